"""Two measurements against each other: of one run, or one of now and one that a report recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kdcli.measure.measurement import Timed
from kdcli.report import metrics
from kdcli.report.facts import SIGNIFICANT
from kdcli.report.gates import drop_of
from kdcli.report.schema import Delta, Measurement, Quality, Warning_
from kdcli.tasks.task import Comparison, Task


def compare(before: Measurement | None, after: Measurement) -> Delta:
    """The numbers of two measurements against each other; None where either lacks one.

    The ratios are above 1 where ``after`` is the better one: bytes and milliseconds of ``before`` divided by those
    of ``after``.

    Args:
        before: None: there is nothing to compare with.
        after: Of the same run, or a later one than a recorded ``before`` (:func:`from_record`).
    """

    def p50(m: Measurement) -> float | None:
        return next((x.p50_ms for x in m.latency if x.batch == 1 and x.runtime == runtime), None)

    # Two runtimes are no comparison of two models.
    runtime = next((x.runtime for x in after.latency if x.batch == 1), None)

    def ratio(a: float | None, b: float | None) -> float | None:
        return a / b if a and b else None

    primary = None if after.quality is None else after.quality.primary
    if before is None:
        return Delta(primary=primary)
    delta = Delta(
        primary=primary,
        size_ratio=ratio(before.size.onnx_bytes, after.size.onnx_bytes),
        speedup=ratio(p50(before), p50(after)),
    )
    return _with(delta, _differences(before.quality, after.quality))


def _differences(before: Quality | None, after: Quality | None) -> dict[str, float]:
    if before is None or after is None:
        return {}
    return {
        name: one.value - before.metrics[name].value
        for name, one in after.metrics.items()
        if name in before.metrics
    }


def _with(delta: Delta, more: Mapping[str, object]) -> Delta:
    return Delta.model_validate({**delta.model_dump(), **more})


def of_two(before: Timed, after: Timed, labels: Sequence[str]) -> Delta:
    """Two models of one run, row by row where they have the same labels.

    Args:
        before: One model, timed.
        after: The other, on the same rows.
        labels: Of the first, in the order of its logits.
    """
    delta = compare(before.measured.measurement, after.measured.measurement)
    one, other = before.checkpoint.task, after.checkpoint.task
    order = other.order(after.checkpoint.labels, labels)
    if order is None or one.name != other.name:
        return delta
    rows = after.encoded
    assert rows.labels is not None
    logits = before.measured.logits[:, order], after.measured.logits
    return row_by_row(delta, other.compare(*logits, rows.labels, rows.queries, first=one))


def set_apart(before: Timed, after: Timed, decided: Task | None = None) -> list[Warning_]:
    """Say so where validation rows decided something for one of two models alone.

    Args:
        before: One model.
        after: The other.
        decided: The task of ``before`` if the same rows had decided for it, too: what it reaches then is told.
    """
    first, second = before.checkpoint.task, after.checkpoint.task
    found = second.set_apart(first) if first.name == second.name else None
    if found is None:
        return []
    if decided is None:
        return [found]
    labels = before.encoded.labels
    assert labels is not None
    metric = metrics.of(decided.primary)
    value = metric.number(decided.score(before.measured.logits, labels, before.encoded.queries))
    fair = f"decided for by the rows that decided for 'after', 'before' has a {metric.title} of {value}"
    return [found.model_copy(update={"message": f"{found.message}; {fair}"})]


def row_by_row(delta: Delta, found: Comparison) -> Delta:
    """Add what only the answers themselves can say.

    Args:
        delta: Of the same two models.
        found: What the task found between them.
    """
    paired = {name: getattr(found, name) for name in ("ci95", "p_value", "agreement", "lost", "won")}
    return _with(delta, {**found.differences, **delta.differences, **paired})


def from_record(recorded: Measurement, after: Measurement) -> Measurement:
    """What a recorded measurement may be compared with now.

    Quality counts where it is of the very same rows. Latencies of another run, with other threads or on another
    machine, are no measure at all and are left out; sizes and operations are the model's own.
    """
    same = same_rows(recorded.quality, after.quality)
    return recorded.model_copy(update={"quality": recorded.quality if same else None, "latency": []})


def of_record(
    recorded: Measurement, before: Measurement, model: str
) -> tuple[list[Warning_], dict[str, str]]:
    """What to say of a comparison with a record.

    Args:
        recorded: As the first model's report has it.
        before: What :func:`from_record` left of it.
        model: The first model's reference.

    Returns:
        Warnings, and for a gate without a value the reason: name -> words.
    """
    how = f"--baseline {model} measures both now"
    speed = f"a record holds for one machine and one load, so speed is not compared with it; {how}"
    reasons = dict.fromkeys(("speedup",), speed) | dict.fromkeys(
        ("agreement", "p_value"), f"a record has no single answers to compare; {how}"
    )
    compared = "sizes" if before.quality is None else "sizes and quality"
    warnings = [
        Warning_(
            code="recorded-baseline",
            message=f"{compared} are compared with the recorded ones of '{model}', speed is not; {how}",
        )
    ]
    if before.quality is None and recorded.quality is not None:
        main = recorded.quality.main
        where = (
            "its record does not say on which rows"
            if recorded.quality.rows_sha256 is None
            else f"the record is of {main.n} other rows ({main.split})"
        )
        title = metrics.of(recorded.quality.primary).title
        words = f"{title} is not compared with the recorded one of '{model}': {where}; {how}"
        warnings.append(Warning_(code="other-rows", message=words))
        reasons["drop"] = words
    return warnings, reasons


def same_rows(one: Quality | None, other: Quality | None) -> bool:
    """Whether both are known to be of the same texts and labels."""
    if one is None or other is None:
        return False
    return one.rows_sha256 is not None and one.rows_sha256 == other.rows_sha256


def fell(delta: Delta, before: Measurement, after: Measurement) -> bool:
    """Whether the primary metric got worse by more than noise.

    Paired where the answers of both are known: by the p-value, or where there is none by whether the interval of the
    difference has 0 in it. Of a record only the values are: there the errors of both are added as if the rows were
    different ones, which misses small differences of models that mostly agree.
    """
    drop = drop_of(after, delta)
    if drop is None or drop <= 0:
        return False
    if delta.p_value is not None:
        return delta.p_value < SIGNIFICANT
    if delta.ci95 is not None:
        return delta.ci95[0] > 0 or delta.ci95[1] < 0
    if before.quality is None or after.quality is None:
        return False
    errors = [
        one.stderr for one in (before.quality.metrics.get(after.quality.primary), after.quality.main) if one
    ]
    noise = sum(error**2 for error in errors if error is not None) ** 0.5
    return None not in errors and drop > 2 * noise


def honest(delta: Delta, before: Measurement | None, after: Measurement) -> list[Warning_]:
    """Say in words what a table of ratios hides."""
    found = []
    if delta.speedup is not None and delta.speedup < 0.98:
        found.append(
            Warning_(
                code="slower", message=f"slower: {1 / delta.speedup:.2f} times the input's latency at batch 1"
            )
        )
    if delta.size_ratio is not None and delta.size_ratio < 0.98:
        found.append(
            Warning_(
                code="bigger", message=f"bigger: model.onnx is {1 / delta.size_ratio:.2f} times the input's"
            )
        )
    if (
        before is not None
        and delta.primary is not None
        and delta.main is not None
        and fell(delta, before, after)
    ):
        metric = metrics.of(delta.primary)
        verb = "fell" if delta.main < 0 else "rose"
        message = f"{metric.title} {verb} by {metric.points(delta.main)}, more than noise"
        if delta.lost is not None and delta.won is not None:
            message += f": {delta.lost} rows lost and {delta.won} won"
        found.append(Warning_(code="worse", message=message))
    return found
