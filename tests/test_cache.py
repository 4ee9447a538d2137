"""Entries of the cache: whole or not there, whoever writes, crashes or damages them."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kdcli import cache
from kdcli.errors import ResourceError

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one byte less": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\n",
    "one bit": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    "zeros": lambda content: bytes(len(content)),
    "other": lambda content: b"{}",
}


@pytest.fixture
def array() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_array_is_not_read(damage: str, mapped: bool, array: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "kind" / "a.npy"
    assert cache.load_array(path) is None
    cache.save_array(path, array)
    found = cache.load_array(path, shape=(7, 3), mapped=mapped)
    assert found is not None
    assert found.tobytes() == array.tobytes()
    assert [p.name for p in path.parent.iterdir()] == ["a.npy"]
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert cache.load_array(path, mapped=mapped) is None
    assert not path.exists()


def test_an_array_of_another_shape_is_not_read(array: np.ndarray, tmp_path: Path) -> None:
    cache.save_array(tmp_path / "a", array)
    assert cache.load_array(tmp_path / "a", shape=(3, 7)) is None


def test_a_plain_array_without_a_digest_is_not_read(array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    assert cache.load_array(tmp_path / "a.npy") is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_json_is_not_read(damage: str, tmp_path: Path) -> None:
    path, content = tmp_path / "kind" / "a.json", {"ms": [1.5, 2.25] * 20}
    assert cache.load_json(path) is None
    cache.save_json(path, content)
    assert cache.load_json(path) == content
    changed = DAMAGES[damage](path.read_bytes())
    path.write_bytes(changed)
    # White space at the end of JSON means nothing.
    assert cache.load_json(path) == (content if damage == "one byte more" else None)


def _directory(place: Path) -> Path:
    with cache.writing(place) as work:
        (work / "inner").mkdir()
        (work / "weights").write_bytes(bytes(range(256)))
        (work / "inner" / "fit.json").write_text(json.dumps({"a": 1}))
    return place


@pytest.mark.parametrize("damage", [*DAMAGES, "gone", "one more", "no digests"])
def test_a_damaged_directory_is_made_again(damage: str, tmp_path: Path) -> None:
    place = _directory(tmp_path / "kind" / "x")
    assert cache.intact(place)
    if damage == "gone":
        (place / "inner" / "fit.json").unlink()
    elif damage == "one more":
        (place / "model.onnx").touch()
    elif damage == "no digests":
        (place / cache.SUMS).unlink()
    else:
        (place / "weights").write_bytes(DAMAGES[damage]((place / "weights").read_bytes()))
    assert not cache.intact(place)
    assert not place.exists()
    assert cache.intact(_directory(place))


def test_two_writers_at_once(array: np.ndarray, tmp_path: Path) -> None:
    place = tmp_path / "x"
    with cache.writing(place) as one, cache.writing(place) as two:
        for work in (one, two):
            (work / "weights").write_bytes(b"the same")
    assert cache.intact(place)
    with cache.filling(tmp_path / "a", array.dtype, array.shape) as first:
        first[...] = array
        cache.save_array(tmp_path / "a", array)
    assert cache.load_array(tmp_path / "a") is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "x"]


def test_a_directory_that_was_damaged_in_the_meantime_is_replaced(tmp_path: Path) -> None:
    place = tmp_path / "x"
    with cache.writing(place) as work:
        (work / "weights").write_bytes(b"good")
        place.mkdir()
        (place / "weights").write_bytes(b"bad")
    assert (place / "weights").read_bytes() == b"good"
    assert cache.intact(place)


def test_what_ends_badly_leaves_nothing(tmp_path: Path) -> None:
    for block in (
        cache.writing(tmp_path / "x"),
        cache.filling(tmp_path / "z", "f4", (2,)),
    ):
        with pytest.raises(RuntimeError, match="stop"), block:
            raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_before_the_first_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as raised:
        cache.save_array(tmp_path / "a", np.zeros((100, 100)))
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KDCLI_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with cache.writable() as reason:
        assert "(from HOME) cannot be written" in str(reason)
        assert cache.problem() is None
        cache.save_json(cache.entry("kind", "x"), 1)
    assert "KDCLI_CACHE" not in os.environ
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(ResourceError, match="from HOME") as raised, cache.writable():
        pass
    assert "TMPDIR" in str(raised.value.hint)
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "file" / "x"))  # asked for by name: no other will do
    with pytest.raises(ResourceError, match="from KDCLI_CACHE"), cache.writable():
        pass


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(cls: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("KDCLI_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(nobody))
    assert cache.root() == Path("/nonexistent/.cache/kdcli")
    assert cache.variable() == "HOME"
