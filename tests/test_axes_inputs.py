"""Outside ``inputs/`` nothing spells what a model takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcli.inputs.text import TEXT
from tests import source

#: File -> why it may.
MAY = {
    "input_names.py": "it is where the names are, for what lies below inputs/",
    "models/small.py": "transformers calls a model by the names of its arguments",
    "models/ensemble.py": "transformers calls a model by the names of its arguments",
    "report/card.py": "lines of Python for people who do without kdcli",
}


def offences(path: Path) -> list[str]:
    tree = source.tree_of(path)
    place = path.relative_to(source.ROOT).as_posix()
    found = [(line, text) for line, text in source.strings(tree) if any(name in text for name in TEXT.names)]
    found += [(line, name) for line, name in source.names(tree) if name in TEXT.names]
    return [f"{place}:{line}: {text!r}" for line, text in found]


def test_no_input_is_spelled_elsewhere() -> None:
    assert not [one for path in source.files("inputs", *MAY) for one in offences(path)]


def test_no_exception_is_idle() -> None:
    assert not [place for place in MAY if not offences(source.ROOT / place)]


@pytest.mark.parametrize(
    "line",
    ["batch['input_ids']", "model(attention_mask=mask)", "batch.token_type_ids", "f'{x} input_ids'"],
)
def test_what_is_searched_for_is_found(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "ROOT", tmp_path)
    (tmp_path / "one.py").write_text(f"x = {line}\n")
    assert offences(tmp_path / "one.py")
    (tmp_path / "one.py").write_text(f'"""{line}."""\nx = 1  # {line}\n')
    assert not offences(tmp_path / "one.py")
