"""Nothing a test does reaches the user's caches or the network."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import kdcli  # noqa: F401 - first: it switches off telemetry, which onnxruntime decides on when it is loaded

# One thread: the models here are too small to share, and waiting threads would slow the whole suite.
os.environ.setdefault("OMP_NUM_THREADS", "1")


import pytest

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


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("KDCLI_CACHE", str(base / "kdcli"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Separable sentences: 96 train, 32 validation, 40 test."""
    from tests import tiny

    return tiny.write_data(tmp_path_factory.mktemp("data"))
