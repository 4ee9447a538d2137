"""What a distillation says of itself before anything is loaded."""

from __future__ import annotations

from kdcli.foresight import RUNNING, TRAINING, Foreseen, Sizes, flops_a_row
from kdcli.models.aliases import small_student
from kdcli.request import Request
from kdcli.stages.distill import fitting
from kdcli.stages.distill.options import STUDENT_PRESETS
from kdcli.stages.distill.plan import check, teacher_epochs

_SECONDS_A_ROW = 1.5e-4  # of a training step besides its products: measured with a student of 2x128


def foreseen(request: Request, sizes: Sizes) -> Foreseen:
    """Teacher, outputs and student.

    Raises:
        UsageError: A bad option.
    """
    plan = check(request)
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
        rounds = plan.settings.teacher_epochs or teacher_epochs(train, sizes.labels, batch)
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


def _size(student: str) -> tuple[int, int] | None:
    """(layers, width) of a student that is named by them; None for one that has to be looked into."""
    if (named := small_student(student)) is not None:
        return 1, named[1]  # about what a convolution or an LSTM costs; pooled embeddings cost less
    parts = student.split("x")
    if len(parts) == 2 and all(p.isdigit() for p in parts):
        return int(parts[0]), int(parts[1])
    return STUDENT_PRESETS.get(student)
