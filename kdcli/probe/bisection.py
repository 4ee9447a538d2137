"""``--max-drop`` as a search by halving: how far a model can be made smaller while its score falls by no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

JUDGED_ROWS = 2000
"""Validation rows that judge a search, at most."""

Result = TypeVar("Result")


def keeps(drop: float, allowed: float) -> bool:
    """Whether a drop is allowed. One of exactly the limit is: 0.9 - 0.89 must not fail 0.01 for its last digit."""
    return drop <= allowed + 1e-12


@dataclass(frozen=True)
class Try:
    """One amount that was tried."""

    amount: float
    drop: float | None  # None where the amount cannot be met
    kept: bool


@dataclass(frozen=True)
class Found(Generic[Result]):
    """Where a search ended."""

    result: Result
    amount: float
    kept: bool  # whether it keeps the limit
    tries: list[Try]  # all of them, in order


def search(
    attempt: Callable[[float], tuple[Result, float] | None],
    allowed: float,
    *,
    safe: float,
    bold: float,
    tries: int,
    safe_first: bool = False,
    digits: int | None = None,
) -> Found[Result] | None:
    """Find the amount nearest to ``bold`` whose drop is at most ``allowed``, by halving what lies between.

    The drop is taken to rise from ``safe`` to ``bold``. Where noise makes it fall again, the result still is one
    that was tried and keeps the limit.

    Args:
        attempt: Tries an amount; gives the result and its drop in quality, or None when the amount cannot be met.
        allowed: Largest drop allowed.
        safe: The end at which least is lost.
        bold: The other end; neither end is tried.
        tries: At least 1.
        safe_first: Try ``safe`` first, and nothing else where it does not keep the limit.
        digits: To how many decimals an amount is rounded.

    Returns:
        The boldest try that keeps the limit; without any, the one with the smallest drop. None where no amount can
        be met.
    """
    made: list[Try] = []
    best: tuple[Result, float, float] | None = None
    for number in range(tries):
        at_safe = safe_first and number == 0
        amount = safe if at_safe else (safe + bold) / 2
        amount = amount if at_safe or digits is None else round(amount, digits)
        outcome = attempt(amount)
        kept = outcome is not None and keeps(outcome[1], allowed)
        made.append(Try(amount, None if outcome is None else outcome[1], kept))
        if outcome is not None and (
            kept or best is None or (not keeps(best[2], allowed) and outcome[1] <= best[2])
        ):
            best = outcome[0], amount, outcome[1]
        del outcome
        if kept:
            safe = amount
        elif at_safe:
            break
        else:
            bold = amount
    return None if best is None else Found(best[0], best[1], keeps(best[2], allowed), made)
