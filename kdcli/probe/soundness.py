"""Does a model of an architecture that kdcli does not know answer, and the same in a batch as alone?"""

from __future__ import annotations

import numpy as np

from kdcli import families
from kdcli.errors import InputError, KdcliError, first_line
from kdcli.export.parity import RELATIVE_TOLERANCE
from kdcli.inputs import batching
from kdcli.inputs.feeding import torch_runner
from kdcli.inputs.text import Encoded
from kdcli.models.checkpoint import Checkpoint
from kdcli.report.schema import Warning_

_ROWS = 4
# Ten times what float32 kernels differ by between batch shapes; an attention that reads padding is off by far more.
_TOLERANCE = 10 * RELATIVE_TOLERANCE


def known(checkpoint: Checkpoint) -> bool:
    """Whether it is of an architecture whose answers do not depend on padding, which tests hold."""
    return families.find(checkpoint.model_type) is not None


def probe(checkpoint: Checkpoint, encoded: Encoded) -> list[Warning_]:
    """Ask for a few real rows, alone and in one padded batch.

    Args:
        checkpoint: Any; nothing is done for architectures that kdcli knows.
        encoded: Its rows.

    Returns:
        A warning where padding changes the answers: a service that answers in batches then gives others than those
        measured, which are of texts alone.

    Raises:
        InputError: The model fails on a text, or on several at once.
    """
    if known(checkpoint):
        return []
    run = torch_runner(checkpoint)
    order = np.argsort(encoded.lengths, kind="stable")
    rows = order[np.unique(np.linspace(0, len(order) - 1, _ROWS).astype(int))]
    kind = checkpoint.model_type
    try:
        alone = np.concatenate(
            [run(batching.collate(encoded, rows[i : i + 1], checkpoint.pad_id)) for i in range(len(rows))]
        )
    except KdcliError:
        raise
    except Exception as error:  # what a model raises has no common base
        raise InputError(
            f"the model (model_type {kind!r}) cannot answer a text of the data: {first_line(error)}",
            "see whether plain transformers can; settings of config.json may not fit its tokenizer",
        ) from error
    try:
        together = run(batching.collate(encoded, rows, checkpoint.pad_id))
    except KdcliError:
        raise
    except Exception as error:
        raise InputError(
            f"the model (model_type {kind!r}) cannot answer several texts at once: {first_line(error)}",
            "give it a padding token: pad_token in tokenizer_config.json, pad_token_id in config.json",
        ) from error
    difference = float(np.abs(alone - together).max())
    if difference <= _TOLERANCE * max(1.0, float(np.abs(alone).max())):
        return []
    message = (
        f"padding changes the answers of this model by up to {difference:.2g}: its numbers hold for texts alone, "
        "or in batches of one length"
    )
    return [Warning_(code="padding-matters", message=message)]
