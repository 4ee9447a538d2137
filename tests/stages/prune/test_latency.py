"""The table of latencies: what it says between its measured sizes, and what its prices add up to."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from kdcli.families.stack import encoder_layers
from kdcli.models.transforms import factorise
from kdcli.stages.prune import latency as prune_latency
from kdcli.stages.prune.latency import LatencyCurve, LatencyTable, kind_of, sizes
from tests import tiny

HEADS, NEURONS = ("heads", *["dense"] * 4), ("neurons", *["dense"] * 2)


def table(overhead: float = 0.0, rest: float = 0.4) -> LatencyTable:
    """4 heads of 0.05 ms and 48 neurons of 0.002 ms a layer, and what a sub-layer costs before its first unit."""
    return LatencyTable(
        {
            HEADS: LatencyCurve((1, 2, 4), tuple(overhead + 0.05 * n for n in (1, 2, 4))),
            NEURONS: LatencyCurve((8, 24, 48), tuple(overhead + 0.002 * n for n in (8, 24, 48))),
        },
        rest,
    )


def test_examples_of_the_module() -> None:
    assert doctest.testmod(prune_latency).failed == 0


def test_between_measured_counts_a_curve_is_a_straight_line() -> None:
    curve = LatencyCurve((2, 6, 10), (1.0, 2.0, 2.4))
    # By hand: halfway between 2 and 6, a quarter of the way from 6 to 10, and on with the mean slope beyond.
    assert curve.at(4) == pytest.approx(1.5)
    assert curve.at(7) == pytest.approx(2.1)
    assert curve.at(12) == pytest.approx(2.4 + 2 * 1.4 / 8)
    assert curve.at(1) == pytest.approx(1.0)  # fewer than ever measured: the overhead stays
    assert curve.at(0) == 0.0


def test_a_curve_never_falls_whatever_the_noise_says() -> None:
    curve = LatencyCurve((1, 2, 3, 4), (0.5, 0.3, 0.6, 0.4))
    values = [curve.at(n) for n in range(5)]
    assert values == sorted(values)
    assert all(curve.price(n) > 0 for n in range(1, 5))
    flat = LatencyCurve((1, 4), (-0.1, -0.2))  # less than an empty sub-layer: nothing but noise
    assert flat.at(4) == 0.0
    assert flat.price(4) > 0


def test_price_of_a_unit_leaves_out_what_the_sub_layer_costs_without_it() -> None:
    layers = encoder_layers(tiny.checkpoint().model, tiny.checkpoint().family)
    prices = table(overhead=0.3).price(layers)
    assert np.allclose(np.concatenate(prices.heads), 0.05)
    assert np.allclose(np.concatenate(prices.neurons), 0.002)


def test_total_and_removal_add_up() -> None:
    made = tiny.checkpoint()
    layers = encoder_layers(made.model, made.family)
    latency = table()
    dense = 0.4 + 2 * (4 * 0.05 + 48 * 0.002)
    assert latency.total(layers) == pytest.approx(dense)
    assert latency.least(layers, "heads+neurons") == pytest.approx(0.4)
    assert latency.least(layers, "neurons") == pytest.approx(0.4 + 2 * 4 * 0.05)
    remove = latency.remove(layers, "heads+neurons", 0.75)
    assert remove == pytest.approx(0.25 * dense)
    assert latency.remove(layers, "heads", 0.1) == pytest.approx(8 * 0.05)  # not more than there is
    # Cut exactly that much: the units' prices are what the total loses.
    layers[0].keep_heads([0, 2])
    layers[1].keep_neurons(range(20))
    assert latency.total(layers) == pytest.approx(dense - 2 * 0.05 - 28 * 0.002)
    layers[0].keep_heads([])
    assert latency.total(layers) == pytest.approx(dense - 4 * 0.05 - 28 * 0.002)
    assert [len(x) for x in latency.price(layers).heads] == [0, 4]


def test_an_anchored_table_meets_both_ends() -> None:
    made = tiny.checkpoint()
    layers = encoder_layers(made.model, made.family)
    anchored = table(overhead=0.1).anchored(layers, 2.0)
    assert anchored.total(layers) == pytest.approx(2.0)
    assert anchored.least(layers, "heads+neurons") == pytest.approx(0.4)
    assert table().anchored(layers, 0.3) == table()  # less than the rest: that was noise


def test_a_factorised_sub_layer_is_on_a_curve_of_its_own() -> None:
    made = tiny.checkpoint()
    layers = encoder_layers(made.model, made.family)
    factorise(made.model, "bert.encoder.layer.1.intermediate.dense", 5)
    assert kind_of(layers[0], "neurons") == NEURONS
    assert kind_of(layers[1], "neurons") == ("neurons", "rank 5", "dense")
    assert kind_of(layers[1], "heads") == HEADS


@pytest.mark.parametrize(("most", "points"), [(1, 4), (2, 4), (12, 4), (1536, 5), (5, 2)])
def test_sizes_end_with_all_and_never_repeat(most: int, points: int) -> None:
    found = sizes(most, points)
    assert found[-1] == most
    assert found[0] >= 1
    assert found == sorted(set(found))
    assert len(found) <= points
