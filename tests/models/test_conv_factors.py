"""Chains of convolutions: the same map as one convolution with the multiplied-out kernel, border included."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.errors import InputError
from kdcli.export import onnx as graphs
from kdcli.export.quiet import quiet
from kdcli.models import conv_factors
from kdcli.models.conv_factors import KINDS, FactorisedConv
from kdcli.models.small import CnnConfig, CnnForSequenceClassification

LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (nn.Conv2d, {"kernel_size": 3}),
    "tuples": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 2), "dilation": (1, 3)}),
    "same": (nn.Conv2d, {"kernel_size": (3, 5), "padding": "same", "dilation": 2}),
    "same-uneven": (nn.Conv2d, {"kernel_size": (4, 3), "padding": "same"}),
    "valid": (nn.Conv2d, {"kernel_size": 3, "padding": "valid", "bias": False}),
    "circular": (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"}),
    "reflect": (nn.Conv2d, {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"}),
    "replicate": (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 1, "padding_mode": "replicate"}),
    "groups": (nn.Conv2d, {"kernel_size": 3, "stride": (1, 2), "padding": 1, "groups": 2}),
    "row": (nn.Conv2d, {"kernel_size": (1, 4), "stride": (2, 1), "padding": (1, 2)}),
    "column": (nn.Conv2d, {"kernel_size": (3, 1), "stride": (1, 3), "padding": (0, 2), "groups": 2}),
    "pointwise": (nn.Conv2d, {"kernel_size": 1}),
    "pointwise-strided": (nn.Conv2d, {"kernel_size": 1, "stride": 2, "padding": (1, 0), "groups": 2}),
    "one-dimensional": (nn.Conv1d, {"kernel_size": 5, "stride": 2, "padding": 3, "dilation": 2}),
    "one-dimensional-groups": (nn.Conv1d, {"kernel_size": 3, "padding": "same", "groups": 2, "bias": False}),
}


def layer_of(name: str, *, inputs: int = 8, outputs: int = 12) -> Any:
    kind, options = LAYERS[name]
    torch.manual_seed(3)
    return kind(inputs, outputs, **options)


def inputs_of(layer: Any, *, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(batch, layer.in_channels, *(11, 13)[: layer.weight.ndim - 2], generator=generator)


def ranks_of(layer: Any, kind: str) -> tuple[int, ...]:
    axes = conv_factors.spatial_axes(layer)
    if kind == "cp":
        return (5,)
    if kind == "tucker2":
        return (2, 3) if axes else (2, 2)
    return (2, 4, 3)[: len(axes) + 1]


def filled(layer: Any, kind: str) -> FactorisedConv:
    """A chain with random weights."""
    torch.manual_seed(5)
    made = conv_factors.build(layer, kind, ranks_of(layer, kind))
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made.eval()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_chain_is_one_convolution_with_the_multiplied_kernel(name: str, kind: str) -> None:
    layer = layer_of(name)
    made, x = filled(layer, kind), inputs_of(layer)
    dense = copy.deepcopy(layer)
    dense.weight.data = conv_factors.kernel(made).float()
    if layer.bias is not None:
        dense.bias.data = made.bias
    # Sums of about 100 float32 products, in another order.
    assert relative(made(x), dense(x)) < 1e-5
    assert relative(conv_factors.merge(made)(x), dense(x)) < 1e-6
    assert sum(p.numel() for p in made.parameters()) == conv_factors.parameters(
        layer, kind, ranks_of(layer, kind)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_kernel_of_a_chain_element_by_element(kind: str) -> None:
    layer = layer_of("groups")
    made = filled(layer, kind)
    factors = [
        parameter.detach().double().numpy() for name, parameter in made.named_parameters() if "weight" in name
    ]
    want = np.zeros(layer.weight.shape)
    outputs, inputs = conv_factors.channels(layer)
    for group in range(2):
        for o in range(outputs):
            for i in range(inputs):
                for x in range(3):
                    for y in range(3):
                        want[group * outputs + o, i, x, y] = _element(kind, factors, group, o, i, x, y)
    np.testing.assert_allclose(conv_factors.kernel(made).numpy(), want, rtol=1e-10, atol=1e-12)


def _element(kind: str, factors: list[np.ndarray], group: int, o: int, i: int, x: int, y: int) -> float:
    """One element of the kernel of a group, from the formulas in the documentation of the module."""
    first, *middle, last = factors
    rank = [first.shape[0] // 2, last.shape[1]]
    out = group * (last.shape[0] // 2) + o
    if kind == "tucker2":
        core = middle[0]
        return float(
            sum(
                last[out, b, 0, 0] * core[group * rank[1] + b, a, x, y] * first[group * rank[0] + a, i, 0, 0]
                for a in range(rank[0])
                for b in range(rank[1])
            )
        )
    if kind == "cp":
        return float(
            sum(
                first[group * rank[0] + r, i, 0, 0]
                * middle[0][group * rank[0] + r, 0, x, 0]
                * middle[1][group * rank[0] + r, 0, 0, y]
                * last[out, r, 0, 0]
                for r in range(rank[0])
            )
        )
    across = middle[0].shape[0] // 2
    return float(
        sum(
            first[group * rank[0] + a, i, 0, 0]
            * middle[0][group * across + b, a, x, 0]
            * middle[1][group * rank[1] + c, b, 0, y]
            * last[out, c, 0, 0]
            for a in range(rank[0])
            for b in range(across)
            for c in range(rank[1])
        )
    )


def test_forms() -> None:
    layer = nn.Conv2d(8, 12, (3, 5), stride=(1, 2), padding=(1, 2))
    shapes = {
        kind: [tuple(f.weight.shape) for f in conv_factors.build(layer, kind, ranks_of(layer, kind))]
        for kind in KINDS
    }
    assert shapes == {
        "tucker2": [(2, 8, 1, 1), (3, 2, 3, 5), (12, 3, 1, 1)],
        "cp": [(5, 8, 1, 1), (5, 1, 3, 1), (5, 1, 1, 5), (12, 5, 1, 1)],
        "tensor-train": [(2, 8, 1, 1), (4, 2, 3, 1), (3, 4, 1, 5), (12, 3, 1, 1)],
    }
    made: Any = conv_factors.build(layer, "tucker2", (2, 3))
    assert [(f.stride, f.padding) for f in made] == [((1, 1), (0, 0)), ((1, 2), (1, 2)), ((1, 1), (0, 0))]
    assert [f.bias is not None for f in made] == [False, False, True]


@pytest.mark.parametrize(
    ("ranks", "shapes"),
    [
        ((8, 3), [(3, 8, 3, 3), (12, 3, 1, 1)]),  # A = I
        ((2, 12), [(2, 8, 1, 1), (12, 2, 3, 3)]),  # B = O
        ((8, 12), [(12, 8, 3, 3)]),
    ],
)
def test_square_factors_are_left_out(ranks: tuple[int, int], shapes: list[tuple[int, ...]]) -> None:
    made = conv_factors.build(layer_of("plain"), "tucker2", ranks)
    assert [tuple(f.weight.shape) for f in made] == shapes


def test_it_answers_as_the_convolution_does() -> None:
    layer = layer_of("tuples")
    made = conv_factors.build(layer, "cp", (2,))
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(made, name) == getattr(layer, name)
    assert (made.kind, made.ranks) == ("cp", (2,))


def test_dtype_and_mode_are_those_of_the_layer() -> None:
    layer = layer_of("plain").to(torch.float64).eval()
    made = conv_factors.build(layer, "tensor-train", (2, 2, 2))
    assert {p.dtype for p in made.parameters()} == {torch.float64}
    assert not any(module.training for module in made.modules())
    assert made.train()(inputs_of(layer).double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "kind", "ranks", "message"),
    [
        ("plain", "tucker2", (3,), "takes 2 of at least 1"),
        ("plain", "tucker2", (0, 3), "takes 2 of at least 1"),
        ("plain", "tucker2", (9, 3), "exceed the 8 inputs and 12 outputs"),
        ("pointwise", "tucker2", (2, 3), "has one rank"),
        ("plain", "cp", (2, 2), "takes 1 of at least 1"),
        ("plain", "tensor-train", (2, 2), "takes 3 of at least 1"),
        ("plain", "tensor-train", (9, 3, 3), r"exceed \[8, 24, 12\]"),
        ("one-dimensional", "tensor-train", (2, 2, 2), "takes 2 of at least 1"),
        ("plain", "tucker3", (2, 2), "unknown form 'tucker3'"),
    ],
)
def test_ranks_that_do_not_fit(name: str, kind: str, ranks: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        conv_factors.build(layer_of(name), kind, ranks)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(6, 6, 3, groups=6), "depthwise"),
        (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d is neither"),
        (nn.Conv3d(4, 4, 3), "Conv3d is neither"),
        (nn.Linear(4, 4), "Linear is neither"),
    ],
)
def test_layers_that_stay(layer: Any, reason: str) -> None:
    assert reason in (conv_factors.why_not(layer) or "")
    with pytest.raises(InputError, match=reason):
        conv_factors.build(layer, "cp", (1,))


def test_one_input_channel_is_not_depthwise() -> None:
    assert conv_factors.why_not(nn.Conv2d(1, 16, 3)) is None


def test_error_of_a_kernel() -> None:
    layer = layer_of("plain")
    made = filled(layer, "tucker2")
    product = conv_factors.kernel(made).numpy()
    weight = layer.weight.detach().double().numpy()
    want = ((weight - product) ** 2).sum() / (weight**2).sum()
    assert conv_factors.error(layer, made) == pytest.approx(want, rel=1e-12)
    nn.init.zeros_(layer.weight)
    assert conv_factors.error(layer, made) == float("inf")
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    assert conv_factors.error(layer, made) == 0.0


class _Images(nn.Module):
    """Every layer of the table of its size, one after the other, on one image."""

    def __init__(self, names: list[str], kind: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList(filled(layer_of(name, inputs=8, outputs=8), kind) for name in names)

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([part(image).mean((2, 3)) for part in self.parts], 1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", KINDS)
def test_chains_export_to_onnx(kind: str, tmp_path: Path) -> None:
    names = [name for name, (make, _) in LAYERS.items() if make is nn.Conv2d]
    model, x = (
        _Images(names, kind).eval(),
        torch.randn(2, 8, 11, 13, generator=torch.Generator().manual_seed(0)),
    )
    path = tmp_path / "model.onnx"
    with quiet(), torch.no_grad():
        torch.onnx.export(
            model, (x,), str(path), dynamo=False, opset_version=graphs.OPSET, input_names=["image"]
        )
    got = onnxruntime.InferenceSession(str(path)).run(None, {"image": x.numpy()})[0]
    want = model(x).detach().numpy()
    # float32 sums in another order, as in export/parity.py.
    np.testing.assert_allclose(got, want, atol=1e-5 * float(np.abs(want).max()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_model_runs_on_chains_and_ignores_padding(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = CnnForSequenceClassification(
        CnnConfig(vocab_size=40, hidden_size=16, intermediate_size=12, num_labels=3)
    ).eval()
    for index, layer in enumerate(model.convolutions):
        made = filled(layer, kind)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter *= 0.3
        model.convolutions[index] = made
    ids = torch.randint(1, 40, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    found = model(input_ids=ids, attention_mask=mask).logits
    more = model(input_ids=F.pad(ids, (0, 4)), attention_mask=F.pad(mask, (0, 4))).logits
    torch.testing.assert_close(more, found, rtol=1e-5, atol=1e-5)
    graphs.export(model, {"input_ids": ids, "attention_mask": mask}, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    longer = {"input_ids": F.pad(ids, (0, 4)).numpy(), "attention_mask": F.pad(mask, (0, 4)).numpy()}
    got = session.run(None, longer)[0]
    scale = float(found.detach().abs().max())
    np.testing.assert_allclose(got, found.detach().numpy(), atol=1e-5 * scale)
