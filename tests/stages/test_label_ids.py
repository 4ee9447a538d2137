"""Numbers in the data, names in the model: refused unless ``--columns`` says that the numbers are ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcli.errors import InputError
from kdcli.progress import Progress
from kdcli.report import io
from kdcli.stages import runner
from kdcli.stages.base import Common, EvaluateOptions, PruneOptions, Request
from tests import tiny


def judge(model: Path, **common) -> runner.Outcome:
    options = EvaluateOptions(models=(str(model),), batch_sizes=(1,))
    return runner.run(
        Request(stage="evaluate", model=None, options=options, common=Common(**common)), Progress()
    )


def test_numbers_against_names(data_dir: Path, tmp_path: Path) -> None:
    model = tiny.saved(tmp_path / "model")
    numbers = tmp_path / "numbers"
    numbers.mkdir()
    for file in data_dir.glob("*.csv"):
        text = file.read_text()
        for i, name in enumerate(tiny.LABELS):
            text = text.replace(f",{name}", f",{i}")
        (numbers / file.name).write_text(text)
    with pytest.raises(InputError, match="are numbers") as caught:
        judge(model, data=str(numbers))
    assert str(caught.value.hint).endswith(
        "(0 is negative, 1 is positive), say so: --columns label=label:ids"
    )

    columns = "label=label:ids"
    named = judge(model, data=str(data_dir)).report.after.quality
    numbered = judge(model, data=str(numbers), columns=columns).report.after.quality
    assert named is not None
    assert numbered is not None
    assert (numbered.accuracy, numbered.macro_f1) == (named.accuracy, named.macro_f1)
    # The next stage finds data and columns in the report, and the names stay those of the model.
    options = PruneOptions(sparsity=0.2, method="taylor", schedule="one-shot")
    common = Common(data=str(numbers), columns=columns, out=tmp_path / "pruned")
    runner.run(Request(stage="prune", model=str(model), options=options, common=common), Progress())
    made = io.read(tmp_path / "pruned")
    assert made.model.labels == tiny.LABELS
    again = judge(tmp_path / "pruned").report
    assert again.after.quality == made.after.quality
    assert again.config["columns"].value == columns
