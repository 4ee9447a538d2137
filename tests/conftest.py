"""Nothing a test does reaches the user's caches or the network."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import kdcli  # noqa: F401 - first: it switches off telemetry, which onnxruntime decides on when it is loaded

# One thread: the models here are too small to share, and waiting threads would slow the whole suite.
os.environ.setdefault("OMP_NUM_THREADS", "1")


import pytest

# What is imported and collected stays until the end: see pytest_runtestloop.
gc.disable()

# A process that a test starts finds kdcli compiled, as after an installation.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell starts what runs in the background with SIGINT ignored, and kdcli leaves an ignored signal ignored: the
# tests that send one need it whatever started them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


# A file of tests runs in one process. Those that take longest begin first, so that no process works alone at the end.
SLOW = (
    "tests/test_pipeline.py",
    "tests/run/test_processes.py",
    "tests/run/test_evaluation.py",
    "tests/stages/distill/test_strategies.py",
    "tests/export/test_own_graph.py",
    "tests/test_interrupts.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow files first; the order inside a file stays."""
    order = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(SLOW)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Keep the garbage collector away from what all tests share.

    Libraries and collected tests are some million objects that stay. While they come in, looking through them again
    and again finds nothing, and afterwards each of the collections that kdcli asks for would take half a second.
    """
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Directories that are not there yet, one for each test. (``mktemp`` would list all of them to find a name.)"""
    base = tmp_path_factory.mktemp("caches")
    return (base / str(n) for n in itertools.count())


@pytest.fixture(autouse=True)
def own_caches(caches: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCLI_CACHE", str(next(caches) / "kdcli"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def few_timed_runs() -> Iterator[None]:
    """Nothing is told by how quick tiny models are: a stage times each 9 times instead of 450.

    tests/measure/test_latency.py is about how it times.
    """
    measurement = sys.modules.get("kdcli.measure.measurement")
    with pytest.MonkeyPatch.context() as patch:
        if measurement is not None:  # else no test that was collected runs a stage
            for name, value in {"warmup": 1, "min_runs": 3, "max_runs": 3}.items():
                patch.setitem(measurement._ROUND, name, value)
        yield


@pytest.fixture(scope="session")
def exported_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture
def shared_exports(own_caches: None, exported_inputs: Path) -> None:
    """The test's cache has the ONNX forms of *inputs* in common with other tests, which use the same tiny models.

    For tests about what comes out of a stage: every output is still exported anew.
    """
    cache = Path(os.environ["KDCLI_CACHE"])
    cache.mkdir(parents=True)
    (cache / "onnx").symlink_to(exported_inputs)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Separable sentences: 96 train, 32 validation, 40 test."""
    from tests import tiny

    return tiny.write_data(tmp_path_factory.mktemp("data"))
