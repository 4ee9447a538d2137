"""The layers of any model in the order in which it runs them, each seen behind those that are replaced already.

Shape letters: B rows, T tokens, D hidden features, I inputs of a layer, N tokens of all rows.

What is known about the model is found by running one batch: which layers read the very same tensor (query, key and
value do), and whether there is a stack of blocks of which each reads what the one before it gives. Where there is,
hidden states are kept between blocks, so that nothing is run from the beginning again; where there is none (an
unusual encoder), every group costs a pass from the start of the model to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.models import mapped
from kdcli.probe.hooks import Enough, reading


@dataclass
class _Block:
    """One of a stack: it gives (B, T, D), or that with nothing but None behind it in a tuple."""

    module: nn.Module
    behind: int | None  # how many None; None when a tensor is given by itself

    def result(self, state: Tensor) -> Any:
        """The state in the form in which the block gives it."""
        return state if self.behind is None else (state, *[None] * self.behind)


@dataclass
class Readers:
    """Layers that read the very same tensors, and when that is.

    Attributes:
        names: In the order in which they run.
        block: Index of the block that they are in; the number of blocks for what runs behind them, 0 in front.
        once: Whether each of them runs once a batch: then nothing behind the last of them needs to run.
    """

    names: list[str]
    block: int = 0
    once: bool = True


@dataclass
class Order:
    """The groups of a model in the order in which they run, and its stack of blocks, which may be empty."""

    groups: list[Readers] = field(default_factory=list)
    blocks: list[_Block] = field(default_factory=list)


@torch.no_grad()
def order_of(model: nn.Module, layers: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> Order:
    """Run one batch and see in which order layers run.

    Args:
        model: In eval mode.
        layers: Name -> one that takes one tensor. What never runs is in no group.
        batch: Arguments of the model.
    """
    read: dict[str, list[Tensor]] = {}  # the tensors are kept, so that no identity is used twice
    stacks = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    calls: dict[str, list[tuple[int, Any, Any]]] = {name: [] for name in stacks}
    places: dict[
        str, dict[str, int]
    ] = {}  # layer -> stack -> the block that was running, or the number of all

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in read:
                places[name] = {stack: _now(found, len(stacks[stack])) for stack, found in calls.items()}
            read.setdefault(name, []).append(args[0])

        return hook

    def enter(stack: str, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[stack].append((index, args[0] if args else kwargs.get("hidden_states"), None))

        return hook

    def leave(stack: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            index, given, _ = calls[stack][-1]
            calls[stack][-1] = (index, given, output)

        return hook

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(note(name)).remove)
        for stack, members in stacks.items():
            for index, member in enumerate(members):
                hooks.callback(member.register_forward_pre_hook(enter(stack, index), with_kwargs=True).remove)
                hooks.callback(member.register_forward_hook(leave(stack)).remove)
        model(**batch)
    sizes = {stack: sum(p.numel() for p in members.parameters()) for stack, members in stacks.items()}
    stack = max((s for s in stacks if _is_chain(calls[s], len(stacks[s]))), key=sizes.__getitem__, default="")
    order = Order()
    if stack:
        order.blocks = [
            _Block(member, None if isinstance(call[2], Tensor) else len(call[2]) - 1)
            for member, call in zip(stacks[stack], calls[stack], strict=True)
        ]
    groups: dict[tuple[int, ...], Readers] = {}
    for name, tensors in read.items():
        if (key := tuple(id(tensor) for tensor in tensors)) not in groups:
            groups[key] = Readers([])
            order.groups.append(groups[key])
        groups[key].names.append(name)
        groups[key].once = groups[key].once and len(tensors) == 1
        groups[key].block = max(groups[key].block, places[name].get(stack, 0))
    return order


def _is_chain(calls: Sequence[tuple[int, Any, Any]], count: int) -> bool:
    """Whether every member ran once, in its turn, on what the one before it gave."""
    if [index for index, _, _ in calls] != list(range(count)):
        return False
    outputs = []
    for _, given, output in calls:
        alone = isinstance(output, tuple) and bool(output) and all(rest is None for rest in output[1:])
        first = output[0] if alone else output
        if not isinstance(given, Tensor) or not isinstance(first, Tensor):
            return False
        outputs.append(first)
    return all(call[1] is before for call, before in zip(calls[1:], outputs, strict=False))


def _now(calls: Sequence[tuple[int, Any, Any]], count: int) -> int:
    """The block that runs now or ran last, 0 in front of the first; ``count`` behind the last."""
    return count if len(calls) == count and calls[-1][2] is not None else max(len(calls) - 1, 0)


class Walk:
    """The calibration rows on their way through a model whose layers are replaced behind them.

    Args:
        model: In eval mode.
        order: Of the layers.
        batches: Gives the same batches every time; there is no padding in them.
    """

    def __init__(
        self, model: nn.Module, order: Order, batches: Callable[[], Iterable[Mapping[str, Any]]]
    ) -> None:
        self.model, self.order, self.batches = model, order, batches
        self.block = 0  # the first that is not passed yet
        self.states: list[Tensor] = []  # what it reads (B, T, D), of every batch; none for the first block

    @torch.no_grad()
    def products(self, group: Readers, layers: Mapping[str, nn.Module]) -> Tensor:
        """X^T X (I, I) of what a group reads, over all rows and all its runs; X is (N, I)."""
        if group.block < self.block:
            self.block, self.states = 0, []
        while self.block < group.block:
            self._pass_block()
        layer = layers[group.names[0]]
        total: Tensor | None = None

        def see(name: str, given: Tensor) -> None:
            nonlocal total
            x = given.reshape(-1, given.shape[-1]).float()
            if total is None:
                total = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            total.addmm_(x.T, x)
            if group.once:
                raise Enough

        with reading({group.names[0]: layer}, see):
            self._run(lambda at, state: None, until=group.block + 1 if group.once else None)
        assert total is not None, "a group is of layers that ran"
        return total

    def _pass_block(self) -> None:
        """Take the states past one block, in place: its layers do not change any more."""

        recent: list[int] = []  # what is in memory still

        def keep(at: int, state: Tensor) -> None:
            if at < len(self.states):
                self.states[at].copy_(state)
                return
            self.states.append(state)
            recent.append(at)
            if sum(self.states[i].numel() * state.element_size() for i in recent) > mapped.LARGE:
                places = mapped.empty([(self.states[i].shape, state.dtype) for i in recent])
                for i, place in zip(recent, places, strict=True):
                    self.states[i] = place.copy_(self.states[i])
                recent.clear()

        self._run(keep, after=self.block)
        self.block += 1

    def _run(
        self, see: Callable[[int, Tensor], None], *, until: int | None = None, after: int | None = None
    ) -> None:
        """Run every batch from the block of now: until another begins, or show what one gives and stop there."""
        blocks = self.order.blocks
        now: int = 0

        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            raise Enough

        def show(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            see(now, output if isinstance(output, Tensor) else output[0])
            raise Enough

        with ExitStack() as hooks:
            if self.states:
                hooks.enter_context(_skipping(blocks[: self.block], lambda: self.states[now]))
            if until is not None and until < len(blocks):
                hooks.callback(blocks[until].module.register_forward_pre_hook(stop).remove)
            if after is not None:
                hooks.callback(blocks[after].module.register_forward_hook(show).remove)
            for now, batch in enumerate(self.batches()):  # noqa: B007  # the hooks read it
                with suppress(Enough):
                    self.model(**batch)


@contextmanager
def _skipping(blocks: Sequence[_Block], state: Callable[[], Tensor]) -> Iterator[None]:
    """Inside the block of this, those blocks compute nothing and give the state."""

    def instead(block: _Block) -> Callable[..., Any]:
        return lambda *args, **kwargs: block.result(state())

    for block in blocks:
        block.module.forward = instead(block)
    try:
        yield
    finally:
        for block in blocks:
            del block.module.forward
