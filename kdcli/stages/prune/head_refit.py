"""The linear layers after the encoder, fitted so that they give what they gave before the encoder was pruned.

For every linear layer of the head in the order in which they run (BERT: pooler, classifier), with its input x now and
its output t in the dense model, (W, b) is the least squares solution that :func:`kdcli.stages.prune.output_refit.refit`
gives; the layers before it are fitted already.

Source: the same problem as for the sub-layers of the encoder (Park et al. 2024, "K-prune", arXiv:2308.03449,
section 3.4). Differs: the paper leaves the head as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdcli.families import stack
from kdcli.families.family import Encoder
from kdcli.inputs.feeding import Labelled
from kdcli.probe.hooks import reading, watching
from kdcli.probe.layer_stream import Stream
from kdcli.probe.raw_moments import RawMoments, add
from kdcli.stages.prune import output_refit


class Head:
    """The linear layers of a classifier's head, and what they give in the dense model.

    Args:
        model: Not yet pruned, in eval mode.
        family: Of the model.
        batches: The rows that the head is fitted on.
    """

    def __init__(self, model: nn.Module, family: Encoder, batches: Sequence[Labelled]) -> None:
        linears = stack.head_linears(model, family)
        self.order: list[nn.Linear] = []
        self.targets: list[list[Tensor]] = []
        with torch.no_grad(), watching({module: module for module in linears.values()}, self._keep):
            for inputs, _ in batches:
                model(**inputs)

    def _keep(self, module: nn.Linear, given: Tensor, output: Tensor) -> None:
        if module not in self.order:
            self.order.append(module)
            self.targets.append([])
        self.targets[self.order.index(module)].append(output)

    @torch.no_grad()
    def refit(self, states: Stream, ridge: float) -> None:
        """Fit every layer, in place.

        Args:
            states: Behind the last encoder layer of the pruned model, for the same batches.
            ridge: Pull towards the layer's own weights, a share of its inputs' mean variance.
        """
        for module, targets in zip(self.order, self.targets, strict=True):
            moments: RawMoments | None = None
            for x, t in zip(_read_by(module, states), targets, strict=True):
                moments = add(moments, x.float(), t.float(), x.new_ones(len(x), 1))
            assert moments is not None
            before = module.weight.double().cpu()
            weight, bias = output_refit.refit(moments, range(module.in_features), before, 1, ridge=ridge)
            module.weight.copy_(weight)
            if module.bias is not None:
                module.bias.copy_(bias)


def _read_by(module: nn.Module, states: Stream) -> list[Tensor]:
    """What a layer behind the encoder gets now, batch by batch."""
    seen: list[Tensor] = []
    with reading({"head": module}, lambda _, given: seen.append(given)):
        for _ in states.logits(len(states.layers)):
            pass
    return seen
