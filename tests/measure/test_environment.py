"""What is said about the machine, from made-up processors."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

from kdcli import __version__
from kdcli.measure import environment

X86 = """processor\t: 0
model name\t: Some CPU @ 2.00GHz
flags\t\t: fpu sse4_2 avx avx2 fma {extra}

processor\t: 1
model name\t: Some CPU @ 2.00GHz
flags\t\t: fpu
"""
ARM = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd aes {extra}
CPU part\t: 0xd0c
"""


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    environment._cpuinfo.cache_clear()
    yield
    environment._cpuinfo.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, directory: Path, text: str) -> None:
    path = directory / "cpuinfo"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(environment, "_CPUINFO", path)


@pytest.mark.parametrize(
    ("text", "extra", "isa", "vnni"),
    [
        (X86, "", ["sse4_2", "avx", "avx2", "fma"], False),
        (X86, "avx512f", ["sse4_2", "avx", "avx2", "fma", "avx512f"], False),
        (X86, "avx512_vnni", ["sse4_2", "avx", "avx2", "fma", "avx512_vnni"], True),
        (X86, "avx_vnni", ["sse4_2", "avx", "avx2", "fma", "avx_vnni"], True),
        (X86, "amx_int8", ["sse4_2", "avx", "avx2", "fma", "amx_int8"], True),
        (ARM, "", ["asimd"], False),
        (ARM, "asimddp i8mm", ["asimd", "asimddp", "i8mm"], True),
    ],
)
def test_instruction_sets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, extra: str, isa: list[str], vnni: bool
) -> None:
    pretend(monkeypatch, tmp_path, text.format(extra=extra))
    assert environment.isa() == isa
    assert environment.has_vnni() is vnni


@pytest.mark.parametrize(
    ("system", "machine", "isa"),
    [("Darwin", "arm64", ["asimd", "asimddp"]), ("Darwin", "x86_64", []), ("Windows", "AMD64", [])],
)
def test_without_cpuinfo_only_what_is_certain_is_claimed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, machine: str, isa: list[str]
) -> None:
    monkeypatch.setattr(environment, "_CPUINFO", tmp_path / "absent")
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert environment.isa() == isa
    assert environment.cpu_name() == machine


def test_the_first_processor_names_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, tmp_path, X86)
    assert environment.cpu_name() == "Some CPU @ 2.00GHz"


@pytest.mark.parametrize(("given", "want"), [("1", 1), ("7", 7), ("0", None), ("4,2", None), ("", None)])
def test_threads_follow_the_variable_or_the_affinity(
    monkeypatch: pytest.MonkeyPatch, given: str, want: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    assert environment.threads() == (want or 3)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 11)
    assert environment.threads() == (want or 11)


def test_versions_are_the_installed_ones_and_absent_packages_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = environment.versions()
    assert found["kdcli"] == __version__
    assert found["torch"] == torch.__version__
    assert set(found) == {"kdcli", *environment.PACKAGES}

    def absent(name: str) -> str:
        if name == "accelerate":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", absent)
    assert "accelerate" not in environment.versions()


def test_memory_is_asked_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(os, "sysconf", answers.__getitem__, raising=False)
    assert environment.ram_bytes() == 4_096_000
    monkeypatch.delattr(os, "sysconf")
    assert environment.ram_bytes() is None


def test_the_report_holds_the_machine_and_nobodys_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch, tmp_path, X86)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(platform, "node", lambda: "secret-host")
    monkeypatch.setenv("HOME", "/home/secret-user")
    monkeypatch.setenv("USER", "secret-user")
    found = environment.environment("cpu", 7)
    assert (found.device, found.gpu, found.seed, found.threads, found.deterministic) == (
        "cpu",
        None,
        7,
        2,
        True,
    )
    assert found.python == platform.python_version()
    assert found.isa == ["sse4_2", "avx", "avx2", "fma"]
    text = found.model_dump_json()
    assert "secret" not in text
    assert "/" not in text


def test_a_gpu_is_named_and_not_called_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", {"cuda:1": "Some GPU"}.__getitem__)
    found = environment.environment("cuda:1", 0)
    assert (found.gpu, found.device, found.deterministic) == ("Some GPU", "cuda:1", False)


def test_describing_a_cpu_imports_no_torch() -> None:
    code = (
        "import sys; from kdcli.measure.environment import environment; environment('cpu', 0);"
        "sys.exit(bool({'torch', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
