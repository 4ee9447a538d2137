"""Which device a run works on, and its generators of random numbers."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from kdcli import processes
from kdcli.errors import ResourceError


def device_of(name: str) -> torch.device:
    """Turn ``auto|cpu|cuda[:N]|mps`` into a device; a named one is a demand.

    Raises:
        ResourceError: The device is not there.
    """
    if name in ("auto", "cuda") and processes.count() > 1 and torch.cuda.is_available():
        return torch.device("cuda", processes.local_rank())
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind == "cuda" and not (torch.cuda.is_available() and int(number or 0) < torch.cuda.device_count()):
        have = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ResourceError(
            f"device '{name}' was asked for, but torch sees {have} CUDA devices", "pass --device cpu"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ResourceError("device 'mps' was asked for, but it is not available here", "pass --device cpu")
    if kind == "cuda":
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", name)
    return torch.device(name)


def session_device(device: torch.device) -> str:
    """CUDA models are timed on CUDA where this onnxruntime can; anything else is timed on the CPU."""
    import onnxruntime

    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return str(device)
    return "cpu"


def seed_everything(seed: int) -> None:
    """Seed every generator and ask for deterministic kernels."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
