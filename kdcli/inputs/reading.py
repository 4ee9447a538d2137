"""What becomes of texts on their way into a model, checked and told: how they are split, cut and understood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kdcli.data.readers import Rows
from kdcli.errors import InputError
from kdcli.inputs import sampling, text
from kdcli.inputs.text import Encoded
from kdcli.models import graph_only, inputs, tokenizers, tokens
from kdcli.models.checkpoint import Checkpoint
from kdcli.report.schema import Warning_

SAMPLE = 256
"""Rows whose splits are compared: enough to meet what differs, and done in a blink."""

MANY_CUT = 0.05  # of the rows
MANY_UNKNOWN = 0.05  # of the tokens, special ones not counted
MANY_LOST = 0.01  # of the rows: nothing but unknown tokens


def check_reading(checkpoint: Checkpoint, rows: Rows, encoded: Encoded, split: str) -> list[Warning_]:
    """Prove on a sample of rows that the checkpoint's tokenizer splits as its tokenizer.json does.

    Args:
        checkpoint: As loaded.
        rows: N texts.
        encoded: What became of them, (N,) rows.
        split: Their name.

    Returns:
        Warnings where files beside ``tokenizer.json`` say something else about these rows.

    Raises:
        InputError: The rows were split in another way.
    """
    found = []
    path, limit = checkpoint.path, checkpoint.max_length
    if not (path / tokenizers.FILE).is_file():
        return []
    backend, stored = tokenizers.opened(path / tokenizers.FILE)
    picked = _sample(len(rows))
    picked = picked[encoded.lengths[picked] < limit]  # how a text is cut is not the file's matter
    if len(picked):
        sample, ours = rows.take(picked), encoded.take(picked)
        if wrong := _unlike(ours, backend, sample):
            raise InputError(
                f"{len(wrong)} of {len(picked)} rows of {split} are not split as {path / tokenizers.FILE} splits them, "
                f"such as {sample.first[wrong[0]][:60]!r}",
                "this tokenizer needs more than its file says; save it again with transformers",
            )
        differing = tokenizers.as_the_settings_say(path, backend)
        if differing and (wrong := _unlike(ours, backend, sample)):
            share = f"{len(wrong)} of {len(picked)} rows of {split}"
            message = (
                f"the files beside tokenizer.json contradict it ({'; '.join(differing[:3])}): transformers 4 would "
                f"split {share} in another way, kdcli follows tokenizer.json"
            )
            found.append(Warning_(code="tokenizer-settings", message=message))
    if stored is not None and stored < limit and (longer := int((encoded.lengths > stored).sum())):
        message = (
            f"tokenizer.json stores a cut at {stored} tokens, which transformers does not heed: kdcli measured at "
            f"{limit}, and {longer} of {len(rows)} rows of {split} are longer; the tokenizers library alone cuts them"
        )
        found.append(Warning_(code="stored-truncation", message=message))
    return found


def check_written(given: Checkpoint, made: Checkpoint, rows: Rows, encoded: Encoded) -> None:
    """Check on a sample of rows that what was written splits them as what came in.

    Args:
        given: What came in.
        made: Loaded from what was written.
        rows: N texts.
        encoded: What ``given`` made of them.

    Raises:
        InputError: It does not.
    """
    picked = _sample(len(rows))
    limit = min(given.max_length, made.max_length)
    picked = picked[encoded.lengths[picked] < limit]
    again = text.encode(rows.take(picked), made.tokenizer, made.max_length, None)
    if _tokens(again) != _tokens(encoded.take(picked)):
        raise InputError(
            f"the tokenizer that was written does not split texts as the one in {given.path}",
            "make its tokenizer.json anew: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )


def _tokens(rows: Encoded) -> str:
    """What a tokenizer made of the rows, without what they are labelled and grouped by."""
    return text.fingerprint(Encoded(rows.ids, rows.type_ids, rows.offsets, None))


def told(checkpoint: Checkpoint, splits: Mapping[str, Encoded]) -> list[Warning_]:
    """Warn of rows that the model does not see whole, or does not understand."""
    found = []
    for split, encoded in splits.items():
        rows = len(encoded)
        if rows and encoded.cut > MANY_CUT * rows:
            message = (
                f"{encoded.cut} of {rows} rows of {split} ({encoded.cut / rows:.1%}) are longer than the limit "
                f"of {checkpoint.max_length} tokens: the model does not see what comes after"
            )
            found.append(Warning_(code="rows-cut", message=message))
        share, lost = unknown(encoded, checkpoint.tokenizer)
        if share > MANY_UNKNOWN or lost > MANY_LOST * rows:
            message = (
                f"{share:.1%} of the tokens of {split} are unknown to the model's vocabulary, and {lost} of {rows} "
                "rows hold nothing else: it cannot tell such texts apart"
            )
            found.append(Warning_(code="unknown-tokens", message=message))
        found += _other_texts(checkpoint, split, encoded)
    tokenizer = checkpoint.tokenizer
    if tokenizer.padding_side == "left" and not checkpoint.pads_left and not graph_only.is_one(checkpoint):
        change = inputs.padding_difference(checkpoint.model, tokenizer, left=True)
        if change > inputs.NOISE:
            message = (
                f"the tokenizer pads on the left, which changes this model's logits by {change:.2g}: kdcli pads on "
                "the right; what is written does so, too"
            )
            found.append(Warning_(code="padding-side", message=message))
    return found


def _other_texts(checkpoint: Checkpoint, split: str, encoded: Encoded) -> list[Warning_]:
    """Warn of single texts for a student that keeps the texts of a pair apart, and of pairs for one that does not."""
    mark = tokens.border(checkpoint.tokenizer)
    if not len(encoded) or mark is None or not hasattr(checkpoint.config, "pair_token_id"):
        return []
    # The token that ends the first text ends the second one, too.
    pairs = np.add.reduceat(encoded.ids == mark, encoded.offsets[:-1], dtype=np.int64) > 1
    if checkpoint.config.pair_token_id is None:
        wrong, said = (
            int(pairs.sum()),
            "two texts, and the model was made for one: it cannot tell how they differ",
        )
    else:
        wrong, said = (
            int((~pairs).sum()),
            "one text, and the model was made for pairs: half of what it reads is empty",
        )
    if not wrong:
        return []
    return [Warning_(code="other-texts", message=f"{wrong} of {len(encoded)} rows of {split} have {said}")]


def unknown(encoded: Encoded, tokenizer: Any) -> tuple[float, int]:
    """The share of unknown tokens among all that are not special, and the rows that hold nothing else."""
    index = tokenizer.unk_token_id
    if index is None or not len(encoded):
        return 0.0, 0
    strange = encoded.ids == index
    special = np.array([i for i in tokenizer.all_special_ids if i != index], dtype=np.int64)
    ordinary = ~np.isin(encoded.ids, special)
    starts = encoded.offsets[:-1]
    of_row = np.add.reduceat(ordinary, starts), np.add.reduceat(strange, starts)
    lost = int(((of_row[0] > 0) & (of_row[0] == of_row[1])).sum())
    return float(strange.sum() / max(1, ordinary.sum())), lost


def _sample(rows: int) -> np.ndarray:
    return sampling.positions(None, rows, SAMPLE, sampling.JUDGING_SEED)


def _unlike(encoded: Encoded, backend: Any, rows: Rows) -> list[int]:
    """Rows that another ``tokenizers.Tokenizer`` splits differently; segments are compared where there are any."""
    texts = rows.first if rows.second is None else list(zip(rows.first, rows.second, strict=True))
    found = []
    for i, made in enumerate(backend.encode_batch(texts)):
        at = slice(int(encoded.offsets[i]), int(encoded.offsets[i + 1]))
        same = encoded.ids[at].tolist() == made.ids
        if same and encoded.type_ids is not None:
            same = encoded.type_ids[at].tolist() == made.type_ids
        if not same:
            found.append(i)
    return found
