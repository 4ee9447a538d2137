"""What an answer is: the contract that every task in this folder keeps.

Nothing outside ``tasks/`` knows what the outputs of a model mean. Losses, criteria, searches, measurements and
reports ask the task of their checkpoint.

Shape letters: N rows of a split, B rows of a batch, C outputs of the head, M models.

Labels are arrays whose form is the task's own:

==========  ===================  =====================================
kind        labels               of a row that has none
==========  ===================  =====================================
one-of      (N,) int64           -100
any-of      (N, C) float32, 0/1  NaN in every column
number      (N,) float32         NaN
==========  ===================  =====================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, Self

import numpy as np

from kdcli.errors import InputError
from kdcli.report.schema import MetricValue, Warning_

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kind = Literal["one-of", "any-of", "number"]
"""What one answer is: one of C classes, any of C labels, or a number."""

OF_TEXTS: Mapping[Kind, str] = {
    "one-of": "text-classification",
    "any-of": "multi-label",
    "number": "regression",
}
"""Kind -> the ``--task`` that gives such answers to texts."""

Reduction = Literal["none", "sum"]
"""As in torch: one value a row, or their sum (as one operation, which rounds in an order of its own)."""


@dataclass(frozen=True)
class Comparison:
    """Two models on the same rows; every difference is the second's value minus the first's."""

    differences: Mapping[str, float]  # metric -> in the unit of the metric
    ci95: tuple[float, float] | None  # of the primary metric's difference, paired
    p_value: float | None  # that the two are equally good, paired
    agreement: (
        float  # share of rows with the same answer; for numbers the share of pairs of rows in the same order
    )
    lost: int | None = None  # rows that only the first got right; None where a row is not right or wrong
    won: int | None = None


@dataclass(frozen=True)
class Blind:
    """What whoever gives all rows the same answer reaches."""

    loss: float  # mean a row
    score: float  # of the primary metric, larger is better
    noise: float  # two standard errors of the score


class Plain:
    """A task whose answers leave nothing to decide."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """As :attr:`Task.metrics` has it."""
        raise NotImplementedError

    def measurable(self, queries: bool) -> tuple[str, ...]:
        """All of them."""
        return self.metrics

    def opened(self) -> Self:
        """Itself."""
        return self

    def selection_score(
        self, logits: np.ndarray, labels: np.ndarray, queries: np.ndarray | None = None
    ) -> float:
        """The score."""
        return self.score(logits, labels, queries)

    def set_apart(self, first: Self) -> Warning_ | None:
        """Nothing."""
        return None

    def check_learnable(self, labels: np.ndarray) -> None:
        """All of them are."""

    def unit(self, labels: np.ndarray) -> tuple[float, float] | None:
        """None: an output has no unit."""
        return None

    def first_logits(self, labels: np.ndarray) -> np.ndarray | None:
        """None: classes are about equally frequent, and a head gives them equal logits."""
        return None

    def teaching_steps(self, labels: int) -> int:
        """180, and 10 more a label: two labels and 7,000 rows make one epoch, 150 labels and 15,000 rows four."""
        return 180 + 10 * labels

    def score(self, logits: np.ndarray, labels: np.ndarray, queries: np.ndarray | None = None) -> float:
        """As :meth:`Task.score` has it."""
        raise NotImplementedError

    @property
    def decides(self) -> bool:
        """No."""
        return False

    @property
    def decided(self) -> bool:
        """No."""
        return False


def by_name(ours: Sequence[str], theirs: Sequence[str]) -> list[int] | None:
    """:meth:`Task.order` of outputs that stand for labels."""
    return [list(theirs).index(name) for name in ours] if set(ours) == set(theirs) else None


def highest(scores: np.ndarray, names: Sequence[str], top: int) -> dict[str, float]:
    """The labels with the highest of one row's scores (C,), best first; of equal ones in the order of the labels."""
    return {names[at]: float(scores[at]) for at in np.argsort(-scores, kind="stable")[:top].tolist()}


class Task(Protocol):
    """One kind of answer.

    A task is a frozen dataclass: what a model stores of it (the primary metric, thresholds) are its fields. Every one
    has the field ``primary``, whose default is the task's own metric, so that the registry can replace it by what
    ``--metric`` asks for.
    """

    @property
    def name(self) -> str:
        """As ``--task`` and reports have it."""
        ...

    @property
    def kind(self) -> Kind:
        """What one answer is."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what :meth:`measure` gives, in the order of reports; some need ``queries``."""
        ...

    @property
    def primary(self) -> str:
        """The metric that gates, searches and the best epoch go by: ``--metric``, or the task's own."""
        ...

    def measurable(self, queries: bool) -> tuple[str, ...]:
        """Those of :attr:`metrics` that :meth:`measure` gives, of rows with or without queries.

        Raises:
            InputError: The primary metric needs queries and there are none.
        """
        ...

    @property
    def problem_type(self) -> str | None:
        """As transformers' ``config.problem_type`` has it; None where none of its values gives this answer."""
        ...

    @property
    def pipeline_tag(self) -> str:
        """As the hub calls the task in a model card."""
        ...

    @property
    def limit(self) -> str:
        """What not to expect of an answer, one sentence for the model card; ``{labels}`` is their number."""
        ...

    def outputs(self, labels: Sequence[str]) -> int:
        """C of a head for these label names."""
        ...

    def order(self, ours: Sequence[str], theirs: Sequence[str]) -> list[int] | None:
        """Where each of this model's outputs is among those of another; None where the two cannot be compared."""
        ...

    # What a model carries along.

    @property
    def decides(self) -> bool:
        """Whether rows of a validation split have something to decide (:meth:`fitted`)."""
        ...

    @property
    def decided(self) -> bool:
        """Whether they have, or are going to."""
        ...

    def opened(self) -> Self:
        """This task for a model that rows of a validation split are going to decide something for."""
        ...

    def fitted(self, logits: np.ndarray, labels: np.ndarray) -> Self:
        """This task with what rows of a validation split decide (thresholds); itself where they decide nothing."""
        ...

    def config_fields(self) -> dict[str, object]:
        """Keys and values of config.json from which :func:`kdcli.tasks.recorded` makes this task again.

        Plain transformers reads ``problem_type`` and keeps the others.
        """
        ...

    def about(self, outputs: int) -> dict[str, str]:
        """What the metadata of a graph with C outputs says of its answers besides the names of the labels.

        Without a key ``task`` one of the labels is chosen, as in every graph before there were other tasks.
        """
        ...

    # Labels as arrays.

    def unlabelled(self, rows: int, outputs: int) -> np.ndarray:
        """Labels of rows that have none."""
        ...

    def known(self, labels: np.ndarray) -> np.ndarray:
        """(N,) bool, True where a row has a label."""
        ...

    def strata(self, labels: np.ndarray) -> np.ndarray | None:
        """(N,) groups that a sample of the rows should have in their shares; None where there are none."""
        ...

    def check_learnable(self, labels: np.ndarray) -> None:
        """Refuse training on labels that no answer can be.

        Raises:
            InputError: Which, and what to do.
        """
        ...

    def unit(self, labels: np.ndarray) -> tuple[float, float] | None:
        """Mean and standard deviation of known labels where an output is measured in their unit; None elsewhere."""
        ...

    def first_logits(self, labels: np.ndarray) -> np.ndarray | None:
        """(C,) what a new head had best answer before it has read a text; None where its own zeros will do."""
        ...

    def teaching_steps(self, labels: int) -> int:
        """Steps of 32 rows that an encoder without a head for the task takes to learn it."""
        ...

    def blind(self, labels: np.ndarray) -> Blind | None:
        """What one answer for all rows reaches on rows with these labels; None where it would be all right."""
        ...

    # Tensors, differentiable in ``logits`` and ``after``, in the number format of what comes in.

    def loss(self, logits: Tensor, labels: Tensor, reduction: Reduction = "none") -> Tensor:
        """(B,) losses of logits (B, C) against the labels, 0 for a row that has none; or their sum, a scalar."""
        ...

    def divergence(self, after: Tensor, before: Tensor, reduction: Reduction = "none") -> Tensor:
        """(B,) how far the answers of ``after`` (B, C) are from those of ``before`` (B, C); or their sum, a scalar.

        KL(before || after) where an answer is a distribution, half the squared difference where it is a number; 0
        where the answers are equal.
        """
        ...

    def own(self, logits: Tensor) -> Tensor:
        """The model's own answers to B rows as labels, for rows that have none."""
        ...

    def drawn(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Labels of B rows drawn from the distribution that the logits stand for, by a generator on the CPU."""
        ...

    def curved(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """(B, C) directions v with E[v v^T] the Hessian of :meth:`divergence` at equality: one draw a row.

        The gradient of ``v . logits`` is then a sample of the Gauss-Newton matrix (Schraudolph 2002).
        """
        ...

    def combined(self, every: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
        """(B, C) logits of the mean answer of M models, each (B, C), weighted where ``weights`` (sum 1) says so."""
        ...

    # Arrays, for measuring.

    def score(self, logits: np.ndarray, labels: np.ndarray, queries: np.ndarray | None = None) -> float:
        """The primary metric alone, larger is better."""
        ...

    def selection_score(
        self, logits: np.ndarray, labels: np.ndarray, queries: np.ndarray | None = None
    ) -> float:
        """What models are chosen by on validation rows: the score that they have once these rows have decided.

        Where nothing is to be decided it is :meth:`score`. Never of rows that a model is judged on.
        """
        ...

    def set_apart(self, first: Self) -> Warning_ | None:
        """What validation rows decided for this model or the first alone: their answers are then not read alike."""
        ...

    def measure(
        self, logits: np.ndarray, labels: np.ndarray, split: str, queries: np.ndarray | None = None
    ) -> dict[str, MetricValue]:
        """Every metric of logits (N, C); the primary one with its standard error and interval.

        Args:
            logits: (N, C).
            labels: Of rows that all have one.
            split: Name of the rows, for the report.
            queries: (N,) groups of rows that are ranked against each other; ranking metrics need them.

        Raises:
            InputError: An answer is not a finite number.
        """
        ...

    def compare(
        self,
        before: np.ndarray,
        after: np.ndarray,
        labels: np.ndarray,
        queries: np.ndarray | None = None,
        first: Self | None = None,
    ) -> Comparison:
        """Two models' logits (N, C) for the same rows, in the same order of labels.

        Args:
            before: Of the first model.
            after: Of the second, whose task this is.
            labels: Of rows that all have one.
            queries: As in :meth:`measure`.
            first: The first model's task, where it may have thresholds of its own; None: they are these.
        """
        ...

    def same(self, before: np.ndarray, after: np.ndarray, first: Self | None = None) -> float:
        """The agreement of :class:`Comparison` without labels."""
        ...

    def doubts(
        self, logits: np.ndarray, labels: np.ndarray, names: Sequence[str], *, of_input: bool = False
    ) -> list[Warning_]:
        """Where the primary metric means less than it seems to."""
        ...

    def unactivated(self, scores: np.ndarray, activation: str, where: str) -> np.ndarray:
        """Logits (N, C) of which a graph's last operator made these scores, float32.

        Args:
            scores: (N, C) float32.
            activation: ``softmax`` or ``sigmoid``.
            where: What messages call the graph.

        Raises:
            InputError: Such scores are no answers of this task.
        """
        ...

    # What people get.

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """(N, C) float64: probabilities where an answer is a distribution, else the numbers themselves."""
        ...

    def answer(
        self, logits: np.ndarray, names: Sequence[str], top: int | None = None
    ) -> list[dict[str, object]]:
        """One JSON object a row of logits (N, C): the answer, and its score or scores.

        Args:
            logits: (N, C).
            names: Of the C labels.
            top: ``scores`` has this many labels, best first; None: as the task has it.

        Raises:
            UsageError: ``top`` of answers that choose no labels.
        """
        ...

    def snippet(self, of_graph: bool) -> str:
        """The lines of Python that print the answer, for the model card.

        Args:
            of_graph: True: ``logits`` is an array (1, C) of onnxruntime and ``about`` the graph's metadata; False: a
                tensor (C,) and ``loaded`` kdcli's checkpoint.
        """
        ...


TINY = np.finfo(np.float32).tiny
"""A probability that was rounded to zero has a logarithm all the same."""


def check_finite(logits: np.ndarray, split: str) -> None:
    """Refuse answers (N, C) that no metric can judge.

    Raises:
        InputError: Some are not finite.
    """
    n = len(logits)
    if broken := n - int(np.isfinite(logits).all(1).sum()):
        raise InputError(
            f"the model's answer to {broken} of {n} rows of '{split}' is not a finite number",
            "something overflows when it runs; use a wider number format or the model as it was before",
        )
