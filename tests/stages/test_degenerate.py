"""Models with parts that say nothing: constant, dead and equal units, zeros, a stream that never varies, few rows.

Every method that solves a system from covariances or weighs by them gives finite weights and numbers, and where what
says nothing is all that has to go, the answers stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcli.data.sources import Rows
from kdcli.families.stack import encoder_layers
from kdcli.models.checkpoint import Checkpoint
from kdcli.probe import definite
from kdcli.stages.lowrank import stage as lowrank
from kdcli.stages.lowrank.options import LowRankOptions
from kdcli.stages.prune import stage as prune
from kdcli.stages.prune.options import PruneOptions
from kdcli.stages.quantize import stage as quantize
from kdcli.stages.quantize.options import QuantizeOptions
from tests import tiny
from tests.stages import contexts
from tests.stages.lowrank.test_convolutions import random_cnn


def layers_of(made: Checkpoint) -> Any:
    return encoder_layers(made.model, made.family)


def spots(made: Checkpoint) -> None:
    """In layer 0: constant neurons, one nearly so, one at 30, dead ones, a copy; a dead head and two equal ones."""
    layer = layers_of(made)[0]
    inner, size = layer.ffn_in, layer.head_size
    inner.weight[:2] = 0.0
    inner.bias[:2] = 1.5
    inner.weight[2] *= 1e-4
    inner.bias[2] = 1.5
    inner.weight[3] *= 1e-3
    inner.bias[3] = 30.0
    inner.bias[4:8] = -20.0
    inner.weight[9], inner.bias[9] = inner.weight[8], inner.bias[8].clone()
    for one in (layer.query, layer.key, layer.value):
        one.weight[:size] = 0.0
        one.bias[:size] = 0.0
        one.weight[3 * size :] = one.weight[2 * size : 3 * size]
        one.bias[3 * size :] = one.bias[2 * size : 3 * size]


def zeros(made: Checkpoint) -> None:
    """All but three of a hundred weights of layer 0 are zero, and all of layer 1."""
    first, second = layers_of(made)
    generator = torch.Generator().manual_seed(0)
    for p in first.module.parameters():
        if p.ndim > 1:
            p *= (torch.rand(p.shape, generator=generator) < 0.03).to(p)
    for p in second.module.parameters():
        p.zero_()


def constant_stream(made: Checkpoint) -> None:
    """Every token of every text is the same vector in front of the first layer."""
    made.model.bert.embeddings.LayerNorm.weight.zero_()
    made.model.bert.embeddings.LayerNorm.bias.add_(3.0)


def constant_part(made: Checkpoint) -> None:
    """All neurons of a layer are constant, at sizes next to which float32 loses what little they vary."""
    inner = layers_of(made)[0].ffn_in
    inner.weight.mul_(1e-7)
    inner.bias.copy_(torch.linspace(1, 50, len(inner.bias)))


MODELS: dict[str, Callable[[Checkpoint], None]] = {
    "spots": spots,
    "zeros": zeros,
    "constant stream": constant_stream,
    "constant part": constant_part,
}

PRUNE = {
    "sensitivity": {"sparsity": 0.4},
    "kprune": {"sparsity": 0.4},
    "fisher": {"sparsity": 0.4},
    "taylor": {"sparsity": 0.4, "schedule": "one-shot"},
    "magnitude": {"sparsity": 0.4},
    "sparsegpt": {"sparsity": 0.5, "structure": "weights"},
    "wanda": {"structure": "2:4"},
    "width-energy": {"sparsity": 0.25, "structure": "width"},
    "layer-kl": {"sparsity": 0.5, "structure": "layers"},
}
LOWRANK = ("svd", "asvd", "fwsvd", "whitening", "two-sided")
QUANTIZE = {
    "gptq": ({"scheme": "int4"}, {"rounding": "gptq", "group": "16"}),
    "hqq": ({"scheme": "int4"}, {"rounding": "hqq", "group": "16"}),
    "smooth": ({"scheme": "static-int8"}, {"smooth": "0.5"}),
    "percentile": ({"scheme": "static-int8", "calibration": "percentile"}, {}),
}


def made_of(change: Callable[[Checkpoint], None]) -> Checkpoint:
    made = tiny.checkpoint()
    with torch.no_grad():
        change(made)
    return made


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from numbers(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from numbers(one)


def check(applied: Any) -> None:
    """Weights, answers and the report are finite."""
    for name, parameter in applied.checkpoint.model.named_parameters():
        assert torch.isfinite(parameter).all(), name
    with torch.no_grad():
        logits = applied.checkpoint.model(**tiny.batch()).logits
    assert torch.isfinite(logits).all()
    # Nothing was fitted to rounding errors: weights of the size of what was there.
    assert max(float(p.detach().abs().max()) for p in applied.checkpoint.model.parameters()) < 1e3
    found = [applied.method.detail, applied.method.layers]
    assert all(math.isfinite(number) for number in numbers(found))


def rows(count: int) -> dict[str, Rows]:
    return {"train": contexts.rows(count, 1), "validation": contexts.rows(8, 2)}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", PRUNE)
def test_prune(method: str, model: str, tmp_path: Path) -> None:
    options = PruneOptions(method=method, **PRUNE[method])
    check(contexts.applied(prune, contexts.of(options, made_of(MODELS[model]), tmp_path, splits=rows(24))))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", LOWRANK)
def test_lowrank(method: str, model: str, tmp_path: Path) -> None:
    made = made_of(MODELS[model])
    check(
        contexts.applied(lowrank, contexts.of(LowRankOptions(method=method), made, tmp_path, splits=rows(24)))
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scheme", QUANTIZE)
def test_quantize(scheme: str, model: str, tmp_path: Path) -> None:
    options, settings = QUANTIZE[scheme]
    given = QuantizeOptions(**options, calibration_samples=24)
    check(
        contexts.applied(
            quantize, contexts.of(given, made_of(MODELS[model]), tmp_path, splits=rows(24), settings=settings)
        )
    )


@pytest.mark.parametrize("method", ["sensitivity", "kprune", "fisher", "sparsegpt", "width-energy"])
def test_prune_with_two_rows(method: str, tmp_path: Path) -> None:
    options = PruneOptions(method=method, **PRUNE[method])
    check(contexts.applied(prune, contexts.of(options, tiny.checkpoint(), tmp_path, splits=rows(2))))


@pytest.mark.parametrize(
    ("method", "setting"),
    [("sparsegpt", ("damping", "0")), ("width-energy", ("ridge", "0")), ("fisher", ("damp", "1e-12"))],
)
def test_prune_with_two_rows_and_hardly_any_damping(
    method: str, setting: tuple[str, str], tmp_path: Path
) -> None:
    options = PruneOptions(method=method, **PRUNE[method])
    made, settings = made_of(spots), dict([setting])
    check(contexts.applied(prune, contexts.of(options, made, tmp_path, splits=rows(2), settings=settings)))


@pytest.mark.parametrize("amount", [{"budget": 0.6}, {"energy": 0.9}, {"rank": "evbmf"}])
@pytest.mark.parametrize("method", LOWRANK)
def test_lowrank_with_two_rows_of_one_label(method: str, amount: dict, tmp_path: Path) -> None:
    one = contexts.rows(4, 1)
    splits = {"train": one.take([0, 2]), "validation": one}
    context = contexts.of(LowRankOptions(method=method, **amount), tiny.checkpoint(), tmp_path, splits=splits)
    check(contexts.applied(lowrank, context))


def test_gptq_with_two_rows(tmp_path: Path) -> None:
    given = QuantizeOptions(scheme="int4", calibration_samples=2)
    check(contexts.applied(quantize, contexts.of(given, tiny.checkpoint(), tmp_path, splits=rows(2))))


@pytest.mark.parametrize("method", ["sensitivity", "kprune", "fisher", "taylor", "magnitude"])
@pytest.mark.parametrize("structure", ["heads", "neurons", "heads+neurons"])
def test_one_head_and_one_neuron_stay(method: str, structure: str, tmp_path: Path) -> None:
    made = tiny.checkpoint(layers=1, heads=1, neurons=1)
    options = PruneOptions(method=method, structure=structure, sparsity=0.9)
    applied = contexts.applied(prune, contexts.of(options, made, tmp_path, splits=rows(24)))
    check(applied)
    (layer,) = layers_of(applied.checkpoint)
    assert (layer.heads, layer.neurons) == (1, 1)
    assert [w.code for w in applied.warnings] == ["budget-missed"]


@pytest.mark.parametrize("method", LOWRANK)
@pytest.mark.parametrize(
    "sizes", [{"heads": 1, "neurons": 1}, {"layers": 1, "hidden": 8, "heads": 1, "neurons": 2}]
)
def test_lowrank_of_one_head_and_one_neuron(method: str, sizes: dict, tmp_path: Path) -> None:
    options = LowRankOptions(method=method, budget=0.9)
    check(
        contexts.applied(lowrank, contexts.of(options, tiny.checkpoint(**sizes), tmp_path, splits=rows(24)))
    )


@pytest.mark.parametrize("method", ["tucker2", "cp", "tensor-train"])
@pytest.mark.parametrize("amount", [{"budget": 0.5}, {"energy": 0.9}, {"rank": "evbmf"}])
def test_convolutions_of_zeros_and_copies(method: str, amount: dict, tmp_path: Path) -> None:
    if method == "cp" and "energy" in amount:
        amount = {"rank": 2}
    made = random_cnn()
    with torch.no_grad():
        made.model.convolutions[1].weight.zero_()
        made.model.convolutions[2].weight[:] = made.model.convolutions[2].weight[:1]
    check(
        contexts.applied(
            lowrank, contexts.of(LowRankOptions(method=method, **amount), made, tmp_path, splits=rows(24))
        )
    )


@pytest.mark.parametrize("structure", ["heads", "neurons"])
def test_units_that_say_nothing_are_all_that_goes(structure: str, tmp_path: Path) -> None:
    """Half of the units give a constant; without them the answers to other rows are the same: a bias is enough."""
    made = tiny.checkpoint()
    with torch.no_grad():
        for layer in layers_of(made):
            half = layer.head_size * layer.heads // 2
            layer.value.weight[:half] = 0.0
            layer.ffn_in.weight[: layer.neurons // 2] = 0.0
            layer.ffn_in.bias[: layer.neurons // 2] = torch.linspace(0.5, 3, layer.neurons // 2)
        before = made.model(**tiny.batch(rows=40, seed=7)).logits
    options = PruneOptions(structure=structure, sparsity=0.5)
    settings = {"ridge": "1e-9"}  # what stays is not to be held back from taking over
    contexts.applied(prune, contexts.of(options, made, tmp_path, splits=rows(64), settings=settings))
    with torch.no_grad():
        after = made.model(**tiny.batch(rows=40, seed=7)).logits
    # Fits of float32 features, where a wrong unit costs 1 and more.
    assert float((after - before).abs().max()) < 0.02


@pytest.mark.parametrize("size", [3, 40])
def test_a_factor_of_what_has_none(size: int) -> None:
    """Indefinite by rounding: the factor is that of the nearest matrix, in either shape and precision."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(2, size, generator=generator, dtype=torch.float64) * 1e3
    few[:, 0] = 5.0
    for dtype in (torch.float64, torch.float32):
        matrix = (few.T @ few).to(dtype)
        matrix.diagonal().sub_(float(matrix.diagonal().max()) * torch.finfo(dtype).eps)
        assert int(torch.linalg.cholesky_ex(matrix).info) != 0
        for upper in (False, True):
            found = definite.cholesky(matrix, upper=upper)
            product = found.T @ found if upper else found @ found.T
            # The raised eigenvalues, n eps of the largest, and rounding of as much.
            room = 4 * size * torch.finfo(dtype).eps * float(torch.linalg.matrix_norm(matrix, 2))
            assert float((product - matrix).abs().max()) < room
            assert (found.diagonal() > 0).all()
            assert torch.equal(found, found.triu() if upper else found.tril())
        assert torch.isfinite(definite.inverse(matrix)).all()
        assert torch.isfinite(definite.solve(matrix, matrix[0])).all()


def test_a_definite_matrix_has_its_usual_factor() -> None:
    matrix = torch.tensor([[4.0, 2.0], [2.0, 3.0]], dtype=torch.float64)
    assert torch.equal(definite.cholesky(matrix), torch.linalg.cholesky(matrix))
    right = torch.tensor([2.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(matrix @ definite.solve(matrix, right), right)
    torch.testing.assert_close(definite.inverse(matrix) @ matrix, torch.eye(2, dtype=torch.float64))
    assert definite.solve(torch.zeros(0, 0), torch.zeros(0, 3)).shape == (0, 3)


def test_the_scale_of_features_is_never_less_than_what_float32_can_tell() -> None:
    assert definite.scale_of(torch.diag(torch.tensor([1.0, 3.0])), torch.zeros(2)) == 2.0
    assert definite.scale_of(torch.zeros(2, 2), torch.full((2,), 8.0)) == 64 * 2.0**-23
    assert definite.scale_of(torch.diag(torch.tensor([-1e-9, -1e-9])), torch.zeros(2)) > 0
    assert definite.scale_of(torch.zeros(0, 0), torch.zeros(0)) > 0
