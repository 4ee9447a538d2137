r"""Patient distillation (PKD): first-token states of several layers follow the teacher's, compared by direction.

With $h_S W$ and $h_T$ the states of the first token ([CLS]) in a mapped pair of layers, $D$ features each, the mean
over rows and pairs of

    L = \left\lVert \frac{h_S W}{\lVert h_S W \rVert} - \frac{h_T}{\lVert h_T \rVert} \right\rVert^2

with the squares summed over the features, so a pair lies in [0, 4]: twice $1 - \cos$. The student's last layer is
left out when the map has further pairs; it gets its signal from the response. The uniform map is PKD-skip.

Source: Sun et al. 2019, "Patient Knowledge Distillation for BERT Model Compression", arXiv:1908.09355,
section 3.2 (the loss, and why the last layer is left out).
Differs: the paper sums over rows and layers, here the mean is taken, so that the value depends neither on the
batch size nor on the depth. Its code takes the mean over the D = 768 features too, which makes it 768 times
smaller; the published beta of 10 to 1000 belongs to that and is 0.013 to 1.3 here, hence the weight 1. The
paper has equal widths; where they differ the student's state is projected by a trained layer. Its code rounds
the normalised states to half precision, this does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from kdcli.training.layer_map import need_layers
from kdcli.training.terms import Loss, Needs, Setting, Signals, Step


class Config(BaseModel):
    """Patient distillation has no parameters of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def loss(student: Tensor, teacher: Tensor, config: Config) -> Tensor:
    """Squared distance between the unit vectors of one pair of layers.

    Args:
        student: First-token states (B, D), already projected; computed in float32 at least.
        teacher: First-token states (B, D); no gradient flows into them.
        config: Empty.

    Returns:
        Scalar without unit, in [0, 4].
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    own, theirs = F.normalize(student.to(dtype), dim=-1), F.normalize(teacher.detach().to(dtype), dim=-1)
    return (own - theirs).square().sum(-1).mean()


def needs(setting: Setting) -> tuple[Needs, Needs]:
    """The hidden states of the layers that are compared."""
    own, theirs = zip(*_pairs(setting), strict=True)
    return Needs(hidden=frozenset(own)), Needs(hidden=frozenset(theirs))


def check(setting: Setting) -> None:
    """Both models must have encoder layers.

    Raises:
        UsageError: One of them has none.
    """
    need_layers("pkd", setting.student.layers, setting.teacher.layers)


def trained(setting: Setting) -> nn.Module | None:
    """A projection D' -> D for every pair that is compared, where the widths differ."""
    own, theirs = setting.student.hidden, setting.teacher.hidden
    return None if own == theirs else nn.ModuleList(nn.Linear(own, theirs) for _ in _pairs(setting))


def term(student: Signals, teacher: Signals, setting: Setting, step: Step) -> Tensor:
    """The mean over the pairs that are compared."""
    values = []
    for number, (own, theirs) in enumerate(_pairs(setting)):
        state = student.hidden[own][:, 0]
        if isinstance(setting.trained, nn.ModuleList):
            project = setting.trained[number]
            state = project(state.to(next(project.parameters()).dtype))
        values.append(loss(state, teacher.hidden[theirs][:, 0], setting.config))
    return torch.stack(values).mean()


def _pairs(setting: Setting) -> Sequence[tuple[int, int]]:
    # A map of the last layer alone would leave nothing to compare.
    below = [pair for pair in setting.pairs if pair[0] != setting.student.layers]
    return below or setting.pairs


METHOD = Loss(
    kind="feature",
    weight=1.0,
    config=Config,
    term=term,
    needs=needs,
    check=check,
    trained=trained,
)
