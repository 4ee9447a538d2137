"""Numbers in the data, names in the model: refused unless ``--columns`` says that the numbers are ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kdcli.errors import InputError
from kdcli.progress import Progress
from kdcli.report import io
from kdcli.request import Common, Request
from kdcli.run import life
from kdcli.run.outcome import Outcome
from kdcli.stages.evaluate.options import EvaluateOptions
from kdcli.stages.prune.options import PruneOptions
from tests import tiny

pytestmark = pytest.mark.usefixtures("shared_exports")


def judge(model: Path, baseline: Path | None = None, **common) -> Outcome:
    against = None if baseline is None else str(baseline)
    options = EvaluateOptions(models=(str(model),), batch_sizes=(1,), baseline=against)
    return life.run(
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
    life.run(Request(stage="prune", model=str(model), options=options, common=common), Progress())
    made = io.read(tmp_path / "pruned")
    assert made.model.labels == tiny.LABELS
    again = judge(tmp_path / "pruned").report
    assert again.after.quality == made.after.quality
    assert again.config["columns"].value == columns


def test_a_number_that_means_different_labels_to_two_models(data_dir: Path, tmp_path: Path) -> None:
    """One model with its labels in two orders answers alike: as ids, the same numbers would be right and wrong."""
    first, other = tiny.saved(tmp_path / "first"), tmp_path / "other"
    shutil.copytree(first, other)
    config = json.loads((other / "config.json").read_text())
    names = tiny.LABELS[::-1]
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (other / "config.json").write_text(json.dumps(config))
    numbers = tmp_path / "numbers.csv"
    numbers.write_text("text,label\n" + "".join(f"row {i} of them,{i % 2}\n" for i in range(8)))
    columns = "label=label:ids"
    assert judge(first, first, data=str(numbers), columns=columns).report.delta.accuracy == 0
    with pytest.raises(InputError, match="a number means another label to"):
        judge(other, first, data=str(numbers), columns=columns)
