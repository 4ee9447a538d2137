"""Gates: conditions that a result must meet. A value that is missing or NaN never meets one."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from kdcli.errors import UsageError, did_you_mean
from kdcli.report import metrics
from kdcli.report.schema import Delta, Gate, Latency, Measurement

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

_SHARES = ("agreement", "p_value")
_COMPARED = ("drop", *_SHARES, "speedup", "size_ratio")
_SIZES = ("parameters", "nonzero_parameters", "checkpoint_bytes", "onnx_bytes", "onnx_gzip_bytes")
_TIMES = ("p50_ms", "p90_ms", "p99_ms")
GENERAL = (*_COMPARED, "macs", *_SIZES, *_TIMES, "throughput_per_s")
"""Names that every report has a value of; those of the metrics are the task's."""

_PERCENT = 2  # from here on a share is certainly meant in percent
_NOTHING = "there is nothing to compare with; --baseline MODEL measures another model on the same rows"


class Limits(Protocol):
    """The gates of a request (``kdcli.request.Gates``)."""

    @property
    def max_drop(self) -> float | None: ...
    @property
    def min_speedup(self) -> float | None: ...
    @property
    def max_size_bytes(self) -> int | None: ...
    @property
    def expressions(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Expression:
    """``accuracy>=0.9``, taken apart."""

    name: str
    operator: str
    threshold: float

    def holds(self, value: float | None) -> bool:
        """Whether the value meets the condition; None and NaN never do."""
        return (
            value is not None and not math.isnan(value) and _OPERATORS[self.operator](value, self.threshold)
        )


def parse_size(given: str) -> int:
    """Bytes of ``20MiB``, ``1.5GB`` or ``4096``.

    Raises:
        UsageError: Not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", given)
    if not found or found[2].lower() not in _UNITS:
        raise UsageError(f"'{given}' is not a size", "write it like 20MiB, 1.5GB or 4096")
    # Fraction keeps every digit: a float of twenty digits is another number, one of 400 is infinity.
    return int(Fraction(found[1]) * _UNITS[found[2].lower()])


def parse_expression(given: str, known: Iterable[str] | None = None) -> Expression:
    """Take ``accuracy>=0.9`` apart.

    Args:
        given: As the user wrote it.
        known: The metrics of the task, as soon as it is known; until then those of all tasks.

    Raises:
        UsageError: Not of the form NAME OP NUMBER, or an unknown name.
    """
    found = re.fullmatch(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*(>=|<=|==|>|<)\s*(\S+)\s*", given)
    if not found:
        raise UsageError(
            f"'{given}' is not a gate", 'write it like "accuracy>=0.9", with one of >= <= == > <'
        )
    name, sign, number = found.groups()
    allowed = tuple(metrics.KNOWN if known is None else known)
    if name not in (*allowed, *GENERAL):
        raise _unknown(name, allowed, of_model=known is not None)
    try:
        threshold = float(parse_size(number)) if name.endswith("_bytes") else float(number)
    except ValueError:
        threshold = math.nan
    if not math.isfinite(threshold):
        raise UsageError(f"'{number}' in the gate '{given}' is not a number")
    # How far a drop can go depends on the primary metric: :func:`check_drop`.
    bounded = name in _SHARES or (name not in GENERAL and metrics.of(name).scale != "open")
    if bounded and (threshold >= _PERCENT or (threshold > 1 and sign[0] == "<")):
        # ece<=5 would hold whatever the model answers.
        raise UsageError(
            f"'{number}' in the gate '{given}': {name} is at most 1",
            f"write {threshold / 100:g} for {number} %",
        )
    return Expression(name, sign, threshold)


def _unknown(name: str, allowed: Sequence[str], *, of_model: bool) -> UsageError:
    if not of_model:
        return UsageError(f"unknown gate '{name}': {did_you_mean(name, (*allowed, *GENERAL))}")
    needs = metrics.of(name).needs
    return UsageError(
        f"the gate '{name}' is not a metric of this model{f': it needs {needs}' if needs else ''}",
        f"its metrics are {', '.join(allowed)}; others are {', '.join(GENERAL)}",
    )


def check(limits: Limits, known: Iterable[str]) -> None:
    """Refuse a gate on a metric that the model will not have, before anything is trained.

    Args:
        limits: What was asked for.
        known: Names of the metrics.

    Raises:
        UsageError: A name is none of them.
    """
    names = tuple(known)
    for one in limits.expressions:
        parse_expression(one, names)


def check_drop(limits: Limits, metric: str | None) -> None:
    """Refuse a limit that every model keeps, before one is loaded: a drop of 2, where 2 % was meant.

    Args:
        limits: What was asked for; drops are in the unit of the primary metric.
        metric: The primary one, as ``--metric`` names it; one that only the model names is taken to be at most 1.

    Raises:
        UsageError: The limit is above 1, and the metric may not be.
    """
    if metric is not None and metrics.of(metric).scale == "open":
        return
    drops = [] if limits.max_drop is None else [(f"--max-drop {limits.max_drop:g}", limits.max_drop)]
    drops += [
        (f"the gate '{given}'", one.threshold)
        for given in limits.expressions
        if (one := parse_expression(given)).name == "drop"
    ]
    for said, drop in drops:
        if drop > 1:
            raise UsageError(
                f"{said}: a drop of {metric or 'the primary metric'} is at most 1",
                f"write {drop / 100:g} for {drop:g} %; where the metric has the unit of the labels, name it: "
                "--metric rmse",
            )


def value_of(name: str, after: Measurement, delta: Delta) -> float | None:
    """The value a gate judges; None when it was not measured."""
    if name == "drop":
        return drop_of(after, delta)
    if name in _COMPARED:
        return getattr(delta, name)
    if name == "macs":
        return after.compute.macs
    if name in _TIMES:
        single = at_batch(after, 1)
        return None if single is None else getattr(single, name)
    if name == "throughput_per_s":
        largest = max(after.latency, key=lambda one: one.batch, default=None)
        at = at_batch(after, 32) or largest
        return None if at is None else at.throughput_per_s
    if name in _SIZES:
        return getattr(after.size, name)
    metric = None if after.quality is None else after.quality.metrics.get(name)
    return None if metric is None else metric.value


def drop_of(after: Measurement, delta: Delta) -> float | None:
    """By how much ``after`` is worse in its primary metric, in the unit of that metric; None where it is not known.

    Where lower is better, a rise is the drop.
    """
    if delta.main is None or after.quality is None:
        return None
    return 0.0 - delta.main if after.quality.main.higher_is_better else 0.0 + delta.main  # never -0


def at_batch(measurement: Measurement, batch: int) -> Latency | None:
    """The first latency measured at this batch size."""
    return next((one for one in measurement.latency if one.batch == batch), None)


def judge(
    limits: Limits,
    before: Measurement | None,
    after: Measurement,
    delta: Delta,
    reasons: Mapping[str, str] | None = None,
) -> list[Gate]:
    """Judge every gate that was asked for.

    ``max_drop`` is of the primary metric, in its unit (of a share: points of 1); it and ``min_speedup`` need something
    to compare with, and fail when there is nothing (``before`` is None).

    Args:
        limits: What was asked for.
        before: The model that is compared with.
        after: The model that is judged.
        delta: The one against the other.
        reasons: Name of a value -> why it is missing, where the caller knows; a gate without a value says it.

    Raises:
        UsageError: A gate names a metric that ``after`` does not have (:func:`check` finds that earlier).
    """
    known = None if after.quality is None else tuple(after.quality.metrics)
    asked: list[tuple[str, str, Expression]] = []
    if limits.max_drop is not None:
        asked.append(("max-drop", f"drop<={limits.max_drop:g}", Expression("drop", "<=", limits.max_drop)))
    if limits.min_speedup is not None:
        asked.append(
            (
                "min-speedup",
                f"speedup>={limits.min_speedup:g}",
                Expression("speedup", ">=", limits.min_speedup),
            )
        )
    if limits.max_size_bytes is not None:
        size = float(limits.max_size_bytes)
        asked.append(
            ("max-size", f"onnx_bytes<={limits.max_size_bytes}", Expression("onnx_bytes", "<=", size))
        )
    asked.extend((e.strip(), e.strip(), parse_expression(e, known)) for e in limits.expressions)
    gates = []
    for name, text, expression in asked:
        value = value_of(expression.name, after, delta)
        usable = None if value is None or not math.isfinite(value) else float(value)
        # A drop of exactly the limit is allowed: 0.9 - 0.89 must not fail 0.01 for its last binary digit.
        slack = 1e-12 if expression.name == "drop" and expression.operator == "<=" else 0.0
        passed = Expression(expression.name, expression.operator, expression.threshold + slack).holds(usable)
        reason = None
        if usable is None:
            nothing = _NOTHING if before is None and expression.name in _COMPARED else None
            reason = (reasons or {}).get(expression.name, nothing)
        gates.append(
            Gate(
                name=name,
                expression=text,
                value=usable,
                threshold=expression.threshold,
                passed=passed,
                reason=reason,
            )
        )
    return gates
