"""Whether rows can teach and choose at all, before the first step."""

from __future__ import annotations

import numpy as np

from kdcli.errors import InputError
from kdcli.inputs.text import Encoded
from kdcli.tasks.task import Task


def check(task: Task, train: Encoded, validation: Encoded, outputs: int) -> None:
    """Refuse labels that no answer can be, and validation rows that have no primary metric.

    Args:
        task: What a label is.
        train: Rows that teach.
        validation: Rows whose primary metric chooses the epoch; they have labels.
        outputs: C, of the model.

    Raises:
        InputError: Which, and what to do.
    """
    if train.labels is not None:
        task.check_learnable(train.labels)
    assert validation.labels is not None
    try:
        task.score(np.zeros((len(validation), outputs), np.float32), validation.labels, validation.queries)
    except InputError as error:
        raise InputError(f"the validation rows choose an epoch, but {error}", error.hint) from error
