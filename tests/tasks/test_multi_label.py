"""Multi-label answers against scikit-learn, transformers' own loss, and plain NumPy."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, f1_score
from transformers import BertConfig, BertForSequenceClassification

from kdcli.errors import InputError
from kdcli.tasks import intervals, thresholds
from kdcli.tasks.f1 import macro_f1_statistic, micro_f1_statistic
from kdcli.tasks.multi_label import MultiLabel, average_precision
from tests.tasks.references import curvature, spread

N, C = 300, 5
TASK = MultiLabel(thresholds=(0.4, 0.5, 0.3, 0.6, 0.5))
NAMES = ["joy", "anger", "fear", "never", "calm"]


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    """Logits with ties, and labels: one is rare, one never occurs, some rows have none."""
    generator = np.random.default_rng(0)
    logits = generator.normal(-0.5, 1.5, (N, C)).round(1).astype(np.float32)
    share = 1 / (1 + np.exp(-logits))
    labels = (generator.random((N, C)) < share * [1, 0.8, 0.1, 0, 1]).astype(np.float32)
    assert (labels.sum(1) == 0).any()
    assert not labels[:, 3].any()
    return logits, labels


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z.astype(np.float64)))


# Tensors.


def test_the_loss_and_its_gradient_are_those_of_transformers() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        num_labels=C, problem_type=TASK.problem_type,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    ids, labels = torch.randint(5, 20, (6, 4)), torch.randint(0, 2, (6, C)).float()
    theirs = model(input_ids=ids, labels=labels)
    (gradient,) = torch.autograd.grad(theirs.loss, model.classifier.weight)
    ours = TASK.loss(model(input_ids=ids).logits, labels)
    assert ours.shape == (6,)
    assert torch.allclose(ours.mean(), theirs.loss, rtol=1e-6)  # float32
    assert torch.allclose(torch.autograd.grad(ours.mean(), model.classifier.weight)[0], gradient, atol=1e-7)


def test_a_row_without_labels_has_no_loss_and_no_gradient() -> None:
    logits = torch.randn(3, C, requires_grad=True)
    labels = torch.from_numpy(np.concatenate([TASK.unlabelled(1, C), np.ones((2, C), np.float32)]))
    loss = TASK.loss(logits, labels)
    loss.sum().backward()
    assert logits.grad is not None
    assert loss[0] == 0
    assert not logits.grad[0].any()
    assert logits.grad[1:].all()
    assert torch.equal(loss[1:], TASK.loss(logits, torch.ones(3, C))[1:])
    assert torch.equal(loss.sum(), TASK.loss(logits, labels, "sum"))
    assert TASK.known(labels.numpy()).tolist() == [False, True, True]


def test_the_divergence_is_one_bernoulli_kl_a_label() -> None:
    before, after = torch.randn(4, C, dtype=torch.float64), torch.randn(4, C, dtype=torch.float64)
    p, q = sigmoid(before.numpy()), sigmoid(after.numpy())
    naive = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean(1)
    assert np.allclose(TASK.divergence(after, before), naive, rtol=1e-10)
    assert not TASK.divergence(before, before).any()
    assert torch.allclose(TASK.divergence(after, before, "sum"), TASK.divergence(after, before).sum())


def test_a_teacher_that_is_sure_makes_the_divergence_the_loss() -> None:
    labels = torch.randint(0, 2, (7, C)).double()
    after = torch.randn(7, C, dtype=torch.float64)
    sure = (labels * 2 - 1) * 60  # 1 - sigmoid(60) is 9e-27
    assert torch.allclose(TASK.divergence(after, sure), TASK.loss(after, labels), rtol=1e-12)
    assert torch.isfinite(TASK.divergence(-sure * 1e3, sure * 1e3)).all()


def test_curved_directions_have_the_hessian_of_the_divergence() -> None:
    logits = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64)
    exact, drawn = curvature(MultiLabel(), logits)
    p = logits.sigmoid()
    assert torch.allclose(exact, torch.diag(p * (1 - p) / 3), atol=1e-12)
    # 200,000 draws: an entry is known to sqrt(2 / 200,000) = 0.3% of the largest, 5 of them are allowed.
    assert torch.allclose(drawn, exact, atol=0.016 * float(exact.max()))


def test_drawn_labels_come_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([[-1.0, 0.0, 2.0]]).expand(20_000, -1)
    drawn = TASK.drawn(logits, torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(drawn.mean(0), logits[0].sigmoid(), atol=4 * 0.5 / 20_000**0.5)
    assert torch.equal(drawn, TASK.drawn(logits, torch.Generator().manual_seed(0)))


def test_the_mean_answer_of_models_is_the_mean_probability() -> None:
    every = [torch.randn(4, C, dtype=torch.float64) * 3 for _ in range(3)]
    mean = torch.stack([one.sigmoid() for one in every]).mean(0)
    assert torch.allclose(TASK.combined(every).sigmoid(), mean, rtol=1e-12)
    assert torch.allclose(TASK.combined([every[0]]), every[0], rtol=1e-12)
    weighted = 0.7 * every[0].sigmoid() + 0.3 * every[1].sigmoid()
    assert torch.allclose(TASK.combined(every[:2], [0.7, 0.3]).sigmoid(), weighted, rtol=1e-12)
    assert torch.isfinite(TASK.combined([torch.full((1, C), 200.0), torch.full((1, C), 300.0)])).all()


def test_own_answers_are_those_that_are_measured(rows: tuple[np.ndarray, np.ndarray]) -> None:
    own = TASK.own(torch.from_numpy(rows[0]))
    assert np.array_equal(own.numpy() == 1, TASK.chosen(rows[0]))
    assert np.array_equal(TASK.chosen(rows[0]), sigmoid(rows[0]) >= np.array(TASK.thresholds))
    assert MultiLabel().own(torch.tensor([[0.0, -1e-6]])).tolist() == [[1.0, 0.0]]  # at the threshold: chosen


# Metrics.


def by_scikit_learn(metric: str, logits: np.ndarray, labels: np.ndarray) -> float:
    answers = sigmoid(logits) >= np.array(TASK.thresholds)
    there = labels.any(0)
    return {
        "micro_f1": lambda: f1_score(labels, answers, average="micro", zero_division=0),
        "macro_f1": lambda: f1_score(labels, answers, average="macro", zero_division=np.nan),
        "subset_accuracy": lambda: accuracy_score(labels, answers),
        "average_precision": lambda: average_precision_score(
            labels[:, there], logits[:, there], average="macro"
        ),
    }[metric]()


def test_every_metric_is_that_of_scikit_learn(rows: tuple[np.ndarray, np.ndarray]) -> None:
    found = TASK.measure(*rows, "test")
    assert tuple(found) == TASK.metrics
    for name, metric in found.items():
        assert metric.value == pytest.approx(by_scikit_learn(name, *rows), rel=1e-12), name
        assert (metric.n, metric.split, metric.higher_is_better) == (N, "test", True)
        assert MultiLabel(name, TASK.thresholds).score(*rows) == metric.value
    # A label that is answered without ever occurring counts in macro F1; one that has neither does not.
    without = MultiLabel(thresholds=(0.4, 0.5, 0.3, 0.999999, 0.5))
    answers = without.chosen(rows[0])
    expected = f1_score(rows[1][:, [0, 1, 2, 4]], answers[:, [0, 1, 2, 4]], average="macro")
    assert without.measure(*rows, "test")["macro_f1"].value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("metric", MultiLabel.metrics)
def test_errors_are_those_of_resampled_rows(metric: str, rows: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = rows
    found = TASK.measure(logits, labels, "test")[metric]
    task = MultiLabel(metric, TASK.thresholds)
    naive = spread(lambda at: task.score(logits[at], labels[at]), N)
    # 3.5% of the naive one and 1.6% of ours, four of them; the linear form is right to 1 / sqrt(N) besides.
    assert found.stderr == pytest.approx(
        naive, rel=4 * 0.039 + (0.06 if metric == "average_precision" else 0)
    )
    assert found.ci95 is not None
    assert found.ci95[0] < found.value < found.ci95[1]


def test_the_influence_on_average_precision_is_its_derivative_by_the_weights(
    rows: tuple[np.ndarray, np.ndarray],
) -> None:
    logits, labels = rows[0][:30], rows[1][:30]
    influence = average_precision(logits, labels > 0.5).sums[:, 0]
    there, step = labels.any(0), 1e-4

    def moved(row: int, by: float) -> float:
        weights = np.ones(30)
        weights[row] += by
        return average_precision_score(labels[:, there], logits[:, there], sample_weight=weights)

    slopes = [(moved(row, step) - moved(row, -step)) / (2 * step) for row in range(30)]
    # A central difference leaves step^2.
    assert np.allclose(influence, slopes, atol=1e-7)


def test_nothing_given_and_nothing_answered_has_a_value() -> None:
    nothing = np.zeros((4, 3), bool)
    assert micro_f1_statistic(nothing, nothing).value == macro_f1_statistic(nothing, nothing).value == 0
    assert average_precision(np.zeros((4, 3)), nothing).value == 0
    perfect = MultiLabel().measure(np.array([[5.0, -5], [-5, 5]]), np.eye(2), "test")
    assert all(one.value == 1 for one in perfect.values())


def test_answers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="1 of 2 rows of 'test' is not a finite number"):
        TASK.measure(np.array([[0.0] * C, [np.nan] * C]), np.ones((2, C)), "test")


# Two models.


def test_a_comparison_is_paired(rows: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = rows
    noise = np.random.default_rng(1).normal(0, 0.7, logits.shape)
    after = (logits + noise).astype(np.float32)
    found = TASK.compare(logits, after, labels)
    for name in TASK.metrics:
        expected = by_scikit_learn(name, after, labels) - by_scikit_learn(name, logits, labels)
        assert found.differences[name] == pytest.approx(expected, abs=1e-12)

    def difference(at: np.ndarray) -> float:
        return TASK.score(after[at], labels[at]) - TASK.score(logits[at], labels[at])

    assert found.ci95 is not None
    # A percentile of 2,000 is known to 0.06 standard errors: the width to 0.09 of 3.9, plus 3.5% of the naive one.
    assert found.ci95[1] - found.ci95[0] == pytest.approx(2 * 1.96 * spread(difference, N), rel=4 * 0.043)
    assert found.agreement == np.mean((TASK.chosen(logits) == TASK.chosen(after)).all(1))
    assert found.agreement == TASK.same(logits, after)
    assert found.lost is found.won is None
    assert TASK.compare(logits, after, labels) == found  # a fixed seed
    worse = TASK.compare(logits, -logits, labels)
    assert worse.p_value == 2 / (intervals.RESAMPLES + 1)
    same = TASK.compare(logits, logits, labels)
    assert (same.p_value, same.agreement, same.differences["micro_f1"]) == (1.0, 1.0, 0.0)


def test_each_model_decides_by_its_own_thresholds(rows: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = rows
    # A model whose logits all lie 1 higher, with thresholds that lie 1 higher, is the same model.
    higher = MultiLabel(thresholds=(float(sigmoid(np.float64(1.05))),) * C)
    lower = MultiLabel(thresholds=(float(sigmoid(np.float64(0.05))),) * C)
    found = higher.compare(logits, logits + 1, labels, first=lower)
    assert (found.agreement, found.p_value) == (1.0, 1.0)
    assert higher.same(logits, logits + 1, lower) == 1.0
    assert higher.same(logits, logits + 1) < 1


# One answer for all rows.


@pytest.mark.parametrize("metric", ["micro_f1", "macro_f1", "subset_accuracy"])
def test_no_fixed_set_is_better_than_the_blind_one(metric: str, rows: tuple[np.ndarray, np.ndarray]) -> None:
    labels = rows[1]
    task = MultiLabel(metric)
    blind = task.blind(labels)
    assert blind is not None
    fixed = [
        task.score(np.tile(np.float32(one) - 0.5, (N, 1)), labels)
        for one in itertools.product([0, 1], repeat=C)
    ]
    assert blind.score == max(fixed)
    best = list(itertools.product([0, 1], repeat=C))[int(np.argmax(fixed))]
    answers = np.tile(np.float32(best) - 0.5, (N, 1))
    error = spread(lambda at: task.score(answers[at], labels[at]), N)
    assert blind.noise == pytest.approx(2 * error, rel=4 * 0.039)
    # The loss is that of logits fitted to the shares of the labels.
    share = torch.from_numpy(labels).mean(0).clamp(1e-12, 1 - 1e-6).double()
    loss = task.loss(share.logit().expand(N, -1), torch.from_numpy(labels)).mean()
    assert blind.loss == pytest.approx(float(loss), abs=1e-5)
    assert task.blind(np.tile(labels[0], (5, 1))) is None


# Thresholds.


@pytest.mark.parametrize("seed", range(10))
def test_the_threshold_is_the_best_of_all(seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(-1, 1, (20, 3)).round(1)
    labels = (generator.random((20, 3)) < sigmoid(logits)).astype(np.float32)
    fitted = thresholds.fitted(logits, labels)
    assert len(fitted) == 3
    assert len(set(fitted)) == 1
    every = sorted({*logits.ravel(), logits.max() + 1})
    best = max(f1_score(labels, logits >= one, average="micro", zero_division=0) for one in every)
    task = MultiLabel().fitted(logits, labels)
    assert task == MultiLabel(thresholds=fitted)
    assert task.score(logits, labels) == pytest.approx(best, rel=1e-12)
    # No score lies on it, so rounding decides nothing.
    assert np.abs(sigmoid(logits) - fitted[0]).min() > 1e-3


def test_with_calibrated_scores_it_is_half_of_the_best_f1() -> None:
    """Lipton, Elkan and Narayanaswamy 2014, theorem 1."""
    generator = np.random.default_rng(0)
    logits = generator.normal(-2, 1.5, (50_000, 4))
    labels = generator.random(logits.shape) < sigmoid(logits)
    task = MultiLabel().fitted(logits, labels.astype(np.float32))
    assert task.thresholds is not None
    # The optimum is flat: with 200,000 decisions F1 is known to 0.002, so the threshold to about sqrt of that.
    assert task.thresholds[0] == pytest.approx(task.score(logits, labels) / 2, abs=0.03)


def test_the_threshold_is_between_0_and_1_and_half_where_nothing_is_known() -> None:
    assert thresholds.fitted(np.ones((3, 2)), np.zeros((3, 2))) == (0.5, 0.5)
    assert thresholds.fitted(np.array([[3.0], [-3.0]]), np.array([[1.0], [0.0]])) == (
        0.5,
    )  # anything between is as good
    all_right = thresholds.fitted(np.full((3, 2), 2.0), np.ones((3, 2)))
    assert 0 < all_right[0] < float(sigmoid(np.float64(2)))
    (huge, _) = thresholds.fitted(np.array([[900.0, 800], [900, -900]]), np.array([[1, 0], [1, 0]]))
    assert 0 < huge < 1


def test_thresholds_of_other_labels_are_refused() -> None:
    with pytest.raises(InputError, match="3 labels, but 5 thresholds"):
        TASK.chosen(np.zeros((1, 3)))


# What people get.


def test_doubts() -> None:
    labels = np.array([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 1]] * 5, np.float32)
    right = labels * 4 - 2
    assert MultiLabel().doubts(right, labels, NAMES) == []

    def code(logits: np.ndarray, truth: np.ndarray = labels, of_input: bool = False) -> tuple[str, str]:
        (found,) = MultiLabel().doubts(logits, truth, NAMES, of_input=of_input)
        return found.code, found.message

    silent, joy = np.full_like(labels, -3), np.tile(np.float32([3, -3, -3, -3, -3]), (15, 1))
    assert code(silent)[0] == "one-answer"
    assert "gives all 15 rows no label" in code(silent)[1]
    assert "the input gives all 15 rows the label 'joy'" in code(joy, of_input=True)[1]
    assert code(joy, of_input=True)[0] == "input-one-answer"
    assert code(right, np.zeros_like(labels)) == (
        "one-label",
        "all 15 rows have no label: they say nothing of how labels are told apart",
    )
    # Always 'joy', 'anger' and 'calm' has 2 * 20 / (3 * 15 + 20).
    more = joy.copy()
    more[0, 3] = 3
    assert code(more)[0] == "majority"
    assert f"the labels 'joy', 'anger', 'calm' would have ({40 / 65:.4f})" in code(more)[1]


def test_the_best_fixed_answer_may_have_several_labels() -> None:
    labels = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]], np.float32)
    fixed = max(
        f1_score(labels, np.tile(one, (4, 1)), average="micro", zero_division=0)
        for one in itertools.product([0, 1], repeat=3)
    )
    nearly = np.array([[1, -1, -1], [1, 1, 1], [-1, 1, -1], [1, 1, -1]], np.float32)
    (found,) = MultiLabel().doubts(nearly, labels, NAMES[:3])
    assert f"the labels 'joy', 'anger' would have ({fixed:.4f})" in found.message


def test_strata_are_the_rarest_label_of_each_row() -> None:
    labels = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0]], np.float32)
    assert MultiLabel().strata(labels).tolist() == [0, 1, 0, 1, 2, 3]


def test_answers_and_the_lines_of_the_card_give_the_same_labels(capsys: pytest.CaptureFixture[str]) -> None:
    logits = np.array([[0.0, -1.0, 3.0, 0.0, -0.1], [-9.0] * 5], np.float32)
    answers = TASK.answer(logits, NAMES)
    assert [one["labels"] for one in answers] == [["joy", "fear"], []]
    assert answers[0]["scores"] == pytest.approx(dict(zip(NAMES, sigmoid(logits[0]), strict=True)), rel=1e-12)
    assert json.loads(json.dumps(answers)) == answers
    assert np.array_equal(TASK.scores(logits)[0], list(answers[0]["scores"].values()))

    about = {**TASK.about(C), "labels": json.dumps(NAMES)}
    exec(TASK.snippet(of_graph=True), {"json": json, "numpy": np, "about": about, "logits": logits[:1]})
    for task in (TASK, MultiLabel(thresholds=None)):
        loaded = SimpleNamespace(task=task, labels=NAMES)
        exec(task.snippet(of_graph=False), {"loaded": loaded, "logits": torch.from_numpy(logits[0])})
    assert capsys.readouterr().out.splitlines() == ["['joy', 'fear']"] * 2 + ["['joy', 'fear', 'never']"]
    assert json.loads(MultiLabel().about(2)["thresholds"]) == [0.5, 0.5]


def test_models_are_chosen_by_what_their_thresholds_will_give(rows: tuple[np.ndarray, np.ndarray]) -> None:
    logits, labels = rows
    low = logits - 10  # at 0.5 no label at all, and the same order
    assert TASK.opened().score(low, labels) == 0
    best = max(
        f1_score(labels, sigmoid(logits) >= limit, average="micro", zero_division=0)
        for limit in sigmoid(np.unique(logits) - 0.01)
    )
    for undecided in (MultiLabel(undecided=True), TASK):  # thresholds that are there are fitted anew
        assert undecided.decided
        assert undecided.selection_score(low, labels) == pytest.approx(best)
    as_it_is = MultiLabel()  # as a model that came without thresholds
    assert not as_it_is.decided
    assert as_it_is.selection_score(low, labels) == 0
    assert not TASK.opened().fitted(low, labels).undecided


def test_two_models_read_at_different_terms_are_told_apart() -> None:
    plain, fitted = MultiLabel(), MultiLabel(thresholds=(0.3, 0.3))
    assert fitted.set_apart(MultiLabel(thresholds=(0.6, 0.6))) is None
    assert plain.set_apart(plain) is None
    for pair in ((plain, fitted), (fitted, plain)):
        warning = pair[0].set_apart(pair[1])
        assert warning is not None
        assert warning.code == "thresholds"
        assert "0.5 (none is stored with it)" in warning.message
        assert "0.3" in warning.message


def test_logits_are_got_back_from_a_sigmoid() -> None:
    logits = np.array([[-90.0, -3.5, 0.0, 2.25, 40.0]], np.float32)
    back = TASK.unactivated(sigmoid(logits).astype(np.float32), "sigmoid", "a graph")
    # float32 keeps 24 bits of 1 - p: at p = 0.9 an error of 1e-6; 1 itself is some large finite number.
    assert np.allclose(back[:, 1:4], logits[:, 1:4], atol=1e-6)
    assert np.isfinite(back).all()
    assert back[0, 0] < -80
    assert back[0, 4] > 80
    with pytest.raises(InputError, match="ends in a softmax: it chooses one label"):
        TASK.unactivated(logits, "softmax", "a graph")
