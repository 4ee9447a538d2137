"""A blank head starts at the labels, and the unit of numbers changes nothing in a training."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartForSequenceClassification

from kdcli import registry
from kdcli.data import sources
from kdcli.inputs import text
from kdcli.models.checkpoint import Checkpoint
from kdcli.progress import Progress
from kdcli.stages.distill import control
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.multi_label import MultiLabel
from kdcli.tasks.regression import Regression
from kdcli.tasks.task import Task
from kdcli.training import number_head, objective, parameter_groups
from kdcli.training.capture import Capture, shape_of
from kdcli.training.features import TeacherSignals
from kdcli.training.label_loss import label_loss
from kdcli.training.loop import Batch, FitOptions, fit
from kdcli.training.objective import ChosenLoss, Objective
from kdcli.training.terms import Loss
from tests import tiny


def blank(family: str, task: Task) -> tuple[Checkpoint, torch.Tensor]:
    made = tiny.checkpoint(family)
    made.task = task
    ids = torch.randint(5, 20, (8, 6), generator=torch.Generator().manual_seed(0))
    return made, ids


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_first_answers_have_the_place_and_the_unit_of_the_labels(family: str) -> None:
    labels = np.array([19_000, np.nan, 21_000, 20_500], np.float32)
    mean, deviation = np.nanmean(labels.astype(np.float64)), np.nanstd(labels.astype(np.float64))
    made, ids = blank(family, Regression())
    with torch.no_grad():
        before = made.model(input_ids=ids).logits
        number_head.start(made, labels)
        after = made.model(input_ids=ids).logits
    # float32 of numbers of 2e4
    assert torch.allclose(after, before * deviation + mean, rtol=1e-5)


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        (Regression(activation="sigmoid"), [0.1, 0.9]),
        (Regression(), [3.0, 3.0]),
        (Regression(), [np.nan, np.nan]),
    ],
)
def test_a_head_without_a_unit_stays_as_it_is(task: Task, labels: list[float]) -> None:
    made, ids = blank("bert", task)
    with torch.no_grad():
        before = made.model(input_ids=ids).logits
        number_head.start(made, np.array(labels, np.float32))
        assert torch.equal(made.model(input_ids=ids).logits, before)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_head_of_several_labels_starts_at_their_frequencies(family: str) -> None:
    """What is left to learn is the text: the first loss is about that of the frequencies, not of one half."""
    labels = np.zeros((98, 2), np.float32)
    labels[:8, 0] = labels[:49, 1] = 1
    labels[-1] = np.nan  # nobody has labelled it
    made, ids = blank(family, MultiLabel())
    with torch.no_grad():
        before = made.model(input_ids=ids).logits
        number_head.start(made, labels)
        after = made.model(input_ids=ids).logits
    odds = torch.tensor([9 / 90, 50 / 49]).log()  # one more row with the label and one without
    assert torch.allclose(after, before + odds, atol=1e-5)  # float32 of numbers of size 1
    truth = torch.from_numpy(labels[:-1])
    blind = MultiLabel().blind(labels[:-1])
    assert blind is not None
    first = MultiLabel().loss(odds.expand_as(truth), truth).mean()
    assert blind.loss < first < blind.loss + 0.01 < np.log(2) - 0.1  # by the two rows that were added


def test_a_head_of_classes_stays_as_it_is() -> None:
    made, _ = blank("bert", CLASSIFICATION)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    number_head.start(made, np.array([0, 0, 1]))
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())


class Trained(NamedTuple):
    scores: np.ndarray  # of the student afterwards, (N,)
    losses: list[float]  # of the epochs


def trained(factor: float, labels: np.ndarray, data_dir: Path) -> Trained:
    """A student of a teacher and of labels in units of 1 / factor; the teacher's states have no unit."""
    dataset = sources.load(str(data_dir), columns=None, seed=0, offline=True)
    teacher = tiny.checkpoint(seed=1)
    teacher.path = data_dir  # whose files stand for its own in the cache
    student = tiny.checkpoint(hidden=16, heads=2, neurons=24, layers=1)
    student.task = Regression()
    student.model.classifier = torch.nn.Linear(16, 1)
    rows = text.encode(dataset.splits["train"], teacher.tokenizer, 40, dict.fromkeys(tiny.LABELS, 0))
    rows = replace(rows, labels=(factor * labels).astype(np.float32))
    number_head.start(student, rows.labels)
    answers = factor * (labels + 0.3 * np.sin(np.arange(len(labels))))[:, None]
    one, two = (registry.load("distill", name, Loss) for name in ("response", "hidden"))
    chosen = [ChosenLoss("response", one, one.config(), 0.5), ChosenLoss("hidden", two, two.config(), 0.1)]
    terms, _ = objective.bind(chosen, shape_of(student), shape_of(teacher), [(1, 2)], 0, torch.device("cpu"))
    ours, theirs = objective.needs(terms)
    signals = TeacherSignals(
        teacher,
        rows,
        answers.astype(np.float32),
        theirs,
        budget=0,
        device=torch.device("cpu"),
        progress=Progress(),
    )
    with closing(signals), Capture(student, ours) as capture:
        loss = Objective(terms, 0.5, rows.labels, capture, signals, torch.device("cpu"), student.task)
        result = fit(
            student.model,
            rows,
            rows,
            loss,
            FitOptions(epochs=5, batch_size=16, lr=1e-2, weight_decay=0.1, keep="last"),
            pad_id=student.pad_id,
            device=torch.device("cpu"),
            progress=Progress(),
            title="student",
            extra=loss.extra,
            task=student.task,
        )
    return Trained(control.answers(student, rows)[:, 0], [row["loss"] for row in result.history])


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    """Of the rows of `data_dir`, every second of which is positive."""
    return 2.0 + 0.7 * (-1.0) ** np.arange(96) + np.random.default_rng(0).normal(0.0, 0.2, 96)


@pytest.mark.parametrize("factor", [100.0, 0.01])
def test_the_unit_of_the_labels_changes_nothing_but_the_unit(
    factor: float, labels: np.ndarray, data_dir: Path
) -> None:
    """Rounding in float32 grows with the steps; AdamW divides gradients by their own size, noise by noise at worst."""
    torch.manual_seed(0)
    own = trained(1.0, labels, data_dir)
    torch.manual_seed(0)
    other = trained(factor, labels, data_dir)
    assert own.scores.std() > 0.05  # it has learned something
    assert np.allclose(other.scores / factor, own.scores, atol=0.01 * own.scores.std())
    assert np.allclose(other.losses, own.losses, rtol=1e-3)


def test_a_loss_of_numbers_is_a_share_of_their_variance(labels: np.ndarray) -> None:
    """The mean of the labels as answer has half the variance, which is 1/2 of 1."""
    loss = label_loss(Regression(), (50 * labels).astype(np.float32), torch.device("cpu"))
    mean = torch.full((96, 1), 50 * labels.mean())
    batch = Batch(np.arange(96), torch.ones(96, 4, dtype=torch.bool), 0.0)
    assert float(loss(SimpleNamespace(logits=mean), batch)) == pytest.approx(0.5, rel=1e-4)  # float32


def test_a_head_of_another_name_is_found_by_its_outputs() -> None:
    """BART and T5 call theirs ``classification_head``; a head that is missed would never reach 20,000."""
    config = BartConfig(
        vocab_size=len(tiny.tokenizer()), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=40, num_labels=1,
    )  # fmt: skip
    model = BartForSequenceClassification(config)
    head = model.classification_head.out_proj
    assert [id(p) for p in number_head.parameters(model)] == [id(head.weight), id(head.bias)]


def test_classes_have_no_unit(data_dir: Path) -> None:
    made = tiny.checkpoint()
    classes = np.array([0, 1, 1])
    assert number_head.deviation(made.task, classes) == 1
    assert number_head.without_unit(classes, 1.0) is classes
    assert all(group["unit"] == 1 for group in parameter_groups.of(made.model, 0.1))
