"""The linear layers after the encoder, fitted so that they give what they gave before the encoder was pruned.

For every linear layer of the head in the order in which they run (BERT: pooler, classifier), with its input x now and
its output t in the dense model, (W, b) is the least squares solution that :func:`kdcli.stages.prune.output_refit.refit`
gives; the layers before it are fitted already.

Source: the same problem as for the sub-layers of the encoder (Park et al. 2024, "K-prune", arXiv:2308.03449,
section 3.4). Differs: the paper leaves the head as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.families import stack
from kdcli.families.family import Encoder
from kdcli.inputs.feeding import Labelled
from kdcli.probe.layer_stream import Moments, Stream, add
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
        hooks = [module.register_forward_hook(self._keep) for module in linears.values()]
        try:
            with torch.no_grad():
                for inputs, _ in batches:
                    model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
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
            seen: list[Tensor] = []
            hook = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            try:
                for _ in states.logits(len(states.layers)):
                    pass
            finally:
                hook.remove()
            moments: Moments | None = None
            for x, t in zip(seen, targets, strict=True):
                moments = add(moments, x.float(), t.float(), x.new_ones(len(x), 1))
            assert moments is not None
            before = module.weight.double().cpu()
            weight, bias = output_refit.refit(moments, range(module.in_features), before, 1, ridge=ridge)
            module.weight.copy_(weight)
            if module.bias is not None:
                module.bias.copy_(bias)
