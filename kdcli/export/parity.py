"""Does the exported graph give the checkpoint's answers, at shapes that real rows have?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kdcli.inputs import kinds
from kdcli.inputs.batching import Arrays
from kdcli.report.schema import Parity

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
) -> Parity:
    """Run both on every batch and compare logits (B, C) and answers.

    Args:
        reference: The checkpoint, reloaded from disk.
        candidate: The exported graph.
        batches: Real rows at several shapes, padded ones among them.
        exact: Float graphs: every logit must agree within the tolerance, and every answer unless its two
            best logits are closer than that. False for integer graphs: at least 95% of the answers agree.

    Returns:
        What was compared and whether it passed; NaN in either never passes.
    """
    worst, scale, equal, rows, ties_only = 0.0, 1.0, 0, 0, True
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
        same = want.argmax(1) == got.argmax(1)
        equal, rows = equal + int(same.sum()), rows + len(same)
        if not same.all():
            best = np.sort(want[~same], axis=1)
            ties_only = ties_only and bool(
                (best[:, -1] - best[:, -2] <= 2 * RELATIVE_TOLERANCE * scale).all()
            )
    tolerance = RELATIVE_TOLERANCE * scale
    agreement = equal / rows if rows else 0.0
    passed = finite and rows > 0
    passed = passed and (worst <= tolerance and ties_only if exact else agreement >= INTEGER_AGREEMENT)
    return Parity(
        max_abs_diff=worst if finite else None,
        top1_agreement=agreement if finite else None,
        shapes=shapes,
        passed=passed,
        tolerance=tolerance if exact else None,
    )
