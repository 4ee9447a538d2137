"""A mistake in a recipe is told with the line that it stands on, and the stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kdcli.errors import InputError
from kdcli.run import lined, recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: x\nlimt: 3\nstages: [quantize]\n", "line 2: unknown key 'limt'"),
        ("model: x\nlimit: many\nstages:\n  - quantize\n", "line 2, stage 1: limit: "),
        ("model: x\nstages:\n  - quantize\n  - prune: {sparsity: 2}\n", "line 4, stage 2: sparsity: "),
        (
            "model: x\nstages:\n  - prune:\n      sparsity: 0.3\n      epoch: 1\n",
            "line 5, stage 1: unknown option",
        ),
        ("model: x\nstages:\n  - prune:\n      sparsity:\n", "line 4, stage 1: 'sparsity' has no value"),
        ("model: x\nstages:\n\n  - shrink\n", "line 4, stage 1: unknown stage 'shrink'"),
        ("model: x\nstages:\n  - quantize\n  - distill\n", "line 4: distill can only be the first"),
        # Two options that contradict each other are no mistake of one line: that of the stage.
        ("model: x\nstages:\n  - prune:\n      sparsity: 0.3\n      budget: 0.3\n", "line 3, stage 1: "),
        (
            "model: x\nstages:\n  - prune:\n      sparsity: 0.3\n      sparsity: 0.5\n",
            "line 5: 'sparsity' is given twice",
        ),
        (
            "model: x\nstages:\n  - prune: {max-drop: 0.1, sparsity: 0.3,\n      max_drop: 0.5}\n",
            "line 4: 'max_drop' is given twice, first in line 3",
        ),
        ("model: x\nstages: !!omap\n  - quantize: {}\n", "has no list 'stages'"),
        ("model: x\nmodel: y\nstages: [quantize]\n", "line 2: 'model' is given twice, first in line 1"),
        ("model: x\nstages: [\n  a: b: c\n", "is not YAML: line 3: "),
    ],
)
def test_where_the_mistake_is(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        recipe.read(path)
    assert str(caught.value).startswith(f"recipe '{path}'")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "a: {b: [1, 2.5, yes], c: null}\nd: |\n  text\n",
        "base: &base {x: 1, y: 2}\nother:\n  <<: *base\n  y: 3\nlist: [*base, *base]\n",
        "just text",
    ],
)
def test_the_content_is_that_of_plain_yaml(text: str) -> None:
    assert lined.load(text) == yaml.safe_load(text)


def test_nothing_but_data_is_made() -> None:
    with pytest.raises(lined.LinedError, match="line 1: could not determine a constructor"):
        lined.load("!!python/object/apply:os.system ['true']")
