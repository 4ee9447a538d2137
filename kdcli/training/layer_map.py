"""Which teacher layer each student layer follows; encoder layers count from 1.

With L_S student and L_T teacher layers, by name:

    uniform  m -> m * L_T / L_S, halves rounded up
    last     L_S -> L_T, nothing else
    bottom   m -> m
    top      m -> L_T - L_S + m

Source: Jiao et al. 2020, "TinyBERT: Distilling BERT for Natural Language Understanding", arXiv:1909.10351, where
uniform, top and bottom are compared. Differs: uniform is defined for any two depths, not only for multiples.
"""

from __future__ import annotations

import re

from kdcli.errors import UsageError, did_you_mean

NAMES = ("uniform", "last", "bottom", "top")
_PAIR = re.compile(r"\s*([0-9]{1,4})\s*:\s*([0-9]{1,4})\s*")


def parse(spec: str | None) -> str | list[tuple[int, int]]:
    """Check the spelling of a map before the models are known.

    Args:
        spec: A name, or pairs ``student:teacher`` such as ``1:2,2:4``; None is uniform.

    Returns:
        The name, or the pairs sorted by student layer.

    Raises:
        UsageError: It is neither, or a student layer is given twice.
    """
    if spec is None:
        return "uniform"
    if ":" not in spec:
        if spec in NAMES:
            return spec
        raise UsageError(f"unknown layer map '{spec}': {did_you_mean(spec, NAMES)}, or pairs such as 1:2,2:4")
    pairs = []
    for part in spec.split(","):
        found = _PAIR.fullmatch(part)
        if found is None or min(int(found[1]), int(found[2])) < 1:
            raise UsageError(
                f"layer map '{spec}': '{part}' is not a pair student:teacher of layers counted from 1; write 1:2,2:4"
            )
        pairs.append((int(found[1]), int(found[2])))
    students = [student for student, _ in pairs]
    twice = sorted({student for student in students if students.count(student) > 1})
    if twice:
        raise UsageError(f"layer map '{spec}': student layer {twice[0]} is given twice; give each layer once")
    return sorted(pairs)


def resolve(spec: str | None, student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Return the pairs (student layer, teacher layer) of a map, sorted by student layer.

    Args:
        spec: As for :func:`parse`.
        student_layers: L_S.
        teacher_layers: L_T.

    Raises:
        UsageError: As :func:`parse`, or the map does not fit the two depths.
    """
    found = parse(spec)
    need_layers("a layer map", student_layers, teacher_layers)
    students = range(1, student_layers + 1)
    if isinstance(found, list):
        for name, depth, layers in (
            ("student", student_layers, [student for student, _ in found]),
            ("teacher", teacher_layers, [teacher for _, teacher in found]),
        ):
            if max(layers) > depth:
                raise UsageError(
                    f"layer map '{spec}': there is no {name} layer {max(layers)}; choose from 1 to {depth}"
                )
        return found
    if found == "last":
        return [(student_layers, teacher_layers)]
    if found == "uniform":
        # Integers, because round() takes halves to the even side; a deeper student would start at layer 0.
        halves = ((2 * m * teacher_layers + student_layers) // (2 * student_layers) for m in students)
        return [(m, max(1, half)) for m, half in zip(students, halves, strict=True)]
    if student_layers > teacher_layers:
        raise UsageError(
            f"layer map '{found}' needs a teacher at least as deep as the student: {student_layers} student "
            f"layers, {teacher_layers} teacher layers; choose uniform or last, or give pairs"
        )
    above = teacher_layers - student_layers if found == "top" else 0
    return [(m, above + m) for m in students]


def need_layers(subject: str, student_layers: int, teacher_layers: int) -> None:
    """Refuse models that are no stack of encoder layers (depth 0, such as cnn, bilstm and static students).

    Args:
        subject: What needs the layers; begins the message.
        student_layers: L_S.
        teacher_layers: L_T.

    Raises:
        UsageError: One of the depths is 0; names the methods that work without layers.
    """
    for name, layers in (("student", student_layers), ("teacher", teacher_layers)):
        if layers < 1:
            raise UsageError(
                f"{subject} compares encoder layers, and the {name} has none: use response methods, "
                "pooled or relation methods"
            )
