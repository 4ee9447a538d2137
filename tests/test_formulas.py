"""Formulas of the documentation are LaTeX that GitHub renders: balanced, of known commands, safe from Markdown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

# All of them are in MathJax 3 and KaTeX. GitHub refuses \operatorname, \newcommand, \DeclareMathOperator and \def.
COMMANDS = frozenset(
    re.findall(
        r"\w+",
        """alpha angle approx begin beta bigl bigr cdot cos cup end frac gamma ge in infty int lVert lambda langle ldots
    le left leftarrow log lvert mathbb mathrm max min mu ne odot overline partial qquad quad rVert rangle rho right
    rvert setminus sigma sqrt sum tau text tfrac times to top underset Vert bar hat tilde""",
    )
)
ENVIRONMENTS = {"aligned", "cases"}


def formulas(text: str) -> list[str]:
    """Blocks, and what stands in sentences, of one page."""
    found = re.findall(r"^```math\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^(?:```.*?^```|    .*?)$", "", text, flags=re.DOTALL | re.MULTILINE)
    found += re.findall(r"\$`([^`]*)`\$", prose)
    return found + inline(prose)


def inline(prose: str) -> list[str]:
    """Formulas between plain dollars, which Markdown reads too."""
    return re.findall(r"\$([^$\n]+)\$", re.sub(r"\$?`[^`]*`\$?", "", prose))


def faults(formula: str) -> list[str]:
    """What is wrong with a formula."""
    found = [name for name in re.findall(r"\\([A-Za-z]+)", formula) if name not in COMMANDS]
    bare = re.sub(r"\\[{}]", "", formula)
    depths = [bare[:end].count("{") - bare[:end].count("}") for end in range(len(bare) + 1)]
    if min(depths) < 0 or depths[-1]:
        found.append("braces")
    for start, end in (("left", "right"), ("bigl", "bigr"), ("lVert", "rVert"), ("langle", "rangle")):
        if len(re.findall(rf"\\{start}(?![A-Za-z])", formula)) != len(
            re.findall(rf"\\{end}(?![A-Za-z])", formula)
        ):
            found.append(f"{start} without {end}")
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", formula):
        if name not in ENVIRONMENTS or (kind == "end" and (not opened or opened.pop() != name)):
            found.append(name)
        if kind == "begin":
            opened.append(name)
    if opened or ("\\\\" in formula and "\\begin" not in formula):
        found.append("rows outside an environment")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_formulas_are_sound(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    wrong = {formula: found for formula in formulas(text) if (found := faults(formula))}
    assert not wrong
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    # `_` opens emphasis after anything but a letter or digit, `*` anywhere; `\,` loses its backslash.
    unsafe = [one for one in inline(prose) if re.search(r"(?<![A-Za-z0-9])_|\*|\\[^A-Za-z]", one)]
    assert not unsafe


@pytest.mark.parametrize(
    "formula",
    [r"\operatorname{KL}", r"\frac{a}{b", r"a}{", r"\left( a", r"\begin{aligned} a", r"a \\ b", r"\lVert a"],
)
def test_a_fault_is_found(formula: str) -> None:
    assert faults(formula)


def test_most_methods_have_a_formula() -> None:
    """Those without one are told in words: layers by their place."""
    found = {}
    for page in ROOT.glob("docs/methods/*.md"):
        for part in re.split(r"^##+ ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            name = part.partition("\n")[0]
            if "**Source" in part:
                found[name] = "```math" in part
    assert len(found) > 40
    assert [name for name, has in found.items() if not has] == ["layer-preset"]
