from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from kdcli import atomic


def test_a_file_takes_its_name_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "new" / "report.json"
    for content in ("one", "two"):
        with atomic.replacing(final) as temporary:
            temporary.write_text(content[:1])
            assert temporary.parent == final.parent
            assert not final.exists() or final.read_text() == "one"
            temporary.write_text(content)
        assert final.read_text() == content
    assert list(final.parent.iterdir()) == [final]


def test_what_ends_badly_leaves_the_old_file_alone(tmp_path: Path) -> None:
    final = tmp_path / "a"
    final.write_text("old")

    def fail() -> None:
        with atomic.replacing(final) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert final.read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_two_writers_at_once_do_not_mix(tmp_path: Path) -> None:
    final = tmp_path / "a"
    with atomic.replacing(final) as one:
        with atomic.replacing(final) as two:
            one.write_text("one")
            two.write_text("two")
        assert final.read_text() == "two"
    assert final.read_text() == "one"
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize(("mode", "umask", "expected"), [(0o666, 0o027, 0o640), (0o600, 0o022, 0o600)])
def test_permissions_are_those_of_the_umask(mode: int, umask: int, expected: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with atomic.replacing(tmp_path / "a", mode) as temporary:
            temporary.write_text("")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == expected


def test_a_crash_between_the_two_renames_leaves_the_old_directory_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, place, aside = (tmp_path / name for name in ("new", "place", "aside"))
    for folder in (new, place, aside):
        folder.mkdir()
        (folder / "says").write_text(folder.name)
    rename = os.replace

    def crash(source: Path, target: Path) -> None:
        if source == new:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        atomic.replace_directory(new, place, aside)
    assert (aside / "says").read_text() == "place"
    monkeypatch.undo()
    atomic.replace_directory(new, place, aside)
    assert (place / "says").read_text() == "new"
    assert not new.exists()
    assert not aside.exists()
