"""Options of ``kdcli distill``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from kdcli import registry
from kdcli.errors import did_you_mean
from kdcli.models.aliases import MODELS, SMALL_STUDENTS, small_student
from kdcli.options import Flag, choice, pairs
from kdcli.request import StageOptions, model_aliases, reference
from kdcli.training import layer_map as layer_maps

STUDENT_PRESETS: dict[str, tuple[int, int]] = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
}
"""Student name -> (layers, hidden size); ``LxH`` by hand is allowed too."""

STRATEGIES: dict[str, str] = {
    "teacher-assisted": "one student, one teacher or the mean of several",
    "layerwise": "every layer of the teacher teaches a small student; their ensemble is the result",
    "online": "students teach each other, or a teacher learns along with its student",
    "assistant-chain": "students of middling size between teacher and student",
    "self": "a student teaches the next one of its own size",
}

INITS: tuple[str, ...] = ("auto", "teacher", "hub", "random")


def students() -> Iterable[str]:
    """Names of students."""
    return (*STUDENT_PRESETS, *SMALL_STUDENTS)


def _methods() -> Iterable[str]:
    return registry.names("distill")


def _student(given: str) -> str:
    """Check a student: a preset, ``LxH``, one that is no transformer, or a model reference."""
    if given in STUDENT_PRESETS or re.fullmatch(r"\d+x\d+", given) or small_student(given):
        return given
    if "/" not in given and given not in MODELS and not Path(given).exists():
        hint = did_you_mean(given, students())
        raise ValueError(f"unknown student '{given}': {hint}, or LxH such as 3x192, or a model directory")
    return given


def _layer_map(given: str) -> str:
    layer_maps.parse(given)
    return given


def _weights(given: Any) -> Mapping[str, Any]:
    """``NAME=VALUE`` with values of 0 or more."""
    found = pairs(given)
    for name, value in found.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"'{name}={value}' must be written NAME=VALUE with a number") from None
        if isinstance(value, bool) or not 0 <= number < float("inf"):
            raise ValueError(f"'{name}={value}' must be at least 0")
    return found


class DistillOptions(StageOptions):
    """``kdcli distill``."""

    takes_model: ClassVar[bool] = False

    teachers: Annotated[
        tuple[str, ...], Flag(name="teacher", metavar="MODEL", names=model_aliases, check=reference)
    ] = Field(
        min_length=1, description="The model to imitate; repeatable, the answers of several are averaged."
    )
    student: Annotated[str, Flag(metavar="STUDENT", names=students, check=_student)] = Field(
        description="tiny, mini, small, medium or LxH (layers x hidden size); static, cnn or bilstm, without a "
        "transformer; or a model directory."
    )
    methods: Annotated[
        tuple[str, ...],
        Flag(
            name="method",
            metavar="NAME",
            names=_methods,
            check=lambda one: registry.load_name("distill", one),
        ),
    ] = Field(
        default=("response",), min_length=1, description="A term of the loss; repeatable. [default: response]"
    )
    strategy: Annotated[str, choice("strategy", lambda: STRATEGIES)] = Field(
        default="teacher-assisted", description="Who teaches whom, and when."
    )
    alpha: Annotated[float | None, Flag(metavar="F")] = Field(
        default=None, ge=0, le=1, description="Weight of the teacher's answers, 0 to 1."
    )
    temperature: Annotated[float | None, Flag(metavar="F")] = Field(
        default=None, gt=0, description="T, softens both models' answers."
    )
    beta: Annotated[float | None, Flag(metavar="F")] = Field(
        default=None, ge=0, description="Weight of the feature terms. [default: the method's own]"
    )
    gamma: Annotated[float | None, Flag(metavar="F")] = Field(
        default=None, ge=0, description="Weight of the relation terms. [default: the method's own]"
    )
    weights: Annotated[Mapping[str, float], Flag(name="weight", metavar="NAME=VALUE", parse=_weights)] = (
        Field(default_factory=dict, description="Weight of any other term; repeatable.")
    )
    layer_map: Annotated[
        str | None, Flag(metavar="MAP", names=lambda: layer_maps.NAMES, check=_layer_map)
    ] = Field(
        default=None,
        description="Which teacher layer a student layer follows: uniform, last, bottom, top, or 1:2,2:4.",
    )
    init: Annotated[str, choice("init", lambda: INITS)] = Field(
        default="auto", description="The student's first weights: auto, teacher, hub or random."
    )
    epochs: Annotated[int | None, Flag(metavar="N")] = Field(
        default=None, ge=1, description="Passes over the training rows."
    )
    lr: Annotated[float | None, Flag(metavar="F")] = Field(default=None, gt=0, description="Learning rate.")
    batch_size: Annotated[int | None, Flag(metavar="N")] = Field(
        default=None, ge=1, description="Rows per training step."
    )
    labels: Annotated[int | None, Flag(metavar="N")] = Field(
        default=None,
        ge=1,
        description="Use the labels of N training rows only, and of the same share of the validation rows; "
        "the rest teaches unlabelled.",
    )
    unlabeled: Annotated[Path | None, Flag(metavar="FILE")] = Field(
        default=None, description="Extra texts without labels."
    )
    augment: Annotated[int | None, Flag(metavar="N")] = Field(
        default=None,
        ge=0,
        description="Extra texts made from each row, labelled by the teacher. [default: from the number of rows]",
    )
    control: Annotated[bool, Flag(off=True)] = Field(
        default=False,
        description="Also train the same student without the teacher, on the labels with and without the extra texts.",
    )
