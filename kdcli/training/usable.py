"""Whether rows can teach and choose at all, before the first step."""

from __future__ import annotations

from typing import Any

import numpy as np

from kdcli.errors import InputError
from kdcli.inputs.text import Encoded
from kdcli.tasks.task import Task


def check(task: Task, train: Encoded, validation: Encoded, model: Any) -> None:
    """Refuse labels that no answer can be, and validation rows that have no primary metric.

    Args:
        task: What a label is.
        train: Rows that teach.
        validation: Rows whose primary metric chooses the epoch; they have labels.
        model: Of transformers; its configuration says how many outputs it has.

    Raises:
        InputError: Which, and what to do.
    """
    if train.labels is not None:
        task.check_learnable(train.labels)
    if validation.queries is None or validation.labels is None:
        return
    answers = np.zeros((len(validation), int(model.config.num_labels)), np.float32)
    try:
        task.score(answers, validation.labels, validation.queries)
    except InputError as error:
        raise InputError(f"the validation rows choose an epoch, but {error}", error.hint) from error
