"""Fake quantisation: forward as the integers will be, backward straight through, the model as before afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kdcli.stages.quantize import fake_quant
from kdcli.stages.quantize.fake_quant import ranges, rounded, straight_through
from kdcli.stages.quantize.rounding import rtn
from tests import tiny


def eight(weight: torch.Tensor) -> torch.Tensor:
    return rtn.symmetric(weight, 8, limit=64).dense()


def by_hand(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Affine rounding to uint8, from its definition."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255)
    zero = np.round(np.float32(-low) / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.inner = nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.inner(self.table(ids))


def test_the_gradient_of_rounding_is_one() -> None:
    weight = torch.randn(3, 5, requires_grad=True)
    value = straight_through(weight, eight)
    torch.testing.assert_close(value, eight(weight.detach()), rtol=0, atol=1e-7)
    upstream = torch.randn(3, 5)
    value.backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_forward_is_the_definition_and_gradients_stop_outside_the_range() -> None:
    torch.manual_seed(0)
    model = Model()
    ids = torch.arange(9)[None]
    with rounded(model, {"inner": eight}, momentum=0.5):
        model.train()
        model(ids)
        model.eval()
        with torch.no_grad():
            model.table.weight[4, 2] = 50.0  # beyond the range that was seen
        out = model(ids)
        found = ranges(model)["inner"]
        out.sum().backward()
    x = model.table.weight.detach().numpy()
    seen = x.copy()
    seen[4, 2] = 0
    low, high = found.low, found.high
    assert high < 50
    expected = by_hand(x, low, high) @ eight(model.inner.weight.detach()).numpy().T
    expected += model.inner.bias.detach().numpy()
    # a value on the edge between two steps may fall to either side in float32
    assert np.abs(out[0].detach().numpy() - expected).max() < 1e-4 + found.scale * 0.01
    gradient = model.table.weight.grad.numpy()
    assert gradient[4, 2] == 0
    inside = np.ones_like(gradient, dtype=bool)
    inside[4, 2] = False
    weight = eight(model.inner.weight.detach()).sum(0).numpy()
    np.testing.assert_allclose(gradient[inside], np.broadcast_to(weight, x.shape)[inside], rtol=1e-5)


def test_judged_before_the_first_step_activations_are_not_rounded() -> None:
    torch.manual_seed(0)
    model, ids = Model().eval(), torch.arange(9)[None]
    with rounded(model, {"inner": eight}, momentum=0.5), torch.no_grad():
        found = model(ids)
        assert ranges(model) == {}
    expected = model.table.weight @ eight(model.inner.weight).T + model.inner.bias
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)  # float32 sums in another order


def test_ranges_are_moving_averages_of_real_tokens() -> None:
    torch.manual_seed(1)
    model = Model()
    batches = [torch.randint(0, 9, (3, 5)) for _ in range(4)]
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, 3:] = 0
    momentum = 0.25
    low = high = None
    with rounded(model, {"inner": eight}, momentum=momentum):
        model.train()
        assert ranges(model) == {}
        for ids in batches:
            model(ids, attention_mask=mask)
            real = model.table.weight.detach()[ids][mask.bool()]
            a, b = float(real.min()), float(real.max())
            low = a if low is None else (1 - momentum) * low + momentum * a
            high = b if high is None else (1 - momentum) * high + momentum * b
        inner = model.inner
        assert float(inner.range_low) == pytest.approx(low, rel=1e-5)
        assert float(inner.range_high) == pytest.approx(high, rel=1e-5)
        # padding that holds anything changes nothing, nor does a model that is not in training
        with torch.no_grad():
            model.table.weight[0] = 1e4
        before = ranges(model)
        padded = torch.cat([batches[0].clamp(min=1), torch.zeros(3, 2, dtype=torch.long)], 1)
        wide = torch.cat([torch.ones(3, 5, dtype=torch.long), torch.zeros(3, 2, dtype=torch.long)], 1)
        model(padded, attention_mask=wide)
        assert float(inner.range_high) < 100
        model.eval()
        frozen = ranges(model)
        model(padded)
        assert ranges(model) == frozen != before


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_model_is_what_it_was(family: str) -> None:
    made = tiny.checkpoint(family)
    names = list(made.model.state_dict())
    kinds = [type(m) for m in made.model.modules()]
    batch = tiny.batch(family)
    with torch.no_grad():
        before = made.model(**batch).logits
    linear = {name: eight for name, m in made.model.named_modules() if isinstance(m, nn.Linear)}
    token = next(n for n, m in made.model.named_modules() if m is made.model.get_input_embeddings())
    with rounded(made.model, {**linear, token: eight}, momentum=0.1):
        made.model.train()
        made.model(**batch)
        made.model.eval()
        with torch.no_grad():
            during = made.model(**batch).logits
        assert set(ranges(made.model)) == set(linear)
        extra = set(made.model.state_dict()) - set(names)
        assert {name.rpartition(".")[2] for name in extra} == {"range_low", "range_high"}
    with torch.no_grad():
        after = made.model(**batch).logits
    assert torch.equal(before, after)
    assert 0 < (before - during).abs().max() < 0.3  # of order 1, all of it rounded to 8 bits
    assert list(made.model.state_dict()) == names
    assert [type(m) for m in made.model.modules()] == kinds
    assert not [m for m in made.model.modules() if hasattr(m, "rounding") or hasattr(m, "momentum")]


def test_only_the_rows_of_the_batch_get_a_gradient() -> None:
    model = Model()
    with rounded(model, {"table": eight}):
        model(torch.tensor([[2, 5, 2]])).sum().backward()
        rows = model.table(torch.tensor([2, 5]))
    gradient = model.table.weight.grad.abs().sum(1)
    assert set(torch.nonzero(gradient).flatten().tolist()) == {2, 5}
    torch.testing.assert_close(rows, eight(model.table.weight.detach())[[2, 5]], rtol=0, atol=1e-6)
    assert fake_quant.ranges(model) == {}


def test_an_interruption_leaves_the_model_whole() -> None:
    model = Model()

    def stopped() -> None:
        with rounded(model, {"inner": eight, "table": eight}, momentum=0.1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert [type(m) for m in model.modules()] == [Model, nn.Embedding, nn.Linear]
    assert set(model.state_dict()) == {"table.weight", "inner.weight", "inner.bias"}
