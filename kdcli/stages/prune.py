"""Prune: take parts out of the encoder, or set single weights of it to zero."""

from __future__ import annotations

from kdcli.stages.context import Applied, Context
from kdcli.stages.pruning import plan as plans
from kdcli.stages.pruning import units, weights


def prepare(context: Context) -> None:
    """Refuse bad options and unknown architectures before anything is measured."""
    plans.check(context.request)
    assert context.checkpoint.family  # raises for an architecture that kdcli cannot operate on


def apply(context: Context) -> Applied:
    """Prune the model of ``context`` in place, then train it back for ``--epochs``.

    ``--sparsity F`` removes the share F of what the structure can remove: of the multiply-accumulates of
    the encoder's heads, of its neurons, or of both together, for a row of the training data's mean length;
    of the number of weights in the encoder's matrices for the structure ``weights``. ``--budget F`` keeps
    the share F of all multiply-accumulates of the encoder. Both refer to the model as it comes in.

    Raises:
        UsageError: A bad option, or a budget that the structure cannot meet.
        InputError: kdcli cannot operate on this architecture, or there is nothing left to prune.
    """
    plan = plans.check(context.request)
    kind = weights if plan.options.structure in plans.ZEROS else units
    return kind.apply(context, plan)
