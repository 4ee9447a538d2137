"""What a quantisation is asked to do, checked before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from kdcli import registry
from kdcli.context import Context
from kdcli.errors import UsageError
from kdcli.families.stack import is_token_table
from kdcli.stages.quantize.options import QuantizeOptions
from kdcli.stages.quantize.scheme import Scheme, WeightRounding

Convolution = nn.Conv1d | nn.Conv2d
Quantisable = nn.Linear | nn.Embedding | Convolution


@dataclass(frozen=True)
class QuantizePlan:
    """One scheme on one model."""

    name: str  # of the scheme
    scheme: Scheme
    config: Any  # its settings
    options: QuantizeOptions
    layers: Mapping[str, Quantisable]  # what is quantised; what is kept in fp32 is not among them
    embeddings: str  # format of the tables, one of EMBEDDINGS
    settings: Mapping[str, str]  # as they were given
    rounding: WeightRounding | None = None  # that ``config.rounding`` names
    inner: Any = None  # its settings

    @property
    def params(self) -> dict[str, Any]:
        """For the report."""
        kept = list(self.options.keep_fp32)
        common = {"scheme": self.name, "embeddings": self.embeddings, "keep_fp32": kept}
        inner = {} if self.inner is None else self.inner.model_dump()
        return common | self.config.model_dump() | inner

    @property
    def matrices(self) -> dict[str, nn.Linear]:
        """The linear layers among ``layers``."""
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, nn.Linear)}

    @property
    def tables(self) -> dict[str, nn.Embedding]:
        """The embedding tables among ``layers``."""
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, nn.Embedding)}

    @property
    def convolutions(self) -> dict[str, Convolution]:
        """The convolutions among ``layers``."""
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, Convolution)}

    def without(self, names: frozenset[str] | set[str]) -> QuantizePlan:
        """The same plan with some more layers kept in fp32."""
        return replace(self, layers={n: layer for n, layer in self.layers.items() if n not in names})


def of(
    context: Context, *, scheme: str | None = None, settings: Mapping[str, str] | None = None
) -> QuantizePlan:
    """Check the options of a request and choose the layers.

    Args:
        context: The input model and what was asked.
        scheme: Another scheme than the one that was asked for (a candidate of ``auto``).
        settings: Its settings.

    Raises:
        UsageError: A bad option, or patterns that match nothing or leave nothing.
    """
    options = context.request.options_as(QuantizeOptions)
    name = scheme or options.scheme
    settings = context.request.common.settings if settings is None else settings
    found = settle(name, settings)
    registry.need_answers({name: found.scheme}, context.checkpoint.task)
    declared, embeddings = (
        found.scheme,
        tables_of(name, found.scheme.tables, options, found.scheme.embeddings),
    )
    _refuse_without_use(name, declared, options)
    layers = choose(
        context.checkpoint.model,
        options.keep_fp32,
        tables=embeddings != "fp32",
        convolutions=declared.convolutions,
    )
    return QuantizePlan(
        name, declared, found.config, options, layers, embeddings, settings, found.rounding, found.inner
    )


def tables_of(name: str, allowed: Sequence[str], options: QuantizeOptions, own: str) -> str:
    """The format of embedding tables: as asked, else the scheme's own.

    Raises:
        UsageError: The scheme has no such format.
    """
    embeddings = options.embeddings or own
    if embeddings not in allowed:
        raise UsageError(
            f"--scheme {name} has no --embeddings {embeddings}: choose one of {', '.join(allowed)}"
        )
    return embeddings


@dataclass(frozen=True)
class Settled:
    """A scheme with its settings, and the way of rounding that they name with its own."""

    scheme: Scheme
    config: Any
    rounding: WeightRounding | None = None
    inner: Any = None


def settle(name: str, settings: Mapping[str, str]) -> Settled:
    """A scheme, and what ``--set`` says to it.

    Raises:
        UsageError: An unknown setting or a bad value.
    """
    scheme = registry.load("quantize", name, Scheme)
    if not scheme.names_rounding:
        _, shared = registry.share_out("quantize", settings, {name: scheme})
        return Settled(scheme, scheme.configured(shared[name]))
    chosen = settings.get("rounding", scheme.config.model_fields["rounding"].default)
    scheme.configured({"rounding": chosen})  # raises when there is no such rounding
    rounding = registry.load("rounding", chosen, WeightRounding)
    _, shared = registry.share_out("quantize", settings, {name: scheme, chosen: rounding})
    return Settled(scheme, scheme.configured(shared[name]), rounding, rounding.configured(shared[chosen]))


def _refuse_without_use(name: str, scheme: Scheme, options: QuantizeOptions) -> None:
    """Refuse options that a scheme has no use for.

    Raises:
        UsageError: Says which.
    """
    if options.epochs and scheme.training is None:
        raise UsageError(
            f"--scheme {name} trains nothing, so --epochs {options.epochs} has no meaning; leave it at 0"
        )
    if options.calibration is not None and not scheme.calibrates:
        raise UsageError(
            f"--scheme {name} uses no fixed range of activations, so --calibration has no meaning"
        )
    if options.sensitivity and scheme.rounds is None:
        able = [n for n in registry.names("quantize") if registry.load("quantize", n, Scheme).rounds]
        raise UsageError(
            f"--scheme {name} measures no single layers, so --sensitivity has no meaning; "
            f"it is for {', '.join(able[:-1])} and {able[-1]}"
        )


def choose(
    model: nn.Module, keep: tuple[str, ...], *, tables: bool, convolutions: bool = False
) -> dict[str, Quantisable]:
    """Every linear layer, the factors of factorised ones among them, and the embedding tables; less the kept.

    Convolutions are among them for schemes that have a kernel for them.

    Tables that are no embeddings of tokens, as MPNet's relative position biases, always stay float.

    Raises:
        UsageError: A pattern that matches nothing, or patterns that leave nothing.
    """
    layers: dict[str, Quantisable] = {}
    for name, module in model.named_modules():
        table = isinstance(module, nn.Embedding) and is_token_table(name)
        convolution = isinstance(module, Convolution) and convolutions
        if isinstance(module, nn.Linear) or convolution or (table and tables):
            layers[name] = module
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in layers):
            examples = ", ".join([*list(layers)[:4], list(layers)[-1]])
            raise UsageError(
                f"--keep-fp32 '{pattern}' matches none of the {len(layers)} layers that would be quantised",
                f"* stands for any characters; the names are such as {examples}",
            )
    kept = {name for name in layers if any(fnmatchcase(name, pattern) for pattern in keep)}
    if kept == set(layers):
        raise UsageError("--keep-fp32 leaves nothing to quantise")
    return {name: layer for name, layer in layers.items() if name not in kept}
