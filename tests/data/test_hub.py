from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from kdcli.data import hub
from kdcli.data.sources import Rows, load
from kdcli.errors import InputError, UnavailableError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FEATURES = datasets.Features(
    {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
)


def split(count: int, tag: str, label: int | None = None) -> datasets.Dataset:
    rows = {
        "text": [f"{tag}{i}" for i in range(count)],
        "label": [i % 2 if label is None else label for i in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=FEATURES)


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fails at every connection and look-up, and remembers them: a library may swallow the error."""
    touched: list[str] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        touched.append(repr(args))
        raise AssertionError("a socket was touched")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return touched


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple[str, str | None]]]:
    """Stand in for a hub that answers; returns the calls made."""

    def install(answer: Any) -> list[tuple[str, str | None]]:
        calls: list[tuple[str, str | None]] = []

        def fake(repo: str, revision: str | None = None) -> Any:
            calls.append((repo, revision))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(hub, "_reachable", lambda: True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets, "load_dataset", fake)
        return calls

    return install


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of ``datasets`` that holds org/tiny at COMMIT, laid out as the library does it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    place = tmp_path / "org___tiny" / "default" / "0.0.0" / COMMIT
    place.mkdir(parents=True)
    info = datasets.DatasetInfo(
        features=FEATURES,
        builder_name="csv",
        dataset_name="tiny",
        config_name="default",
        version="0.0.0",
        splits=datasets.SplitDict(
            {
                name: datasets.SplitInfo(name=name, num_examples=count, dataset_name="tiny")
                for name, count in (("train", 8), ("validation", 4))
            }
        ),
    )
    info.write_to_directory(str(place))
    for name, count in (("train", 8), ("validation", 4)):
        with datasets.arrow_writer.ArrowWriter(
            path=str(place / f"tiny-{name}.arrow"), features=FEATURES
        ) as writer:
            for row in split(count, name):
                writer.write({"text": row["text"], "label": row["label"]})
            writer.finalize()
    assert json.loads((place / "dataset_info.json").read_text())["config_name"] == "default"
    return tmp_path


def test_offline_and_not_cached_fails_at_once(
    tmp_path: Path, no_sockets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    start = time.monotonic()
    with pytest.raises(
        UnavailableError, match="org/none@v1' is not in the local cache, and --offline"
    ) as caught:
        load("org/none@v1", offline=True)
    assert time.monotonic() - start < 1
    assert no_sockets == []
    assert caught.value.hint is not None
    assert "train.csv" in caught.value.hint


def test_offline_takes_the_cache(
    cache: Path, no_sockets: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    data = load(f"org/tiny@{COMMIT}", offline=True)
    assert data.splits["validation"] == Rows([f"validation{i}" for i in range(4)], None, ["bad", "good"] * 2)
    assert len(data.splits["train"]) == 8
    assert data.notes == []
    assert no_sockets == []
    assert capfd.readouterr() == ("", "")


def test_offline_without_a_revision_says_which_one_it_is(cache: Path) -> None:
    assert load("org/tiny", offline=True).notes == [f"data set 'org/tiny' has no @revision; this is {COMMIT}"]


@pytest.mark.parametrize("revision", ["f" * 40, "v1"])
def test_offline_does_not_take_another_revision(cache: Path, revision: str) -> None:
    with pytest.raises(UnavailableError, match=f"only revision {COMMIT}"):
        load(f"org/tiny@{revision}", offline=True)


def test_offline_leaves_the_library_as_it_was(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    load("org/tiny", offline=True)
    assert datasets.config.HF_HUB_OFFLINE is False
    assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == (level, bars)


def test_a_hub_that_does_not_answer(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host name look-up hangs: the answer still comes in time, and the cache is used."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.1)
    released = threading.Event()

    def hang(*args: Any, **kwargs: Any) -> Any:
        released.wait(5)
        raise OSError("too late")

    monkeypatch.setattr(socket, "create_connection", hang)
    start = time.monotonic()
    with pytest.raises(UnavailableError, match="the hub can't be reached"):
        load("org/none")
    assert time.monotonic() - start < 1
    assert len(load("org/tiny").splits["train"]) == 8
    released.set()


def test_the_probe_goes_to_the_endpoint_or_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    asked: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        asked.append(address)
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example:8443")
    assert hub._reachable()
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert hub._reachable()
    monkeypatch.setenv("no_proxy", "hub.example")
    assert hub._reachable()
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example:port")
    assert not hub._reachable()
    assert asked == [("hub.example", 8443), ("proxy.example", 3128), ("hub.example", 8443)]


def test_splits_and_class_names(online: Any) -> None:
    calls = online(
        datasets.DatasetDict(
            train=split(30, "t"), dev=split(4, "v"), test=split(4, "x", label=-1), extra=split(2, "e")
        )
    )
    data = load("org/name@v1")
    assert calls == [("org/name", "v1")]
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 30, "validation": 4}
    assert data.splits["train"].labels == ["bad", "good"] * 15
    assert data.notes == [
        "data set 'org/name': splits left out: extra",
        "the test split has no labels (-1) and is left out",
    ]
    assert [code for code, _ in data.warnings] == ["rows-without-label"]


def test_no_validation_split(online: Any) -> None:
    online(datasets.DatasetDict(train=split(40, "t")))
    data = load("org/name")
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 36, "validation": 4}


def test_columns_and_a_missing_label(online: Any) -> None:
    online(
        datasets.DatasetDict(train=split(30, "t").rename_column("text", "sentence"), validation=split(4, "v"))
    )
    with pytest.raises(InputError, match="'org/name train' has no column 'text'"):
        load("org/name")
    mixed = {"text": [f"t{i}" for i in range(31)], "label": [0, 1, -1] + [0, 1] * 14}
    online(datasets.DatasetDict(train=datasets.Dataset.from_dict(mixed, features=FEATURES)))
    data = load("org/name")
    assert sum(len(rows) for rows in data.splits.values()) == 30
    assert data.label_names == ["bad", "good"]
    assert data.warnings == [("rows-without-label", "1 rows of train have no label (-1) and are left out")]


def test_no_train_split(online: Any) -> None:
    online(datasets.DatasetDict(test=split(4, "x")))
    with pytest.raises(InputError, match="has no train split; it has: test"):
        load("org/name")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'x' doesn't exist"), InputError, "doesn't exist"),
        (ValueError("Config name is missing.\nPick one"), InputError, "Config name is missing"),
        (ConnectionError("reset"), UnavailableError, "can't be fetched: reset"),
        (TimeoutError(), UnavailableError, "can't be fetched: TimeoutError"),
    ],
)
def test_errors_of_the_hub(online: Any, error: Exception, kind: type[Exception], message: str) -> None:
    online(error)
    with pytest.raises(kind, match=message):
        load("org/name@v1")


@pytest.mark.parametrize(
    "ref", ["org/name@-x", "org/na..me", "org/name@a b", "-org/name", "o/" + "n" * 97, "org"]
)
def test_not_a_hub_id(ref: str) -> None:
    assert hub.parse(ref) is None
