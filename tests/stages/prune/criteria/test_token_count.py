"""Tokens stay for being used or for being needed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from kdcli.stages.prune.criteria import token_count
from kdcli.stages.prune.criterion import TokenJob


@pytest.mark.parametrize("least", [1, 2, 5])
def test_what_stays_is_what_a_counter_says(least: int) -> None:
    rng = np.random.default_rng(0)
    ids = rng.zipf(1.5, 500) % 64
    protected = np.arange(64) < 3
    job = TokenJob(np.bincount(ids, minlength=64), protected)
    kept = token_count.keep(job, token_count.Config(min_count=least))
    counted = Counter(ids.tolist())
    assert set(np.flatnonzero(kept)) == {t for t, n in counted.items() if n >= least} | {0, 1, 2}


def test_nothing_used_leaves_the_protected_alone() -> None:
    protected = np.array([True, False, True])
    job = TokenJob(np.zeros(3, dtype=np.int64), protected)
    assert (token_count.keep(job, token_count.Config()) == protected).all()


def test_more_occurrences_asked_for_keep_fewer_tokens() -> None:
    job = TokenJob(np.arange(20), np.zeros(20, dtype=bool))
    sizes = [int(token_count.keep(job, token_count.Config(min_count=n)).sum()) for n in (1, 3, 10)]
    assert sizes == [19, 17, 10]
    with pytest.raises(ValidationError):
        token_count.Config(min_count=0)
