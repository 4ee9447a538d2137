"""Records of report schema version 1, as version 2 has them: what older versions of kdcli wrote stays readable.

Version 1 knew one task. Its quality was always accuracy, macro F1 and ECE, and accuracy was the primary one. Every
function takes JSON as it was read, of either version, and checks nothing: the models of
:mod:`kdcli.report.schema` do.
"""

from __future__ import annotations

from typing import Any

PRIMARY = "accuracy"


def report(content: dict[str, Any]) -> dict[str, Any]:
    """A whole report.json."""
    after = _dict(content.get("after"))
    made = content | {"schema_version": 2}
    for side in ("before", "after"):
        if side in made:
            made[side] = measurement(made[side])
    if isinstance(delta := content.get("delta"), dict):
        made["delta"] = _delta(delta, measured=after.get("quality") is not None)
    if isinstance(entries := content.get("lineage"), list):
        made["lineage"] = [lineage_entry(one) for one in entries]
    return made


def measurement(content: Any) -> Any:
    """``before``, ``after``, or the measurement that the first entry of a lineage carries along."""
    quality = _dict(content).get("quality")
    if not isinstance(quality, dict) or "primary" in quality:
        return content
    return content | {"quality": {"primary": PRIMARY} | quality}


def lineage_entry(content: Any) -> Any:
    """One step of a lineage, in a report or in kdcli.json."""
    if not isinstance(content, dict):
        return content
    made = dict(content)
    if "accuracy" in made and "value" not in made:
        value = made.pop("accuracy")
        made |= {"metric": None if value is None else PRIMARY, "value": value}
    if "measurement" in (params := _dict(made.get("params"))):
        made["params"] = params | {"measurement": measurement(params["measurement"])}
    return made


def _delta(content: dict[str, Any], *, measured: bool) -> dict[str, Any]:
    made = {"primary": PRIMARY if measured else None} | content
    if "accuracy_ci95" in made:
        made["ci95"] = made.pop("accuracy_ci95")
    if made.get(PRIMARY) is None:  # a difference that is not known has no entry
        made.pop(PRIMARY, None)
    return made


def _dict(content: Any) -> dict[str, Any]:
    return content if isinstance(content, dict) else {}
