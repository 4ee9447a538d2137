"""Several classifiers that train side by side on the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kdcli.inputs.feeding import HandsOn, taken
from kdcli.models.tokens import token_tables
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.task import Task


@dataclass
class Outputs:
    """What all members answer."""

    logits: Tensor  # (B, C), of the members that count: their mean answer
    every: list[Tensor]  # (B, C) of each member


class Together(HandsOn):
    """Calls every member with the same batch.

    Args:
        members: Classifiers of the same labels and vocabulary.
        counted: Which of them decide the validation, and so the epoch that is kept.
        rates: Of each member, relative to the learning rate of the training.
        task: What an answer is.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        counted: Sequence[int],
        rates: Sequence[float],
        task: Task = CLASSIFICATION,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.config: Any = members[0].config
        self.counted = list(counted)
        self.rates = list(rates)
        self.task = task

    def token_tables(self) -> list[nn.Embedding]:
        """Every table that token ids look up."""
        return [table for member in self.members for table in token_tables(member)]

    def rated(self) -> list[tuple[nn.Module, float]]:
        """Members with their relative learning rates."""
        return list(zip(self.members, self.rates, strict=True))

    def forward(self, **given: Tensor) -> Outputs:
        """A batch of B rows to the answers of all members."""
        every = [member(**taken(member, given)).logits for member in self.members]
        return Outputs(self.task.combined([every[i].float() for i in self.counted]), every)
