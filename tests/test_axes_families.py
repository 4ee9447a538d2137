"""Outside ``families/`` nothing knows an architecture: no path of one, no name of one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kdcli import families
from tests import source

# Names of modules that only make sense inside one architecture or another.
PATHS = re.compile(
    r"encoder\.layer|transformer\.layer|attention\.(self|output|attn)\b|intermediate\.dense|output\.(dense|LayerNorm)"
    r"|ffn\.lin|\b[qkv]_lin\b|\bout_lin\b|sa_layer_norm|output_layer_norm|embeddings_project|embed_positions|\bwpe\b"
    r"|pooler|pre_classifier|(^|\.)classifier\b|(?<!max_)\b(word|position|token_type)_embeddings\b"
)
#: File -> why it may.
MAY = {
    "models/small.py": "it is the architecture of kdcli's own students",
    "models/ensemble.py": "it is the architecture of kdcli's own ensembles",
    "models/ownership.py": "tensors that files of every architecture of transformers hold beside their model",
    "models/foreign.py": "tensors and settings by which files of other tools and tasks are told from a classifier",
}
#: A string that is another thing of the same name.
OTHER = {
    ("models/aliases.py", "mpnet"): "an alias of a model",
    ("stages/distill/strategies/layerwise.py", "classifier"): "a part of its own module, of no model",
}


def offences(path: Path) -> list[str]:
    tree, place = source.tree_of(path), path.relative_to(source.ROOT).as_posix()
    known = set(families.every())
    found = []
    for line, text in [*source.strings(tree), *source.chains(tree)]:
        hit = PATHS.search(text) if " " not in text else None  # a sentence is for people
        said = hit.group().strip(".") if hit else text if text in known else None
        if said is not None and (place, said) not in OTHER:
            found.append(f"{place}:{line}: {text!r}")
    return found


def test_no_architecture_is_known_elsewhere() -> None:
    assert not [one for path in source.files("families", *MAY) for one in offences(path)]


def test_no_exception_is_idle() -> None:
    assert not [place for place in MAY if not offences(source.ROOT / place)]


@pytest.mark.parametrize(
    "line",
    [
        "model.bert.encoder.layer[0]",
        "layer.attention.self.query",
        "model.get_submodule('distilbert.transformer.layer')",
        "module.pooler",
        "f'{name}.embeddings.word_embeddings'",
        "kind == 'roberta'",
        "getattr(model, 'classifier')",
    ],
)
def test_what_is_searched_for_is_found(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "ROOT", tmp_path)
    (tmp_path / "one.py").write_text(f'"""The encoder.layer of BERT."""\nx = {line}  # pooler\n')
    assert offences(tmp_path / "one.py")
    (tmp_path / "one.py").write_text(f'"""{line}."""\nconfig.max_position_embeddings  # {line}\n')
    assert not offences(tmp_path / "one.py")
