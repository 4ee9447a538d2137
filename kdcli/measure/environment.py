"""The machine and the versions behind a number."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from kdcli import __version__
from kdcli.report.schema import Environment

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "onnx",
    "onnxruntime",
    "numpy",
)
_CPUINFO = Path("/proc/cpuinfo")
# Instruction sets that decide which integer and half-precision kernels a CPU has.
_X86 = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw")
_X86_MACHINE_LEARNING = ("avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_ARM = ("neon", "asimd", "asimddp", "i8mm", "sve")
_FLAGS = _X86 + _X86_MACHINE_LEARNING + _ARM


def versions() -> dict[str, str]:
    """kdcli and what it computes with, by distribution metadata (nothing is imported)."""
    found = {"kdcli": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def _cpuinfo() -> dict[str, str]:
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
    found: dict[str, str] = {}
    for key, _, value in pairs:
        found.setdefault(key.strip(), value.strip())
    return found


def cpu_name() -> str:
    """The processor, as it names itself."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def isa() -> list[str]:
    """The instruction sets that matter here and that this CPU has."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    if not flags and (platform.system(), platform.machine()) == ("Darwin", "arm64"):
        # macOS has no such file; every ARM processor of a Mac has these.
        flags = {"asimd", "asimddp"}
    return [flag for flag in _FLAGS if flag in flags]


def has_vnni() -> bool:
    """Whether 8-bit products are summed in 32 bits in one instruction, which cannot saturate."""
    return bool({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"} & set(isa()))


def threads() -> int:
    """Cores this process may use, which is how many threads every measurement uses."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdecimal() and int(limit) > 0:
        return int(limit)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ram_bytes() -> int | None:
    """Installed memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def environment(device: str, seed: int) -> Environment:
    """Describe this machine; no names of users, hosts or paths."""
    gpu = None
    if device.startswith("cuda"):
        import torch

        gpu = torch.cuda.get_device_name(device)
    return Environment(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        cpu=cpu_name(),
        isa=isa(),
        cores=os.cpu_count() or 1,
        threads=threads(),
        ram_bytes=ram_bytes(),
        device=device,
        gpu=gpu,
        versions=versions(),
        seed=seed,
        deterministic=not device.startswith(("cuda", "mps")),
    )
