"""report.json, schema version 2: typed, with units in the names, null instead of NaN."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from kdcli.errors import ExitCode

Number = Annotated[float, Field(allow_inf_nan=False)]
"""A finite float; NaN and infinity are refused, unknown values are null."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelInfo(_Part):
    """What kind of model this is."""

    source: str = Field(description="the reference the stage started from")
    family: str
    task: str
    labels: list[str] = Field(description="label names in the order of the logits")


class DataInfo(_Part):
    """The rows that were used."""

    ref: str
    fingerprint: str = Field(description="sha256 over the content of all splits")
    rows: dict[str, int] = Field(description="split -> number of rows")
    kind: Literal["path", "alias", "hub"] | None = Field(
        default=None, description="what `ref` is; null in reports of older versions"
    )
    path: str | None = Field(
        default=None, description="of a relative `ref`: the way from this report's directory to the data"
    )


class MetricValue(_Part):
    """One quality metric with its uncertainty."""

    value: Number
    stderr: Number | None = None
    ci95: tuple[Number, Number] | None = None
    n: int
    split: str
    higher_is_better: bool = True


class Quality(_Part):
    """How good the answers are: ``primary``, and every metric under its own name."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, MetricValue] = Field(init=False)

    primary: str = Field(description="the metric that gates, searches and the best epoch go by")
    rows_sha256: str | None = Field(
        default=None,
        description="of the texts and labels of the rows, in any order; two numbers compare only where it is the same",
    )

    @classmethod
    def of(cls, primary: str, metrics: Mapping[str, MetricValue], rows_sha256: str | None = None) -> Quality:
        """Put together what a task measured.

        Raises:
            ValueError: The primary metric is not among them.
        """
        return cls.model_validate({"primary": primary, "rows_sha256": rows_sha256, **metrics})

    @model_validator(mode="after")
    def _has_primary(self) -> Quality:
        if self.primary not in self.metrics:
            raise ValueError(f"the primary metric '{self.primary}' is missing")
        return self

    @property
    def metrics(self) -> dict[str, MetricValue]:
        """Name -> value, in the order of the report."""
        return self.__pydantic_extra__

    @property
    def main(self) -> MetricValue:
        """The primary metric."""
        return self.metrics[self.primary]


class Size(_Part):
    """How big the model is; bytes on disk, not in memory."""

    parameters: int | None
    nonzero_parameters: int | None
    checkpoint_bytes: int | None = Field(description="of the safetensors files")
    onnx_bytes: int | None
    onnx_gzip_bytes: int | None


class Compute(_Part):
    """Multiply-accumulates of one row of ``sequence`` tokens."""

    macs: int | None
    sequence: int | None


class Latency(_Part):
    """Wall-clock time of one batch."""

    runtime: str
    batch: int
    sequence: Number = Field(description="mean tokens a row, padding not counted")
    threads: int
    p50_ms: Number
    p90_ms: Number
    p99_ms: Number
    throughput_per_s: Number
    n: int = Field(description="timed batches")


class Files(_Part):
    """Which files the numbers of a measurement come from."""

    graph: str | None = Field(
        description="the ONNX file that was timed and weighed, by its place in the model's directory; `export`: "
        "the directory has none, and kdcli exported the checkpoint; null: it has no ONNX form, torch gave all"
    )
    graph_sha256: str | None
    quality: Literal["onnx", "torch"] = Field(description="what gave the answers: that graph, or torch")
    weights: list[str] = Field(
        description="of parameters, MACs and what torch gives; empty: none that belong to the graph"
    )


class Measurement(_Part):
    """One model, measured."""

    quality: Quality | None
    size: Size
    compute: Compute
    latency: list[Latency]
    files: Files | None = Field(default=None, description="null in reports of older versions")


class Delta(_Part):
    """``after`` against ``before``: the difference of every metric that both have, under the metric's own name.

    A difference is after minus before, in the unit of the metric (of a share: points of 1).
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Number] = Field(init=False)

    primary: str | None = Field(description="of `after`; null where its quality was not measured")
    ci95: tuple[Number, Number] | None = Field(
        default=None, description="95 % interval of the primary difference, both models on the same rows"
    )
    p_value: Number | None = Field(
        default=None, description="that both are equally good by the primary metric; paired, two-sided"
    )
    agreement: Number | None = Field(
        default=None,
        description="share of rows with the same answer; where answers are numbers, of pairs of rows in the same order",
    )
    lost: int | None = Field(default=None, description="rows that only `before` got right")
    won: int | None = Field(default=None, description="rows that only `after` got right")
    size_ratio: Number | None = Field(default=None, description="bytes of model.onnx before / after")
    speedup: Number | None = Field(default=None, description="p50 at batch 1 before / after")

    @property
    def differences(self) -> dict[str, float]:
        """Name of a metric -> after minus before; empty where no quality was compared."""
        return self.__pydantic_extra__

    @property
    def main(self) -> float | None:
        """The difference of the primary metric; None where it was not compared."""
        return None if self.primary is None else self.differences.get(self.primary)


class Method(_Part):
    """What the stage did, resolved to the last default."""

    name: str
    params: dict[str, Any]
    detail: dict[str, Any]
    layers: list[dict[str, Any]] = Field(description="one row a layer, where the stage has such a table")


class Parity(_Part):
    """The exported graph against the checkpoint."""

    max_abs_diff: Number | None
    top1_agreement: Number | None = Field(
        description="share of rows with the same answer; of numbers, of the pairs of rows in the same order"
    )
    shapes: list[tuple[int, int]] = Field(description="(batch, sequence) of every comparison")
    passed: bool
    tolerance: Number | None = Field(
        description="largest allowed difference of a logit; null for integer graphs"
    )


class Gate(_Part):
    """One condition and how it went."""

    name: str
    expression: str
    value: Number | None
    threshold: Number
    passed: bool
    reason: str | None = Field(default=None, description="why there is no value, and how to get one")


class LineageEntry(_Part):
    """One step of a model's history."""

    stage: str
    method: str
    report_sha256: str | None
    model: str
    metric: str | None = Field(description="what `value` is: the primary metric of then")
    value: Number | None = Field(description="of the model after this step")
    params: dict[str, Any]
    chosen: list[str] = Field(default=[], description="what the rows of the validation split chose, in words")
    chosen_on: str | None = Field(
        default=None, description="sha256 of the rows of that split, as `rows_sha256`"
    )


class Environment(_Part):
    """Where the numbers were measured."""

    python: str
    platform: str
    cpu: str
    isa: list[str]
    cores: int
    threads: int
    ram_bytes: int | None
    device: str
    gpu: str | None
    versions: dict[str, str]
    seed: int
    deterministic: bool


class Warning_(_Part):
    """Something to know before trusting the result."""

    code: str
    message: str


class Artifact(_Part):
    """One file of the output directory."""

    path: str
    bytes: int
    sha256: str


class Setting(_Part):
    """One resolved option."""

    value: Any
    origin: str = Field(
        description="flag, environment, file (kdcli.toml), recipe, argument (Python), model (its own report) or default"
    )


class Report(_Part):
    """report.json of one stage."""

    schema_version: Literal[2] = 2
    kind: Literal["kdcli.report"] = "kdcli.report"
    complete: bool
    exit_code: int
    kdcli_version: str
    stage: str
    command: list[str]
    config: dict[str, Setting]
    model: ModelInfo
    data: DataInfo | None
    before: Measurement | None
    after: Measurement
    delta: Delta
    method: Method | None
    parity: Parity | None
    gates: list[Gate]
    lineage: list[LineageEntry]
    environment: Environment
    timings: dict[str, Number] = Field(description="seconds a phase")
    warnings: list[Warning_]
    artifacts: list[Artifact]
    created_at: str = Field(description="ISO 8601, UTC")

    _directory: Path | None = PrivateAttr(default=None)

    @property
    def directory(self) -> Path | None:
        """Where a call from Python wrote it; None for one that was read, or of a judgement that wrote nothing."""
        return self._directory

    def written_to(self, directory: Path) -> None:
        """Keep where the output is, for the caller; report.json does not say it."""
        self._directory = directory

    @property
    def verdict(self) -> ExitCode:
        """What the process should exit with: parity first, then the gates."""
        if self.parity is not None and not self.parity.passed:
            return ExitCode.PARITY
        if not all(gate.passed for gate in self.gates):
            return ExitCode.GATE
        return ExitCode.OK
