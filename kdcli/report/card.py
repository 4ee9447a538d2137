"""README.md of an output directory: the model card, with nothing in it that was not measured."""

from __future__ import annotations

import json
import re

from kdcli.report import facts, markdown
from kdcli.report.schema import LineageEntry, Report

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
    logits = loaded.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
print(loaded.labels[int(logits.argmax())])"""

_ONNX = """\
# the ONNX export, without torch and kdcli
import json

import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")  # the directory of this file
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
names = {one.name for one in session.get_inputs()}
about = session.get_modelmeta().custom_metadata_map  # length and label names travel with the graph
batch = tokenizer(["some text"], return_tensors="np", truncation=True, max_length=int(about["max_length"]))
logits = session.run(None, {name: batch[name].astype("int64") for name in batch if name in names})[0]
print(json.loads(about["labels"])[int(logits[0].argmax())])"""


def card(report: Report, base_model: str | None = None) -> str:
    """The model card.

    Args:
        report: Of the stage that made the directory.
        base_model: Hub id of the model that the lineage starts from, where the caller knows it. Without it
            the front matter names one only for a pinned reference (``org/name@revision``): a bare
            ``org/name`` may as well be a directory.
    """
    steps = [entry.stage for entry in report.lineage if entry.stage != "input"]
    source = facts.public(report.lineage[0].model if report.lineage else report.model.source)
    done = ", ".join(_VERBS.get(step, step) for step in steps or [report.stage])
    parts = [
        _front_matter(report, f"{source}, {done}", steps, base_model),
        f"# {markdown.escape(source)}, {markdown.escape(done)}",
        f"A {markdown.escape(report.model.family)} model for {markdown.escape(report.model.task)} with "
        f"{len(report.model.labels)} labels, written by kdcli {markdown.escape(report.kdcli_version)}. "
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
        markdown.fenced(_PYTHON, "python"),
        markdown.fenced(_ONNX, "python"),
        "Plain `transformers` (`AutoModelForSequenceClassification.from_pretrained`) loads the directory too "
        "unless `kdcli.json` lists a `width`, a `factorise`, or a `cut` or `layers` without `in_config`; then only "
        "kdcli knows the shapes.",
        "## Limits",
        "\n".join(f"- {markdown.escape(limit)}" for limit in _limits(report)),
        "## Labels",
        ", ".join(markdown.escape(label) for label in report.model.labels),
    ]
    return "\n\n".join(parts) + "\n"


def _lineage(report: Report) -> str:
    if not report.lineage:
        return "No history is recorded."
    rows = []
    for entry in report.lineage:
        accuracy = facts.score(entry.accuracy)
        rows.append((entry.stage, entry.method or "-", facts.public(entry.model), accuracy, _settings(entry)))
    return markdown.grid(
        ("step", "method", "model it started from", "accuracy after it", "settings"),
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
        total = report.data.rows.get(quality.accuracy.split)
        of = f" of {total}" if total not in (None, quality.accuracy.n) else ""
        rows = (
            f"Quality is from {quality.accuracy.n}{of} rows of the split {quality.accuracy.split} of "
            f"{facts.public(report.data.ref)}. "
        )
    earlier = "the model it is compared with" if report.stage == "evaluate" else "this stage's input"
    words = f"'before' is {earlier}, 'after' the model in this directory. " if report.before else ""
    return markdown.escape(
        f"{rows}{words}Latency was measured on {device}; it differs on every other machine."
    )


def _limits(report: Report) -> list[str]:
    """What a reader should not conclude, in plain words; each line only where it applies."""
    after = report.after
    found = [one.message for one in report.warnings]
    quality = after.quality
    if quality is None:
        found.append("The quality of this model was not measured.")
    else:
        if quality.accuracy.ci95 is not None:
            low, high = quality.accuracy.ci95
            found.append(
                f"The accuracy of {quality.accuracy.value:.4f} is an estimate: on other rows of the same kind "
                f"it may lie between {low:.4f} and {high:.4f} (95 % interval). On texts of another kind "
                "nothing is known."
            )
        if quality.accuracy.split == "train":
            found.append("The quality was measured on rows that the model may have been trained on.")
    if report.delta.agreement is not None and report.delta.agreement < 1:
        found.append(
            f"On {100 * (1 - report.delta.agreement):.2f} % of the rows it answers differently from the "
            "model before it; the accuracy alone does not show that."
        )
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
        f"It knows {len(report.model.labels)} labels and always answers with one of them, also for a text "
        "that fits none.",
        "Compression was judged by overall numbers: rare labels and groups of people may have lost more. "
        "kdcli did not test for bias, safety or adversarial inputs.",
        "The licences of the base model and of the data apply; kdcli does not know them.",
    ]
    return list(dict.fromkeys(found))


def _integers(report: Report) -> bool:
    """Whether some step stored the weights as integers."""
    steps = [(one.method, one.params) for one in report.lineage if one.stage == "quantize"]
    return any("int" in f"{method} {params.get('scheme', '')}" for method, params in steps)


def _front_matter(report: Report, name: str, steps: list[str], base_model: str | None) -> str:
    """YAML; every string is quoted as JSON, which YAML reads as the same string."""
    pinned = _PINNED.fullmatch(report.lineage[0].model) if report.lineage else None
    base = base_model or (pinned[1] if pinned else None)
    lines = ["---", "library_name: transformers", f"pipeline_tag: {_quoted(report.model.task)}"]
    if base:
        lines.append(f"base_model: {_quoted(base)}")
    lines.append("tags:")
    lines += [f"- {_quoted(tag)}" for tag in dict.fromkeys(["kdcli", "onnx", "model-compression", *steps])]
    quality = report.after.quality
    if quality is not None and report.data is not None:
        ref = facts.public(report.data.ref)
        lines += [
            "metrics:",
            "- accuracy",
            "- f1",
            "model-index:",
            f"- name: {_quoted(name)}",
            "  results:",
            "  - task:",
            f"      type: {_quoted(report.model.task)}",
            "    dataset:",
            f"      name: {_quoted(ref)}",
            f"      type: {_quoted(ref)}",
            f"      split: {_quoted(quality.accuracy.split)}",
            "    metrics:",
        ]
        for kind, title, metric in (
            ("accuracy", "accuracy", quality.accuracy),
            ("f1", "macro F1", quality.macro_f1),
        ):
            lines += [
                f"    - type: {kind}",
                f"      name: {title}",
                f"      value: {metric.value:.6f}",
            ]
    return "\n".join([*lines, "---"])


def _quoted(text: str) -> str:
    return json.dumps(facts.visible(text), ensure_ascii=False)
