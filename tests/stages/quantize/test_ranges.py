"""Ranges from a stream, against everything at once in plain NumPy and against onnxruntime's search."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch

from kdcli.errors import InputError
from kdcli.stages.quantize.ranges import (
    HALF,
    Affine,
    Histogram,
    affine,
    divergence,
    find_range,
    squared_error,
)

RULES = ("minmax", "percentile", "entropy", "mse")


def gelu_like(seed: int = 0, count: int = 20_000) -> np.ndarray:
    """Values as an activation has them: one long tail, one short, a few outliers."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(size=count), rng.standard_t(3, size=count // 10) * 2, [37.5, -0.125]])
    return (x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))).astype(np.float32)


def filled(values: np.ndarray, parts: int = 1) -> Histogram:
    histogram = Histogram()
    for part in np.array_split(values, parts):
        histogram.add(torch.from_numpy(part))
    return histogram


def rounded(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Affine quantisation to uint8 and back, from its definition."""
    scale = (high - low) / 255
    zero = round(-low / scale)
    return (np.clip(np.round(values.astype(np.float64) / scale) + zero, 0, 255) - zero) * scale


class TestHistogram:
    def test_counts_are_those_of_the_definition(self) -> None:
        values = gelu_like()
        histogram = filled(values, 7)
        # floor(x / width), in exact arithmetic because width is a power of two
        index = np.floor(values.astype(np.float64) / histogram.width).astype(int) + HALF
        assert np.array_equal(histogram.counts, np.bincount(index, minlength=2 * HALF))
        assert (histogram.low, histogram.high) == (values.min(), values.max())
        # the narrowest power of two that holds every value
        assert np.abs(values).max() < HALF * histogram.width <= 2 * np.abs(values).max()

    def test_neither_order_nor_batches_matter(self) -> None:
        values = gelu_like(1)
        one = filled(values)
        for parts, other in ((2, values), (113, np.sort(values)), (7, np.sort(values)[::-1].copy())):
            again = filled(other, parts)
            assert np.array_equal(one.counts, again.counts)
            assert all(find_range(one, rule) == find_range(again, rule) for rule in RULES)

    def test_growing_by_many_steps_loses_nothing(self) -> None:
        histogram = Histogram()
        for value in (0.0, 1e-30, -1e-30, 1e-3, -2.0, 3e38, 1.0):
            histogram.add(torch.tensor([value]))
        assert histogram.counts.sum() == histogram.count == 7
        assert find_range(histogram, "minmax") == (-2.0, pytest.approx(3e38, rel=1e-7))
        # everything but the giant lies in the two bins at zero
        assert histogram.counts[HALF - 1 : HALF + 1].sum() == 6

    def test_memory_stays_flat(self) -> None:
        histogram = Histogram()
        size = histogram.counts.nbytes
        histogram.add(torch.randn(1000))
        tracemalloc.start()
        for _ in range(200):
            histogram.add(torch.randn(1000) * 3)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert histogram.counts.nbytes == size == 16 * HALF
        assert held < 3 * size  # a list of 200 batches would hold 800 kB more
        assert histogram.count == 201_000

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_values_without_a_range_are_refused(self, bad: float) -> None:
        histogram = Histogram()
        with pytest.raises(InputError, match="NaN or infinite"):
            histogram.add(torch.tensor([1.0, bad]))
        assert histogram.count == 0

    @pytest.mark.parametrize("rule", RULES)
    def test_nothing_seen_is_refused(self, rule: str) -> None:
        histogram = Histogram()
        histogram.add(torch.empty(0))
        with pytest.raises(InputError, match="without rows"):
            find_range(histogram, rule)

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("value", [0.0, 2.5, -1.75])
    def test_a_constant_has_a_range_with_zero(self, rule: str, value: float) -> None:
        low, high = find_range(filled(np.full(10, value, np.float32)), rule)
        assert (low, high) == (min(0.0, value), max(0.0, value))


class TestAffine:
    @pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (-1e-3, 1e3)])
    def test_zero_is_exact_and_the_range_is_covered_to_half_a_step(self, low: float, high: float) -> None:
        found = affine(low, high)
        assert 0 <= found.zero <= 255
        # rounding the zero point moves both ends by at most half a step
        assert abs(found.low - min(low, 0)) <= found.scale * 0.501
        assert abs(found.high - max(high, 0)) <= found.scale * 0.501
        assert found.low <= 0 <= found.high

    def test_an_empty_range_has_scale_one(self) -> None:
        assert affine(0.0, 0.0) == affine(-1e-42, 1e-42) == Affine(1.0, 0)

    def test_it_is_torchs(self) -> None:
        x = torch.linspace(-3, 5, 1001)
        found = affine(-2.0, 4.0)
        theirs = torch.fake_quantize_per_tensor_affine(x, found.scale, found.zero, 0, 255)
        # half a step of 0.0235, and float32 against float64 at the ties
        ours = rounded(x.numpy(), -2.0, 4.0)
        assert np.abs(theirs.numpy() - ours).max() < found.scale + 1e-6
        assert (np.abs(theirs.numpy() - ours) < 1e-5).mean() > 0.99


class TestRules:
    def test_minmax(self) -> None:
        values = gelu_like()
        assert find_range(filled(values, 5), "minmax") == (values.min(), values.max())
        assert find_range(filled(np.abs(values) + 1), "minmax")[0] == 0

    @pytest.mark.parametrize("percentile", [99.0, 99.9, 99.99, 100.0])
    def test_percentile_is_numpys_to_one_bin(self, percentile: float) -> None:
        values = gelu_like(2)
        histogram = filled(values, 3)
        low, high = find_range(histogram, "percentile", percentile=percentile)
        tail = (100 - percentile) / 2
        want_low = np.percentile(values, tail, method="lower")
        want_high = np.percentile(values, 100 - tail, method="higher")
        assert want_low - histogram.width <= low <= want_low + histogram.width
        assert want_high - histogram.width <= high <= want_high + histogram.width
        left_out = ((values < low) | (values > high)).mean()
        assert left_out <= (100 - percentile) / 100 + 1 / len(values)

    def test_mse_is_the_best_of_a_plain_search(self) -> None:
        values = gelu_like(3, 4000)
        low, high = find_range(filled(values), "mse")
        found = ((rounded(values, low, high) - values) ** 2).sum()
        grid = [
            ((rounded(values, values.min() * a, values.max() * b) - values) ** 2).sum()
            for a in np.linspace(0.25, 1, 13)
            for b in np.linspace(0.02, 1, 99)
        ]
        # 128 positions an end, centres of bins for values: within 2% of the best of another grid
        assert found <= min(grid) * 1.02
        assert found < ((rounded(values, values.min(), values.max()) - values) ** 2).sum()

    def test_squared_error_by_hand(self) -> None:
        values, counts = np.array([-0.3, 0.0, 0.49, 9.0]), np.array([2, 100, 1, 3])
        # levels -1, 0, 1, 2: -0.3 -> 0, 0.49 -> 0, 9 -> 2
        expected = 2 * 0.3**2 + 0 + 0.49**2 + 3 * 7.0**2
        assert squared_error(values, counts, Affine(1.0, 1, 4)) == pytest.approx(expected, rel=1e-12)

    def test_divergence_by_hand(self) -> None:
        counts = np.array([4, 0, 2, 2, 6, 10, 1, 1])
        # four levels of two bins: (4, 0) (4 / 2, 4 / 2) (8, 8) (1, 1); two below and one above join P alone
        p = np.array([6, 0, 2, 2, 6, 10, 1, 2], dtype=float)
        q = np.array([4, 0, 2, 2, 8, 8, 1, 1], dtype=float)
        for d in (p, q):
            d[d > 0] -= 1e-4 / 7
            d[1] = 1e-4
            d /= d.sum()
        filled_bins = [0, 2, 3, 4, 5, 6, 7]
        expected = sum(p[i] * math.log(p[i] / q[i]) for i in filled_bins)
        assert divergence(counts, 2, 1, 4) == pytest.approx(expected, rel=1e-12)

    def test_no_information_is_lost_when_every_bin_has_its_level(self) -> None:
        counts = np.array([1, 5, 0, 7, 2, 2, 9, 1])
        assert divergence(counts, 0, 0, 8) == pytest.approx(0, abs=1e-15)
        assert divergence(counts, 0, 0, 4) > 0
        assert divergence(counts, 9, 0, 8) > 0

    def test_entropy_is_at_least_as_good_as_onnxruntimes_threshold(self) -> None:
        from onnxruntime.quantization.calibrate import HistogramCollector

        rng = np.random.default_rng(4)
        values = np.concatenate([rng.laplace(size=30_000), [25.0, -25.0]]).astype(np.float32)
        histogram = filled(values)
        low, high = find_range(histogram, "entropy")
        used = np.flatnonzero(histogram.counts)
        counts = histogram.counts
        # Theirs has one threshold for both signs; it reads a histogram that is symmetric about zero.
        bins = 2001
        edges = np.linspace(-25, 25, bins + 1)
        collector = HistogramCollector.__new__(HistogramCollector)
        theirs = collector.get_entropy_threshold(
            (np.histogram(values, edges)[0], edges, -25.0, 25.0, 25.0), 255
        )
        bound = max(float(np.asarray(end)) for end in theirs[:2])
        assert 4 < bound < 25

        def cost(low: float, high: float) -> float:
            start = max(int(np.floor(low / histogram.width)) + HALF, used[0])
            stop = min(int(np.ceil(high / histogram.width)) + HALF, used[-1] + 1)
            return divergence(counts[start:stop], counts[:start].sum(), counts[stop:].sum(), 256)

        # the measure is the paper's, the search over two ends must not be worse than theirs over one
        assert cost(low, high) <= cost(-bound, bound) * 1.001
        assert cost(low, high) < cost(-25, 25)
        assert -25 < low < -4
        assert 4 < high < 25

    @pytest.mark.parametrize("rule", ["percentile", "entropy", "mse"])
    def test_an_outlier_does_not_set_the_range(self, rule: str) -> None:
        # 400,000 roundings at a step of 30 / 127 cost more than cutting one value off at about 14
        values = np.concatenate([np.random.default_rng(5).normal(size=400_000), [30.0]]).astype(np.float32)
        histogram = filled(values)
        assert find_range(histogram, "minmax")[1] == 30
        assert 3 < find_range(histogram, rule)[1] < 20

    @pytest.mark.parametrize("rule", RULES)
    def test_a_range_scales_with_the_values(self, rule: str) -> None:
        values = gelu_like(6, 3000)
        low, high = find_range(filled(values), rule)
        assert find_range(filled(values * 8), rule) == pytest.approx((low * 8, high * 8), rel=1e-6)
        assert values.min() <= low <= 0 <= high <= values.max()
