"""A search by halving, against drops whose limit is known."""

from __future__ import annotations

import pytest

from kdcli.probe import bisection


def amounts_of(found: bisection.Found) -> list[float]:
    return [one.amount for one in found.tries]


def test_bisection_finds_the_largest_share_of_a_monotone_drop() -> None:
    for limit in (0.0, 0.003, 0.02, 0.5):
        tried: list[float] = []

        def attempt(share: float, tried: list[float] = tried) -> tuple[float, float]:
            tried.append(share)
            return share, max(0.0, share - 0.3) ** 2

        best = bisection.search(attempt, limit, safe=0.0, bold=0.95, tries=6)
        assert best is not None
        true = min(0.95, 0.3 + limit**0.5)
        assert best.result == best.amount == max(s for s in tried if max(0.0, s - 0.3) ** 2 <= limit)
        assert best.kept
        assert true - 0.95 / 2**6 <= best.amount <= true  # halved six times
        assert amounts_of(best) == tried
        assert len(tried) == 6


def test_bisection_never_ends_without_a_result() -> None:
    best = bisection.search(lambda share: ("m", 0.1 + share), 0.05, safe=0.0, bold=0.95, tries=5)
    assert best is not None
    assert not best.kept
    assert best.amount == min(share for share in amounts_of(best))


def test_bisection_keeps_a_try_that_held_where_noise_is_not_monotone() -> None:
    drops = iter([0.5, 0.0, 0.9, 0.001])
    best = bisection.search(lambda share: (share, next(drops)), 0.01, safe=0.0, bold=0.8, tries=4)
    assert best is not None
    assert [round(share, 3) for share in amounts_of(best)] == [0.4, 0.2, 0.3, 0.25]
    assert best.amount == pytest.approx(0.25)


def test_a_search_may_try_the_safe_end_first_and_end_there() -> None:
    tried: list[float] = []

    def attempt(budget: float) -> tuple[float, float] | None:
        tried.append(budget)
        return None if budget < 0.3 else (budget, 1 - budget)

    best = bisection.search(attempt, 0.2, safe=0.95, bold=0.05, tries=6, safe_first=True, digits=4)
    assert best is not None
    assert tried[:2] == [0.95, 0.5]
    assert 0.8 <= best.amount == best.result < 0.8 + 0.9 / 2**5 + 1e-4
    assert all(round(one, 4) == one for one in tried)
    tried.clear()
    best = bisection.search(attempt, 0.01, safe=0.95, bold=0.05, tries=6, safe_first=True)
    assert best is not None
    assert (best.kept, tried) == (False, [0.95])


def test_amounts_that_cannot_be_met_have_no_result() -> None:
    assert bisection.search(lambda amount: None, 0.1, safe=0.0, bold=1.0, tries=3) is None


def test_a_drop_of_exactly_the_limit_is_allowed() -> None:
    assert 0.9 - 0.89 > 0.01
    assert bisection.keeps(0.9 - 0.89, 0.01)
    assert not bisection.keeps(0.0101, 0.01)
