"""CONTRIBUTING.md tells the truth: its files and names exist, and its excerpts are in the files that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE)
CODE = re.findall(r"`([^`\n]+)`", PROSE)
PLACES = [code for code in CODE if re.fullmatch(r"(?:kdcli|tests)(?:/\w+)+(?:\.\w+)?", code)]
SYMBOLS = sorted({code for code in CODE if re.fullmatch(r"_?[A-Z]\w+", code)})
SOURCES = [
    path.read_text(encoding="utf-8") for path in [*(ROOT / "kdcli").rglob("*.py"), ROOT / "tests" / "tiny.py"]
]
EXCERPTS = re.findall(r"^```python\n# (\S+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_every_place_exists() -> None:
    assert len(PLACES) > 60
    assert [place for place in PLACES if not (ROOT / place).exists()] == []
    linked = re.findall(r"\b(?:docs/[\w./]+\.md|docs/\w+)\b", PROSE)
    assert [place for place in linked if not (ROOT / place).exists()] == []


def test_the_house_has_every_folder() -> None:
    folders = {
        f"kdcli/{path.name}"
        for path in (ROOT / "kdcli").iterdir()
        if path.is_dir() and (path / "__init__.py").exists()
    }
    assert folders <= set(PLACES)


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_every_name_is_defined(symbol: str) -> None:
    defined = re.compile(rf"^ *(?:class {symbol}\b|{symbol}(?:: .*)? = )", re.MULTILINE)
    assert any(defined.search(text) for text in SOURCES)


@pytest.mark.parametrize(("place", "excerpt"), EXCERPTS, ids=[place for place, _ in EXCERPTS])
def test_excerpts_are_in_their_files(place: str, excerpt: str) -> None:
    """``...`` on a line of its own leaves something out."""
    text, at = (ROOT / place).read_text(encoding="utf-8"), 0
    for part in re.split(r"^\.\.\.\n", excerpt, flags=re.MULTILINE):
        found = text.find(part, at)
        assert found >= 0, f"{place} no longer has:\n{part}"
        at = found + len(part)


def test_the_table_of_contents_leads_somewhere() -> None:
    headings = re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors
