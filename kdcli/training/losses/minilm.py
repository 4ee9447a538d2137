r"""MiniLMv2: relations among the queries, the keys and the values of one layer, whatever the sizes of the models.

For each of $X = Q, K, V$ the heads are concatenated, $X$ (T, H E), and split again into $A_r$ relation heads of
$d_r = H E / A_r$ features, the same number $A_r$ in both models. Then, with the softmax over the real keys,

    R_a = \mathrm{softmax}\bigl( X_a X_a^\top / \sqrt{d_r} \bigr) \\
    L = \sum_{X = Q, K, V} \mathrm{KL}(R^T \,\Vert\, R^S)

averaged over rows, real queries and relation heads. The student's last layer follows one teacher layer; the layer
map is not used, nothing is projected.

Source: Wang et al. 2021, "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
Transformers", arXiv:2012.15828, section 3.1 (relations, relation heads, loss) and the study of teacher layers.
Differs: the paper pre-trains a student on this loss alone, here it is one term of a task's training. The mean
over queries is taken within a row and then over the rows. By default $A_r$ is the largest of 48, 24, 12, 8, 6, 4,
3, 2, 1 that divides both widths and leaves 8 features a head or more; 48 is the paper's number for base-size
teachers, and at a width of 384, its smaller student, these are the 8 features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from kdcli.errors import UsageError
from kdcli.training.layer_map import need_layers
from kdcli.training.terms import Loss, Needs, Setting, Signals, Step

_RELATION_HEADS = (48, 24, 12, 8, 6, 4, 3, 2, 1)
_FEATURES = 8  # of a relation head, at least


class Config(BaseModel):
    """Parameters of relation distillation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    relation_heads: int = Field(
        default=0, ge=0, description="A_r, must divide the widths of both models; 0 chooses by the widths"
    )
    teacher_layer: int = Field(
        default=0,
        ge=0,
        description="teacher layer to follow, from 1; 0 is the last (large teachers: one of the upper middle)",
    )


def relation_heads(student: int, teacher: int, config: Config) -> int:
    """Number of relation heads A_r for two widths H * E.

    Raises:
        UsageError: The number that was given does not divide both.
    """
    given = config.relation_heads
    if given and (student % given or teacher % given):
        raise UsageError(
            f"minilm: relation_heads={given} does not divide the widths of queries, keys and values, {student} "
            f"(student) and {teacher} (teacher); give a common divisor, or 0 to have one chosen"
        )
    narrow = min(student, teacher)
    fitting = (n for n in _RELATION_HEADS if not student % n and not teacher % n and narrow >= n * _FEATURES)
    return given or next(fitting, 1)


def relations(vectors: Tensor, heads: int, mask: Tensor) -> Tensor:
    """Log-probabilities of the relations of every token to every real token.

    Args:
        vectors: Queries, keys or values (B, H, T, E).
        heads: A_r.
        mask: (B, T) bool, True on real tokens.

    Returns:
        (B, A_r, T, T) in float32 at least; zero, and not minus infinity, on padded keys.
    """
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    # Heads are concatenated first: relation heads need not fall on the borders of attention heads.
    split = vectors.to(dtype).transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
    padded = ~mask[:, None, None, :]
    scores = split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5
    # Zero on both sides makes the divergence exp(0) * (0 - 0) there, where -inf would make it 0 * (-inf).
    return scores.masked_fill(padded, torch.finfo(dtype).min).log_softmax(-1).masked_fill(padded, 0)


def loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, config: Config) -> Tensor:
    """Divergence of the student's relations from the teacher's.

    Args:
        student: Queries, keys and values (B, H', T, E').
        teacher: Queries, keys and values (B, H, T, E); no gradient flows into them.
        mask: (B, T) bool, True on real tokens.
        config: The number of relation heads.

    Returns:
        Scalar in nats, at least 0; a sum of three means.

    Raises:
        UsageError: The number of relation heads does not divide both widths.
    """
    value = mask.new_zeros((), dtype=torch.promote_types(student[0].dtype, torch.float32))
    for own, theirs in zip(student, teacher, strict=True):
        heads = relation_heads(own.shape[1] * own.shape[3], theirs.shape[1] * theirs.shape[3], config)
        target = relations(theirs.detach().to(value.dtype), heads, mask)
        each = F.kl_div(relations(own, heads, mask), target, reduction="none", log_target=True)
        queries = each.sum(-1).mean(1).masked_fill(~mask, 0)
        value = value + (queries.sum(1) / mask.sum(1).clamp(min=1)).mean()
    return value


def needs(setting: Setting) -> tuple[Needs, Needs]:
    """Queries, keys and values of the student's last layer and of the teacher layer it follows."""
    return Needs(attention=frozenset({setting.student.layers})), Needs(attention=frozenset({_layer(setting)}))


def check(setting: Setting) -> None:
    """Both models must have encoder layers, and the teacher the one that is asked for.

    Raises:
        UsageError: They have not.
    """
    need_layers("minilm", setting.student.layers, setting.teacher.layers)
    if _layer(setting) > setting.teacher.layers:
        raise UsageError(
            f"minilm: teacher_layer={_layer(setting)}, but the teacher has {setting.teacher.layers} layers; "
            f"give 1 to {setting.teacher.layers}, or 0 for the last"
        )


def term(student: Signals, teacher: Signals, setting: Setting, step: Step) -> Tensor:
    """The loss on the student's last layer."""
    own, theirs = setting.student.layers, _layer(setting)
    return loss(
        (student.query[own], student.key[own], student.value[own]),
        (teacher.query[theirs], teacher.key[theirs], teacher.value[theirs]),
        student.mask,
        setting.config,
    )


def _layer(setting: Setting) -> int:
    return int(setting.config.teacher_layer) or setting.teacher.layers


METHOD = Loss(
    kind="feature",
    weight=1.0,
    config=Config,
    term=term,
    needs=needs,
    check=check,
)
