"""Rows that can teach or choose nothing are refused before the first step."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from kdcli.errors import InputError
from kdcli.inputs.text import Encoded
from kdcli.tasks.classification import CLASSIFICATION
from kdcli.tasks.regression import Regression
from kdcli.training import usable

ONE, THREE = (SimpleNamespace(config=SimpleNamespace(num_labels=n)) for n in (1, 3))


def rows(labels: list[float], queries: list[int] | None = None) -> Encoded:
    count = len(labels)
    found = np.array(queries) if queries is not None else None
    ids, offsets = np.ones(count, np.int32), np.arange(count + 1)
    return Encoded(ids, None, offsets, np.array(labels, np.float32), queries=found)


@pytest.mark.parametrize(
    ("labels", "queries"),
    [([0, 0, 0, 0], [0, 0, 1, 1]), ([1, 0, 1, 0], [0, 1, 2, 3])],
    ids=["nothing relevant", "one row a query"],
)
@pytest.mark.parametrize("metric", ["ndcg_at_10", "mrr_at_10"])
def test_validation_rows_without_a_query_to_rank_choose_no_epoch(
    labels: list[float], queries: list[int], metric: str
) -> None:
    train, other = rows([1, 0], [0, 0]), rows(labels, queries)
    with pytest.raises(
        InputError, match=f"validation rows choose an epoch, but {metric} orders the rows"
    ) as no:
        usable.check(Regression(metric), train, other, ONE)
    assert "choose another --metric" in str(no.value.hint)
    usable.check(Regression(), train, other, ONE)  # another metric can
    usable.check(Regression(metric), other, train, ONE)  # rows that teach need no query to rank


def test_labels_outside_of_a_sigmoid_teach_nothing() -> None:
    fine, far = rows([0, 1]), rows([0, 5])
    with pytest.raises(InputError, match="between 0 and 1"):
        usable.check(Regression("spearman", "sigmoid"), far, fine, ONE)
    usable.check(Regression("spearman", "sigmoid"), replace(far, labels=None), fine, ONE)


def test_classes_can_always_choose() -> None:
    given = replace(rows([0, 0], [0, 0]), labels=np.array([0, 0]))
    usable.check(CLASSIFICATION, given, given, THREE)
