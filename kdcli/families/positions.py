"""Tables of positions, in any architecture: how long a text may be, and where the first position stands."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# What they are called in transformers; all other models compute positions or need none.
_NAMES = ("position_embeddings", "embed_positions", "wpe")


def tables(model: nn.Module) -> list[tuple[int, int]]:
    """Of every table of positions its rows, and how many of them no position uses.

    A table with a ``padding_idx`` counts from the row after it (RoBERTa, XLM-RoBERTa, CamemBERT, Longformer, MPNet and
    other relatives), so its first rows hold no token.
    """
    found = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name.rpartition(".")[2] in _NAMES and isinstance(weight, Tensor) and weight.ndim == 2:
            before = getattr(module, "padding_idx", None)
            found.append((weight.shape[0], 0 if before is None else int(before) + 1))
    return found


def limit(config: Any) -> Any:
    """What a configuration says of the longest text; -1 and other nonsense where there is no limit, None of nothing."""
    return getattr(config, "max_position_embeddings", None)


def lack_padding(model: nn.Module) -> bool:
    """Whether some module finds positions by the padding, and there is no padding."""
    return any(
        _NAMES[0] in vars(module)["_modules"]
        and "padding_idx" in vars(module)
        and vars(module)["padding_idx"] is None
        for module in model.modules()
    )
