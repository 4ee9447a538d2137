"""What an answer is, ``kdcli/tasks`` alone knows: nothing else names a task or takes a softmax of logits."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kdcli

ROOT = Path(kdcli.__file__).parent
CALLS = {"argmax", "softmax", "log_softmax", "cross_entropy", "kl_div", "logsumexp"}
NAMES = ("text-classification", "multi-label")  # "regression" is a problem_type of transformers too

# File -> calls that it may make, and why.
ALLOWED: dict[str, tuple[set[str], str]] = {
    "training/losses/attention_transfer.py": ({"softmax"}, "of attention scores over the keys"),
    "training/losses/minilm.py": ({"log_softmax", "kl_div"}, "of relations between tokens"),
    "training/losses/pkt.py": ({"log_softmax", "kl_div"}, "of similarities between the rows of a batch"),
    "training/losses/dkd.py": (
        {"log_softmax", "kl_div", "logsumexp", "argmax"},
        "splits the classes into the target and the others: for one-of answers only",
    ),
    "training/losses/dist.py": ({"softmax"}, "correlates probabilities of classes: for one-of answers only"),
    "training/losses/logit_standardisation.py": (
        {"log_softmax", "kl_div"},
        "standardises the logits of a row over its classes: for one-of answers only",
    ),
    "models/ensemble.py": (
        {"log_softmax", "logsumexp"},
        "an architecture of its own, whose graph mixes the probabilities of classes",
    ),
    "models/inits.py": ({"argmax"}, "the sign of a projection's largest entry"),
    "stages/lowrank/factors.py": ({"argmax"}, "the sign of a vector's largest entry"),
    "stages/lowrank/rules/tucker2.py": ({"argmax"}, "the best of a table of ranks"),
    "stages/prune/criteria/fisher.py": ({"argmax"}, "the best of a table of cuts, the mask furthest from 1"),
}


def calls(tree: ast.AST) -> set[str]:
    """Names from :data:`CALLS` that a file calls, as a method, a function or by import."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            found.add(name)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
    return found & CALLS


def named(tree: ast.AST) -> set[str]:
    """Names of tasks that a file has as a whole string outside its docstrings, for branching on them."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in NAMES}


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] != "tasks"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_only_tasks_know_what_an_answer_is(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    allowed = ALLOWED.get(name, (set(), ""))[0]
    assert calls(tree) == allowed, f"{name}: ask the task of the checkpoint (kdcli/tasks/task.py)"
    assert not named(tree), f"{name} names a task"


def test_every_exception_is_a_file_with_a_reason() -> None:
    for name, (_, reason) in ALLOWED.items():
        assert (ROOT / name).is_file(), name
        assert len(reason.split()) > 3


@pytest.mark.parametrize(
    "line",
    [
        "right = (model(**x).logits.argmax(1) == labels).sum()",
        "best = np.argmax(answers, -1)",
        "loss = F.cross_entropy(logits, labels)",
        "p = torch.softmax(z, -1)",
        "kl = F.kl_div(a.log_softmax(-1), b)",
        "from torch.nn.functional import cross_entropy",
        "if task.name == 'text-classification': pass",
    ],
)
def test_a_line_that_knows_is_found(line: str) -> None:
    tree = ast.parse(line)
    assert calls(tree) or named(tree)


def test_a_word_in_a_sentence_is_no_name() -> None:
    assert not named(ast.parse('"""For regression and the like."""'))
