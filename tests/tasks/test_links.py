"""Links against SciPy, torch's distributions, and sentence-transformers' own reading of a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_squared_error

from kdcli import tasks
from kdcli.errors import InputError
from kdcli.models import safety
from kdcli.tasks import links
from kdcli.tasks.regression import Regression
from tests.tasks.references import curvature

TASK = Regression(activation="sigmoid")


def outputs(rows: int = 50, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_metrics_judge_the_number_that_the_owner_gets() -> None:
    z = outputs().numpy().astype(np.float32)
    labels = np.random.default_rng(0).random(50).astype(np.float32)
    m = expit(z[:, 0].astype(np.float64))
    found = TASK.measure(z, labels, "test")
    assert found["rmse"].value == pytest.approx(np.sqrt(mean_squared_error(labels, m)), rel=1e-6)
    assert found["pearson"].value == pytest.approx(pearsonr(m, labels).statistic, rel=1e-6)
    assert found["spearman"].value == pytest.approx(spearmanr(z[:, 0], labels).statistic, rel=1e-6)
    assert found["rmse"].value != pytest.approx(
        Regression().measure(z, labels, "test")["rmse"].value, rel=0.1
    )
    assert TASK.answer(z, ["score"])[3]["score"] == pytest.approx(m[3])


def test_loss_divergence_and_curvature_are_those_of_a_bernoulli_distribution() -> None:
    before, after = outputs(seed=1), outputs(seed=2)
    y = torch.rand(50, dtype=torch.float64)
    one, two = (torch.distributions.Bernoulli(logits=z[:, 0]) for z in (before, after))
    assert torch.allclose(TASK.divergence(after, before), torch.distributions.kl_divergence(one, two))
    m = after[:, 0].sigmoid()
    assert torch.allclose(TASK.loss(after, y), -y * m.log() - (1 - y) * (1 - m).log())
    exact, drawn = curvature(TASK, torch.tensor([0.7], dtype=torch.float64))
    # Variance of a squared centred draw is below 1/16, so four errors of 200,000 draws are below 3e-3.
    assert exact.item() == pytest.approx(expit(0.7) * expit(-0.7))
    assert drawn.item() == pytest.approx(exact.item(), abs=3e-3)


def test_the_mean_answer_is_the_mean_of_the_numbers() -> None:
    every = [outputs(seed=seed) for seed in range(3)]
    want = sum(w * z.sigmoid() for w, z in zip((0.5, 0.2, 0.3), every, strict=True))
    assert torch.allclose(TASK.combined(every, [0.5, 0.2, 0.3]).sigmoid(), want)


def test_numbers_go_back_to_outputs() -> None:
    m = np.array([[0.0], [1e-6], [0.25], [0.75], [1.0]], np.float32)
    z = TASK.unactivated(m, "sigmoid", "a graph")
    assert np.allclose(z[1:4], logit(m[1:4].astype(np.float64)), rtol=1e-5)
    assert np.isfinite(z).all()
    assert np.array_equal(
        Regression().unactivated(m, "sigmoid", "a graph"), m
    )  # without an activation after it a graph's number is it


def test_labels_that_a_sigmoid_cannot_give_are_refused_and_doubted() -> None:
    with pytest.raises(InputError, match="labels go from 0 to 5"):
        TASK.check_learnable(np.array([0, np.nan, 5], np.float32))
    TASK.check_learnable(np.array([0, np.nan, 1], np.float32))
    Regression().check_learnable(np.array([-7, 5], np.float32))
    (doubt,) = TASK.doubts(outputs(2).numpy(), np.array([0, 5], np.float32), ["score"])
    assert doubt.code == "label-range"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "identity"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, "sigmoid"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "identity"),
        ({"sentence_transformers": {"version": "4.1.0"}}, "sigmoid"),  # CrossEncoder's default
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, "identity"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}, "sigmoid"),
        ({"function_to_apply": "sigmoid"}, "sigmoid"),
        ({"function_to_apply": "none"}, "identity"),
    ],
)
def test_the_activation_of_a_configuration(config: dict[str, Any], expected: str) -> None:
    found = tasks.recorded({"architectures": ["BertForSequenceClassification"], "num_labels": 1, **config})
    assert found == Regression(activation=expected)


def test_another_activation_is_refused() -> None:
    with pytest.raises(InputError, match="identity, sigmoid"):
        links.of_config({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}})


@pytest.mark.parametrize("given", [torch.nn.Sigmoid(), torch.nn.Identity(), None])
def test_a_directory_of_cross_encoder_gives_its_numbers_both_ways(
    given: torch.nn.Module | None, tmp_path: Path
) -> None:
    CrossEncoder = pytest.importorskip("sentence_transformers").CrossEncoder
    from kdcli.models import checkpoint as checkpoints
    from tests import tiny

    model = tiny.checkpoint()
    config = model.config
    config.id2label, config.label2id, config.architectures = {0: "s"}, {"s": 0}, [type(model.model).__name__]
    plain, theirs, ours = (tmp_path / name for name in ("plain", "theirs", "ours"))
    ours.mkdir()
    checkpoints.fresh(config).save_pretrained(plain)
    model.tokenizer.save_pretrained(plain)
    CrossEncoder(str(plain), activation_fn=given).save_pretrained(str(theirs))
    files = safety.check_checkpoint(theirs)
    found = tasks.recorded(files.config)
    assert isinstance(found, Regression)
    loaded = checkpoints.load(theirs)
    assert loaded.task == found
    pair = ("a good film", "a dull plot")
    want = float(CrossEncoder(str(theirs)).predict(pair))
    with torch.no_grad():
        z = loaded.model(**loaded.tokenizer(*pair, return_tensors="pt")).logits.numpy()
    assert found.scores(z).item() == pytest.approx(want, abs=1e-6)
    checkpoints.save(loaded, ours)
    assert float(CrossEncoder(str(ours)).predict(pair)) == pytest.approx(want, abs=1e-6)
