"""Write and read report.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kdcli import atomic
from kdcli.errors import InputError
from kdcli.report import version1
from kdcli.report.schema import LineageEntry, Measurement, Report

FILE = "report.json"


def dumps(report: Report) -> str:
    """The report as canonical JSON: fields in the order of their declaration, newline at the end.

    NaN and infinity in a method's free-form detail become null.
    """
    text = json.dumps(report.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A file name that is not UTF-8 arrives as lone surrogates, which only JSON's own escape can write.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write(report: Report, directory: Path) -> Path:
    """Write report.json atomically; its presence marks the directory as complete."""
    with atomic.replacing(directory / FILE) as temporary:
        temporary.write_text(dumps(report), encoding="utf-8")
        temporary.chmod(0o644)
    return directory / FILE


def read(path: Path) -> Report:
    """Read a report; one of schema version 1 comes out as version 2.

    Args:
        path: report.json or the directory that holds it.

    Raises:
        InputError: There is none, it is broken, or its schema version is unknown.
    """
    file = path / FILE if path.is_dir() else path
    if file.exists() and not file.is_file():
        raise InputError(f"'{file}' is not a regular file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"'{path}' holds no {FILE}", "give the output directory of a kdcli stage") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"'{file}' is not readable JSON: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != "kdcli.report":
        raise InputError(f"'{file}' is not a kdcli report")
    version = content.get("schema_version")
    if version not in (1, 2) or isinstance(version, bool):
        raise InputError(
            f"'{file}' has schema version {repr(version)[:40]}; this kdcli reads versions 1 and 2",
            "a newer kdcli wrote it: upgrade",
        )
    try:
        return Report.model_validate(version1.report(content) if version == 1 else content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"'{file}' is not a valid report: {where}: {first['msg']}") from error


def lineage(stored: Iterable[dict[str, Any]]) -> list[LineageEntry]:
    """The lineage that kdcli.json holds, written by this or an earlier version of kdcli."""
    return [LineageEntry.model_validate(version1.lineage_entry(one)) for one in stored]


def recorded(first: LineageEntry) -> Measurement | None:
    """The measurement that the first entry of a lineage carries along; None where it has none."""
    stored = first.params.get("measurement")
    return None if stored is None else Measurement.model_validate(version1.measurement(stored))


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def schema_json() -> str:
    """The JSON Schema of report.json, keys sorted."""
    return json.dumps(Report.model_json_schema(mode="serialization"), indent=2, sort_keys=True) + "\n"
