"""Tokens: dropped from the tokenizer and from the model's table in one go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcli.context import Context
from kdcli.data import sources
from kdcli.inputs import text
from kdcli.inputs.picked import pick
from kdcli.inputs.splits import Splits
from kdcli.inputs.text import Encoded
from kdcli.models import tokens
from kdcli.models.transforms import Vocab
from kdcli.report.schema import Warning_
from kdcli.stages.prune.criterion import TokenJob

if TYPE_CHECKING:
    from kdcli.stages.prune.combined import State, StructurePart


def drop(context: Context, part: StructurePart, state: State) -> None:
    """Cut the vocabulary; the data is tokenised again from here on.

    The checkpoint of ``context`` becomes a new one with the same model and the new tokenizer, so that whoever
    holds the old one can still read texts as before.
    """
    before = context.checkpoint
    vocabulary = tokens.Vocabulary(before.tokenizer)
    size = len(vocabulary.tokens)
    job = TokenJob(_counts(context, part, size), vocabulary.protected(before.config))
    kept = np.flatnonzero(vocabulary.closed(part.criterion.keep(job, part.config)))
    picked = pick(context.dataset, None, context.request.common.limit)
    split, rows = picked.split, picked.of(context.encoded)
    unknown = _unknown_share(rows, vocabulary)
    detail: dict[str, Any] = {
        "tokens_before": size,
        "tokens_after": len(kept),
        "table_values_before": _values(before),
    }
    if len(kept) < size:
        after = replace(before, tokenizer=tokens.cut_tokenizer(before.tokenizer, kept.tolist()))
        tokens.keep_tokens(after.model, kept.tolist())
        after.log.transforms.append(Vocab(before=size, after=len(kept)))
        context.checkpoint = after
        context.encoded = Splits(context.dataset, after)
        new_rows = picked.of(context.encoded)
        changed = _differ(rows, replace(new_rows, ids=kept[new_rows.ids].astype(rows.ids.dtype)))
        unknown_now = _unknown_share(new_rows, tokens.Vocabulary(after.tokenizer))
    else:
        changed, unknown_now = 0, unknown
    state.detail["vocab"] = detail | {
        "table_values_after": _values(context.checkpoint),
        "split": split,
        "rows": len(rows),
        "rows_tokenised_differently": changed,
        "unknown_share_before": unknown,
        "unknown_share_after": unknown_now,
    }
    context.progress.note(
        f"vocab: {len(kept)} of {size} tokens stay; {changed} of {len(rows)} rows of {split} are split differently, "
        f"{unknown_now:.2%} of their tokens are unknown ({unknown:.2%} before)"
    )
    if unknown_now > unknown:
        text_ = f"{unknown_now:.2%} of the tokens of {split} are unknown where {unknown:.2%} were"
        state.warnings.append(
            Warning_(code="unknown-tokens", message=f"{text_}; give more texts by --set vocab_text=FILE")
        )


def _counts(context: Context, part: StructurePart, size: int) -> np.ndarray:
    """How often each token occurs in the training and validation rows and in the extra texts, (V,)."""
    checkpoint = context.checkpoint
    texts = [context.encoded[name] for name in ("train", "validation") if name in context.encoded]
    if (file := part.config.vocab_text) is not None:
        rows = sources.load_texts(Path(file), context.request.common.columns, context.dataset.kind)
        texts.append(text.encode(rows, checkpoint.tokenizer, checkpoint.max_length, None))
    return sum((np.bincount(x.ids, minlength=size) for x in texts), np.zeros(size, dtype=np.int64))


def _values(checkpoint: Any) -> int:
    return sum(table.weight.numel() for table in tokens.token_tables(checkpoint.model))


def _unknown_share(rows: Encoded, vocabulary: tokens.Vocabulary) -> float:
    """Unknown tokens among all that are not special; the unknown token is not counted as special."""
    if vocabulary.unknown is None:
        return 0.0
    unknown = rows.ids == vocabulary.unknown
    ordinary = ~vocabulary.special[rows.ids] | unknown
    return float(unknown.sum() / max(1, ordinary.sum()))


def _differ(one: Encoded, two: Encoded) -> int:
    """Rows whose tokens are not the same."""
    same_length = np.flatnonzero(one.lengths == two.lengths)
    equal = one.ids[one.positions(same_length)] == two.ids[two.positions(same_length)]
    starts = np.concatenate([[0], np.cumsum(one.lengths[same_length])[:-1]]).astype(np.int64)
    same = int(np.logical_and.reduceat(equal, starts).sum()) if len(same_length) else 0
    return len(one) - same
