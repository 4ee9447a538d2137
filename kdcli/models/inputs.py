"""What a model takes: how long a text may be, and what fills up the shorter ones of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.errors import InputError
from kdcli.families import positions
from kdcli.input_names import IDS, MASK
from kdcli.models.safety import show

# More positions than anybody classifies; a tokenizer without a limit says 1e30.
_LONGEST = 8192

# Of a logit in float32; what padding changes where it changes anything is a thousand times as much.
NOISE = 1e-4


class LeftPadding(int):
    """The id of a padding that goes to the left of a text."""

    left = True


def longest(model: nn.Module, tokenizer: Any) -> int:
    """Longest input in tokens, special tokens included, at most 8192.

    See :func:`kdcli.families.positions.tables` for where the first position stands.
    """
    config: Any = model.config
    limits = [_LONGEST]
    for given in (positions.limit(config), tokenizer.model_max_length):
        # XLNet, which has no limit, says -1.
        if isinstance(given, int | float) and given >= 1:
            limits.append(int(min(given, _LONGEST)))
    limits += [rows - before for rows, before in positions.tables(model)]
    return min(limits)


def padding(model: nn.Module, tokenizer: Any, *, left: bool) -> int:
    """Id of the padding: the model's own, because some find positions or the last token by it.

    The tokenizer's stands in where the configuration has none, and id 0 where neither has one: what is padded is
    masked.
    """
    config: Any = model.config
    known: list[int | None] = [before - 1 for _, before in positions.tables(model) if before]
    known += [getattr(config, "pad_token_id", None), tokenizer.pad_token_id]
    found = next((x for x in known if isinstance(x, int) and x >= 0), 0)
    return LeftPadding(found) if left else found


def check_padding(model: nn.Module, path: Path) -> None:
    """Check that a model which finds positions by the padding has one.

    Raises:
        InputError: It has none.
    """
    config: Any = model.config
    if positions.lack_padding(model):
        raise InputError(
            f"pad_token_id in {show(path / 'config.json')} is null, but a model of type '{config.model_type}' "
            "counts positions from it",
            "write the id that the model was trained with (1 in the published ones)",
        )


def must_pad_left(model: nn.Module, tokenizer: Any) -> bool:
    """Whether the tokenizer pads on the left and the model answers right only so, as XLNet, which reads the last token.

    The answers for one text are compared, alone and padded on either side; models with absolute positions want their
    padding on the right whatever the tokenizer's side is.
    """
    if tokenizer.padding_side != "left":
        return False
    right = padding_difference(model, tokenizer, left=False)
    return right > NOISE and right > 10 * padding_difference(model, tokenizer, left=True)


@torch.no_grad()
def padding_difference(model: nn.Module, tokenizer: Any, *, left: bool) -> float:
    """How much a logit changes at most when a text of a few tokens is padded with three more."""
    size = int(getattr(model.config, "vocab_size", 0) or 0)
    ids = [i for i in tokenizer("a b c")[IDS] if not size or i < size] or [0]
    device = next(model.parameters()).device
    fill, pad = [padding(model, tokenizer, left=left)] * 3, [0] * 3

    def answer(tokens: list[int], mask: list[int]) -> Tensor:
        given = {IDS: tokens, MASK: mask}
        logits: Tensor = model(**{k: torch.tensor([v], device=device) for k, v in given.items()}).logits
        return logits.float()

    alone, ones = answer(ids, [1] * len(ids)), [1] * len(ids)
    padded = answer(fill + ids, pad + ones) if left else answer(ids + fill, ones + pad)
    return float((padded - alone).abs().max())
