"""What one answer is, said by somebody or seen in the data, and the complaint when the two contradict each other."""

from __future__ import annotations

from dataclasses import dataclass

from kdcli.errors import InputError
from kdcli.tasks import settled
from kdcli.tasks.task import OF_TEXTS, Kind

SAID = {
    "one-of": "one of several classes",
    "any-of": "any of several labels",
    "number": "a number",
}


@dataclass(frozen=True)
class Wanted:
    """The kind of answer that the rows of a file must have."""

    kind: Kind
    #: Who says so, for messages: ``--task regression``, ``the model 'x'``, ``train.csv``; empty where nobody does.
    by: str = ""
    #: It is a model that says so, which no option can contradict.
    of_model: bool = False

    def other(self, kind: Kind) -> str:
        """How to ask for another kind of answer, for hints."""
        task = OF_TEXTS[kind]
        return f"{settled(task)}, if it was trained for that" if self.of_model else f"--task {task}"

    def contradicted(self, found: str, hint: str | None = None) -> InputError:
        """The error that names both sides: what was found, and who wants something else."""
        return InputError(
            f"{found}, but {self.by} has {SAID[self.kind]} as answer" if self.by else found, hint
        )
