"""The log of structural transforms (``kdcli.json``) and its replay on a fresh model.

A checkpoint whose shapes its ``config.json`` cannot express is rebuilt in three steps: a fresh
model from the configuration, the log replayed on it in order, then the weights loaded strictly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from kdcli.errors import InputError
from kdcli.models.families import encoder_layers, family_of
from kdcli.models.layers import LowRankLinear, SmoothLinear

FILE = "kdcli.json"


class _Transform(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Cut(_Transform):
    """Heads and neurons that were cut out: for each changed layer, what was kept, in its numbering before."""

    op: Literal["cut"] = "cut"
    heads: dict[int, list[int]] = Field(default_factory=dict)
    neurons: dict[int, list[int]] = Field(default_factory=dict)
    #: True when config.json already has the resulting size, so that plain transformers can load it too.
    in_config: bool = False


class Factorise(_Transform):
    """Linear layers that became two factors: dotted name -> rank."""

    op: Literal["factorise"] = "factorise"
    ranks: dict[str, int]


class Zero(_Transform):
    """Weights set to zero; shapes are unchanged, so replaying it does nothing."""

    op: Literal["zero"] = "zero"
    sparsity: float
    tensors: dict[str, int]  # name -> number of zeros


class Layout(_Transform):
    """How some tensors lie in the file."""

    bits: int
    group: int | None = None  # columns that share a scale; None: a row has one
    symmetric: bool = True  # False: zero points are stored too
    tensors: list[str]


class Quantise(_Transform):
    """Tensors stored as integers with scales; loading multiplies them out."""

    op: Literal["quantise"] = "quantise"
    scheme: str
    bits: int  # of most weights
    reduce_range: bool = False
    tensors: list[str]  # names of the integer tensors; each has its scale in "<name>_scale"
    #: How they are stored. Tensors that are in none of them are int8 with a scale a row.
    layouts: list[Layout] = Field(default_factory=list)
    #: Whether activations are rounded, and with which range: that of each row, or the ones below.
    rounds: Literal["none", "dynamic", "fixed"] = "none"
    #: Fixed ranges of activations: input of this layer -> (scale, zero point as uint8).
    activations: dict[str, tuple[float, int]] = Field(default_factory=dict)


class Smooth(_Transform):
    """Linear layers that multiply their input by a vector of their own first."""

    op: Literal["smooth"] = "smooth"
    layers: list[str]


Transform = Annotated[Cut | Factorise | Zero | Quantise | Smooth, Field(discriminator="op")]


class TransformLog(BaseModel):
    """Everything that happened to a model since kdcli first wrote it, oldest first."""

    model_config = ConfigDict(extra="forbid")
    format: Literal["kdcli.transforms"] = "kdcli.transforms"
    version: Literal[1] = 1
    transforms: list[Transform] = Field(default_factory=list)
    #: One entry a stage: {"stage", "method", "report_sha256", ...}, as report.json's lineage has it.
    lineage: list[dict[str, Any]] = Field(default_factory=list)

    @property
    def quantised(self) -> Quantise | None:
        """The quantisation in force, if any."""
        found = [t for t in self.transforms if isinstance(t, Quantise)]
        return found[-1] if found else None

    @property
    def smoothed(self) -> bool:
        """Whether some layers multiply their input first, which config.json cannot say."""
        return any(isinstance(t, Smooth) for t in self.transforms)


def read_log(directory: Path) -> TransformLog | None:
    """Read ``kdcli.json``; None when the directory was not written by kdcli.

    Raises:
        InputError: The file is broken or of another version.
    """
    path = directory / FILE
    if not path.exists():
        return None
    try:
        return TransformLog.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, ValueError, OSError) as error:
        reason = str(error).splitlines()[-1].strip() if str(error) else type(error).__name__
        raise InputError(f"{path} is not a transform log that this kdcli can read: {reason}") from error


def write_log(log: TransformLog, directory: Path) -> None:
    """Write ``kdcli.json``."""
    text = json.dumps(log.model_dump(mode="json"), indent=1, ensure_ascii=False)
    (directory / FILE).write_text(text + "\n", encoding="utf-8")


def apply(model: nn.Module, transform: Cut | Factorise | Zero | Quantise | Smooth) -> None:
    """Change the shapes of ``model`` as ``transform`` says, in place.

    Raises:
        InputError: The transform does not fit the model (a log from another model).
    """
    if isinstance(transform, Cut):
        if not transform.in_config:
            _cut(model, transform)
    elif isinstance(transform, Factorise):
        for name, rank in transform.ranks.items():
            factorise(model, name, rank)
    elif isinstance(transform, Smooth):
        for name in transform.layers:
            smooth(model, name)


def replay(model: nn.Module, log: TransformLog) -> None:
    """Apply every transform of ``log``, oldest first."""
    for transform in log.transforms:
        apply(model, transform)


def _cut(model: nn.Module, cut: Cut) -> None:
    config: Any = model.config
    layers = encoder_layers(model, family_of(config.model_type))
    for kind, keep in (("heads", cut.heads), ("neurons", cut.neurons)):
        for index, kept in keep.items():
            if not 0 <= index < len(layers):
                raise InputError(
                    f"{FILE} cuts {kind} of layer {index}, but the model has {len(layers)} layers"
                )
            have = layers[index].heads if kind == "heads" else layers[index].neurons
            if any(not 0 <= unit < have for unit in kept) or len(set(kept)) != len(kept):
                raise InputError(
                    f"{FILE} keeps {kind} of layer {index} that it does not have (it has {have})"
                )
            if kind == "heads":
                layers[index].keep_heads(kept)
            else:
                layers[index].keep_neurons(kept)


def factorise(model: nn.Module, name: str, rank: int) -> LowRankLinear:
    """Replace the linear layer ``name`` by an uninitialised factor pair of the given rank and return it.

    Raises:
        InputError: There is no such linear layer, or the rank is out of range.
    """
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise InputError(f"{FILE} factorises '{name}', which the model does not have") from error
    if not isinstance(layer, nn.Linear) or not 1 <= rank <= min(layer.in_features, layer.out_features):
        raise InputError(f"{FILE} factorises '{name}' to rank {rank}, which does not fit that layer")
    pair = LowRankLinear(layer.in_features, layer.out_features, rank, bias=layer.bias is not None)
    pair.to(device=layer.weight.device, dtype=layer.weight.dtype)
    pair.train(layer.training)
    model.set_submodule(name, pair)
    return pair


def smooth(model: nn.Module, name: str) -> SmoothLinear:
    """Let the linear layer ``name`` multiply its input by a vector of ones, to be set by the caller; return it.

    Raises:
        InputError: There is no such linear layer.
    """
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise InputError(f"{FILE} smooths the input of '{name}', which the model does not have") from error
    if not isinstance(layer, nn.Linear):
        raise InputError(f"{FILE} smooths the input of '{name}', which is no linear layer")
    if isinstance(layer, SmoothLinear):
        return layer
    made = SmoothLinear.of(layer)
    model.set_submodule(name, made)
    return made


def settle_in_config(model: nn.Module, log: TransformLog) -> None:
    """Move cuts that ``config.json`` can express into it, so that plain transformers loads the result.

    Possible when no layer lost a head, nothing is factorised and all layers have equally many neurons.
    """
    cuts = [t for t in log.transforms if isinstance(t, Cut)]
    if not cuts or any(isinstance(t, Factorise | Smooth) for t in log.transforms):
        return
    config: Any = model.config
    family = family_of(config.model_type)
    layers = encoder_layers(model, family)
    sizes = {layer.neurons for layer in layers}
    if len(sizes) != 1 or 0 in sizes or any(layer.heads != config.num_attention_heads for layer in layers):
        return
    setattr(config, family.ffn_size_key, sizes.pop())
    for cut in cuts:
        cut.in_config = True
