"""Resume points: everything that decides the rest of a training, in safetensors and JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdcli import atomic
from kdcli.errors import InputError, UsageError

_STATE, _TENSORS = "state.json", "state.safetensors"


class ResumePoint:
    """One directory that holds the latest state of one training.

    Args:
        directory: Where; made on the first save.
        identity: What must be equal for a resumed run to be the same run (options, data, weights).
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self.directory = directory
        self.identity = json.loads(json.dumps(dict(identity), default=str))

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Replace the stored state; a crash in between leaves the previous one."""
        temporary = self.directory.with_name(self.directory.name + ".new")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / _TENSORS)
        content = {"identity": self.identity, "state": dict(state)}
        (temporary / _STATE).write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
        atomic.replace_directory(temporary, self.directory, self._old)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return tensors and state, or None when there is nothing to resume.

        Raises:
            UsageError: The stored run had other options, data or weights; says which.
            InputError: The stored state is broken.
        """
        place = self.directory if self.directory.exists() else self._old
        if not (place / _STATE).exists():
            return None
        try:
            content = json.loads((place / _STATE).read_text(encoding="utf-8"))
            stored, state = content["identity"], content["state"]
            tensors = load_file(place / _TENSORS)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(
                f"the resume point {self.directory} is broken: {error}", "delete it, or run without --resume"
            ) from error
        changed = sorted(
            k for k in stored.keys() | self.identity.keys() if stored.get(k) != self.identity.get(k)
        )
        if changed:
            shown = "; ".join(
                f"{k}: {stored.get(k)!r} then, {self.identity.get(k)!r} now" for k in changed[:3]
            )
            raise UsageError(
                f"cannot resume: this run differs from the interrupted one in {', '.join(changed)} ({shown})",
                "give the same options and data, or run without --resume to start again",
            )
        return tensors, state

    def clear(self) -> None:
        """Forget the stored state."""
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self._old, ignore_errors=True)

    @property
    def _old(self) -> Path:
        return self.directory.with_name(self.directory.name + ".old")


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flatten the per-parameter state of an optimizer: ``optimizer.<parameter>.<name>``."""
    packed = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            packed[f"optimizer.{index}.{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return packed


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo :func:`pack_optimizer` on a fresh optimizer over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    content = optimizer.state_dict()
    content["state"] = state
    optimizer.load_state_dict(content)
