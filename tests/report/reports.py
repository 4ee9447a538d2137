"""Reports to test with: the committed ones, and one whose every name is hostile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdcli.report import io, metrics
from kdcli.report.schema import (
    Compute,
    Delta,
    Gate,
    Latency,
    LineageEntry,
    Measurement,
    MetricValue,
    ModelInfo,
    Quality,
    Report,
    Size,
)

V1 = Path(__file__).parent / "data" / "v1"

HOSTILE = (
    "a|b\n::error::x\r\n# h <script>alert(1)</script>\x1b[31m &amp; `c` [l](javascript:x) \u202eend \"'>]]>"
)


def full() -> Report:
    """A prune report with every part filled, one gate met and two missed."""
    return io.read(V1 / "prune.json")


def bare() -> Report:
    """A report with every optional part missing."""
    return io.read(V1 / "bare.json")


def hostile() -> Report:
    """Every free text that comes from a model, a data set or a command line is :data:`HOSTILE`."""
    content = full().model_dump()
    content["stage"] = content["created_at"] = content["kdcli_version"] = HOSTILE
    content["command"] = ["kdcli", HOSTILE]
    content["config"] = {HOSTILE: {"value": HOSTILE, "origin": HOSTILE}}
    content["model"] = {
        "source": HOSTILE,
        "family": HOSTILE,
        "task": HOSTILE,
        "labels": [HOSTILE, "::error::y"],
    }
    content["data"] |= {"ref": HOSTILE, "rows": {HOSTILE: 1}}
    content["method"] = {
        "name": HOSTILE,
        "params": {HOSTILE: HOSTILE},
        "detail": {HOSTILE: [HOSTILE]},
        "layers": [{HOSTILE: HOSTILE}],
    }
    for gate in content["gates"]:
        gate |= {"name": HOSTILE, "expression": HOSTILE}
    for side in (content["before"], content["after"]):
        side["quality"]["accuracy"]["split"] = HOSTILE
        for one in side["latency"]:
            one["runtime"] = HOSTILE
    for entry in content["lineage"]:
        entry |= {"stage": HOSTILE, "method": HOSTILE, "model": HOSTILE, "params": {HOSTILE: HOSTILE}}
    content["environment"] |= {"cpu": HOSTILE, "platform": HOSTILE, "isa": [HOSTILE], "gpu": HOSTILE}
    content["environment"]["versions"] = {HOSTILE: HOSTILE}
    content["timings"] = {HOSTILE: 1.0}
    content["warnings"] = [{"code": HOSTILE, "message": HOSTILE}]
    content["artifacts"][0]["path"] = HOSTILE
    return Report.model_validate(content)


def measurement(accuracy: float | None = 0.9, batches: tuple[int, ...] = (1, 32), **size: Any) -> Measurement:
    """A measurement; latency at batch b is b ms at p50 and 1000 b rows a second."""

    def metric(value: float, higher: bool = True) -> MetricValue:
        return MetricValue(value=value, n=100, split="test", higher_is_better=higher)

    quality = None
    if accuracy is not None:
        found = {"accuracy": metric(accuracy), "macro_f1": metric(0.8), "ece": metric(0.05, higher=False)}
        quality = Quality.of("accuracy", found)
    sizes = dict.fromkeys(Size.model_fields, 1000) | size
    latency = [
        Latency(
            runtime="onnx",
            batch=b,
            sequence=10,
            threads=2,
            p50_ms=b,
            p90_ms=2 * b,
            p99_ms=3 * b,
            throughput_per_s=1000 * b,
            n=30,
        )
        for b in batches
    ]
    return Measurement(
        quality=quality, size=Size(**sizes), compute=Compute(macs=5, sequence=10), latency=latency
    )


def delta(**known: Any) -> Delta:
    """A delta by accuracy, with the rest unknown."""
    return Delta.model_validate({"primary": "accuracy"} | known)


def with_gates(report: Report, *passed: bool, parity: bool | None = None) -> Report:
    """The report with these outcomes."""
    gates = [
        Gate(name=f"g{i}", expression="accuracy>=0.5", value=0.4, threshold=0.5, passed=one)
        for i, one in enumerate(passed)
    ]
    found = None
    if parity is not None:
        known = full().parity
        assert known is not None
        found = known.model_copy(update={"passed": parity})
    return report.model_copy(update={"gates": gates, "parity": found})


def multi_label() -> Report:
    """A quantize report of a task that judges by micro-F1, which fell by less than noise."""
    before = {"micro_f1": (0.5521, 0.0101), "macro_f1": (0.4413, None), "subset_accuracy": (0.4102, None)}
    after = {"micro_f1": (0.5492, 0.0102), "macro_f1": (0.4397, None), "subset_accuracy": (0.4080, None)}
    found = {"primary": "micro_f1", "micro_f1": -0.0029, "macro_f1": -0.0016, "subset_accuracy": -0.0022}
    found |= {
        "ci95": (-0.0071, 0.0012),
        "p_value": 0.17,
        "agreement": 0.931,
        "size_ratio": 3.9,
        "speedup": 2.1,
    }
    return _of_task("multi-label", ["joy", "anger", "fear"], before, after, found, "micro_f1>=0.55", False)


def regression() -> Report:
    """A quantize report of a task that judges by Spearman, with an error where lower is better."""
    before = {"spearman": (0.8730, 0.0071), "pearson": (0.8801, None), "rmse": (12.51, None)}
    after = {"spearman": (0.8630, 0.0075), "pearson": (0.8692, None), "rmse": (13.02, None)}
    found = {"primary": "spearman", "spearman": -0.0100, "pearson": -0.0109, "rmse": 0.51}
    found |= {"ci95": (-0.0131, -0.0070), "agreement": 0.962, "size_ratio": 3.9, "speedup": 2.1}
    return _of_task("regression", ["score"], before, after, found, "spearman>=0.86", True)


def _of_task(
    task: str,
    labels: list[str],
    before: dict[str, tuple[float, float | None]],
    after: dict[str, tuple[float, float | None]],
    found: dict[str, Any],
    gate: str,
    passed: bool,
) -> Report:
    primary = found["primary"]

    def quality(values: dict[str, tuple[float, float | None]]) -> Quality:
        made = {}
        for name, (value, stderr) in values.items():
            ci95 = None if stderr is None else (value - 2 * stderr, value + 2 * stderr)
            higher = metrics.of(name).higher_is_better
            made[name] = MetricValue(
                value=value, stderr=stderr, ci95=ci95, n=1379, split="test", higher_is_better=higher
            )
        return Quality.of(primary, made)

    name, _, threshold = gate.partition(">=")
    report = full()
    assert report.before is not None
    steps = {"input": before[primary][0], "quantize": after[primary][0]}
    return report.model_copy(
        update={
            "stage": "quantize",
            "model": ModelInfo(source="out/teacher", family="bert", task=task, labels=labels),
            "before": report.before.model_copy(update={"quality": quality(before)}),
            "after": report.after.model_copy(update={"quality": quality(after)}),
            "delta": Delta.model_validate(found),
            "gates": [
                Gate(
                    name=gate,
                    expression=gate,
                    value=after[name][0],
                    threshold=float(threshold),
                    passed=passed,
                )
            ],
            "lineage": [
                LineageEntry(
                    stage=stage,
                    method="dynamic-int8",
                    report_sha256=None,
                    model="out/teacher",
                    metric=primary,
                    value=value,
                    params={},
                )
                for stage, value in steps.items()
            ],
            "warnings": [],
        }
    )
