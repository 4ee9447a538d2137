"""Does the exported graph give the checkpoint's answers, at shapes that real rows have?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kdcli.inputs import kinds
from kdcli.inputs.batching import Arrays
from kdcli.report.schema import Parity
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.task import Task

# Fused float32 kernels sum in another order than torch. Measured over the five families and three
# datasets the largest difference was below 1e-5 of the largest logit; ten times that is still far
# from anything that a wrong graph produces.
RELATIVE_TOLERANCE = 1e-4
# Dynamic int8 rounds every activation, so its logits cannot be compared closely; its answers can.
INTEGER_AGREEMENT = 0.95


def compare(
    reference: Callable[[Arrays], np.ndarray],
    candidate: Callable[[Arrays], np.ndarray],
    batches: Sequence[Arrays],
    *,
    exact: bool = True,
    task: Task = CLASSIFICATION,
) -> Parity:
    """Run both on every batch and compare logits (B, C) and answers.

    Args:
        reference: The checkpoint, reloaded from disk.
        candidate: The exported graph.
        batches: Real rows at several shapes, padded ones among them.
        exact: Float graphs: every logit must agree within the tolerance; then an answer can differ only where it
            was a tie. False for integer graphs: at least 95% of the answers agree.
        task: What an answer is.

    Returns:
        What was compared and whether it passed; NaN in either never passes.
    """
    worst, scale = 0.0, 1.0
    wanted: list[np.ndarray] = []
    given: list[np.ndarray] = []
    shapes: list[tuple[int, int]] = []
    finite = True
    for batch in batches:
        want, got = reference(batch), candidate(batch)
        finite = (
            finite
            and want.shape == got.shape
            and bool(np.isfinite(got).all())
            and bool(np.isfinite(want).all())
        )
        if not finite:
            break
        shape = kinds.shape(batch)
        if shape not in shapes:
            shapes.append(shape)
        worst = max(worst, float(np.abs(want - got).max()))
        scale = max(scale, float(np.abs(want).max()))
        wanted.append(want)
        given.append(got)
    tolerance = RELATIVE_TOLERANCE * scale
    agreement = task.same(np.concatenate(wanted), np.concatenate(given)) if wanted else 0.0
    passed = finite and bool(wanted)
    passed = passed and (worst <= tolerance if exact else agreement >= INTEGER_AGREEMENT)
    return Parity(
        max_abs_diff=worst if finite else None,
        top1_agreement=agreement if finite else None,
        shapes=shapes,
        passed=passed,
        tolerance=tolerance if exact else None,
    )
