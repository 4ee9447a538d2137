"""What a quantisation is asked to do, checked before anything is measured."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

from torch import nn

from kdcli import registry
from kdcli.context import Context
from kdcli.errors import UsageError, did_you_mean
from kdcli.families.stack import is_token_table
from kdcli.stages.quantize.options import SCHEMES, QuantizeOptions

INTEGER_TABLES = ("int8", "int4", "fp32")
Convolution = nn.Conv1d | nn.Conv2d
Layer = nn.Linear | nn.Embedding | Convolution


@dataclass(frozen=True)
class QuantizePlan:
    """One scheme on one model."""

    scheme: str
    module: ModuleType  # schemes/<scheme>.py
    config: Any  # its Config
    options: QuantizeOptions
    layers: Mapping[str, Layer]  # what is quantised; what is kept in fp32 is not among them
    embeddings: str  # format of the tables, one of EMBEDDINGS
    settings: Mapping[str, str]  # as they were given
    inner: Any = None  # the Config of the method that ``config.rounding`` names

    @property
    def params(self) -> dict[str, Any]:
        """For the report."""
        kept = list(self.options.keep_fp32)
        common = {"scheme": self.scheme, "embeddings": self.embeddings, "keep_fp32": kept}
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
    options = context.request.options
    assert isinstance(options, QuantizeOptions)
    scheme = scheme or options.scheme
    settings = context.request.common.settings if settings is None else settings
    module, config, inner = settle(scheme, settings)
    embeddings = str(options.embeddings or getattr(module, "EMBEDDINGS", "int8"))
    if (allowed := getattr(module, "TABLES", INTEGER_TABLES)) and embeddings not in allowed:
        raise UsageError(
            f"--scheme {scheme} has no --embeddings {embeddings}: choose one of {', '.join(allowed)}"
        )
    convolutions = getattr(module, "CONVOLUTIONS", False)
    model, tables = context.checkpoint.model, embeddings != "fp32"
    layers = choose(model, options.keep_fp32, tables=tables, convolutions=convolutions)
    return QuantizePlan(scheme, module, config, options, layers, embeddings, settings, inner)


def stage_file(scheme: str) -> Any:
    """The file of this folder that does a scheme."""
    return importlib.import_module(f"kdcli.stages.quantize.{SCHEMES[scheme]}")


def settle(scheme: str, settings: Mapping[str, str]) -> tuple[ModuleType, Any, Any]:
    """The method of a scheme, its Config, and the Config of the rounding that it names, if it names one.

    Raises:
        UsageError: An unknown setting or a bad value.
    """
    if scheme not in registry.names("quantize"):
        module = stage_file(scheme)
        own = list(module.Config.model_fields)
        if strange := next((key for key in settings if key not in own), None):
            raise UsageError(
                f"unknown setting '{strange}': --scheme {scheme} has {' and '.join(own)}, "
                "and tries every scheme as it is by default",
                "name one scheme to set more of it",
            )
        return module, registry.parse_settings(module, settings), None
    module = registry.load("quantize", scheme)
    fields = module.Config.model_fields
    chosen = settings.get("rounding", fields["rounding"].default if "rounding" in fields else None)
    if chosen not in registry.names("quantize"):
        return module, registry.parse_settings(module, settings), None
    inner = registry.load("quantize", chosen)
    known = {*fields, *inner.Config.model_fields}
    for key in settings:
        if key not in known:
            raise UsageError(f"unknown setting '{key}': {did_you_mean(key, sorted(known))}")
    config = registry.parse_settings(module, {k: v for k, v in settings.items() if k in fields})
    return (
        module,
        config,
        registry.parse_settings(inner, {k: v for k, v in settings.items() if k not in fields}),
    )


def choose(
    model: nn.Module, keep: tuple[str, ...], *, tables: bool, convolutions: bool = False
) -> dict[str, Layer]:
    """Every linear layer, the factors of factorised ones among them, and the embedding tables; less the kept.

    Convolutions are among them for schemes that have a kernel for them.

    Tables that are no embeddings of tokens, as MPNet's relative position biases, always stay float.

    Raises:
        UsageError: A pattern that matches nothing, or patterns that leave nothing.
    """
    layers: dict[str, Layer] = {}
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


def refuse_training(plan: QuantizePlan) -> None:
    """For schemes that train nothing.

    Raises:
        UsageError: ``--epochs`` was given.
    """
    if plan.options.epochs:
        raise UsageError(
            f"--scheme {plan.scheme} trains nothing, so --epochs {plan.options.epochs} has no meaning; leave it at 0"
        )


def refuse_sensitivity(plan: QuantizePlan) -> None:
    """For schemes whose layers cannot be exchanged one by one afterwards.

    Raises:
        UsageError: ``--sensitivity`` was given.
    """
    if plan.options.sensitivity:
        raise UsageError(
            f"--scheme {plan.scheme} measures no single layers, so --sensitivity has no meaning; "
            "it is for dynamic-int8, static-int8 and int4"
        )


def refuse_calibration(plan: QuantizePlan) -> None:
    """For schemes that have no fixed range of activations.

    Raises:
        UsageError: ``--calibration`` was given.
    """
    if plan.options.calibration is not None:
        raise UsageError(
            f"--scheme {plan.scheme} uses no fixed range of activations, so --calibration has no meaning"
        )
