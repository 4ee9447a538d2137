r"""Hidden states: the states of a student layer follow those of the teacher layer that it is mapped to.

With $h_S W$ the projected student state and $h_T$ the teacher's state of a real token, $D$ features each, the mean
over real tokens and mapped pairs of layers of

    L_\text{mse} = \frac{1}{D} \lVert h_S W - h_T \rVert^2 \qquad L_\text{cosine} = 1 - \cos(h_S W,\, h_T)

as ``distance`` says.

Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550, eq. 3 (a hint layer followed
through a trained regressor); the cosine from Sanh et al. 2019, "DistilBERT", arXiv:1910.01108, section 2.
Differs: FitNets has one pair of layers, half the squared norm and a first phase of its own; here the mean over
features is taken, so that the value does not grow with the teacher's width, and the term is added to the others.
DistilBERT has equal widths and the last layer only.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from kdcli.training.layer_map import need_layers
from kdcli.training.terms import Loss, Needs, Setting, Signals, Step


class Config(BaseModel):
    """Parameters of hidden state distillation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    distance: Literal["mse", "cosine"] = Field(
        default="mse",
        description="mse: squared difference, also of the length; cosine: of the direction only",
    )


def loss(student: Tensor, teacher: Tensor, mask: Tensor, config: Config) -> Tensor:
    """Distance between the states of one pair of layers.

    Args:
        student: States (B, T, D), already projected; computed in float32 at least.
        teacher: States (B, T, D); no gradient flows into them.
        mask: (B, T) bool, True on real tokens.
        config: The distance.

    Returns:
        Scalar: mse in squared units of the states, at least 0; cosine in [0, 2].
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    own, theirs = student[mask].to(dtype), teacher.detach()[mask].to(dtype)
    if config.distance == "cosine":
        return 1 - F.cosine_similarity(own, theirs, dim=-1).mean()
    return F.mse_loss(own, theirs)


def needs(setting: Setting) -> tuple[Needs, Needs]:
    """The hidden states of the mapped layers."""
    own, theirs = zip(*setting.pairs, strict=True)
    return Needs(hidden=frozenset(own)), Needs(hidden=frozenset(theirs))


def check(setting: Setting) -> None:
    """Both models must have encoder layers.

    Raises:
        UsageError: One of them has none.
    """
    need_layers("hidden", setting.student.layers, setting.teacher.layers)


def trained(setting: Setting) -> nn.Module | None:
    """A projection D' -> D for every pair of layers, where the widths differ."""
    own, theirs = setting.student.hidden, setting.teacher.hidden
    return None if own == theirs else nn.ModuleList(nn.Linear(own, theirs) for _ in setting.pairs)


def term(student: Signals, teacher: Signals, setting: Setting, step: Step) -> Tensor:
    """The mean over the mapped pairs."""
    values = []
    for number, (own, theirs) in enumerate(setting.pairs):
        state = student.hidden[own]
        if isinstance(setting.trained, nn.ModuleList):
            project = setting.trained[number]
            state = project(state.to(next(project.parameters()).dtype))
        values.append(loss(state, teacher.hidden[theirs], student.mask, setting.config))
    return torch.stack(values).mean()


METHOD = Loss(
    kind="feature",
    # A student of two layers on validation rows of CLINC150: 90.7% without this term, 90.5 with 0.01, 89.2 with 0.1.
    weight=0.01,
    config=Config,
    term=term,
    needs=needs,
    check=check,
    trained=trained,
)
