"""What pruning says of itself before anything is loaded."""

from __future__ import annotations

from kdcli import registry
from kdcli.foresight import STATISTICS_ROWS, Foreseen, Sizes
from kdcli.request import Request
from kdcli.stages.prune import combined
from kdcli.stages.prune import plan as plans
from kdcli.stages.prune.options import PruneOptions


def foreseen(request: Request, sizes: Sizes) -> Foreseen:
    """One cut and its recovery, or as many as a search tries.

    Raises:
        UsageError: A bad option, or a criterion that cannot work with the task's answers.
    """
    options = request.options_as(PruneOptions)
    if combined.is_combined(request):
        parts = combined.check(request)
        registry.need_answers({part.name: part.criterion for part in parts.parts}, sizes.task)
        chosen, max_drop = "+".join(part.name for part in parts.parts), parts.max_drop
    else:
        pruned = plans.check(request)
        registry.need_answers({pruned.name: pruned.criterion}, sizes.task)
        chosen, max_drop = pruned.name, pruned.max_drop
    facts = {"structure": options.structure, "method": chosen}
    once = sizes.learning(STATISTICS_ROWS * 8) + sizes.learning(options.epochs * sizes.rows["train"])
    if max_drop is None:
        return Foreseen(facts, once)
    facts["search"] = f"{plans.TRIES} tries for the smallest model that keeps --max-drop {max_drop:g}"
    return Foreseen(facts, plans.TRIES * once)
