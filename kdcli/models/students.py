"""Small students: their size, their family and where their first weights come from."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcli import families
from kdcli.errors import InputError, KdcliError, UsageError, did_you_mean
from kdcli.families import bert, ensemble, stack
from kdcli.families import positions as positions_of
from kdcli.families.family import Encoder
from kdcli.models import inits, tokens, transforms
from kdcli.models.aliases import SMALL_STUDENTS, small_student
from kdcli.models.checkpoint import Checkpoint, fresh, load

HEAD_SIZE = 64  # of the published BERT miniatures


@dataclass
class Student:
    """A student that is ready to train."""

    checkpoint: Checkpoint
    init: str  # "teacher", "hub", "random" or "checkpoint"
    notes: list[str] = field(default_factory=list)
    no_hub: str | None = None  # why the published weights were not used, when they were looked for


def size_of(name: str, presets: dict[str, tuple[int, int]]) -> tuple[int, int] | None:
    """Return (layers, hidden) of a preset or of ``LxH``; None when the name is neither.

    A student that is no transformer has 0 layers.

    Raises:
        UsageError: ``LxH`` or ``static-D`` with a size that makes no model.
    """
    if name in presets:
        return presets[name]
    if (small := small_student(name)) is not None:
        if not 8 <= small[1] <= 4096 or small[1] % 8:
            raise UsageError(f"student '{name}' is out of range: width 8 to 4096 in steps of 8")
        return 0, small[1]
    found = re.fullmatch(r"(\d+)x(\d+)", name)
    if not found:
        return None
    layers, hidden = int(found[1]), int(found[2])
    if not 1 <= layers <= 48 or not 8 <= hidden <= 4096 or hidden % 8:
        raise UsageError(
            f"student '{name}' is out of range: 1 to 48 layers, hidden size 8 to 4096 in steps of 8"
        )
    return layers, hidden


def build(
    name: str,
    teacher: Checkpoint,
    labels: Sequence[str],
    presets: dict[str, tuple[int, int]],
    *,
    init: str,
    seed: int,
    hub: Callable[[str], Path],
    resolve: Callable[[str], Path],
    vectors: Callable[[], Tensor] | None = None,
    pairs: bool = False,
) -> Student:
    """Make the student called ``name``: a preset, ``LxH``, one that is no transformer, or a checkpoint.

    Args:
        name: Preset, ``LxH``, ``static``, ``cnn`` or ``bilstm`` (``static-D`` for a width), or a model reference.
        teacher: Gives the vocabulary, the family and, for ``init`` teacher, the first weights.
        labels: Label names of the student's head.
        presets: Preset name -> (layers, hidden).
        init: ``auto`` (published miniature, else teacher), ``teacher``, ``hub`` or ``random``.
        seed: Of the random part.
        hub: Maps a preset to the directory of its published miniature; may raise KdcliError.
        resolve: Maps any other reference to a directory; may raise KdcliError.
        vectors: Gives what the teacher makes of every token, :func:`kdcli.models.inits.token_vectors`; their
            principal components are better first embeddings than the projected token table, which is taken
            when there are none.
        pairs: It reads two texts a row: one that is no transformer keeps them apart.

    Raises:
        UsageError: The student is neither preset nor size nor checkpoint, or ``init`` cannot be had.
        InputError: A student checkpoint with another vocabulary than the teacher's.
    """
    size = size_of(name, presets)
    torch.manual_seed(seed)
    if size is None:
        return _own(name, teacher, labels, presets, resolve)
    if (small := small_student(name)) is not None:
        return _small(*small, teacher, labels, init, vectors, pairs)
    notes: list[str] = []
    reason: str | None = None
    if init in ("auto", "hub"):
        try:
            student = _from_hub(hub(name), teacher, labels)
            return Student(student, "hub", notes)
        except KdcliError as error:
            if init == "hub":
                raise
            reason = str(error)
            notes.append("published weights cannot be had here; the teacher gives the first weights instead")
    student = _blank(size, teacher, labels)
    made = Student(student, init, notes, reason)
    copied: list[str] = []
    if init != "random":
        copied = from_teacher(student, teacher, vectors)
        notes.extend(copied)
        made.init = "teacher" if copied else "random"
    if pairs and len(copied) < 2:  # embeddings at most, and no layer
        notes.append(
            "layers that start from nothing learn slowly how two texts differ; --student static keeps them apart"
        )
    return made


def _own(
    name: str,
    teacher: Checkpoint,
    labels: Sequence[str],
    presets: dict[str, tuple[int, int]],
    resolve: Callable[[str], Path],
) -> Student:
    try:
        path = resolve(name)
    except InputError as error:
        hint = did_you_mean(name, [*presets, *SMALL_STUDENTS])
        raise UsageError(
            f"unknown student '{name}': {hint}, LxH (such as 3x192), or a model directory"
        ) from error
    student = load(path, labels=labels)
    _same_vocabulary(student, teacher, str(path))
    if student.model_type == ensemble.FAMILY.name:
        raise InputError(
            f"{path} is an ensemble, which can teach but not be a student", "name a student such as tiny"
        )
    if not student.has_head or student.labels != list(labels) or student.task.name != teacher.task.name:
        _new_head(student, labels)
    return Student(student, "checkpoint", [])


def _small(
    kind: str,
    width: int,
    teacher: Checkpoint,
    labels: Sequence[str],
    init: str,
    vectors: Callable[[], Tensor] | None,
    pairs: bool,
) -> Student:
    from transformers import AutoConfig

    if init == "hub":
        raise UsageError(
            f"there are no published weights of a '{kind}' student", "--init teacher or --init random"
        )
    config = AutoConfig.for_model(
        f"kdcli-{kind}",
        vocab_size=int(getattr(teacher.config, "vocab_size", len(teacher.tokenizer))),
        hidden_size=width,
        max_position_embeddings=teacher.max_length,
        pad_token_id=teacher.tokenizer.pad_token_id,
        num_labels=len(labels),
        pair_token_id=tokens.border(teacher.tokenizer) if pairs else None,
    )
    model: Any = fresh(config)
    student = Checkpoint(
        model.eval(), teacher.tokenizer, list(labels), transforms.TransformLog(), teacher.path
    )
    wide = int(teacher.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
    if init == "random" or width > wide:
        return Student(student, "random")
    table, note = token_embeddings(teacher, width, vectors)
    # Features of unit variance. Measured on CLINC150, `static`: 94.2% against 93.6% with the teacher's own scale.
    table = table * (math.sqrt(width) / inits.row_norm(table))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(table)
    return Student(student, "teacher", [note])


def token_embeddings(
    teacher: Checkpoint, width: int, vectors: Callable[[], Tensor] | None
) -> tuple[Tensor, str]:
    """First token embeddings (V, D') of a student from its teacher, and a sentence that says how.

    Without ``vectors`` they are the teacher's token table E (V, D) on its D' leading right singular vectors, the best
    approximation of rank D' in the Frobenius norm (Eckart and Young, 1936). With them they are the principal
    components of what the teacher makes of each token, as long as those would be.
    """
    table: Tensor = teacher.model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    projected = (table.double() @ inits.svd_projection(table, width)).float()
    base = str(teacher.model.base_model_prefix)
    encoder = hasattr(teacher.model, base)  # else nothing there reads tokens in context
    if vectors is None or not encoder:
        return projected, f"token embeddings: {width} leading features of the teacher's table, by SVD"
    made = inits.token_table(vectors().to(table.device), width, inits.row_norm(projected))
    return made, f"token embeddings: {width} principal components of what the teacher makes of each token"


def _from_hub(path: Path, teacher: Checkpoint, labels: Sequence[str]) -> Checkpoint:
    student = load(path, labels=labels)
    _same_vocabulary(student, teacher, "the published miniature")
    return student


def _same_vocabulary(student: Checkpoint, teacher: Checkpoint, what: str) -> None:
    # Sizes alone would let two vocabularies of 30,522 tokens in another order pass.
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise InputError(f"{what} has another vocabulary than the teacher; student and teacher must share it")


def _new_head(student: Checkpoint, labels: Sequence[str]) -> None:
    config = copy.deepcopy(student.config)
    config.num_labels = len(labels)
    model: Any = fresh(config)
    transforms.replay(model, student.log)
    if base := model.base_model_prefix:
        getattr(model, base).load_state_dict(getattr(student.model, base).state_dict())
    else:
        head = f"{families.presumed(student.model_type).logits}."
        state = {k: v for k, v in student.model.state_dict().items() if not k.startswith(head)}
        model.load_state_dict(state, strict=False)
    student.model, student.labels, student.has_head = model.eval(), list(labels), False


def _blank(size: tuple[int, int], teacher: Checkpoint, labels: Sequence[str]) -> Checkpoint:
    """An untrained student of the teacher's family (BERT for a family kdcli cannot operate on)."""
    from transformers import AutoConfig

    layers, hidden = size
    family = teacher.family if families.is_encoder(teacher.model_type) else bert.FAMILY
    heads = max(1, hidden // HEAD_SIZE)
    while hidden % heads:
        heads -= 1
    tokenizer = teacher.tokenizer
    source = teacher.config
    # A teacher of another family counts its positions otherwise, or has no limit.
    same = family.name == teacher.model_type
    positions = int(positions_of.limit(source)) if same else teacher.max_length
    sizes: dict[str, Any] = {
        "vocab_size": int(getattr(source, "vocab_size", len(tokenizer))),
        "max_position_embeddings": positions,
        "pad_token_id": tokenizer.pad_token_id,
        "num_labels": len(labels),
    }
    sizes |= family.sizes(layers, hidden, heads)
    for key, usual in family.taken_over.items():
        sizes[key] = type(usual)(getattr(source, key, usual) or usual)
    for key in ("bos_token_id", "eos_token_id"):
        if getattr(source, key, None) is not None:
            sizes[key] = getattr(source, key)
    config = AutoConfig.for_model(family.name, **sizes)
    return Checkpoint(fresh(config).eval(), tokenizer, list(labels), transforms.TransformLog(), teacher.path)


def from_teacher(
    student: Checkpoint, teacher: Checkpoint, vectors: Callable[[], Tensor] | None = None
) -> list[str]:
    """Start the student from the teacher: embeddings, and lower layers where the shapes agree.

    A narrower student gets :func:`token_embeddings`; its position and segment tables are projected as the token
    table would be, because the model adds them. Of equal widths the tables are copied.

    Returns:
        What was taken over, one sentence each; empty when nothing fits.
    """
    if student.model_type != teacher.model_type:
        return []
    family = student.family
    ours, theirs = stack.tables(student.model, family), stack.tables(teacher.model, family)
    tokens = family.token_table
    hidden, wide = ours[tokens].shape[1], theirs[tokens].shape[1]
    if hidden > wide:
        return []
    notes = ["embeddings copied from the teacher"]
    sources = dict(theirs)
    if hidden < wide:
        projection = inits.svd_projection(theirs[tokens], hidden)
        sources = {name: (table.double() @ projection).float() for name, table in theirs.items()}
        sources[tokens], note = token_embeddings(teacher, hidden, vectors)
        notes = [note]
    with torch.no_grad():
        for name, target in ours.items():
            source = sources.get(name)
            if source is not None and source.shape[0] == target.shape[0]:
                target.copy_(source.to(target))
    if hidden == wide and _same_layers(student, teacher):
        notes.append(_copy_lower_layers(student, teacher, family))
    return notes


def _same_layers(student: Checkpoint, teacher: Checkpoint) -> bool:
    one = student.model.get_submodule(student.family.layers)[0].state_dict()  # type: ignore[index]
    two = teacher.model.get_submodule(teacher.family.layers)[0].state_dict()  # type: ignore[index]
    return {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}


def _copy_lower_layers(student: Checkpoint, teacher: Checkpoint, family: Encoder) -> str:
    # Lower layers, not every other one: better for response distillation (Wang et al., ACL 2023).
    ours, theirs = student.model.get_submodule(family.layers), teacher.model.get_submodule(family.layers)
    count = min(len(ours), len(theirs))  # type: ignore[arg-type]
    for index in range(count):
        ours[index].load_state_dict(theirs[index].state_dict())  # type: ignore[index]
    own = student.model.get_submodule(family.embeddings)
    own.load_state_dict(teacher.model.get_submodule(family.embeddings).state_dict())
    return f"the teacher's lowest {count} layers copied"
