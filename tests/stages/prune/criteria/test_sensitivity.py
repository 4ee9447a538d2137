"""Sensitivity: shares against brute force, nothing lost where units are redundant, better than Taylor."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kdcli.stages.prune.criteria import sensitivity, taylor
from kdcli.stages.prune.criteria.sensitivity import SublayerCurve, interpolate, keep_one, share_out
from tests import tiny
from tests.stages.prune.criteria.refitting import (
    batches,
    divergence,
    doubled,
    halves_and_beats_taylor,
    job_of,
)

CONFIG = sensitivity.Config(ridge=1e-5)


def curves(seed: int = 0, units: int = 6) -> list[SublayerCurve]:
    """Three convex curves with units of different prices."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(3):
        rise = np.concatenate([[0.0], np.cumsum(np.sort(rng.random(units)))])
        made.append(SublayerCurve(n, "neurons", rise, (n + 1.0) * np.arange(units + 1)))
    return made


@pytest.mark.parametrize("remove", [3.0, 11.0, 20.0, 36.0])
def test_shares_are_the_best_by_brute_force_up_to_one_unit(remove: float) -> None:
    given = curves()
    found = share_out(given, remove)
    ks = [found[c.layer, "neurons"] for c in given]
    assert sum(c.saved[k] for c, k in zip(given, ks, strict=True)) >= remove - 1e-6
    total = sum(c.rise[k] for c, k in zip(given, ks, strict=True))

    def best(target: float) -> float:
        options = itertools.product(range(7), repeat=3)
        return min(
            sum(c.rise[k] for c, k in zip(given, some, strict=True))
            for some in options
            if sum(c.saved[k] for c, k in zip(given, some, strict=True)) >= target - 1e-9
        )

    # What was saved beyond the target, at most one unit, is the only thing that may be paid for.
    saved = sum(c.saved[k] for c, k in zip(given, ks, strict=True))
    assert best(remove) <= total + 1e-12
    assert total <= best(saved) + 1e-12
    assert saved - remove < 3.0


def test_one_head_and_one_neuron_stay_somewhere() -> None:
    given = [
        SublayerCurve(n, part, np.array([0.0, 1.0 + n]), np.array([0.0, 1.0]))
        for n in (0, 1)
        for part in ("heads", "neurons")
    ]
    limits = keep_one(given)
    assert limits == [1, 1, 0, 0]  # where their loss would hurt most
    found = share_out(given, 4.0, limits)
    assert found == {(0, "heads"): 1, (0, "neurons"): 1, (1, "heads"): 0, (1, "neurons"): 0}


def test_the_rise_passes_through_what_was_measured_and_never_falls() -> None:
    error = np.array([0.0, 0.1, 0.3, 0.9, 2.0, 5.0])
    rise = interpolate(error, [2, 4, 5], [0.02, 0.5, 0.4])  # the last one is noise: not below the one before
    assert rise[0] == 0
    np.testing.assert_allclose(rise[[2, 4, 5]], [0.02, 0.5, 0.5])
    assert (np.diff(rise) >= 0).all()
    assert rise[1] == pytest.approx(0.02 * 0.1 / 0.3)
    power = np.log(0.5 / 0.02) / np.log(2.0 / 0.3)
    assert rise[3] == pytest.approx(0.02 * (0.9 / 0.3) ** power)


@pytest.mark.parametrize("structure", ["neurons", "heads"])
def test_redundant_units_cost_nothing(structure: str) -> None:
    """Of every pair of equal units one can go; its twin takes over. Taylor sees no pairs and loses."""
    dense, made, other = doubled(), doubled(), doubled()
    found = sensitivity.prune(job_of(made, structure, 0.5), CONFIG)
    kept = found.cut.heads if structure == "heads" else found.cut.neurons
    assert all({u // 2 for u in units} == set(range(len(units))) for units in kept.values())
    fresh = batches(seed=9)
    lost = divergence(dense, made, fresh)
    taylor.prune(job_of(other, structure, 0.5), taylor.Config(samples=64))
    assert lost < 1e-6 < divergence(dense, other, fresh)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_half_of_the_cost_goes_and_taylor_loses_more(family: str) -> None:
    halves_and_beats_taylor(family, lambda job: sensitivity.prune(job, CONFIG))


def test_the_table_has_every_sub_layer_at_every_level() -> None:
    made = tiny.checkpoint()
    found = sensitivity.prune(job_of(made, "heads+neurons", 0.3), CONFIG)
    table = found.detail["sensitivity"]
    assert {(r["layer"], r["part"]) for r in table} == {(i, p) for i in (0, 1) for p in ("heads", "neurons")}
    for row in table:
        assert row["kl"] >= 0
        assert 0 < row["removed"] <= 1
    assert sum(r["removed"] == 1.0 for r in table) == 4


def test_nothing_to_remove_changes_nothing() -> None:
    dense, made = tiny.checkpoint(), tiny.checkpoint()
    found = sensitivity.prune(job_of(made, "heads+neurons", 0.0), CONFIG)
    assert not found.cut.heads
    assert not found.cut.neurons
    assert all(
        torch.equal(a, b)
        for a, b in zip(dense.model.state_dict().values(), made.model.state_dict().values(), strict=True)
    )
