"""Quantisation-aware training: train with rounded weights, taught by the model that came in; see ``Training``."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from torch import Tensor, nn

from kdcli import families
from kdcli.context import Applied, Context
from kdcli.errors import UsageError
from kdcli.families.stack import logits_layer
from kdcli.models import checkpoint as checkpoints
from kdcli.models.integers import Integers
from kdcli.stages.quantize import fake_quant, fixed_ranges, integer_weights
from kdcli.stages.quantize.fake_quant import Rounding
from kdcli.stages.quantize.plan import QuantizePlan
from kdcli.stages.quantize.ranges import Affine
from kdcli.stages.quantize.rounding import rtn
from kdcli.stages.quantize.scheme import Training
from kdcli.training import objective, resumable
from kdcli.training import teacher as teachers
from kdcli.training.capture import Capture, shape_of
from kdcli.training.features import TeacherSignals
from kdcli.training.loop import FitOptions
from kdcli.training.losses import response, tinybert
from kdcli.training.objective import ChosenLoss, Objective
from kdcli.training.recovery import hold_zeros

BATCH_SIZE = 32
_SAFE = (
    64  # no product of two such integers saturates anywhere, see kdcli.stages.quantize.schemes.dynamic_int8
)
_CACHE = 4 << 30  # bytes of the teacher's hidden states on disk


def check(context: Context, plan: QuantizePlan) -> None:
    """Refuse models without anything to train."""
    if plan.options.epochs < 0:
        raise UsageError(f"--epochs {plan.options.epochs} is negative; 0 means the scheme's own number")
    if not _trained(context, plan):
        raise UsageError(
            f"--scheme {plan.name} is for the matrices of an encoder, and none is left to quantise",
            "use --scheme dynamic-int8 or static-int8 for this model",
        )


def apply(context: Context, plan: QuantizePlan) -> Applied:
    """Train, round once more, and hand back integers and how to write the graph."""
    config, how = plan.config, training_of(plan)
    fixed = how.ranges
    trained = _trained(context, plan)
    model = context.checkpoint.model
    layers = {name: _rounding(plan, table=name in plan.tables) for name in trained}
    if fixed:
        layers |= {name: _eight_bits for name in plan.matrices if name not in trained}
    ranges: dict[str, Affine] = {}
    with fake_quant.rounded(model, layers, momentum=config.momentum if fixed else None):
        detail = _distil(context, plan)
        ranges = fake_quant.ranges(model)

    def matrix(name: str, layer: nn.Linear) -> Integers:
        if name in trained:
            return how.quantise(layer.weight, config)
        return _other(layer.weight) if fixed else rtn.symmetric(layer.weight, 8)

    integers = integer_weights.quantise(plan, matrix)
    for name in trained & set(plan.tables):
        integers[f"{name}.weight"] = how.quantise(plan.tables[name].weight, config, table=True)
    if fixed:
        return fixed_ranges.finish(
            context,
            plan,
            integers,
            ranges,
            {},
            detail=detail,
            unsigned=how.unsigned,
            reduce_range=how.reduce_range,
            pack=how.pack,
        )
    return integer_weights.finish(
        context, plan, integers, kernel="blocks", fusion="separate", exact=True, detail=detail
    )


def training_of(plan: QuantizePlan) -> Training:
    """How the scheme of a plan trains."""
    assert plan.scheme.training is not None, "only schemes that train come here"
    return plan.scheme.training(plan.config)


def _other(weight: Tensor) -> Integers:
    """Integers of a matrix outside the encoder; the bound keeps products from saturating, as in dynamic-int8."""
    return rtn.symmetric(weight, 8, limit=_SAFE)


def _eight_bits(weight: Tensor) -> Tensor:
    return _other(weight).dense()


def _trained(context: Context, plan: QuantizePlan) -> set[str]:
    """Names of the layers that are rounded while the model trains.

    Few bits are for the encoder and, where asked, the token table; matrices outside, such as the classifier, are
    small and have 8. A model that is no stack of encoder layers has every matrix but its classifier trained.
    """
    checkpoint = context.checkpoint
    if training_of(plan).everywhere:
        return set(plan.matrices)
    if families.is_encoder(checkpoint.model_type):
        inside = f"{checkpoint.family.layers}."
        names = {name for name in plan.matrices if name.startswith(inside)}
    else:
        last = logits_layer(checkpoint.model, families.presumed(checkpoint.model_type))
        names = {name for name, layer in plan.matrices.items() if layer is not last}
    if plan.config.tables:
        model: Any = checkpoint.model
        token = model.get_input_embeddings()
        names |= {name for name, table in plan.tables.items() if table is token}
    return names


def _without_zero(context: Context, plan: QuantizePlan) -> set[str]:
    """Weights of one bit: zeros of an earlier stage cannot stay in them, and had better learn a sign."""
    if training_of(plan).zeros:
        return set()
    return {f"{name}.weight" for name in _trained(context, plan) & set(plan.matrices)}


def _rounding(plan: QuantizePlan, *, table: bool) -> Rounding:
    how = training_of(plan)

    def rounding(weight: Tensor) -> Tensor:
        return how.quantise(weight, plan.config, table=table).dense()

    return rounding


def _distil(context: Context, plan: QuantizePlan) -> dict[str, Any]:
    """Train the model of ``context``, whose layers round already; what was done, for the report."""
    student, train = context.checkpoint, context.encoded["train"]
    config = plan.config
    dense = checkpoints.load(student.path, device=context.device)
    targets = teachers.outputs(dense, train, device=context.device, progress=context.progress)
    options = FitOptions(
        epochs=plan.options.epochs or training_of(plan).epochs,
        batch_size=BATCH_SIZE,
        lr=config.lr,
        seed=context.seed,
        rate_option="--set lr=RATE",
    )
    answers = response.Config(temperature=config.temperature)
    chosen = [ChosenLoss("response", response.METHOD, answers, config.alpha)]
    shape = shape_of(student)
    pairs = [(number, number) for number in range(1, shape.layers + 1)]
    if config.hidden and pairs:
        chosen.append(ChosenLoss("tinybert", tinybert.METHOD, tinybert.Config(), config.hidden))
    terms, _ = objective.bind(chosen, shape, shape_of(dense), pairs, context.seed, context.device)
    mine, theirs = objective.needs(terms)
    signals = TeacherSignals(
        dense, train, targets, theirs, budget=_CACHE, device=context.device, progress=context.progress
    )
    labels = resumable.labels_of(train, student)
    training = resumable.TrainingId(
        title=plan.name, place="quantize", identity=resumable.identity_of(context)
    )
    hold = hold_zeros(student, but=_without_zero(context, plan))
    with closing(signals), Capture(student, mine) as capture:
        loss = Objective(terms, 1 - config.alpha, labels, capture, signals, context.device, student.task)
        result = resumable.run(context, training, student, train, loss, options, after_step=hold)
    return {"training": {"methods": [c.name for c in chosen], "batch_size": BATCH_SIZE} | result.detail()}
