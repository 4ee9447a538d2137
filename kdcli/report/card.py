"""README.md of an output directory: the model card, with nothing in it that was not measured."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from kdcli.report import facts, markdown, metrics
from kdcli.report.schema import LineageEntry, Quality, Report

_PINNED = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)@[\w./-]+")
_VERBS = {
    "distill": "distilled",
    "prune": "pruned",
    "lowrank": "factorised",
    "quantize": "quantized",
    "evaluate": "measured",
}
_INT8_FLAGS = ("vnni", "amx_int8", "i8mm", "asimddp", "dotprod")

_PYTHON = """\
# the checkpoint, with kdcli (any compressed shape)
from pathlib import Path

import torch
from kdcli.models import checkpoint

loaded = checkpoint.load(Path("."))  # the directory of this file
batch = loaded.tokenizer(["some text"], return_tensors="pt", truncation=True, max_length=loaded.max_length)
with torch.inference_mode():
    logits = loaded.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]"""

_ONNX_TITLE = "# the ONNX export, without torch and kdcli\n"
_ONNX_IMPORTS = "import onnxruntime\nfrom transformers import AutoTokenizer\n\n"
_ONNX = """\
tokenizer = AutoTokenizer.from_pretrained(".")  # the directory of this file
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
names = {one.name for one in session.get_inputs()}
about = session.get_modelmeta().custom_metadata_map  # length and label names travel with the graph
batch = tokenizer(["some text"], return_tensors="np", truncation=True, max_length=int(about["max_length"]))
logits = session.run(None, {name: batch[name].astype("int64") for name in batch if name in names})[0]"""


@dataclass(frozen=True)
class Use:
    """What a card says of a task's answers."""

    of_checkpoint: (
        str  # Python that prints the answer of ``logits``, a tensor (C,), with the checkpoint ``loaded``
    )
    of_graph: str  # the same of ``logits``, an array (1, C), with the graph's metadata ``about``
    limit: str  # what not to expect of an answer; ``{labels}`` is the number of labels
    pipeline_tag: str  # the task as the hub knows it


def card(report: Report, use: Use, base_model: str | None = None) -> str:
    """The model card.

    Args:
        report: Of the stage that made the directory.
        use: Of the model's task.
        base_model: Hub id of the model that the lineage starts from, where the caller knows it. Without it
            the front matter names one only for a pinned reference (``org/name@revision``): a bare
            ``org/name`` may as well be a directory.
    """
    steps = [entry.stage for entry in report.lineage if entry.stage != "input"]
    source = facts.public(report.lineage[0].model if report.lineage else report.model.source)
    done = ", ".join(_VERBS.get(step, step) for step in steps or [report.stage])
    parts = [
        _front_matter(report, f"{source}, {done}", steps, base_model, use),
        f"# {markdown.escape(source)}, {markdown.escape(done)}",
        f"A {markdown.escape(report.model.family)} model for {markdown.escape(report.model.task)} with "
        f"{facts.labels_text(report)}, written by kdcli {markdown.escape(report.kdcli_version)}. "
        "Every number here is from `report.json` beside this file.",
        "## What was done",
        _lineage(report),
    ]
    if report.command:
        parts.append(markdown.fenced(facts.command_text(report), "sh"))
    parts += ["## Numbers", _measured_on(report), markdown.numbers(report)]
    told = (facts.delta_text(report), facts.files_text(report), *markdown.found_out(report))
    said = [text for text in told if text]
    sentences = [text[0].upper() + text[1:] + "." for text in said]
    if report.parity is not None:
        sentences.append(f"The ONNX export {facts.parity_text(report)}.")
    if report.gates:
        asked = "; ".join(f"{one.expression} {'met' if one.passed else 'MISSED'}" for one in report.gates)
        sentences.append(f"Gates: {asked}.")
    if sentences:
        parts.append(markdown.escape(" ".join(sentences)))
    parts += [
        "## How to load it",
        markdown.fenced(f"{_PYTHON}\n{use.of_checkpoint}", "python"),
        markdown.fenced(_of_graph(f"{_ONNX}\n{use.of_graph}"), "python"),
        "Plain `transformers` (`AutoModelForSequenceClassification.from_pretrained`) loads the directory too "
        "unless `kdcli.json` lists a `width`, a `factorise`, or a `cut` or `layers` without `in_config`; then only "
        "kdcli knows the shapes.",
        "## Limits",
        "\n".join(f"- {markdown.escape(limit)}" for limit in _limits(report, use)),
        "## Labels",
        ", ".join(markdown.escape(label) for label in report.model.labels),
    ]
    return "\n\n".join(parts) + "\n"


def _lineage(report: Report) -> str:
    if not report.lineage:
        return "No history is recorded."
    head, values = facts.values_after(report.lineage)
    rows = [
        (entry.stage, entry.method or "-", facts.public(entry.model), value, _settings(entry))
        for entry, value in zip(report.lineage, values, strict=True)
    ]
    return markdown.grid(
        ("step", "method", "model it started from", markdown.escape(head), "settings"),
        [tuple(markdown.escape(cell) for cell in row) for row in rows],
        right=(3,),
    )


def _settings(entry: LineageEntry) -> str:
    shown = (
        f"{key}={value}" for key, value in facts.parameters_of(entry).items() if value not in (None, [], {})
    )
    return ", ".join(shown)


def _measured_on(report: Report) -> str:
    where = report.environment
    device = f"{where.cpu}, {where.threads} thread{'s' if where.threads != 1 else ''}"
    if where.gpu:
        device += f", {where.gpu}"
    quality = report.after.quality
    rows = ""
    if quality is not None and report.data is not None:
        main = quality.main
        total = report.data.rows.get(main.split)
        of = f" of {total}" if total not in (None, main.n) else ""
        rows = (
            f"Quality is from {main.n}{of} rows of the split {main.split} of "
            f"{facts.public(report.data.ref)}. "
        )
    earlier = "the model it is compared with" if report.stage == "evaluate" else "this stage's input"
    words = f"'before' is {earlier}, 'after' the model in this directory. " if report.before else ""
    return markdown.escape(
        f"{rows}{words}Latency was measured on {device}; it differs on every other machine."
    )


def _limits(report: Report, use: Use) -> list[str]:
    """What a reader should not conclude, in plain words; each line only where it applies."""
    after = report.after
    found = [one.message for one in report.warnings]
    quality = after.quality
    if quality is None:
        found.append("The quality of this model was not measured.")
    else:
        main, metric = quality.main, metrics.of(quality.primary)
        if main.ci95 is not None:
            low, high = (metric.number(end) for end in main.ci95)
            found.append(
                f"The {metric.title} of {metric.number(main.value)} is an estimate: on other rows of the same kind "
                f"it may lie between {low} and {high} (95 % interval). On texts of another kind "
                "nothing is known."
            )
        if main.split == "train":
            found.append("The quality was measured on rows that the model may have been trained on.")
    if report.delta.agreement is not None and report.delta.agreement < 1:
        found.append(_answers_changed(report.delta.agreement, metrics.of(report.delta.primary or "")))
    if (zeros := facts.zero_share(after)) > facts.MANY_ZEROS:
        found.append(
            f"{100 * zeros:.0f} % of the weights are zero. Zeros are not smaller: they take "
            "the same space in the file and the same time to compute; only a compressed copy shrinks."
        )
    if _integers(report):
        isa = report.environment.isa
        has = any(flag in name.lower() for name in isa for flag in _INT8_FLAGS)
        # No list at all means that the flags could not be read, not that there are none.
        known = (
            f" The machine of these numbers {'has' if has else 'does not list'} such instructions."
            if isa
            else ""
        )
        found.append(
            "Int8 may be slower than float32, above all with small batches and on CPUs without int8 "
            f"instructions (VNNI).{known} Answers can differ a little between CPUs."
        )
    found += [
        use.limit.format(labels=len(report.model.labels)),
        "Compression was judged by overall numbers: rare labels and groups of people may have lost more. "
        "kdcli did not test for bias, safety or adversarial inputs.",
        "The licences of the base model and of the data apply; kdcli does not know them.",
    ]
    return list(dict.fromkeys(found))


def _of_graph(code: str) -> str:
    """The code with the imports that it needs: the lines of a task may use more than those that all share."""
    more = [name for name in ("json", "numpy") if f"{name}." in code]
    imports = "".join(f"import {name}\n" + "\n" * (name == "json") for name in more)
    return f"{_ONNX_TITLE}{imports}{_ONNX_IMPORTS}{code}"


def _answers_changed(agreement: float, metric: metrics.Metric) -> str:
    changed = f"{100 * (1 - agreement):.2f} %"
    said = (
        f"{changed} of the pairs of rows stand in another order than with"
        if metric.ordered
        else f"On {changed} of the rows it answers differently from"
    )
    return f"{said} the model before it; the {metric.title} alone does not show that."


def _integers(report: Report) -> bool:
    """Whether some step stored the weights as integers."""
    steps = [(one.method, one.params) for one in report.lineage if one.stage == "quantize"]
    return any("int" in f"{method} {params.get('scheme', '')}" for method, params in steps)


def _front_matter(report: Report, name: str, steps: list[str], base_model: str | None, use: Use) -> str:
    """YAML; every string is quoted as JSON, which YAML reads as the same string."""
    pinned = _PINNED.fullmatch(report.lineage[0].model) if report.lineage else None
    base = base_model or (pinned[1] if pinned else None)
    tag = _quoted(use.pipeline_tag)
    lines = ["---", "library_name: transformers", f"pipeline_tag: {tag}"]
    if base:
        lines.append(f"base_model: {_quoted(base)}")
    lines.append("tags:")
    lines += [f"- {_quoted(tag)}" for tag in dict.fromkeys(["kdcli", "onnx", "model-compression", *steps])]
    quality = report.after.quality
    if quality is not None and report.data is not None:
        ref = facts.public(report.data.ref)
        listed = _listed(quality)
        lines += [
            "metrics:",
            *(f"- {kind}" for kind in dict.fromkeys(kind for kind, _, _ in listed)),
            "model-index:",
            f"- name: {_quoted(name)}",
            "  results:",
            "  - task:",
            f"      type: {tag}",
            "    dataset:",
            f"      name: {_quoted(ref)}",
            f"      type: {_quoted(ref)}",
            f"      split: {_quoted(quality.main.split)}",
            "    metrics:",
        ]
        for kind, title, value in listed:
            lines += [
                f"    - type: {kind}",
                f"      name: {title}",
                f"      value: {value:.6f}",
            ]
    return "\n".join([*lines, "---"])


def _listed(quality: Quality) -> list[tuple[str, str, float]]:
    """(type, title, value) of the metrics that the hub lists, the primary one first; the texts are YAML."""
    found = []
    for name in dict.fromkeys((quality.primary, *quality.metrics)):
        metric = metrics.of(name)
        if name == quality.primary or (metric.hub and not metric.minor):
            kind, title = metric.hub or name, metric.title
            plain = name in metrics.KNOWN
            value = quality.metrics[name].value
            found.append((kind if plain else _quoted(kind), title if plain else _quoted(title), value))
    return found


def _quoted(text: str) -> str:
    return json.dumps(facts.visible(text), ensure_ascii=False)
