"""Models larger than one device: accelerate spreads their layers over all devices, memory and disk."""

from __future__ import annotations

from pathlib import Path

import torch

from kdcli import families
from kdcli.models.checkpoint import Checkpoint

_ROOM = 1.3  # of its weights, that a model needs to run: activations come on top


def weight_bytes(path: Path) -> int:
    """Bytes of a checkpoint's weights in float32, told from its files."""
    from kdcli.models import safety

    total = 0
    for file in sorted(path.glob("*.safetensors")):
        for entry in safety.read_header(file).values():
            count = 4
            for size in entry["shape"]:
                count *= size
            total += count
    return total


def fits(path: Path, device: torch.device) -> bool:
    """Whether a model can be loaded whole on a CUDA device; on any other it is left to the system."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return _ROOM * weight_bytes(path) < free


def spread(checkpoint: Checkpoint, device: torch.device, offload: Path, limit: int | None = None) -> None:
    """Spread a model that is on the CPU over every CUDA device, then memory, then disk, in place.

    The layers of an encoder stay whole. Inputs are expected on ``device``, where the logits come back to.

    Args:
        checkpoint: In eval mode; it can only be run afterwards, not trained, exported or saved.
        device: The device of the student.
        offload: Directory for what fits no memory.
        limit: Bytes that the model may take of each device and of memory; by default what is free.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_max_memory

    memory = get_max_memory()
    if limit is not None:
        memory = {name: min(size, limit) for name, size in memory.items()}
    model = checkpoint.model
    whole: list[str] = []
    if families.is_encoder(checkpoint.model_type):
        layers = model.get_submodule(checkpoint.family.layers)
        whole = sorted({type(layer).__name__ for layer in layers.children()})
    places = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    offload.mkdir(parents=True, exist_ok=True)
    checkpoint.model = dispatch_model(
        model, places, main_device=device, offload_dir=str(offload), force_hooks=True
    )
    checkpoint.placed = device
    checkpoint.notes.append(f"spread over {', '.join(sorted({str(place) for place in places.values()}))}")
