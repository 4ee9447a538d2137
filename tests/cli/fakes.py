"""Stand-ins for what the command line calls, so that its tests need no model and no torch.

Run as a script it is a kdcli whose stages are fake: ``python -m tests.cli.fakes prune MODEL ...``.
What the stage does is chosen by FAKE_STAGE in the environment.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import time
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcli.request import Request


@dataclass
class Outcome:
    """As ``kdcli.run.outcome.Outcome``."""

    path: Path
    report: Any
    reports: list[Any] = field(default_factory=list)


@dataclass
class DryRun:
    """As ``kdcli.run.dry_run.DryRun``."""

    stage: str

    def lines(self) -> list[str]:
        return [f"would run {self.stage}", "nothing was written"]

    def to_json(self) -> dict[str, Any]:
        return {"kind": "kdcli.plan", "stage": self.stage}


def measurement(accuracy: float = 0.9, onnx_bytes: int = 4_000_000, p50_ms: float = 2.0) -> Any:
    """A small but complete measurement."""
    from kdcli.report import schema

    def score(value: float) -> Any:
        return schema.MetricValue(
            value=value, stderr=0.01, ci95=None, n=100, split="test", higher_is_better=True
        )

    latency = [
        schema.Latency(
            runtime="onnx",
            batch=batch,
            sequence=12.5,
            threads=2,
            p50_ms=p50_ms * batch,
            p90_ms=3.0 * batch,
            p99_ms=4.0 * batch,
            throughput_per_s=500.0,
            n=30,
        )
        for batch in (1, 32)
    ]
    return schema.Measurement(
        quality=schema.Quality.of(
            "accuracy", {"accuracy": score(accuracy), "macro_f1": score(accuracy), "ece": score(0.05)}
        ),
        size=schema.Size(
            parameters=1_000_000,
            nonzero_parameters=1_000_000,
            checkpoint_bytes=4_000_000,
            onnx_bytes=onnx_bytes,
            onnx_gzip_bytes=3_000_000,
        ),
        compute=schema.Compute(macs=5_000_000, sequence=12),
        latency=latency,
    )


def report(
    stage: str = "prune",
    *,
    source: str = "in",
    exit_code: int = 0,
    gates: tuple[tuple[str, bool], ...] = (),
    warnings: tuple[str, ...] = (),
    before: Any = None,
    after: Any = None,
) -> Any:
    """A complete report."""
    from kdcli.report import schema

    return schema.Report(
        complete=True,
        exit_code=exit_code,
        kdcli_version="0.1.0",
        stage=stage,
        command=["kdcli", stage],
        config={},
        model=schema.ModelInfo(
            source=source, family="bert", task="text-classification", labels=["no", "yes"]
        ),
        data=schema.DataInfo(ref="reviews", fingerprint="0" * 64, rows={"test": 100}),
        before=measurement() if before is None else before,
        after=measurement(0.88, 1_000_000, 1.0) if after is None else after,
        delta=schema.Delta(
            primary="accuracy", accuracy=-0.02, size_ratio=4.0, speedup=2.0, agreement=0.97, p_value=0.5
        ),
        method=schema.Method(name="taylor", params={}, detail={}, layers=[]),
        parity=schema.Parity(
            max_abs_diff=1e-6, top1_agreement=1.0, shapes=[(1, 8)], passed=exit_code != 5, tolerance=1e-4
        ),
        gates=[
            schema.Gate(name=text, expression=text, value=0.88, threshold=0.9, passed=passed)
            for text, passed in gates
        ],
        lineage=[],
        environment=schema.Environment(
            python="3.11",
            platform="Linux x86_64",
            cpu="cpu",
            isa=[],
            cores=2,
            threads=2,
            ram_bytes=None,
            device="cpu",
            gpu=None,
            versions={},
            seed=0,
            deterministic=True,
        ),
        timings={},
        warnings=[schema.Warning_(code="w", message=text) for text in warnings],
        artifacts=[],
        created_at="2026-01-01T00:00:00+00:00",
    )


class Recorder:
    """Takes the place of runner, plan, recipe and inspect, and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.calls: list[tuple[Any, ...]] = []
        self.error: BaseException | None = None
        self.outcome: Outcome | None = None

    @property
    def request(self) -> Request:
        """The only request."""
        assert len(self.requests) == 1
        return self.requests[0]

    def run(self, request: Request, progress: Any, resolved: Any = None) -> Outcome:
        """As ``runner.run``."""
        self.requests.append(request)
        progress.phase("measure before")
        if self.error is not None:
            raise self.error
        made = self.outcome or Outcome(Path("out/made"), report(request.stage))
        made.reports = made.reports or [made.report]
        return made

    def plan(self, request: Request, progress: Any) -> DryRun:
        """As ``plan.plan``."""
        self.requests.append(request)
        return DryRun(request.stage)

    def recipe(
        self, path: Path, out: Path | None, force: bool, progress: Any, dry_run: bool, argv: Any
    ) -> Any:
        """As ``recipe.run``."""
        self.calls.append((path, out, force, dry_run))
        return (
            DryRun("recipe")
            if dry_run
            else Outcome(Path("out/2-prune"), report(), [report("distill"), report()])
        )

    def describe(self, ref: str, *, offline: bool = False) -> dict[str, Any]:
        """As ``inspect.describe``."""
        self.calls.append((ref, offline))
        return {"model": ref, "sizes": {"hidden_size": 1024}, "labels": ["a\x1b[31m", "b"], "onnx": None}

    def modules(self) -> dict[str, types.ModuleType]:
        """Module name -> module, to be put into ``sys.modules``."""
        made = {}
        for name, function, value in (
            ("kdcli.run.preflight", "check", lambda request: []),
            ("kdcli.run.life", "run", self.run),
            ("kdcli.run.dry_run", "plan", self.plan),
            ("kdcli.run.recipe", "run", self.recipe),
            ("kdcli.models.inspect", "describe", self.describe),
        ):
            made[name] = types.ModuleType(name)
            setattr(made[name], function, value)
        return made

    def install(self, setitem: Any, setattribute: Any) -> None:
        """Put the modules where an import finds them."""

        for name, module in self.modules().items():
            setitem(sys.modules, name, module)
            package, _, short = name.rpartition(".")
            setattribute(importlib.import_module(package), short, module, raising=False)


def _process() -> None:
    """A kdcli process with a stage that talks too much, waits, or fails."""
    what = os.environ.get("FAKE_STAGE", "")
    recorder = Recorder()

    def run(request: Request, progress: Any, resolved: Any = None) -> Outcome:
        print("a library prints")
        os.write(1, b"native code prints\n")
        os.system("echo a child prints")
        if what == "wait":
            progress.phase("waiting")
            time.sleep(30)
        if what == "tasks":
            with progress.task("train", 3) as task:
                for _ in range(3):
                    time.sleep(0.05)
                    task.advance(detail="loss 0.5")
        if what == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if what == "gate":
            recorder.outcome = Outcome(
                Path("out/kept"), report(exit_code=4, gates=(("accuracy>=0.9", False),))
            )
        made = recorder.run(request, progress)
        models = getattr(request.options, "models", ()) or ("teacher",)
        made.path = Path(f"{request.model or models[0]}-{request.stage}")
        return made

    def setattribute(target: Any, name: str, value: Any, raising: bool = True) -> None:
        setattr(target, name, value)

    recorder.install(dict.__setitem__, setattribute)
    sys.modules["kdcli.run.life"].run = run  # type: ignore[attr-defined]

    from kdcli.cli.app import main

    main()


if __name__ == "__main__":
    _process()
