"""The log of structural transforms (``kdcli.json``) and its replay on a fresh model.

A checkpoint whose shapes its ``config.json`` cannot express is rebuilt in three steps: a fresh
model from the configuration, the log replayed on it in order, then the weights loaded strictly.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from kdcli import families
from kdcli.errors import InputError
from kdcli.families import stack
from kdcli.families.modules import LowRankEmbedding, LowRankLinear, SmoothLinear
from kdcli.families.stack import encoder_layers
from kdcli.models import conv_factors

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
    """Linear layers and embedding tables that became two factors: dotted name -> rank."""

    op: Literal["factorise"] = "factorise"
    ranks: dict[str, int]
    #: Linear layers that have one right factor together; the weights are stored under the first name.
    shared: list[list[str]] = Field(default_factory=list)


class FactoriseConv(_Transform):
    """Convolutions that became several: dotted name -> ranks."""

    op: Literal["factorise_conv"] = "factorise_conv"
    kind: str
    ranks: dict[str, list[int]]


class Layers(_Transform):
    """Encoder layers that were dropped: those that stayed, in their numbering before."""

    op: Literal["layers"] = "layers"
    keep: list[int]
    #: As in :class:`Cut`.
    in_config: bool = False


class Width(_Transform):
    """Features of the residual stream that stayed, in their numbering before.

    ``config.json`` keeps the width of before, which also gives the size of the heads.
    """

    op: Literal["width"] = "width"
    keep: list[int]


class Vocab(_Transform):
    """Tokens that were dropped, from the tokenizer and the embedding alike; ``config.json`` has the new number."""

    op: Literal["vocab"] = "vocab"
    before: int
    after: int


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


Transform = Annotated[
    Cut | Layers | Width | Vocab | Factorise | FactoriseConv | Zero | Quantise | Smooth,
    Field(discriminator="op"),
]


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
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            reason = f"{place}: {first['msg']}" if place else first["msg"]
        else:
            reason = str(error) or type(error).__name__
        raise InputError(f"{path} is not a transform log that this kdcli can read: {reason}") from error


def write_log(log: TransformLog, directory: Path) -> None:
    """Write ``kdcli.json``."""
    text = json.dumps(log.model_dump(mode="json"), indent=1, ensure_ascii=False)
    (directory / FILE).write_text(text + "\n", encoding="utf-8")


def apply(model: nn.Module, transform: Transform) -> None:
    """Change the shapes of ``model`` as ``transform`` says, in place.

    A :class:`Vocab` changes nothing here: a model made from its configuration has the new size already.

    Raises:
        InputError: The transform does not fit the model (a log from another model).
    """
    if isinstance(transform, Cut):
        if not transform.in_config:
            _cut(model, transform)
    elif isinstance(transform, Layers):
        if not transform.in_config:
            family = families.of(str(_config(model).model_type))
            _check_kept("layers", transform.keep, len(encoder_layers(model, family)))
            stack.keep_layers(model, family, transform.keep)
    elif isinstance(transform, Width):
        family = families.of(str(_config(model).model_type))
        _check_kept("features", transform.keep, stack.width_of(model, family))
        stack.keep_features(model, family, transform.keep)
    elif isinstance(transform, Factorise):
        together = {name: group for group in transform.shared for name in group}
        for name, rank in transform.ranks.items():
            group = together.get(name)
            if group is None:
                factorise(model, name, rank)
            elif name == group[0]:
                factorise_linears(model, group, rank)
    elif isinstance(transform, FactoriseConv):
        for name, sizes in transform.ranks.items():
            factorise_conv(model, name, transform.kind, tuple(sizes))
    elif isinstance(transform, Smooth):
        for name in transform.layers:
            smooth(model, name)


def replay(model: nn.Module, log: TransformLog) -> None:
    """Apply every transform of ``log``, oldest first."""
    for transform in log.transforms:
        apply(model, transform)


def _config(model: nn.Module) -> Any:
    return model.config


def _check_kept(what: str, kept: list[int], have: int) -> None:
    if not kept or any(not 0 <= i < have for i in kept) or len(set(kept)) != len(kept):
        raise InputError(f"{FILE} keeps {what} that the model does not have (it has {have})")


def _cut(model: nn.Module, cut: Cut) -> None:
    config: Any = model.config
    layers = encoder_layers(model, families.of(config.model_type))
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


def factorise(model: nn.Module, name: str, rank: int) -> LowRankLinear | LowRankEmbedding:
    """Replace the linear layer or table ``name`` by an uninitialised factor pair of the given rank and return it.

    Raises:
        InputError: There is no such layer, or the rank is out of range.
    """
    if isinstance(_named(model, name), nn.Embedding):
        return factorise_table(model, name, rank)
    layer = _named(model, name)
    if not isinstance(layer, nn.Linear) or not 1 <= rank <= min(layer.in_features, layer.out_features):
        raise InputError(f"{FILE} factorises '{name}' to rank {rank}, which does not fit that layer")
    pair = LowRankLinear(layer.in_features, layer.out_features, rank, bias=layer.bias is not None)
    pair.to(device=layer.weight.device, dtype=layer.weight.dtype)
    pair.train(layer.training)
    model.set_submodule(name, pair)
    return pair


def shared_weights(log: TransformLog) -> dict[str, str]:
    """Weights that are stored under another name only: name in the model -> name in the file."""
    found: dict[str, str] = {}
    for at, transform in enumerate(log.transforms):
        for group in transform.shared if isinstance(transform, Factorise) else []:
            names = [now for name in group if (now := _name_now(name, log.transforms[at + 1 :])) is not None]
            found |= {f"{name}.first.weight": f"{names[0]}.first.weight" for name in names[1:]}
    return found


def _name_now(name: str, later: Sequence[Any]) -> str | None:
    """What a layer of the encoder is called after later transforms; None when it was dropped."""
    prefix = next(
        (f"{f.layers}." for f in families.encoders().values() if name.startswith(f"{f.layers}.")), None
    )
    if prefix is None:
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    at = int(number)
    for transform in later:
        if isinstance(transform, Layers):
            if at not in transform.keep:
                return None
            at = transform.keep.index(at)
    return f"{prefix}{at}.{rest}"


def factorise_linears(model: nn.Module, names: Sequence[str], rank: int) -> list[LowRankLinear]:
    """Replace linear layers by uninitialised factor pairs of one rank; several get one right factor together.

    Raises:
        InputError: As for :func:`factorise`, or their inputs are not of one size.
    """
    pairs: list[LowRankLinear] = []
    for name in names:
        pair = factorise(model, name, rank)
        assert isinstance(pair, LowRankLinear)
        if pair.in_features != (pairs[0] if pairs else pair).in_features:
            raise InputError(f"{FILE} joins '{name}' with layers of other inputs")
        pairs.append(pair)
    for pair in pairs[1:]:
        pair.first = pairs[0].first
    return pairs


def factorise_table(model: nn.Module, name: str, rank: int) -> LowRankEmbedding:
    """Replace the embedding table ``name`` by an uninitialised factor pair and return it.

    Raises:
        InputError: As for :func:`factorise`.
    """
    table = _named(model, name)
    if not isinstance(table, nn.Embedding) or not 1 <= rank <= table.embedding_dim:
        raise InputError(f"{FILE} factorises '{name}' to rank {rank}, which does not fit that table")
    pair = LowRankEmbedding(table.num_embeddings, table.embedding_dim, rank, table.padding_idx)
    pair.to(device=table.weight.device, dtype=table.weight.dtype)
    pair.train(table.training)
    model.set_submodule(name, pair)
    return pair


def factorise_conv(model: nn.Module, name: str, kind: str, ranks: tuple[int, ...]) -> nn.Module:
    """Replace the convolution ``name`` by uninitialised factors and return them.

    Raises:
        InputError: There is no such convolution, or the ranks do not fit it.
    """
    layer = _named(model, name)
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        raise InputError(f"{FILE} factorises '{name}', which is not a convolution")
    built = conv_factors.build(layer, kind, ranks)
    built.train(layer.training)
    model.set_submodule(name, built)
    return built


def _named(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise InputError(f"{FILE} factorises '{name}', which the model does not have") from error


def merged(log: TransformLog, names: Collection[str]) -> None:
    """Take layers whose factors were multiplied back out of the log: a fresh model has them dense already.

    Args:
        log: Changed in place.
        names: As the model has them now; an older transform may know them by the number they had before.
    """
    for at, transform in enumerate(log.transforms):
        if not isinstance(transform, Factorise | FactoriseConv):
            continue
        gone = {n for n in transform.ranks if _name_now(n, log.transforms[at + 1 :]) in names}
        for name in gone:
            del transform.ranks[name]
        if isinstance(transform, Factorise):
            left = ([n for n in group if n not in gone] for group in transform.shared)
            transform.shared = [group for group in left if len(group) > 1]
    log.transforms = [t for t in log.transforms if not isinstance(t, Factorise | FactoriseConv) or t.ranks]


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
        raise InputError(f"{FILE} smooths the input of '{name}', which is not a linear layer")
    if isinstance(layer, SmoothLinear):
        return layer
    made = SmoothLinear.of(layer)
    model.set_submodule(name, made)
    return made


def settle_in_config(model: nn.Module, log: TransformLog) -> None:
    """Move cuts that ``config.json`` can express into it, so that plain transformers loads the result.

    Possible when no layer lost a head, nothing is factorised, all layers have equally many neurons and the
    residual stream has its width.
    """
    cuts = [t for t in log.transforms if isinstance(t, Cut | Layers)]
    if not cuts or any(isinstance(t, Factorise | FactoriseConv | Width | Smooth) for t in log.transforms):
        return
    config: Any = model.config
    family = families.of(config.model_type)
    layers = encoder_layers(model, family)
    sizes = {layer.neurons for layer in layers}
    if len(sizes) != 1 or 0 in sizes or any(layer.heads != config.num_attention_heads for layer in layers):
        return
    setattr(config, family.keys.neurons, sizes.pop())
    setattr(config, family.keys.layers, len(layers))
    for cut in cuts:
        cut.in_config = True
