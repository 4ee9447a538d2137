"""What a distillation has before its student is taught: the plan, and teachers with a head for the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kdcli.models.checkpoint import Checkpoint
from kdcli.stages.distill.plan import DistillPlan
from kdcli.stages.distill.student import Taught


@dataclass(frozen=True)
class Prepared:
    """A plan and who carries it out."""

    plan: DistillPlan
    teachers: Sequence[Checkpoint]  # at least one; all have a head for the task
    detail: dict[str, Any]  # how the first one got its head, for the report
    came_trained: Sequence[str] = field(default_factory=tuple)  # references of those that had one already
    #: A student that was trained together with its teacher, because that one is measured before the stage begins.
    taught: Taught | None = None
