"""Quality metrics against hand-made numbers, naive loops and scipy's own intervals."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, entropy
from sklearn.metrics import f1_score, log_loss, matthews_corrcoef

from kdcli.errors import InputError
from kdcli.tasks import classification
from tests.tasks.references import spread

TASK = classification.Classification()


def mcnemar(*answers: np.ndarray) -> float:
    return classification.paired(*answers).p_value


def rows(n: int = 200, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are right more often than chance, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)).astype(np.float32)
    logits[np.arange(n), labels] += 1.0
    return logits, labels


def test_accuracy_and_its_standard_error_by_hand() -> None:
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.5, 0.1]])
    found = TASK.measure(logits, np.array([0, 1, 0, 1]), "test")["accuracy"]
    assert (found.value, found.n, found.split, found.higher_is_better) == (0.75, 4, "test", True)
    assert found.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4), rel=1e-12)


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (1, 2), (183, 200), (999, 1000)])
def test_wilson_is_scipys_interval(right: int, n: int) -> None:
    want = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert classification.wilson(right, n) == pytest.approx((want.low, want.high), abs=1e-12)


def test_the_interval_of_the_report_is_wilsons_and_holds_the_value() -> None:
    logits, labels = rows()
    found = TASK.measure(logits, labels, "test")["accuracy"]
    right = int((logits.argmax(1) == labels).sum())
    assert found.ci95 == classification.wilson(right, len(labels))
    assert found.ci95[0] < found.value < found.ci95[1]


def test_macro_f1_is_the_mean_over_classes() -> None:
    logits, labels = rows()
    predicted = logits.argmax(1)
    scores = []
    for label in range(4):
        hits = sum(p == t == label for p, t in zip(predicted, labels, strict=True))
        scores.append(2 * hits / (sum(predicted == label) + sum(labels == label)))
    found = TASK.measure(logits, labels, "test")["macro_f1"]
    assert found.value == pytest.approx(sum(scores) / 4, abs=1e-12)
    assert found.stderr is None


def test_macro_f1_leaves_out_what_neither_labels_nor_answers_hold() -> None:
    logits, labels = rows(classes=7)
    logits[:, 2] = -1e3  # never answered, but a label
    logits[:, 4:6] = -1e3
    labels = np.where(labels == 4, 0, np.where(labels == 6, 1, labels))  # 4: neither; 5: a label; 6: answered
    found = TASK.measure(logits, labels, "test")["macro_f1"]
    want = f1_score(labels, logits.argmax(1), average="macro", zero_division=0)
    assert found.value == pytest.approx(want, rel=1e-12)
    assert len({*labels, *logits.argmax(1)}) == 6


def test_macro_f1_of_a_class_never_answered_is_zero_without_a_warning() -> None:
    found = TASK.measure(np.tile([1.0, 0.0], (4, 1)), np.array([0, 0, 0, 1]), "test")
    assert found["macro_f1"].value == pytest.approx((2 * 3 / 7 + 0) / 2)


def naive_calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int) -> float:
    total = 0.0
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, label in zip(logits.astype(float), labels, strict=True):
        weights = [math.exp(x) for x in row]
        confidence = max(weights) / sum(weights)
        at = next(i for i in range(bins) if i / bins < confidence <= (i + 1) / bins)
        members[at].append((confidence, int(row.argmax()) == label))
    for group in members:
        if group:
            gap = sum(hit for _, hit in group) / len(group) - sum(c for c, _ in group) / len(group)
            total += len(group) / len(labels) * abs(gap)
    return total


@pytest.mark.parametrize("classes", [2, 4, 30])
def test_calibration_error_is_the_naive_one(classes: int) -> None:
    logits, labels = rows(classes=classes)
    want = naive_calibration_error(logits, labels, 15)
    assert want > 0.01
    assert classification.calibration_error(logits, labels) == pytest.approx(want, abs=1e-12)
    found = TASK.measure(logits, labels, "test")["ece"]
    assert (found.value, found.higher_is_better) == (pytest.approx(want, abs=1e-12), False)


def test_a_confidence_on_a_limit_belongs_to_the_lower_bin() -> None:
    # 0.5 and right, 0.75 and wrong: two bins give (0.5 + 0.75) / 2, one would give |0.5 - 0.75| / 2.
    logits = np.array([[0.0, 0.0], [math.log(3), 0.0]])
    assert classification.calibration_error(logits, np.array([0, 1]), bins=2) == pytest.approx(0.625)


def test_calibrated_answers_have_no_error() -> None:
    # Three of four rows at confidence 3/4 are right.
    logits = np.tile([math.log(3), 0.0], (4, 1))
    assert classification.calibration_error(logits, np.array([0, 0, 0, 1])) == pytest.approx(0, abs=1e-15)


def test_calibration_error_does_not_overflow_and_ignores_a_shift() -> None:
    logits, labels = rows()
    plain = classification.calibration_error(logits.astype(np.float64), labels)
    assert classification.calibration_error(logits.astype(np.float64) + 5e3, labels) == pytest.approx(
        plain, abs=1e-9
    )
    sure = np.array([[1e4, -1e4], [1e4, -1e4]], dtype=np.float32)
    assert classification.calibration_error(sure, np.array([0, 1])) == pytest.approx(0.5)


def test_measuring_does_not_write_to_the_logits() -> None:
    logits, labels = rows()
    before = logits.astype(np.float64)
    copy = before.copy()
    TASK.measure(copy, labels, "test")
    assert np.array_equal(copy, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_answers_that_are_not_numbers_are_refused(bad: float) -> None:
    logits, labels = rows(n=10)
    logits[3, 1] = logits[3, 2] = logits[7, 0] = bad
    with pytest.raises(InputError, match="2 of 10 rows of 'validation'"):
        TASK.measure(logits, labels, "validation")


def test_mcnemar_by_hand() -> None:
    labels = np.zeros(20, dtype=int)
    before, after = labels.copy(), labels.copy()
    before[:5] = 1  # five that only the second model has right
    after[5] = 1  # one that only the first has
    before[6:9], after[6:9] = 1, 2  # both wrong, differently: no evidence
    # P(at most 1 of 6 heads) on both sides.
    assert mcnemar(before, after, labels) == pytest.approx(2 * (1 + 6) / 2**6)
    assert mcnemar(after, before, labels) == pytest.approx(2 * (1 + 6) / 2**6)


@pytest.mark.parametrize("n", [0, 1, 6, 7, 400, 20_000])
def test_mcnemar_is_scipys_binomial_test(n: int) -> None:
    for won in {0, n // 3, max(n // 2 - 1, 0), n // 2, n - n // 2, n}:
        found = classification.Paired(n - won, won, n).p_value
        want = binomtest(won, n, 0.5).pvalue if n else 1.0
        # SciPy sums the two tails, which differ in rounding.
        assert found == pytest.approx(want, rel=1e-9), won


def test_mcnemar_of_models_that_do_not_differ_is_one() -> None:
    labels = np.array([0, 1, 0, 1])
    assert mcnemar(labels, labels, labels) == 1.0
    assert mcnemar(np.array([1, 1, 0, 1]), np.array([0, 1, 0, 0]), labels) == pytest.approx(1.0)


@pytest.mark.parametrize("metric", ["macro_f1", "mcc", "ece", "log_loss"])
def test_what_is_resampled_is_the_metric(metric: str) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 200)
    logits = generator.normal(size=(200, 5)) + 2 * np.eye(5)[labels]  # two classes only among the answers
    task = classification.Classification(metric)
    assert classification._STATISTICS[metric](logits, labels).value == pytest.approx(
        classification._METRICS[metric](logits, labels), rel=1e-9
    )
    found = task.measure(logits, labels, "test")[metric]
    naive = spread(lambda rows: classification._METRICS[metric](logits[rows], labels[rows]), 200)
    # 3.5% of the naive one and 1.6% of ours, four of them.
    assert found.stderr == pytest.approx(naive, rel=4 * 0.039)
    same = task.compare(logits, logits, labels)
    assert (same.p_value, same.ci95) == (1.0, (0.0, 0.0))
    worse = task.compare(logits, -logits, labels)
    assert worse.p_value is not None
    assert worse.p_value < 0.01


# ------------------------------------------------- the other metrics


@pytest.mark.parametrize("classes", [2, 5])
def test_correlation_and_log_loss_are_those_of_scikit_learn(classes: int) -> None:
    logits, labels = rows(classes=classes)
    found = TASK.measure(logits, labels, "test")
    assert tuple(found) == TASK.metrics
    assert found["mcc"].value == pytest.approx(matthews_corrcoef(labels, logits.argmax(1)), abs=1e-12)
    scores = np.exp(logits.astype(np.float64))
    want = log_loss(labels, scores / scores.sum(1, keepdims=True), labels=range(classes))
    assert found["log_loss"].value == pytest.approx(want, rel=1e-12)
    assert not found["log_loss"].higher_is_better
    constant = np.tile([1.0, 0.0], (10, 1))
    assert TASK.measure(constant, np.arange(10) % 2, "test")["mcc"].value == 0.0


@pytest.mark.parametrize("metric", TASK.metrics)
def test_any_metric_can_be_the_primary_one(metric: str) -> None:
    logits, labels = rows(n=300)
    other = classification.Classification(metric)
    found = other.measure(logits, labels, "test")
    assert found[metric].stderr is not None
    low, high = found[metric].ci95
    assert low < high
    sign = 1 if found[metric].higher_is_better else -1
    assert other.score(logits, labels) == pytest.approx(sign * found[metric].value)
    assert {name: one.value for name, one in found.items()} == {
        name: one.value for name, one in TASK.measure(logits, labels, "test").items()
    }


def test_drawn_rows_give_the_error_that_the_formula_gives() -> None:
    """Of a mean both are known: the log loss is one."""
    logits, labels = rows(n=500)
    found = classification.Classification("log_loss").measure(logits, labels, "test")["log_loss"]
    each = -np.log(TASK.scores(logits)[np.arange(500), labels])
    # 2000 draws know a standard error to 1 / sqrt(4000), 1.6%; 5 of them are 8%.
    assert found.stderr == pytest.approx(each.std(ddof=1) / math.sqrt(500), rel=0.08)


def test_two_models_are_compared_on_the_same_rows() -> None:
    logits, labels = rows(n=300)
    worse = logits + np.random.default_rng(9).normal(size=logits.shape).astype(np.float32)
    found = TASK.compare(logits, worse, labels)
    one, two = (TASK.measure(x, labels, "test") for x in (logits, worse))
    assert found.differences == {name: two[name].value - one[name].value for name in TASK.metrics}
    assert found.agreement == np.mean(logits.argmax(1) == worse.argmax(1)) == TASK.same(logits, worse)
    assert found.p_value == mcnemar(logits.argmax(1), worse.argmax(1), labels)
    by_f1 = classification.Classification("macro_f1").compare(logits, worse, labels)
    low, high = by_f1.ci95
    assert low < by_f1.differences["macro_f1"] < high < 0
    assert by_f1.p_value == pytest.approx(2 / 2001)  # none of 2000 draws is on the other side
    itself = classification.Classification("macro_f1").compare(logits, logits, labels)
    assert (itself.p_value, itself.ci95, itself.agreement) == (1.0, (0.0, 0.0), 1.0)


# ------------------------------------------------- tensors


def tensors(n: int = 6, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(n, classes, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def test_losses_and_divergences_are_their_definitions_and_sums_of_rows() -> None:
    after, before = tensors()
    labels = torch.tensor([0, 1, 2, 3, -100, 1])
    p, q = (x.softmax(-1).numpy() for x in (after, before))
    want = [0.0 if t < 0 else -math.log(p[i, t]) for i, t in enumerate(labels.tolist())]
    assert TASK.loss(after, labels).numpy() == pytest.approx(want)
    assert float(TASK.loss(after, labels, "sum")) == pytest.approx(sum(want))
    kl = entropy(q, p, axis=1)
    assert TASK.divergence(after, before).numpy() == pytest.approx(kl)
    assert float(TASK.divergence(after, before, "sum")) == pytest.approx(kl.sum())
    assert TASK.divergence(after, after).abs().max() < 1e-15


def test_curved_directions_have_the_hessian_of_the_divergence() -> None:
    (z, _), generator = tensors(n=1, classes=3), torch.Generator().manual_seed(0)
    directions = TASK.curved(z.expand(200_000, 3), generator).numpy()
    hessian = torch.autograd.functional.hessian(lambda x: TASK.divergence(x[None], z)[0], z[0]).numpy()
    # 200,000 draws of products of order 0.3 know their mean to 0.3 / sqrt(200,000) = 0.0007.
    assert directions.T @ directions / 200_000 == pytest.approx(hessian, abs=0.004)


def test_drawn_labels_come_as_often_as_they_are_probable_and_the_most_probable_is_its_own() -> None:
    (z, _), generator = tensors(n=1), torch.Generator().manual_seed(0)
    often = np.bincount(TASK.drawn(z.expand(100_000, 4), generator), minlength=4) / 100_000
    assert often == pytest.approx(z[0].softmax(0).numpy(), abs=0.008)  # 5 standard errors
    assert TASK.own(z).tolist() == [int(z.argmax())]


def test_models_combined_have_the_mean_of_their_probabilities() -> None:
    every = tensors()
    assert torch.allclose(TASK.combined(every).softmax(-1), sum(z.softmax(-1) for z in every) / 2)
    weighed = 0.2 * every[0].softmax(-1) + 0.8 * every[1].softmax(-1)
    assert torch.allclose(TASK.combined(every, [0.2, 0.8]).exp(), weighed)


# ------------------------------------------------- labels and words


def test_rows_without_a_label_and_what_one_answer_for_all_reaches() -> None:
    labels = np.array([0, 0, 0, 1, -100])
    assert TASK.known(labels).tolist() == [True] * 4 + [False]
    assert TASK.unlabelled(2, 7).tolist() == [-100, -100]
    blind = TASK.blind(labels[:4])
    assert blind is not None
    assert (blind.loss, blind.score) == (pytest.approx(math.log(2)), 0.75)
    assert blind.noise == pytest.approx(2 * math.sqrt(0.75 * 0.25 / 4))
    assert TASK.blind(labels[:3]) is None


def test_an_answer_is_a_name_and_its_probability_and_the_snippets_print_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logits, names = np.array([[0.0, math.log(3)]], dtype=np.float32), ["no", "yes"]
    (found,) = TASK.answer(logits, names)
    assert found == {"label": "yes", "score": pytest.approx(0.75)}
    about = {"labels": json.dumps(names)}
    exec(TASK.snippet(of_graph=True), {"json": json, "about": about, "logits": logits})
    loaded = SimpleNamespace(labels=names)
    exec(TASK.snippet(of_graph=False), {"loaded": loaded, "logits": torch.from_numpy(logits[0])})
    assert capsys.readouterr().out == "yes\nyes\n"
