"""The loss of a distillation is the weighted sum that the report says it is."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

from kdcli import registry
from kdcli.data import sources
from kdcli.errors import InterruptedRun, UsageError
from kdcli.inputs import text
from kdcli.models import checkpoint as checkpoints
from kdcli.models.checkpoint import Checkpoint
from kdcli.progress import Progress
from kdcli.training import objective
from kdcli.training.capture import Capture, shape_of
from kdcli.training.features import TeacherSignals
from kdcli.training.loop import Batch, FitOptions, FitResult, fit
from kdcli.training.objective import ChosenLoss, Objective, bind, weights
from kdcli.training.resume import ResumePoint
from kdcli.training.terms import Loss, LossSetting, Needs, Shape, Signals, Step
from tests import tiny

CPU = torch.device("cpu")
SHAPE = Shape(layers=2, hidden=32, heads=4, classes=3, pooled=32)
LABELS = np.array([2, -100, 0, 1, -100, 1, 2, 0])


def chosen(name: str, weight: float, **config: Any) -> ChosenLoss:
    method = registry.load("distill", name, Loss)
    return ChosenLoss(name, method, method.config(**config), weight)


def of_logits(
    one: list[ChosenLoss], hard_weight: float, teacher: Tensor, labels: np.ndarray = LABELS
) -> Objective:
    """An objective of methods that read logits only; the teacher's are given for every row."""
    terms, _ = bind(one, SHAPE, SHAPE, [], 0, CPU)
    assert objective.needs(terms) == (Needs(), Needs())
    fake: Any = lambda batch: Signals(teacher[torch.from_numpy(batch.rows)], batch.mask)  # noqa: E731
    return Objective(terms, hard_weight, labels, Capture(tiny.checkpoint(), Needs()), fake, CPU)


def batch(rows: list[int], progress: float = 0.0) -> Batch:
    return Batch(np.array(rows), torch.ones(len(rows), 4, dtype=torch.bool), progress)


def logits(seed: int, rows: int = 8) -> Tensor:
    return 3 * torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(own: np.ndarray, theirs: np.ndarray, labels: np.ndarray, alpha: float, temperature: float) -> float:
    """(1 - alpha) * CE(y, s) + alpha * T^2 * KL(t_T || s_T), row by row; both means are over all rows."""

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z - z.max())
        return e / e.sum()

    value = 0.0
    for s, t, y in zip(own, theirs, labels, strict=True):
        if y >= 0:
            value -= (1 - alpha) * np.log(softmax(s)[y])
        p, q = softmax(t / temperature), softmax(s / temperature)
        value += alpha * temperature**2 * float((p * (np.log(p) - np.log(q))).sum())
    return value / len(labels)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.3, 2.0), (0.9, 1.0), (1.0, 4.0), (0.0, 2.0)])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5, 6, 7], [6, 1, 4], [3]])
def test_labels_and_response_are_the_naive_sum(alpha: float, temperature: float, rows: list[int]) -> None:
    teacher, own = logits(1), logits(2)[: len(rows)]
    loss = of_logits([chosen("response", alpha, temperature=temperature)], 1 - alpha, teacher)
    value = float(loss(SimpleNamespace(logits=own), batch(rows)))
    want = naive(own.numpy(), teacher[rows].numpy(), LABELS[rows], alpha, temperature)
    assert value == pytest.approx(want, rel=1e-5)  # the labels' part is float32


def test_rows_without_label_count_in_soft_terms_only() -> None:
    teacher, rows = logits(1), list(range(8))
    unlabelled = torch.from_numpy(LABELS < 0)
    for alpha, reached in ((0.0, False), (1.0, True)):
        own = logits(2).requires_grad_()
        loss = of_logits([chosen("response", alpha)], 1 - alpha, teacher)
        loss(SimpleNamespace(logits=own), batch(rows)).backward()
        assert own.grad is not None
        assert bool((own.grad[unlabelled] != 0).any(1).all()) is reached
        assert (own.grad[~unlabelled] != 0).any(1).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_batch_without_labels_is_finite_and_trains(alpha: float) -> None:
    teacher, own = logits(1), logits(2)[:2].requires_grad_()
    loss = of_logits([chosen("response", alpha, temperature=2.0)], 1 - alpha, teacher)
    value = loss(SimpleNamespace(logits=own), batch([1, 4]))
    value.backward()
    assert own.grad is not None
    assert torch.isfinite(own.grad).all()
    want = naive(own.detach().numpy(), teacher[[1, 4]].numpy(), LABELS[[1, 4]], alpha, 2.0)
    assert float(value.detach()) == pytest.approx(want, rel=1e-6)


def test_terms_get_labels_progress_and_their_weight() -> None:
    seen: list[Step] = []

    def term(student: Signals, teacher: Signals, setting: LossSetting, step: Step) -> Tensor:
        seen.append(step)
        return (student.logits - teacher.logits).sum() * setting.config

    stub = Loss(kind="relation", weight=1.0, term=term, config=BaseModel)
    teacher, own = logits(1), logits(2)[:3]
    one = [ChosenLoss("one", stub, 2.0, 10.0), ChosenLoss("two", stub, 3.0, 100.0)]
    value = of_logits(one, 0.0, teacher)(SimpleNamespace(logits=own), batch([6, 1, 3], progress=0.25))
    want = float((own - teacher[[6, 1, 3]]).sum()) * (2 * 10 + 3 * 100)
    assert float(value) == pytest.approx(want, rel=1e-9)
    assert [step.progress for step in seen] == [0.25, 0.25]
    assert seen[0].labels.tolist() == [2, -100, 1]


NAMES = ["response", "hidden", "rkd", "dkd", "adversarial"]


def weigh(names: list[str] = NAMES, **more: Any) -> tuple[float, dict[str, float]]:
    methods = {name: registry.load("distill", name, Loss) for name in names}
    given: dict[str, Any] = {"alpha": 0.3, "beta": None, "gamma": None, "given": {}} | more
    return weights(names, methods, **given)


def test_weights_of_alpha_beta_gamma_and_the_rest() -> None:
    assert weigh() == (
        0.7,
        {
            "response": 0.3,
            "hidden": 0.01,
            "rkd": 1.0,
            "dkd": 1.0,
            "adversarial": 0.1,
        },  # the weight that each declares
    )
    _, found = weigh(beta=5.0, gamma=7.0)
    assert (found["hidden"], found["rkd"], found["response"]) == (5.0, 7.0, 0.3)
    _, found = weigh(beta=5.0, gamma=7.0, given={"hidden": 2.0, "dkd": 0.0, "adversarial": 0.05})
    assert (found["hidden"], found["rkd"], found["dkd"], found["adversarial"]) == (2.0, 7.0, 0.0, 0.05)
    _, found = weigh(beta=0.0)
    assert found["hidden"] == 0.0  # zero is a weight, not a missing one


def test_weights_alpha_belongs_to_the_first_response_method() -> None:
    hard, found = weigh(["hidden", "dkd", "response"], alpha=0.6)
    assert hard == pytest.approx(0.4)
    assert found == {"hidden": 0.01, "dkd": 0.6, "response": 1.0}
    hard, found = weigh(["hidden"], alpha=0.6)
    assert (hard, found) == (1.0, {"hidden": 0.01})
    with pytest.raises(UsageError, match="the weight of 'dkd' is --alpha"):
        weigh(["hidden", "dkd", "response"], given={"dkd": 1.0})
    _, found = weigh(["hidden", "dkd", "response"], given={"response": 0.2})
    assert found["response"] == 0.2


def test_weights_of_beta_reach_every_method_of_the_kind() -> None:
    _, found = weigh(["response", "hidden", "minilm", "attention-transfer"], beta=0.5, given={"minilm": 3.0})
    assert found == {"response": 0.3, "hidden": 0.5, "minilm": 3.0, "attention-transfer": 0.5}


@pytest.mark.parametrize(
    ("names", "more", "words"),
    [
        (["response"], {"given": {"rkd": 1.0}}, "--weight rkd belongs to no chosen method; chosen: response"),
        (["response", "rkd"], {"beta": 1.0}, "--beta weighs feature methods, and none was chosen"),
        (["response", "hidden"], {"gamma": 1.0}, "--gamma weighs relation methods, and none was chosen"),
        (["response"], {"given": {"response": 0.5}}, "the weight of 'response' is --alpha"),
    ],
)
def test_weights_of_nothing_are_refused(names: list[str], more: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        weigh(names, **more)


def test_notes_of_methods_are_passed_on_and_refusals_raised() -> None:
    binary = Shape(2, 32, 4, 2, 32)
    terms, notes = bind([chosen("response", 1.0), chosen("dist", 1.0)], binary, binary, [], 0, CPU)
    own = registry.load("distill", "dist", Loss).check(LossSetting(terms[1].chosen.config, binary, binary))
    assert notes == [own]
    assert len(terms) == 2
    _, notes = bind([chosen("response", 1.0), chosen("dist", 1.0)], SHAPE, SHAPE, [], 0, CPU)
    assert notes == []
    with pytest.raises(UsageError, match="compares encoder layers, and the student has none"):
        bind([chosen("hidden", 1.0)], Shape(0, 32, 0, 3, 32), SHAPE, [], 0, CPU)


def test_first_weights_of_projections_come_from_the_seed_alone() -> None:
    def first(seed: int, names: list[str]) -> dict[str, Tensor]:
        torch.manual_seed(np.random.default_rng().integers(1000))  # what ran before plays no part
        small = Shape(2, 16, 2, 3, 16)
        terms, _ = bind([chosen(name, 1.0) for name in names], small, SHAPE, [(1, 1), (2, 2)], seed, CPU)
        found: Any = Objective(terms, 1.0, LABELS, Capture(tiny.checkpoint(), Needs()), lambda _: None, CPU)  # type: ignore[arg-type]
        state: dict[str, Tensor] = found.extra.state_dict()
        return state

    one, two, three = (first(seed, ["hidden", "pooled"]) for seed in (1, 1, 2))
    assert one.keys() == two.keys() == three.keys() != set()
    assert {name.split(".")[0] for name in one} == {"hidden", "pooled"}
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not any(torch.equal(one[k], three[k]) for k in one)
    assert not torch.equal(one["hidden.0.weight"], one["hidden.1.weight"])


# From here on: whole trainings.


@dataclass
class Lesson:
    """What every training here has in common."""

    teacher: Checkpoint
    train: text.Encoded
    validation: text.Encoded


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Lesson:
    index = {name: i for i, name in enumerate(tiny.LABELS)}
    splits = sources.load(str(data_dir)).splits
    train, validation = (text.encode(splits[s], tiny.tokenizer(), 40, index) for s in ("train", "validation"))
    teacher = checkpoints.load(tiny.saved(tmp_path_factory.mktemp("objective") / "teacher", seed=50))
    return Lesson(teacher, train, validation)


def small_student(seed: int = 0) -> Checkpoint:
    return tiny.checkpoint(seed=seed, hidden=16, heads=2)


def teach(
    student: Checkpoint,
    lesson: Lesson,
    one: list[ChosenLoss],
    *,
    seed: int = 0,
    hard_weight: float = 0.5,
    **more: Any,
) -> tuple[Objective, FitResult]:
    """Fit with an objective, as the strategies do."""
    teacher, train = lesson.teacher, lesson.train
    assert train.labels is not None
    terms, _ = bind(one, shape_of(student), shape_of(teacher), [(1, 1), (2, 2)], seed, CPU)
    own, theirs = objective.needs(terms)
    soft = np.random.default_rng(0).normal(size=(len(train), 2)).astype(np.float32)
    signals = TeacherSignals(teacher, train, soft, theirs, budget=1 << 30, device=CPU, progress=Progress())
    with Capture(student, own) as capture:
        loss = Objective(terms, hard_weight, train.labels, capture, signals, CPU)
        result = fit(
            student.model,
            train,
            lesson.validation,
            loss,
            FitOptions(epochs=2, batch_size=16, lr=5e-3, seed=3),
            pad_id=student.pad_id,
            device=CPU,
            progress=Progress(),
            title="training",
            extra=loss.extra,
            **more,
        )
    return loss, result


def test_projections_are_trained_along_and_not_in_the_student(lesson: Lesson) -> None:
    student = small_student()
    names = list(student.model.state_dict())
    one = [chosen("response", 0.5), chosen("hidden", 1.0)]
    terms, _ = bind(one, shape_of(student), shape_of(tiny.checkpoint()), [(1, 1), (2, 2)], 0, CPU)
    start = {f"hidden.{k}": v.clone() for k, v in terms[1].setting.trained.state_dict().items()}  # type: ignore[union-attr]
    loss, _ = teach(student, lesson, one)
    trained = loss.extra.state_dict()
    assert trained.keys() == start.keys()
    assert {tuple(trained[k].shape) for k in trained} == {(32, 16), (32,)}
    assert all(not torch.equal(trained[k], start[k]) for k in trained)
    assert list(student.model.state_dict()) == names
    assert not {id(p) for p in loss.extra.parameters()} & {id(p) for p in student.model.parameters()}
    # Equal widths need none.
    terms, _ = bind([chosen("hidden", 1.0)], SHAPE, SHAPE, [(1, 1), (2, 2)], 0, CPU)
    assert terms[0].setting.trained is None


ADVERSARIAL = [chosen("response", 0.5), chosen("adversarial", 0.1, warmup=0.2, neurons=8)]


def states(student: Checkpoint, loss: Objective) -> dict[str, bytes]:
    """Everything that was trained: student, projection, discriminator with its optimizer."""
    game: Any = loss.extra["adversarial"]
    parts = {"student": student.model.state_dict(), "extra": loss.extra.state_dict(), "own": game.tensors()}
    return {name: b"".join(part[k].numpy().tobytes() for k in sorted(part)) for name, part in parts.items()}


@pytest.mark.parametrize("stop_at", [1, 3, 6, 11])
def test_the_adversary_survives_a_resume_to_the_byte(lesson: Lesson, tmp_path: Path, stop_at: int) -> None:
    whole = small_student()
    expected, result = teach(whole, lesson, ADVERSARIAL)
    assert result.steps == 12
    steps = 0

    def interrupt() -> None:
        nonlocal steps
        steps += 1
        if steps == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRun):
        teach(
            small_student(),
            lesson,
            ADVERSARIAL,
            resume=ResumePoint(tmp_path / "point", {}),
            after_step=interrupt,
        )
    assert steps == stop_at
    # Whatever student, projection and discriminator were, the resume point decides, but for tokens never seen.
    again = small_student(seed=99)
    again.model.get_input_embeddings().load_state_dict(  # type: ignore[operator]
        small_student().model.get_input_embeddings().state_dict()  # type: ignore[operator]
    )
    loss, repeated = teach(
        again, lesson, ADVERSARIAL, seed=7, resume=ResumePoint(tmp_path / "point", {}), resuming=True
    )
    assert repeated.steps == 12
    assert repeated.history == result.history
    assert states(again, loss) == states(whole, expected)
    # The comparison can fail: another discriminator makes another student.
    other = small_student()
    different, _ = teach(other, lesson, ADVERSARIAL, seed=7)
    assert states(other, different)["student"] != states(whole, expected)["student"]
