"""Train only those rows of the token table that the texts use.

A table of 30,522 tokens is nine tenths of a small student, and most of its rows never occur: their gradient is
zero at every step, yet AdamW would read, decay and write all of them. While a model trains, its table holds the
rows of the tokens that occur; the others come back untouched. Apart from weight decay, which would shrink tokens
that were never seen, the result is that of training the whole table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcli.inputs.text import Encoded
from kdcli.models.tokens import token_ids, token_tables

_LARGEST_PAD = 1024  # a padding id above it would keep too many rows in front of it


@contextlib.contextmanager
def compacted(model: nn.Module, texts: Sequence[Encoded], pad_id: int) -> Iterator[list[Encoded]]:
    """Shrink the model's token tables to the tokens of ``texts`` inside the block.

    Args:
        model: Changed in place; its whole tables are back after the block, trained rows included.
        texts: Everything the model will see inside the block.
        pad_id: Of the padding, which keeps its id: some models find positions by it.

    Yields:
        The same texts with the ids of the small table.
    """
    found = token_tables(model)
    if not found or pad_id > _LARGEST_PAD or _shared(model, found):
        yield list(texts)
        return
    size = found[0].num_embeddings
    used = np.zeros(size, dtype=bool)
    used[: pad_id + 1] = True
    for text in texts:
        used[text.ids] = True
    kept = np.flatnonzero(used)
    position = np.zeros(size, dtype=np.int32)
    position[kept] = np.arange(len(kept), dtype=np.int32)
    at = torch.from_numpy(kept).to(found[0].weight.device)
    whole: list[Tensor] = [table.weight.data for table in found]
    for table in found:
        _set(table, table.weight.data[at].clone(), table.weight.requires_grad)
    named = _renumbered(model, used, position)
    try:
        yield [replace(text, ids=position[text.ids]) for text in texts]
    finally:
        for config, ids in named:
            vars(config).update(ids)
        for table, full in zip(found, whole, strict=True):
            full[at] = table.weight.data
            _set(table, full, table.weight.requires_grad)


def _renumbered(model: nn.Module, used: np.ndarray, position: np.ndarray) -> list[tuple[Any, dict[str, int]]]:
    """Give the tokens that a configuration names, and a model may look for, their new ids; returns the old ones.

    A token that does not occur gets -1, which no token has.
    """
    configs = {id(config): config for part in model.modules() if (config := getattr(part, "config", None))}
    found = []
    for config in configs.values():
        ids = token_ids(config)
        found.append((config, ids))
        vars(config).update(
            {
                key: int(position[old]) if 0 <= old < len(used) and used[old] else -1
                for key, old in ids.items()
            }
        )
    return found


def _shared(model: nn.Module, found: list[nn.Embedding]) -> bool:
    """Whether another module holds a table too, such as the encoder of BART: it would see ids that it cannot read."""
    held = {id(table.weight) for table in found}
    others = (module for module in model.modules() if module not in found)
    return any(id(p) in held for module in others for p in module.parameters(recurse=False))


def _set(table: nn.Embedding, weight: Tensor, requires_grad: bool) -> None:
    table.weight = nn.Parameter(weight, requires_grad=requires_grad)
    table.num_embeddings = len(weight)
