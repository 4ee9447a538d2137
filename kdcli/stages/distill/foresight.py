"""What a distillation says of itself before anything is loaded."""

from __future__ import annotations

from kdcli import families
from kdcli.families.family import Encoder
from kdcli.foresight import RUNNING, TRAINING, Foreseen, Sizes, flops_a_row
from kdcli.models.aliases import small_student
from kdcli.request import Request
from kdcli.stages.distill import fitting
from kdcli.stages.distill.options import STUDENT_PRESETS
from kdcli.stages.distill.plan import check, need_task, teacher_epochs
from kdcli.stages.distill.student import precheck
from kdcli.training.terms import Shape

_SECONDS_A_ROW = 1.5e-4  # of a training step besides its products: measured with a student of 2x128


def foreseen(request: Request, sizes: Sizes) -> Foreseen:
    """Teacher, outputs and student.

    Raises:
        UsageError: A bad option, or a method or strategy that means nothing for this teacher and its task.
    """
    plan = check(request)
    need_task(plan, sizes.task)
    if (teacher := _shape(sizes)) is not None:
        precheck(plan, teacher)
    options = plan.options
    size = _size(options.student)
    facts = {"student": options.student, "method": list(options.methods), "strategy": options.strategy}
    architectures = sizes.config.get("architectures") or [""]
    has_head = str(architectures[0]).endswith("ForSequenceClassification")
    facts["teacher"] = (
        "has a head" if has_head else "has no head for the task: it is fine-tuned first, and cached"
    )
    train = sizes.rows["train"]
    further = fitting.augmented(plan, train * sizes.tokens) * train
    texts = train + further
    epochs = options.epochs or fitting.default_epochs(texts * sizes.tokens)
    facts["texts"] = f"{train} and {further} made from them, {epochs} epochs"
    seconds = texts * sizes.cost / RUNNING
    if not has_head:
        batch = plan.settings.teacher_batch_size
        rounds = plan.settings.teacher_epochs or teacher_epochs(sizes.task, train, sizes.labels, batch)
        seconds += sizes.learning(rounds * train)
    logits = 4 * texts * sizes.labels
    trainings = 4 if options.control else 1  # each of up to three controls takes as many steps as the student
    if size is None:
        seconds += sizes.learning(trainings * epochs * texts)
        return Foreseen(facts, seconds, 0, logits + sizes.weights)
    small = flops_a_row(*size, sizes.tokens)
    seconds += trainings * epochs * texts * (3 * small / TRAINING + _SECONDS_A_ROW)
    vocabulary = int(sizes.config.get("vocab_size") or 30000)
    parameters = vocabulary * size[1] + 12 * size[0] * size[1] ** 2
    return Foreseen(facts, seconds, 16 * parameters, 8 * parameters + logits + sizes.weights)


def _shape(sizes: Sizes) -> Shape | None:
    """The teacher as its configuration describes it; None where only its weights would tell."""
    family = families.find(str(sizes.config.get("model_type")))
    if not isinstance(family, Encoder):
        return None
    keys = (family.keys.layers, family.keys.hidden, family.keys.heads)
    if not all(isinstance(sizes.config.get(key), int) for key in keys):
        return None
    layers, hidden, heads = (int(sizes.config[key]) for key in keys)
    return Shape(layers, hidden, heads, sizes.labels, hidden)


def _size(student: str) -> tuple[int, int] | None:
    """(layers, width) of a student that is named by them; None for one that has to be looked into."""
    if (named := small_student(student)) is not None:
        return 1, named[1]  # about what a convolution or an LSTM costs; pooled embeddings cost less
    parts = student.split("x")
    if len(parts) == 2 and all(p.isdigit() for p in parts):
        return int(parts[0]), int(parts[1])
    return STUDENT_PRESETS.get(student)
