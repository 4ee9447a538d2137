"""Numbers as answers, against SciPy, scikit-learn, transformers' own loss, and naive rankings."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import mean_squared_error, ndcg_score, r2_score, roc_auc_score
from transformers import BertConfig, BertForSequenceClassification

from kdcli.errors import InputError
from kdcli.tasks import intervals, ranking
from kdcli.tasks.regression import Regression
from tests.tasks.references import curvature, jackknife, spread

N = 200
TASK = Regression()


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions with ties, labels 0 to 5 with ties, and queries of 1 to 12 rows in any order."""
    generator = np.random.default_rng(0)
    x = generator.normal(2.5, 1.2, N)
    labels = np.clip(x + generator.normal(0, 0.8, N), 0, 5).round(1).astype(np.float32)
    labels[generator.random(N) < 0.3] = 0
    return x.round(1).astype(np.float32)[:, None], labels, generator.integers(0, 40, N)


# Tensors.


def test_the_loss_and_its_gradient_are_half_of_those_of_transformers() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        num_labels=1, problem_type=TASK.problem_type,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    ids, labels = torch.randint(5, 20, (6, 4)), torch.rand(6) * 5
    theirs = model(input_ids=ids, labels=labels)
    (gradient,) = torch.autograd.grad(theirs.loss, model.classifier.weight)
    ours = TASK.loss(model(input_ids=ids).logits, labels)
    assert ours.shape == (6,)
    assert torch.allclose(2 * ours.mean(), theirs.loss, rtol=1e-6)  # float32
    assert torch.allclose(
        2 * torch.autograd.grad(ours.mean(), model.classifier.weight)[0], gradient, rtol=1e-4
    )


def test_a_row_without_a_label_has_no_loss_and_no_gradient() -> None:
    logits = torch.randn(3, 1, requires_grad=True)
    labels = torch.from_numpy(np.concatenate([TASK.unlabelled(1, 1), np.ones(2, np.float32)]))
    loss = TASK.loss(logits, labels)
    loss.sum().backward()
    assert logits.grad is not None
    assert (loss[0], logits.grad[0]) == (0, 0)
    assert torch.allclose(logits.grad[1:, 0], logits.detach()[1:, 0] - 1)
    assert TASK.known(labels.numpy()).tolist() == [False, True, True]


def test_the_divergence_is_the_kl_of_two_gaussians() -> None:
    before, after = torch.randn(5, 1), torch.randn(5, 1)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(before[:, 0], 1.0), torch.distributions.Normal(after[:, 0], 1.0)
    )
    assert torch.allclose(TASK.divergence(after, before), kl, atol=1e-6)
    assert torch.equal(TASK.divergence(after, before), TASK.loss(after, TASK.own(before)))
    assert torch.allclose(TASK.divergence(after, before, "sum"), kl.sum(), rtol=1e-5)
    assert torch.allclose(TASK.loss(after, TASK.own(before), "sum"), kl.sum(), rtol=1e-5)
    assert torch.allclose(9 * TASK.divergence(after / 3, before / 3), kl, atol=1e-6)
    assert not TASK.divergence(before, before).any()


def test_curved_directions_have_the_hessian_of_the_divergence() -> None:
    exact, drawn = curvature(TASK, torch.tensor([0.7], dtype=torch.float64))
    assert exact.tolist() == [[1.0]]
    assert drawn.item() == pytest.approx(1, abs=5 * (2 / 200_000) ** 0.5)


def test_drawn_numbers_are_gaussian_about_the_prediction() -> None:
    drawn = TASK.drawn(torch.full((20_000, 1), 3.0), torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000,)
    assert drawn.mean().item() == pytest.approx(3, abs=4 / 20_000**0.5)
    assert drawn.std().item() == pytest.approx(1, abs=4 / 40_000**0.5)


def test_the_mean_answer_and_a_models_own() -> None:
    every = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [6.0]])]
    assert TASK.combined(every).tolist() == [[2.0], [4.0]]
    assert TASK.combined(every, [0.25, 0.75]).tolist() == [[2.5], [5.0]]
    assert TASK.scores(every[0].numpy()).tolist() == [[1.0], [2.0]]
    assert TASK.own(every[0]).tolist() == [1.0, 2.0]


# Metrics.


def naive_pair_order(x: np.ndarray, y: np.ndarray) -> float:
    pairs = [(x[i] - x[j], y[i] - y[j]) for i, j in itertools.combinations(range(len(x)), 2) if y[i] != y[j]]
    return float(np.mean([0.5 if p == 0 else float(p * q > 0) for p, q in pairs]))


def by_others(metric: str, x: np.ndarray, y: np.ndarray) -> float:
    if metric == "pair_order":
        pairs = len(y) * (len(y) - 1) / 2
        _, equal = np.unique(y, return_counts=True)
        _, equal_x = np.unique(x, return_counts=True)
        different, different_x = (pairs - (e * (e - 1) / 2).sum() for e in (equal, equal_x))
        # tau-b times its denominator is concordant less discordant pairs.
        return float(0.5 + kendalltau(x, y).statistic * np.sqrt(different * different_x) / different / 2)
    return {
        "spearman": lambda: spearmanr(x, y).statistic,
        "pearson": lambda: np.corrcoef(x, y)[0, 1],
        "rmse": lambda: np.sqrt(mean_squared_error(y, x)),
        "r2": lambda: r2_score(y, x),
    }[metric]()


POINTWISE = ("spearman", "pearson", "rmse", "r2", "pair_order")


def test_every_metric_is_that_of_scipy_and_scikit_learn(
    rows: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    logits, labels, _ = rows
    x, y = logits[:, 0].astype(float), labels.astype(float)
    found = TASK.measure(logits, labels, "test")
    assert tuple(found) == POINTWISE
    for name, metric in found.items():
        assert metric.value == pytest.approx(by_others(name, x, y), rel=1e-9), name
        assert (metric.n, metric.split, metric.higher_is_better) == (N, "test", name != "rmse")
        assert Regression(name).score(logits, labels) == (-metric.value if name == "rmse" else metric.value)
    assert found["pair_order"].value == pytest.approx(naive_pair_order(x, y), rel=1e-12)


@pytest.mark.parametrize("metric", POINTWISE)
def test_errors_are_those_of_resampled_rows(
    metric: str, rows: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    x, y = rows[0][:, 0].astype(float), rows[1].astype(float)
    found = TASK.measure(rows[0], rows[1], "test")[metric]
    # 3.5% of the naive one and 1.6% of ours, four of them, and 1 / sqrt(N) = 7% for what is linear.
    naive = spread(lambda at: by_others(metric, x[at], y[at]), N)
    assert found.stderr == pytest.approx(naive, rel=4 * 0.039 + 0.07)
    assert found.ci95 is not None
    assert found.ci95[0] < found.value < found.ci95[1]


@pytest.mark.parametrize("metric", ["spearman", "pair_order"])
def test_influence_is_what_a_row_changes(
    metric: str, rows: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    x, y = rows[0][:, 0].astype(float), rows[1].astype(float)
    one = {"spearman": ranking.spearman, "pair_order": ranking.pair_order}[metric](x, y)
    influence = one.sums[:, 0] * (1 - one.value**2 if metric == "spearman" else 1)
    removed = jackknife(lambda at: by_others(metric, x[at], y[at]), N)
    # Right to first order: what is left is of the order 1 / N of the largest.
    assert np.abs(influence - removed).max() < 6 / N * np.abs(influence).max()
    assert np.corrcoef(influence, removed)[0, 1] > 0.999


def test_the_interval_of_spearman_is_near_that_of_bonett_and_wright() -> None:
    """Bonett and Wright 2000: artanh(r) has the variance (1 + r^2 / 2) / (n - 3) for normal variables."""
    n = 2000
    x, e = np.random.default_rng(0).normal(size=(2, n))
    found = TASK.measure((x + e)[:, None], x, "test")["spearman"]
    assert found.ci95 is not None
    half = 1.96 * np.sqrt((1 + found.value**2 / 2) / (n - 3))
    low, high = np.tanh(np.arctanh(found.value) + np.array([-half, half]))
    # Their variance is an approximation, good to about 5%; percentiles of 2,000 are known to 3% of the half.
    assert found.ci95 == (
        pytest.approx(low, abs=0.15 * (high - low) / 2),
        pytest.approx(high, abs=0.15 * (high - low) / 2),
    )


def test_perfect_reversed_and_binary_orders() -> None:
    y = np.arange(20.0)
    for sign in (1, -1):
        found = TASK.measure(sign * y[:, None], y, "test")
        assert found["spearman"].value == pytest.approx(sign, rel=1e-12)
        assert found["pearson"].value == pytest.approx(sign, rel=1e-12)
        assert found["pair_order"].value == (sign == 1)
        assert found["spearman"].stderr is None
    binary = (y > 12).astype(float)
    x = np.random.default_rng(0).integers(0, 9, 20).astype(float)
    assert ranking.pair_order(x, binary).value == pytest.approx(roc_auc_score(binary, x), rel=1e-12)


def test_a_constant_prediction_has_no_order_and_is_doubted() -> None:
    y = np.random.default_rng(0).normal(size=30).astype(np.float32)
    same = np.full((30, 1), 0.1, np.float32)
    found = TASK.measure(same, y, "test")
    assert (found["spearman"].value, found["pearson"].value, found["pair_order"].value) == (0, 0, 0.5)
    assert found["spearman"].stderr is found["pearson"].ci95 is None
    (doubt,) = TASK.doubts(same, y, ["score"])
    assert (doubt.code, "0.1:" in doubt.message) == ("one-answer", True)
    assert TASK.doubts(same, y, [], of_input=True)[0].code == "input-one-answer"
    assert TASK.doubts(y[:, None], y, []) == []
    # And of labels: nothing can be right.
    found = TASK.measure(y[:, None], same[:, 0], "test")
    assert [found[name].value for name in ("spearman", "pearson", "r2", "pair_order")] == [0, 0, 0, 0.5]
    assert TASK.doubts(y[:, None], same[:, 0], [])[0].code == "one-label"


def test_a_single_row_has_values() -> None:
    found = TASK.measure(np.array([[1.0]]), np.array([3.0]), "test")
    assert (found["spearman"].value, found["rmse"].value) == (0, 2)
    assert TASK.same(np.array([[1.0]]), np.array([[2.0]])) == 1


def test_answers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="1 of 2 rows of 'test' is not a finite number"):
        TASK.measure(np.array([[0.0], [np.inf]]), np.ones(2), "test")


def test_a_hundred_thousand_rows_are_counted_exactly() -> None:
    x = np.random.default_rng(0).integers(0, 1000, 100_000).astype(float)
    y = (x + np.random.default_rng(1).integers(0, 500, 100_000)).round(-1)
    assert ranking.pair_order(x, y).value == pytest.approx(by_others("pair_order", x, y), rel=1e-9)


# Rankings.


def naive_mrr(scores: np.ndarray, labels: np.ndarray, cut: int = 10) -> float:
    """Mean over every order of the rows that the scores allow."""
    found = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[i] >= scores[j] for i, j in itertools.pairwise(order)):
            found.append(next((1 / (r + 1) for r, i in enumerate(order[:cut]) if labels[i] > 0), 0.0))
    return float(np.mean(found))


def test_ndcg_is_that_of_scikit_learn(rows: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    logits, labels, queries = rows
    found = TASK.measure(logits, labels, "test", queries)["ndcg_at_10"]
    each = []
    for query in np.unique(queries):
        of = queries == query
        if of.sum() > 1 and labels[of].any():
            each.append(ndcg_score([labels[of]], [logits[of, 0]], k=10))
    assert found.n == len(each)
    assert found.value == pytest.approx(np.mean(each), rel=1e-9)
    assert found.stderr == pytest.approx(np.std(each) / np.sqrt(len(each)), rel=4 * 0.016)


@pytest.mark.parametrize("seed", range(5))
def test_mrr_is_the_mean_over_the_orders_that_the_scores_allow(seed: int) -> None:
    generator = np.random.default_rng(seed)
    queries = generator.integers(0, 12, 50)
    keep = np.concatenate([np.flatnonzero(queries == q)[:6] for q in range(12)])
    generator.shuffle(keep)
    queries, scores, labels = (
        queries[keep],
        generator.integers(0, 3, len(keep)),
        generator.integers(-3, 2, len(keep)),
    )
    each = [
        naive_mrr(scores[of], labels[of])
        for of in (queries == q for q in np.unique(queries))
        if of.sum() > 1 and (labels[of] > 0).any()
    ]
    found = ranking.mrr(scores.astype(float), labels.astype(float), queries)
    assert (found.value, found.n) == (pytest.approx(np.mean(each), rel=1e-12), len(each))


def test_only_the_first_ten_ranks_count() -> None:
    scores, queries = -np.arange(12.0), np.zeros(12)
    for rank in (9, 10):
        labels = (np.arange(12) == rank).astype(float)
        assert ranking.mrr(scores, labels, queries).value == pytest.approx(0.1 if rank == 9 else 0)
        assert (ranking.ndcg(scores, labels, queries).value > 0) == (rank == 9)
    # One right row among 12 with one score: each of the ten ranks has the chance 1 / 12.
    expected = sum(1 / r for r in range(1, 11)) / 12
    assert ranking.mrr(np.zeros(12), labels, queries).value == pytest.approx(expected, rel=1e-12)


def test_queries_that_no_order_is_right_or_wrong_for_are_left_out() -> None:
    queries = np.array(["a", "a", "b", "c", "c"])
    labels, scores = np.array([0.0, 1, 1, 0, 0]), np.array([1.0, 2, 0, 1, 2])
    for metric in (ranking.ndcg, ranking.mrr):
        found = metric(scores, labels, queries)
        assert (found.value, found.n) == (1.0, 1)
        assert metric(scores, np.zeros(5), queries).value == 0


def test_ranking_metrics_need_queries() -> None:
    with pytest.raises(InputError, match="mrr_at_10 orders the rows of a query"):
        Regression("mrr_at_10").measure(np.ones((2, 1)), np.ones(2), "test")
    with pytest.raises(InputError) as refused:
        Regression("ndcg_at_10").score(np.ones((2, 1)), np.ones(2))
    assert refused.value.hint is not None
    assert "--columns query=NAME" in refused.value.hint
    # Without a query that can be ranked there is nothing to report: 0 would be no worse after any compression.
    logits, single = np.arange(4, dtype=np.float32)[:, None], np.arange(4)
    for labels, queries in (
        (np.arange(4.0), single),
        (np.zeros(4), single // 2),
        (-np.arange(4.0), single // 2),
    ):
        assert "ndcg_at_10" not in Regression().measure(logits, labels, "test", queries)
        assert "mrr_at_10" not in Regression().compare(logits, logits, labels, queries).differences
        with pytest.raises(InputError, match="none here has two rows, one with a label above 0"):
            Regression("ndcg_at_10").measure(logits, labels, "test", queries)


# One answer for all rows.


@pytest.mark.parametrize("metric", POINTWISE)
def test_the_blind_answer_is_the_mean_label(
    metric: str, rows: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    labels = rows[1].astype(float)
    task = Regression(metric)
    blind = task.blind(labels)
    assert blind is not None
    mean = np.full((N, 1), labels.mean())
    assert blind.score == pytest.approx(task.score(mean, labels), abs=1e-12)
    assert blind.loss == pytest.approx(
        float(task.loss(torch.from_numpy(mean), torch.from_numpy(labels)).mean())
    )
    if metric == "rmse":
        chance = [
            task.score(mean[:N], labels[at]) for at in np.random.default_rng(0).integers(0, N, (400, N))
        ]
    elif metric != "r2":
        chance = [task.score(np.random.default_rng(seed).normal(size=(N, 1)), labels) for seed in range(400)]
    else:
        assert blind.noise == 0
        return
    # Two standard errors of chance, for the share of pairs at most.
    assert 2 * np.std(chance) <= blind.noise * (1 + 4 * 0.035)
    assert blind.noise <= 2 * np.std(chance) * (2 if metric == "pair_order" else 1 + 4 * 0.035)
    assert task.blind(np.ones(3)) is None


# Two models.


@pytest.mark.parametrize("metric", ["spearman", "ndcg_at_10"])
def test_a_comparison_is_paired(metric: str, rows: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    logits, labels, queries = rows
    task = Regression(metric)
    after = (logits + np.random.default_rng(1).normal(0, 0.4, logits.shape)).astype(np.float32)
    found = task.compare(logits, after, labels, queries)
    one, two = task.measure(logits, labels, "t", queries), task.measure(after, labels, "t", queries)
    for name in task.metrics:
        assert found.differences[name] == pytest.approx(two[name].value - one[name].value, abs=1e-12)

    groups = [np.flatnonzero(queries == q) for q in np.unique(queries)]

    def difference(at: np.ndarray) -> float:
        drawn = np.concatenate([groups[i] for i in at])
        own = np.repeat(
            np.arange(len(at)), [len(groups[i]) for i in at]
        )  # a query drawn twice is two queries
        return task.score(after[drawn], labels[drawn], own) - task.score(logits[drawn], labels[drawn], own)

    assert found.ci95 is not None
    naive = 2 * 1.96 * spread(difference, len(groups))
    # As for multi-label, and 1 / sqrt(40 queries) = 16% for what is linear.
    assert found.ci95[1] - found.ci95[0] == pytest.approx(
        naive, rel=4 * 0.043 + (0.16 if metric == "spearman" else 0)
    )
    assert task.compare(logits, after, labels, queries) == found  # a fixed seed
    assert task.compare(logits, -logits, labels, queries).p_value == 2 / (intervals.RESAMPLES + 1)
    same = task.compare(logits, logits, labels, queries)
    assert (same.p_value, same.agreement, same.differences[metric]) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("metric", ["rmse", "pearson"])
def test_each_model_is_read_through_its_own_link(metric: str) -> None:
    z = np.random.default_rng(0).normal(0, 3, 50).astype(np.float32)[:, None]
    labels = (1 / (1 + np.exp(-z[:, 0]))).astype(np.float32)
    sigmoid, plain = Regression(metric, "sigmoid"), Regression(metric)
    # The same numbers, one model giving them, the other their logit; so is a bad one no better for being read wrongly.
    same = plain.compare(z, labels[:, None], labels, first=sigmoid)
    assert same.differences[metric] == pytest.approx(0, abs=1e-6)  # the labels are float32
    assert same.ci95 == pytest.approx((0, 0), abs=1e-6)
    assert same.agreement == 1
    worse = sigmoid.compare(labels[:, None], labels[:, None], labels, first=plain)
    own = sigmoid.measure(labels[:, None], labels, "t")[metric].value
    other = plain.measure(labels[:, None], labels, "t")[metric].value
    assert worse.differences[metric] == pytest.approx(own - other, abs=1e-12)
    assert worse.ci95 is not None
    assert worse.ci95[0] <= own - other <= worse.ci95[1]


@pytest.mark.parametrize("seed", range(5))
def test_agreement_is_the_share_of_pairs_in_the_same_order(seed: int) -> None:
    x, y = np.random.default_rng(seed).integers(0, 6, (2, 40)).astype(np.float32)
    pairs = itertools.combinations(range(40), 2)
    naive = np.mean([1 - abs(np.sign(x[i] - x[j]) - np.sign(y[i] - y[j])) / 2 for i, j in pairs])
    assert TASK.same(x[:, None], y[:, None]) == pytest.approx(naive, rel=1e-12)
    assert TASK.same(x[:, None], 3 * x[:, None] + 1) == 1
    assert TASK.same(y[:, None], x[:, None]) == pytest.approx(naive, rel=1e-12)


# What people get.


def test_answers_and_the_lines_of_the_card_give_the_number(capsys: pytest.CaptureFixture[str]) -> None:
    logits = np.array([[0.5], [-2.25]], np.float32)
    assert TASK.answer(logits, ["score"]) == [{"score": 0.5}, {"score": -2.25}]
    exec(TASK.snippet(of_graph=True), {"logits": logits[:1]})
    exec(TASK.snippet(of_graph=False), {"logits": torch.from_numpy(logits[1])})
    assert capsys.readouterr().out == "0.5\n-2.25\n"
    assert (TASK.about(1), TASK.outputs(["score"]), TASK.strata(logits[:, 0])) == (
        {"task": "regression", "activation": "identity"},
        1,
        None,
    )
    assert TASK.fitted(logits, logits[:, 0]) is TASK
