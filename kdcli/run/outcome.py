"""What a finished run hands back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kdcli.report.schema import Report


@dataclass
class Outcome:
    """The output and what is to say of it; ``report.exit_code`` is the verdict."""

    path: Path
    report: Report
    reports: list[Report] = field(default_factory=list)
