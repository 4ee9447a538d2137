"""Layerwise: every layer of the teacher teaches a small student of its own; their ensemble is the result.

1. Layer by layer, bottom to top, each encoder layer l is fine-tuned with a classifier on its output (the mean
   over the real tokens); the layers below are already tuned and stay as they are.
2. For every layer one student learns from that layer's answers. The students train side by side and share their
   token table, which would otherwise be copied once a layer.
3. The answer is a mixture of the students' probabilities; its weights are those that give the validation labels
   the highest likelihood. ``--set distill_ensemble=true`` distils the mixture into one student in the end.
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcli import cache, families
from kdcli.context import Applied, Context
from kdcli.errors import UsageError
from kdcli.families.stack import encoder_layers
from kdcli.inputs import batching, kinds, text
from kdcli.inputs.feeding import HandsOn, model_inputs, real, taken
from kdcli.inputs.text import Encoded
from kdcli.models import ensemble
from kdcli.models.checkpoint import Checkpoint
from kdcli.models.students import Student
from kdcli.models.transforms import TransformLog
from kdcli.probe.hooks import Enough
from kdcli.stages.distill import control, fitting, lesson
from kdcli.stages.distill import student as students
from kdcli.stages.distill.plan import DistillPlan
from kdcli.stages.distill.prepared import Prepared
from kdcli.stages.distill.strategies import succession, teacher_assisted
from kdcli.stages.distill.student import Taught
from kdcli.training import distributed
from kdcli.training.capture import Capture
from kdcli.training.label_loss import hard, label_loss
from kdcli.training.loop import Batch, FitOptions, evaluate, inference
from kdcli.training.losses import response
from kdcli.training.side_by_side import Outputs
from kdcli.training.terms import Needs

CLASSIFIER_RATE = 10.0  # times the layer's


class LayerClassifier(HandsOn):
    """An encoder up to one of its layers, with a classifier on the mean of that layer's real tokens.

    Args:
        checkpoint: The encoder; all layers up to this one run, this one alone is trained.
        number: The layer, from 1.
        classes: C.
    """

    def __init__(self, checkpoint: Checkpoint, number: int, classes: int) -> None:
        super().__init__()
        self.config: Any = checkpoint.config
        self.encoder = checkpoint.model
        self.number = number
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(int(self.config.hidden_size), classes)
        self._capture = Capture(checkpoint, Needs(hidden=frozenset({number})), cut=True)

    def token_tables(self) -> list[nn.Embedding]:
        """None: the table is not trained."""
        return []

    def rated(self) -> list[tuple[nn.Module, float]]:
        """The layer has the rate of a fine-tuning; the classifier starts from nothing and needs a higher one."""
        return [(self.encoder, 1.0), (self.classifier, CLASSIFIER_RATE)]

    def forward(self, **given: Tensor) -> Outputs:
        """A batch of B rows to logits (B, C)."""
        with contextlib.suppress(Enough):
            self.encoder(**taken(self.encoder, given))
        mask = kinds.mask(given).bool()
        states = self._capture.signals(mask.new_zeros(()), mask).hidden[self.number]
        logits = self.classifier(self.dropout(mean_of(states, mask)))
        return Outputs(logits, [logits])

    def close(self) -> None:
        """Remove the hooks."""
        self._capture.__exit__(None, None, None)


def mean_of(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens: states (B, T, D) and mask (B, T) bool to (B, D)."""
    real = mask[..., None].to(states.dtype)
    return (states * real).sum(1) / real.sum(1)


def run(context: Context, prepared: Prepared) -> Applied:
    """Tune the layers, train their students, mix them; the report has the score of each."""
    plan = prepared.plan
    teacher = context.checkpoint
    if not families.is_encoder(teacher.model_type):
        raise UsageError(f"strategy 'layerwise' needs encoder layers, a '{teacher.model_type}' shows none")
    made = students.make(context, plan, teacher, plan.options.student)
    if not families.is_encoder(made.checkpoint.model_type) or made.checkpoint.log.transforms:
        raise UsageError(
            "strategy 'layerwise' makes ensembles of plain encoders only", "such as --student tiny"
        )
    names = teacher.labels
    rows = students.rows_of(context, plan, teacher).rows
    heads, table = _tune(context, plan, teacher)
    targets = _answers(context, teacher, heads, rows)
    count = len(heads)
    members = [made] + [
        students.make(context, plan, teacher, plan.options.student, seed=context.seed + n)
        for n in range(1, count)
    ]
    model = ensemble.of_members(
        [m.checkpoint.model for m in members],
        made.checkpoint.model.get_input_embeddings().weight.data,  # type: ignore[operator]
    ).to(context.device)
    whole = Checkpoint(model, teacher.tokenizer, list(names), TransformLog(), teacher.path, task=teacher.task)
    students.set_dropout(whole, plan.settings.dropout)
    options = fitting.fit_options(context, plan, made, rows)
    result = fitting.run_fit(context, whole, rows, _loss(context, plan, rows, targets), options, "ensemble")
    _weigh(context, whole, table)
    detail: dict[str, Any] = {"training": result.detail(), "ensemble": {"members": count}}
    for split in ("validation", "test"):
        if split in context.encoded:
            detail["ensemble"][f"{split}_{teacher.task.primary}"] = control.score(context, whole, split)
    metric = teacher.task.primary
    shown = ", ".join(f"{row[f'student_{metric}']:.4g}" for row in table)
    context.progress.note(
        f"{metric} on validation: students {shown}; ensemble {detail['ensemble'][f'validation_{metric}']:.4g}"
    )
    taught = Taught(Student(whole, made.init, made.notes, made.no_hub), options, result, detail, result.steps)
    if plan.settings.distill_ensemble:
        kept = succession.keep(context, whole, "ensemble")
        single = students.make(context, plan, teacher, plan.options.student)
        last = lesson.teach(context, plan, single, [kept], rows, title="student")
        last.detail["layerwise"] = detail
        taught = last
    detail = students.describe(context, prepared.detail, taught, rows)
    applied = Applied(taught.checkpoint, teacher_assisted.method_of(plan, taught, detail))
    applied.method.layers = table
    return applied


def _tune(
    context: Context, plan: DistillPlan, teacher: Checkpoint
) -> tuple[list[nn.Linear], list[dict[str, Any]]]:
    """Fine-tune every layer with a classifier on its output, in place; classifiers and a table of scores."""
    settings, train = plan.settings, context.encoded["train"]
    assert train.labels is not None
    labelled = train.take(np.flatnonzero(teacher.task.known(train.labels)))
    assert labelled.labels is not None
    layers = encoder_layers(teacher.model, teacher.family)
    heads: list[nn.Linear] = []
    table: list[dict[str, Any]] = []
    validation = context.encoded["validation"]
    for layer in layers:
        for p in teacher.model.parameters():
            p.requires_grad_(False)
        for p in layer.module.parameters():
            p.requires_grad_(True)
        torch.manual_seed(context.seed + layer.index)
        part = LayerClassifier(teacher, layer.index + 1, len(teacher.labels)).to(context.device)
        options = FitOptions(
            epochs=settings.layer_epochs,
            batch_size=settings.teacher_batch_size,
            lr=settings.teacher_lr or (2e-4 if int(teacher.config.hidden_size) <= 384 else 5e-5),
            seed=context.seed,
            rate_option="--set teacher_lr=RATE",
        )
        loss = label_loss(teacher.task, labelled.labels, context.device)
        title = f"teacher layer {layer.index + 1} of {len(layers)}"
        fitting.run_fit(context, teacher, labelled, loss, options, title, model=part)
        batches = inference(validation, 128, teacher.pad_id)
        found, _ = evaluate(teacher.task, part, validation, batches, context.device)
        part.close()
        heads.append(part.classifier)
        table.append({"layer": layer.index + 1, f"teacher_{teacher.task.primary}": found})
        context.progress.note(f"{title}: validation {teacher.task.primary} {found:.4g}")
    for p in teacher.model.parameters():
        p.requires_grad_(True)
    return heads, table


@torch.no_grad()
def _answers(context: Context, teacher: Checkpoint, heads: list[nn.Linear], rows: Encoded) -> np.ndarray:
    """Logits (N, L, C) of every layer for every row, on disk beside the resume points."""
    classes = heads[0].out_features
    weights = hashlib.sha256()
    for tensor in (*teacher.model.parameters(), *(h.weight for h in heads)):
        weights.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    key = cache.key(rows=text.fingerprint(rows), model=weights.hexdigest())
    path = context.resume_dir / f"layer-answers-{key}.npy"
    shape = (len(rows), len(heads), classes)
    with distributed.first_then_others():
        if (known := cache.load_array(path, shape=shape, mapped=True)) is not None:
            return known
        teacher.model.eval()
        needs = Needs(hidden=frozenset(range(1, len(heads) + 1)))
        batches = batching.inference_batches(rows.lengths, 128)
        with (
            cache.filling(path, np.float32, shape) as made,
            Capture(teacher, needs) as capture,
            context.progress.task("layers' answers", len(rows)) as task,
        ):
            for at in batches:
                batch = batching.collate(rows, at, teacher.pad_id)
                output = teacher.model(**model_inputs(teacher.model, batch, context.device))
                mask = real(batch, context.device)
                hidden = capture.signals(output.logits, mask).hidden
                answers = [head(mean_of(hidden[n], mask)) for n, head in enumerate(heads, start=1)]
                made[at] = torch.stack(answers, 1).float().cpu().numpy()
                task.advance(len(at))
    return made


def _loss(context: Context, plan: DistillPlan, rows: Encoded, targets: np.ndarray) -> Any:
    """The mean of the members' own losses, each against its own layer's answers."""
    assert rows.labels is not None
    labels = torch.from_numpy(rows.labels).to(context.device)
    alpha, soft, task = 1 - plan.hard_weight, plan.chosen[0], context.checkpoint.task

    def loss(output: Any, batch: Batch) -> Tensor:
        own = labels[torch.from_numpy(batch.rows).to(context.device)]
        theirs = torch.from_numpy(targets[batch.rows]).to(context.device)
        parts = [
            (1 - alpha) * hard(task, logits, own)
            + alpha * response.loss(logits, theirs[:, m], soft.config, task)
            for m, logits in enumerate(output["every"])
        ]
        return torch.stack(parts).mean()

    return loss


@torch.no_grad()
def _weigh(context: Context, whole: Checkpoint, table: list[dict[str, Any]]) -> None:
    """Fit the mixture's weights on the validation rows and write them into the model."""
    rows, model = context.encoded["validation"], whole.model.eval()
    assert rows.labels is not None
    parts, order = [], []
    for at in batching.inference_batches(rows.lengths, 128):
        batch = batching.collate(rows, at, whole.pad_id)
        parts.append(model(**model_inputs(model, batch, context.device))["every"])
        order.append(at)
    answers = torch.cat(parts, 1)
    labels = torch.from_numpy(rows.labels[np.concatenate(order)]).to(context.device)
    weights = ensemble.mixture_weights(answers, labels)
    buffer: Any = model.log_weights
    buffer.copy_(weights.clamp_min(1e-9).log().to(buffer))
    truth = labels.cpu().numpy()
    for row, own, weight in zip(table, answers.cpu().numpy(), weights.tolist(), strict=True):
        row |= {f"student_{whole.task.primary}": whole.task.score(own, truth), "weight": weight}
