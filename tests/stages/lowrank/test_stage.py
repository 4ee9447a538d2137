"""The lowrank stage on tiny models: what it factorises, what it reports, what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcli import memory, processes
from kdcli.context import Context
from kdcli.errors import UsageError
from kdcli.families.modules import LowRankEmbedding, LowRankLinear
from kdcli.families.stack import encoder_linears
from kdcli.models import checkpoint as checkpoints
from kdcli.models import mapped, transforms
from kdcli.models.transforms import Cut, Factorise, Layers, Width
from kdcli.probe import rows as calibration
from kdcli.probe import speedup
from kdcli.probe.speedup import Speed
from kdcli.request import Gates
from kdcli.stages.lowrank import matrices, merging, rank_budget
from kdcli.stages.lowrank import stage as lowrank
from kdcli.stages.lowrank.options import LowRankOptions
from tests import tiny
from tests.stages import contexts

# float32 sums in another order; logits are of order 1.
TOLERANCE = 1e-5


def context_of(made, work: Path, *, settings=None, seed: int = 0, **options) -> Context:
    splits = {"train": contexts.rows(80, 1), "validation": contexts.rows(16, 2)}
    return contexts.of(LowRankOptions(**options), made, work, splits=splits, settings=settings, seed=seed)


def without_clock(method) -> list[dict]:
    """The table without what the machine's load decides."""
    return [{k: v for k, v in row.items() if not k.startswith("latency")} for row in method.layers]


def logits(made, family: str) -> torch.Tensor:
    with torch.no_grad():
        return made.model(**tiny.batch(family, rows=20)).logits


def check_table(applied, budget: float | None = None) -> None:
    """What the table says is what the model is; a layer behind factorised ones errs more than was predicted."""
    model = applied.checkpoint.model
    for row in applied.method.layers:
        layer = model.get_submodule(row["name"])
        assert sum(p.numel() for p in layer.parameters()) == row["parameters_after"]
        assert row["shape"] == [layer.out_features, layer.in_features]
        assert row["kept_dense"] == (not isinstance(layer, LowRankLinear))
        if row["kept_dense"]:
            assert (row["rank"], row["error_measured"], row["error_predicted"]) == (None, 0.0, 0.0)
            assert row["parameters_after"] == row["parameters_before"]
        else:
            assert row["rank"] == layer.rank < row["break_even"]
            assert row["parameters_after"] < row["parameters_before"]
            assert 0 <= row["error_predicted"] < 1
            # Behind a sub-layer without heads the first token is constant, and both are rounding. Neither is what
            # the method minimises, so a layer fitted again may come out somewhat below: 0.89 was seen.
            assert row["error_measured"] >= 0.8 * row["error_predicted"] - 1e-6
            assert row["error_measured"] > 0 or row["error_predicted"] < 1e-6
        assert row["latency_before_ms"] > 0
        assert row["latency_after_ms"] > 0
    detail = applied.method.detail
    for key in ("parameters_before", "parameters_after"):
        assert detail[key] == sum(row[key] for row in applied.method.layers)
    if budget is not None:
        assert budget * 0.9 < detail["parameters_kept"] <= budget


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_budget_on_every_family_and_back_from_disk(family: str, tmp_path: Path) -> None:
    made = tiny.checkpoint(family)
    names, dense = list(encoder_linears(made.model, made.family)), logits(made, family)
    applied = contexts.applied(lowrank, context_of(made, tmp_path, budget=0.7))
    check_table(applied, 0.7)
    assert [row["name"] for row in applied.method.layers] == names
    assert {w.code for w in applied.warnings} <= {"thin-products"}
    ranks = {row["name"]: row["rank"] for row in applied.method.layers if not row["kept_dense"]}
    assert made.log.transforms == [Factorise(ranks=ranks)]
    allocation = applied.method.detail["allocation"]
    assert (
        allocation["kl"][allocation["chosen"]] == min(allocation["kl"].values()) <= allocation["kl"]["even"]
    )
    assert allocation["held_rows"] == 20
    assert set(applied.method.detail["alone"]["kl"]) == set(names)
    now = logits(made, family)
    assert float((now - dense).abs().max()) > 0
    again = tiny.reload(made, tmp_path / "out")
    torch.testing.assert_close(logits(again, family), now, rtol=0, atol=TOLERANCE)


def test_a_nearly_whole_budget_changes_little_and_more_budget_is_closer(tmp_path: Path) -> None:
    dense = logits(tiny.checkpoint(), "bert").log_softmax(-1)
    distances = []
    for budget in (0.3, 0.6, 0.97):
        made = tiny.checkpoint()
        check_table(contexts.applied(lowrank, context_of(made, tmp_path, budget=budget)), budget)
        now = logits(made, "bert").log_softmax(-1)
        distances.append(
            float(torch.nn.functional.kl_div(now, dense, reduction="batchmean", log_target=True))
        )
    assert distances[0] > distances[1] > distances[2]


@pytest.mark.parametrize("better", ["even", "weighted", "between"])
def test_the_share_that_diverges_least_on_held_rows_is_taken(
    better: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny.checkpoint()
    sizes = {n: rank_budget.size_of(x) for n, x in encoder_linears(made.model, made.family).items()}
    shares: dict[str, rank_budget.Ranks] = {}
    for name in ("by_damage", "between"):
        real = getattr(rank_budget, name)

        def keep(*args, real=real, name=name):
            shares["weighted" if name == "by_damage" else name] = real(*args)
            return shares["weighted" if name == "by_damage" else name]

        monkeypatch.setattr(rank_budget, name, keep)
    real_divergence = rank_budget.divergence

    def divergence(*args):
        found = real_divergence(*args)
        tried = [name for name in ("even", "weighted", "between") if name in shares]
        if len(tried) < 2:  # each layer alone, before there are shares
            return found
        divergence.calls += 1
        return 0.1 if ("even", "weighted", "between")[divergence.calls - 1] == better else 0.2

    divergence.calls = 0
    monkeypatch.setattr(rank_budget, "divergence", divergence)
    applied = contexts.applied(lowrank, context_of(made, tmp_path, budget=0.6))
    shares["even"] = rank_budget.even(sizes, 0.6)
    assert applied.method.detail["allocation"]["chosen"] == better
    assert {row["name"]: row["rank"] for row in applied.method.layers} == shares[better]


def test_none_of_the_three_means_budget(tmp_path: Path) -> None:
    applied = contexts.applied(lowrank, context_of(tiny.checkpoint(), tmp_path))
    assert applied.method.name == LowRankOptions().method
    assert applied.method.params["budget"] == lowrank.BUDGET
    check_table(applied, lowrank.BUDGET)


def test_rank_keeps_layers_dense_from_break_even_on(tmp_path: Path) -> None:
    applied = contexts.applied(lowrank, context_of(tiny.checkpoint(), tmp_path, rank=17))
    check_table(applied)
    # 32 x 32 breaks even at 16, 48 x 32 at 19.2.
    assert {tuple(r["shape"]): r["rank"] for r in applied.method.layers} == {
        (32, 32): None,
        (48, 32): 17,
        (32, 48): 17,
    }
    assert "allocation" not in applied.method.detail


def test_energy_keeps_the_fewest_directions_with_that_share(tmp_path: Path) -> None:
    few = contexts.applied(lowrank, context_of(tiny.checkpoint(), tmp_path, method="whitening", energy=0.8))
    check_table(few)
    errors = [row["error_predicted"] for row in few.method.layers]
    assert any(errors)
    assert max(errors) <= 0.2
    for row in few.method.layers:
        if row["rank"] is not None and row["rank"] > 1:
            fewer = contexts.applied(
                lowrank,
                context_of(
                    tiny.checkpoint(),
                    tmp_path,
                    method="whitening",
                    rank=row["rank"] - 1,
                    include=(row["name"],),
                ),
            )
            assert fewer.method.layers[0]["error_predicted"] > 0.2


@pytest.mark.parametrize("options", [{"energy": 1.0}, {"rank": 1000}, {"rank": 20}])
def test_nothing_worth_factorising_is_a_warning(options: dict, tmp_path: Path) -> None:
    made = tiny.checkpoint()
    before = logits(made, "bert")
    applied = contexts.applied(lowrank, context_of(made, tmp_path, epochs=1, **options))
    assert [w.code for w in applied.warnings] == ["nothing-factorised"]
    assert "no rank is below break-even" in applied.warnings[0].message
    assert made.log.transforms == []
    assert all(row["kept_dense"] for row in applied.method.layers)
    assert applied.method.detail["parameters_kept"] == 1
    assert torch.equal(logits(made, "bert"), before)


def test_include_exclude_and_a_second_pass_over_what_is_left(tmp_path: Path) -> None:
    made = tiny.checkpoint()
    first = contexts.applied(
        lowrank,
        context_of(
            made, tmp_path, include=("*.intermediate.*", "*.output.*"), exclude=("*attention*",), rank=9
        ),
    )
    names = [row["name"] for row in first.method.layers]
    assert len(names) == 4
    assert not any("attention" in name for name in names)
    second = contexts.applied(lowrank, context_of(made, tmp_path, budget=0.6))
    check_table(second, 0.6)
    assert len(second.method.layers) == 8
    assert all("attention" in row["name"] for row in second.method.layers)
    assert [len(t.ranks) for t in made.log.transforms] == [4, second.method.detail["factorised"]]
    now = logits(made, "bert")
    again = tiny.reload(made, tmp_path / "out")
    torch.testing.assert_close(logits(again, "bert"), now, rtol=0, atol=TOLERANCE)


def test_a_model_with_nothing_left(tmp_path: Path) -> None:
    made = tiny.checkpoint()
    contexts.applied(lowrank, context_of(made, tmp_path, rank=5))
    third = contexts.applied(lowrank, context_of(made, tmp_path))
    assert [w.code for w in third.warnings] == ["nothing-factorised"]
    assert "no dense linear layer left" in third.warnings[0].message
    assert third.method.layers == []
    assert third.method.detail["parameters_kept"] is None
    assert len(made.log.transforms) == 1
    with pytest.raises(UsageError, match=r"--include '\*query' matches no dense"):
        lowrank.prepare(context_of(made, tmp_path, include=("*query",)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_pruned_uneven_model(family: str, tmp_path: Path) -> None:
    made = tiny.checkpoint(family)
    cut = Cut(heads={0: [], 1: [2]}, neurons={0: list(range(11)), 1: []})
    transforms.apply(made.model, cut)
    made.log.transforms.append(cut)
    applied = contexts.applied(lowrank, context_of(made, tmp_path, budget=0.6))
    check_table(applied)
    assert applied.method.detail["parameters_kept"] <= 0.6
    assert {tuple(row["shape"]) for row in applied.method.layers} == {(11, 32), (32, 11), (8, 32), (32, 8)}
    now = logits(made, family)
    again = tiny.reload(made, tmp_path / "out")
    torch.testing.assert_close(logits(again, family), now, rtol=0, atol=TOLERANCE)


def test_same_seed_same_weights_and_the_samples_setting(tmp_path: Path) -> None:
    found = []
    for seed in (3, 3, 4):
        made = tiny.checkpoint()
        context = context_of(made, tmp_path, seed=seed, settings={"samples": "32"}, budget=0.6)
        applied = contexts.applied(lowrank, context)
        assert applied.method.detail["rows"] == 32
        assert applied.method.params["samples"] == 32
        found.append((made.model.state_dict(), applied.method))
    assert without_clock(found[0][1]) == without_clock(found[1][1])
    assert all(torch.equal(v, found[1][0][k]) for k, v in found[0][0].items())
    assert without_clock(found[2][1]) != without_clock(found[0][1])


def test_factors_of_a_large_model_are_the_same_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = tiny.checkpoint(), tiny.checkpoint()
    asked: list[None] = []
    monkeypatch.setattr(memory, "give_back", lambda: asked.append(None))
    contexts.applied(lowrank, context_of(small, tmp_path, budget=0.6))
    assert not asked  # it takes a tenth of a second, which is worth it beside many megabytes only
    files = []
    real = mapped.empty
    monkeypatch.setattr(mapped, "LARGE", 1)
    monkeypatch.setattr(mapped, "empty", lambda wanted: files.append(real(wanted)) or files[-1])
    contexts.applied(lowrank, context_of(large, tmp_path, budget=0.6))
    assert asked
    assert len(files) == len(encoder_linears(tiny.checkpoint().model, large.family))
    for name, weight in small.model.state_dict().items():
        assert torch.equal(large.model.state_dict()[name], weight)


def test_recovery_follows_the_surgery(tmp_path: Path) -> None:
    made = checkpoints.load(tiny.saved(tmp_path / "m"))
    applied = contexts.applied(lowrank, context_of(made, tmp_path, rank=6, epochs=1, batch_size=16))
    assert applied.method.detail["recovery"]["epochs"] == 1
    assert applied.method.params["epochs"] == 1
    assert isinstance(made.model.get_submodule("bert.encoder.layer.0.output.dense"), LowRankLinear)
    again = tiny.reload(made, tmp_path / "out")
    torch.testing.assert_close(logits(again, "bert"), logits(made, "bert"), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.5, "rank": 4}, "budget and rank exclude each other"),
        ({"energy": 0.5, "rank": 4}, "energy and rank exclude each other"),
        ({"budget": 0.0}, "'0.0' must be above 0 and below 1"),
        ({"budget": 1.0}, "'1.0' must be above 0 and below 1"),
        ({"budget": 0.01}, "--budget 0.01 cannot be met"),
        ({"energy": 0.0}, "'0.0' must be above 0 and at most 1"),
        ({"energy": 1.1}, "'1.1' must be above 0 and at most 1"),
        ({"budget": float("nan")}, "'nan' must be above 0 and below 1"),
        ({"rank": 0}, "rank: '0' must be at least 1"),
        ({"rank": "evbf"}, "'evbf' is neither a whole number nor evbmf"),
        ({"target_speedup": 1.0}, "'1.0' must be above 1"),
        ({"target_speedup": 2.0, "budget": 0.5}, "budget and target_speedup exclude each other"),
        (
            {"merge": True, "rank": 5},
            "--merge multiplies factors back and factorises nothing; leave out --rank",
        ),
        ({"merge": True, "epochs": 1}, "leave out --epochs"),
        ({"method": "tucker2"}, "--method tucker2 factorises convolutions, and the model has none"),
        ({"rank": 4, "epochs": -1}, "epochs: '-1' must be at least 0"),
        ({"method": "whitenin"}, "did you mean 'whitening'"),
        ({"include": ("*quary*",)}, "--include '.quary.' matches no dense linear layer"),
        ({"exclude": ("*quary*",)}, "--exclude '.quary.' matches no dense linear layer"),
        ({"exclude": ("*",)}, "leave no layer"),
        ({"settings": {"sample": "9"}}, "did you mean 'samples'"),
        ({"settings": {"samples": "2"}}, "--set samples=2"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        lowrank.prepare(context_of(tiny.checkpoint(), tmp_path, **options))
    if "quary" in message:
        assert "bert.encoder.layer.0.attention.self.query" in str(caught.value.hint)


def alone(name: str, tmp_path: Path, method: str, **options):
    """One layer factorised by itself."""
    made = tiny.checkpoint()
    applied = contexts.applied(lowrank, context_of(made, tmp_path, method=method, include=(name,), **options))
    return made, applied


@pytest.mark.parametrize("method", ["svd", "fwsvd", "asvd", "whitening", "two-sided"])
@pytest.mark.parametrize("part", ["attention.self.key", "intermediate.dense", "output.dense"])
def test_of_a_layer_alone_the_predicted_error_is_the_measured_one(
    method: str, part: str, tmp_path: Path
) -> None:
    name = f"bert.encoder.layer.1.{part}"
    _, applied = alone(name, tmp_path, method, rank=5)
    row = applied.method.layers[0]
    # With nothing factorised before it a fit has nothing to change. Ridge and float32 sums leave 1e-3.
    assert row["error_measured"] == pytest.approx(row["error_predicted"], rel=2e-3)


@pytest.mark.parametrize("method", ["svd", "fwsvd", "asvd", "whitening", "two-sided"])
def test_full_rank_in_every_layer_leaves_the_model_as_it_is(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full ranks never pay, so break-even is moved out of the way; the batch is padded, and its rows are new."""
    monkeypatch.setattr(rank_budget.LayerSize, "break_even", property(lambda size: 33.0))
    made = tiny.checkpoint()
    dense = logits(made, "bert")
    applied = contexts.applied(lowrank, context_of(made, tmp_path, method=method, rank=32))
    assert [row["rank"] for row in applied.method.layers] == [32] * 12
    assert sum(isinstance(m, LowRankLinear) for m in made.model.modules()) == 12
    torch.testing.assert_close(logits(made, "bert"), dense, rtol=0, atol=TOLERANCE * float(dense.abs().max()))
    assert all(row["error_measured"] < 1e-9 for row in applied.method.layers)


def kl(made, dense: torch.Tensor) -> float:
    now = logits(made, "bert").log_softmax(-1)
    return float(torch.nn.functional.kl_div(now, dense, reduction="batchmean", log_target=True))


def test_methods_that_see_more_diverge_less(tmp_path: Path) -> None:
    dense = logits(tiny.checkpoint(), "bert").log_softmax(-1)
    found = {}
    for method in ("svd", "asvd", "whitening", "two-sided"):
        made = tiny.checkpoint()
        contexts.applied(lowrank, context_of(made, tmp_path, method=method, rank=7))
        found[method] = kl(made, dense)
    assert found["whitening"] < found["asvd"] < found["svd"]
    assert found["two-sided"] < found["whitening"]


def test_fitting_behind_the_factorised_layers_helps(tmp_path: Path) -> None:
    dense = logits(tiny.checkpoint(), "bert").log_softmax(-1)
    found = {}
    for mode in ("targets", "inputs", "off"):
        made = tiny.checkpoint()
        contexts.applied(
            lowrank,
            context_of(
                made, tmp_path, method="whitening", rank=6, settings={"sequential": mode, "ridge": "0.01"}
            ),
        )
        found[mode] = kl(made, dense)
    assert found["targets"] < 0.8 * found["off"]
    assert found["targets"] < found["inputs"]


@pytest.mark.parametrize("method", ["svd", "two-sided"])
def test_a_table_of_fewer_tokens_than_features(method: str, tmp_path: Path) -> None:
    made = tiny.checkpoint(hidden=64)
    name = made.family.tokens
    original = made.model.get_submodule(name).weight.detach().double().numpy()
    assert original.shape[0] < original.shape[1]
    options = {"method": method, "rank": 13, "include": ("embeddings",), "exclude": ("*.layer.*",)}
    contexts.applied(lowrank, context_of(made, tmp_path, **options))
    table = made.model.get_submodule(name)
    assert isinstance(table, LowRankEmbedding)
    with torch.no_grad():
        now = table(torch.arange(len(original))).double().numpy()
    u, s, v = np.linalg.svd(original)
    if method == "svd":  # the rows of a table are all alike to it
        np.testing.assert_allclose(now, u[:, :13] * s[:13] @ v[:13], atol=1e-5)
    else:
        assert table.second.bias is not None  # the tokens' mean, which is no part of the product
        now -= table.second.bias.detach().double().numpy()
        assert np.linalg.matrix_rank(now, 1e-4) == 13


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_table_of_the_tokens(family: str, tmp_path: Path) -> None:
    made = tiny.checkpoint(family)
    name = made.family.tokens
    dense = logits(made, family)
    applied = contexts.applied(lowrank, context_of(made, tmp_path, rank=13, include=("embeddings", "*.1.*")))
    table = made.model.get_submodule(name)
    assert isinstance(table, LowRankEmbedding)
    row = applied.method.layers[0]
    assert (row["name"], row["rank"]) == (name, 13)
    assert row["parameters_after"] == sum(p.numel() for p in table.parameters()) < row["parameters_before"]
    # On the training rows' tokens, each once more than it occurs.
    made_again = tiny.checkpoint(family)
    original = made_again.model.get_submodule(name).weight.detach().double()
    counts = (
        torch.bincount(
            torch.from_numpy(context_of(made_again, tmp_path).encoded["train"].ids), minlength=len(original)
        )
        + 1.0
    )
    centred = original - (counts[:, None] * original).sum(0) / counts.sum()
    wrong = (table.weight.detach().double() - original).square().sum(1)
    share = float((counts * wrong).sum() / (counts * centred.square().sum(1)).sum())
    assert row["error_measured"] == pytest.approx(share, rel=1e-3)
    assert [r["name"].startswith(made.family.layers + ".1.") for r in applied.method.layers[1:]] == [True] * 6
    now = logits(made, family)
    assert float((now - dense).abs().max()) > 0
    again = tiny.reload(made, tmp_path / "out")
    torch.testing.assert_close(logits(again, family), now, rtol=0, atol=TOLERANCE)
    assert isinstance(again.model.get_submodule(name), LowRankEmbedding)
    only = contexts.applied(
        lowrank,
        context_of(tiny.checkpoint(family), tmp_path, rank=13, include=("embeddings",), exclude=("*",)),
    )
    assert [r["name"] for r in only.method.layers] == [name]
    with pytest.raises(UsageError, match="factorised already"):
        lowrank.prepare(context_of(made, tmp_path, include=("embeddings",)))


def test_one_right_factor_for_query_key_and_value(tmp_path: Path) -> None:
    made = tiny.checkpoint()
    applied = contexts.applied(
        lowrank, context_of(made, tmp_path, rank=20, settings={"share_right": "true"}, method="whitening")
    )
    attention = made.model.get_submodule("bert.encoder.layer.0.attention.self")
    assert attention.query.first is attention.key.first is attention.value.first
    row = applied.method.layers[0]
    # Three 32 x 32 stacked break even at 24, where each alone does at 16.
    assert (row["shape"], row["rank"], row["break_even"]) == ([96, 32], 20, 24)
    assert row["with"] == [f"bert.encoder.layer.0.attention.self.{part}" for part in ("key", "value")]
    assert row["parameters_after"] == 20 * (32 + 96) + 96
    now = logits(made, "bert")
    again = tiny.reload(made, tmp_path / "out")
    torch.testing.assert_close(logits(again, "bert"), now, rtol=0, atol=TOLERANCE)
    back = again.model.get_submodule("bert.encoder.layer.1.attention.self")
    assert back.query.first is back.key.first is back.value.first
    assert sum(p.numel() for p in again.model.parameters()) == sum(p.numel() for p in made.model.parameters())


def test_rank_by_evbmf_is_that_of_the_matrix(tmp_path: Path) -> None:
    made = tiny.checkpoint()
    layers = encoder_linears(made.model, made.family)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in layers.values():  # three directions that stand out of noise
            parts = torch.randn(layer.out_features, 3), torch.randn(3, layer.in_features)
            layer.weight.copy_(parts[0] @ parts[1] + 0.1 * torch.randn_like(layer.weight))
    applied = contexts.applied(lowrank, context_of(made, tmp_path, rank="evbmf"))
    assert {row["rank"] for row in applied.method.layers} == {3}


def test_merge_multiplies_back_what_does_not_pay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny.checkpoint()
    contexts.applied(lowrank, context_of(made, tmp_path, rank=5))
    factorised = logits(made, "bert")
    log = [t.model_copy(deep=True) for t in made.log.transforms]
    # Slow factors only in layers of 48: 32 x 32 at rank 5 are smaller and faster.
    clock = {48: (2.0, 1.0), 32: (1.0, 2.0)}
    monkeypatch.setattr(
        merging.Clock,
        "product",
        lambda self, outputs, inputs, rank: clock[max(outputs, inputs)][rank is None],
    )
    applied = contexts.applied(lowrank, context_of(made, tmp_path, merge=True))
    merged = {row["name"] for row in applied.method.layers if row["merged"]}
    assert len(merged) == applied.method.detail["merged"] == 4
    assert all("attention" not in name for name in merged)
    assert set(made.log.transforms[0].ranks) == set(log[0].ranks) - merged
    now = logits(made, "bert")
    torch.testing.assert_close(now, factorised, rtol=0, atol=TOLERANCE)
    again = tiny.reload(made, tmp_path / "out")
    torch.testing.assert_close(logits(again, "bert"), now, rtol=0, atol=TOLERANCE)
    clock[32] = (2.0, 1.0)
    contexts.applied(lowrank, context_of(made, tmp_path, merge=True))
    assert made.log.transforms == []  # plain transformers can load it again
    assert made.model.get_submodule("bert.encoder.layer.0.attention.self.query").weight.shape == (32, 32)
    with pytest.raises(UsageError, match="no factors"):
        contexts.applied(lowrank, context_of(made, tmp_path, merge=True))


def test_factors_that_grew_by_pruning_are_merged_because_they_are_larger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny.checkpoint()
    contexts.applied(lowrank, context_of(made, tmp_path, rank=15))
    cut = Cut(neurons={0: list(range(8))})
    transforms.apply(made.model, cut)
    made.log.transforms.append(cut)
    monkeypatch.setattr(merging.Clock, "product", lambda self, outputs, inputs, rank: 1.0)
    before = logits(made, "bert")
    applied = contexts.applied(lowrank, context_of(made, tmp_path, merge=True))
    merged = {row["name"] for row in applied.method.layers if row["merged"]}
    assert merged == {f"bert.encoder.layer.0.{part}.dense" for part in ("intermediate", "output")}
    assert applied.method.detail["parameters_after"] < applied.method.detail["parameters_before"]
    torch.testing.assert_close(logits(made, "bert"), before, rtol=0, atol=TOLERANCE)
    again = tiny.reload(made, tmp_path / "out")
    torch.testing.assert_close(logits(again, "bert"), before, rtol=0, atol=TOLERANCE)


def with_drop(context: Context, max_drop: float) -> Context:
    common = context.request.common.model_copy(update={"gates": Gates(max_drop=max_drop)})
    context.request = dataclasses.replace(context.request, common=common)
    return context


def test_max_drop_searches_the_smallest_budget_that_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny.checkpoint()
    whole = sum(layer.weight.numel() for layer in encoder_linears(made.model, made.family).values())

    def accuracy(context: Context, rows) -> float:
        """0.9 of a dense model, and a point less for every tenth that is missing."""
        kept = sum(
            p.numel()
            for name, p in context.checkpoint.model.named_parameters()
            if ".layer." in name and p.ndim == 2
        )
        return 0.9 - 0.1 * (1 - kept / whole)

    monkeypatch.setattr(calibration, "score", accuracy)
    applied = contexts.applied(lowrank, with_drop(context_of(made, tmp_path), 0.05))
    assert applied.method.params["max_drop"] == 0.05
    steps = applied.method.detail["search"]["steps"]
    kept = [step["budget"] for step in steps if step["kept"]]
    lost = [step["budget"] for step in steps if not step["kept"]]
    assert min(kept) > max(lost)
    assert accuracy(context_of(made, tmp_path), None) >= 0.85
    assert applied.method.detail["parameters_kept"] == pytest.approx(min(kept), abs=0.05)
    # Half is allowed to go, and six halvings of 0.9 leave 0.03.
    assert 0.45 < min(kept) < 0.56


def test_max_drop_that_nothing_keeps_leaves_the_model_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny.checkpoint()
    before = logits(made, "bert")
    answers = iter([0.9, 0.5])
    monkeypatch.setattr(calibration, "score", lambda context, rows: next(answers))
    applied = contexts.applied(lowrank, with_drop(context_of(made, tmp_path), 0.01))
    assert [w.code for w in applied.warnings] == ["nothing-factorised"]
    assert "no budget below 1 keeps the accuracy within 0.01" in applied.warnings[0].message
    assert torch.equal(logits(made, "bert"), before)
    assert made.log.transforms == []


WHOLE = 20.0  # milliseconds of the model on the machine that the tests imagine, of which 12 are products


def pair_ms(rank: int | None) -> float:
    """Slower than the matrix from rank 10 on."""
    return 1.0 if rank is None else 0.2 + 0.08 * rank


def speed_of(made, gain: float = 1.0) -> Speed:
    """On a machine on which ``gain`` of what the clock says is saved in the finished graph."""
    pairs = [m for m in made.model.modules() if isinstance(m, LowRankLinear)]
    return Speed(WHOLE / (WHOLE - gain * sum(1.0 - pair_ms(pair.rank) for pair in pairs)), 0.01)


@pytest.fixture
def imagined(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = matrices.Clock
    monkeypatch.setattr(clock, "model", lambda self, context: WHOLE)
    monkeypatch.setattr(clock, "product", lambda self, outputs, inputs, rank: pair_ms(rank))


def finished(monkeypatch: pytest.MonkeyPatch, measure) -> None:
    monkeypatch.setattr(speedup, "against_input", lambda context, made: measure(made))


@pytest.mark.usefixtures("imagined")
def test_a_target_speedup_that_the_finished_graph_has_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(monkeypatch, speed_of)
    made = tiny.checkpoint()
    applied = contexts.applied(lowrank, context_of(made, tmp_path, target_speedup=1.25))
    found = applied.method.detail["target_speedup"]
    assert found["latency"] == {"model_ms": 20, "layers_ms": 12}
    spent = sum(row["latency_after_ms"] for row in applied.method.layers)
    assert 7.5 < spent <= 8  # 20 / 1.25 - (20 - 12)
    assert found["predicted"] == pytest.approx(20 / (8 + spent))
    assert found["measured"] == pytest.approx(found["predicted"])
    assert len(found["tries"]) == 1
    assert all(row["rank"] is None or row["rank"] < 10 for row in applied.method.layers)
    assert applied.warnings == []
    ranks = {row["name"]: row["rank"] for row in applied.method.layers if not row["kept_dense"]}
    assert made.log.transforms == [Factorise(ranks=ranks)]


@pytest.mark.usefixtures("imagined")
@pytest.mark.parametrize("gain", [0.8, 1.4])
def test_a_target_speedup_is_corrected_by_the_finished_graph(
    gain: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def measure(made) -> Speed:
        seen.append({n: m.rank for n, m in made.model.named_modules() if isinstance(m, LowRankLinear)})
        return speed_of(made, gain)

    finished(monkeypatch, measure)
    made = tiny.checkpoint()
    applied = contexts.applied(lowrank, context_of(made, tmp_path, target_speedup=1.35))
    found = applied.method.detail["target_speedup"]
    first, last = found["tries"][0], found["tries"][-1]
    assert (first["measured"] < 1.32) == (gain < 1)
    assert 1.32 <= last["measured"] <= 1.35 * 1.1 + 0.01
    assert (first["predicted"] < last["predicted"]) == (gain < 1)
    assert 1 < len(seen) == len(found["tries"]) <= speedup.ROUNDS
    # Every try starts from the dense model, and what is kept is what was measured.
    assert seen[-1] == {r["name"]: r["rank"] for r in applied.method.layers if not r["kept_dense"]}
    assert speed_of(made, gain).value == pytest.approx(found["measured"])
    assert applied.warnings == []


@pytest.mark.usefixtures("imagined")
def test_a_target_speedup_out_of_reach_is_refused_with_the_fastest_or_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(monkeypatch, speed_of)
    # 12 pairs of rank 1 save 0.72 ms each.
    with pytest.raises(
        UsageError, match=r"--target-speedup 3 cannot be met: .* 1\.76 times as fast, .* the most"
    ):
        contexts.applied(lowrank, context_of(tiny.checkpoint(), tmp_path, target_speedup=3.0))
    finished(monkeypatch, lambda made: Speed(1.03, 0.0))
    stubborn = contexts.applied(lowrank, context_of(tiny.checkpoint(), tmp_path, target_speedup=1.08))
    assert [w.code for w in stubborn.warnings] == ["speedup-missed"]
    assert len(stubborn.method.detail["target_speedup"]["tries"]) == speedup.ROUNDS
    monkeypatch.setattr(matrices.Clock, "product", lambda self, outputs, inputs, rank: 1.0 + (rank or 0))
    with pytest.raises(
        UsageError, match="no factors are faster here than the layer they replace, so 1 is the most"
    ):
        contexts.applied(lowrank, context_of(tiny.checkpoint(), tmp_path, target_speedup=1.2))


@pytest.mark.usefixtures("imagined")
def test_of_those_that_meet_a_target_speedup_the_slowest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([Speed(1.9, 0.0), Speed(1.1, 0.0), Speed(1.4, 0.0)])
    finished(monkeypatch, lambda made: next(answers))
    applied = contexts.applied(lowrank, context_of(tiny.checkpoint(), tmp_path, target_speedup=1.25))
    assert applied.method.detail["target_speedup"]["measured"] == 1.4


@pytest.mark.usefixtures("imagined")
def test_a_resumed_recovery_belongs_to_the_ranks_that_were_measured_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.saved(tmp_path / "m")
    options = {"target_speedup": 1.25, "epochs": 1, "batch_size": 16}
    finished(monkeypatch, speed_of)
    first = contexts.applied(lowrank, context_of(checkpoints.load(tmp_path / "m"), tmp_path, **options))

    def broken(made) -> Speed:
        raise AssertionError("the speed is known")

    finished(monkeypatch, broken)
    context = context_of(checkpoints.load(tmp_path / "m"), tmp_path, **options)
    common = context.request.common.model_copy(update={"resume": True})
    context.request = dataclasses.replace(context.request, common=common)
    later = contexts.applied(lowrank, context)
    assert without_clock(later.method) == without_clock(first.method)
    assert later.method.detail["target_speedup"] == first.method.detail["target_speedup"]


def test_a_target_speedup_is_for_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(UsageError, match="several processes would disturb"):
        lowrank.prepare(context_of(tiny.checkpoint(), tmp_path, target_speedup=2.0))


def test_thin_products_that_are_slower_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        matrices.Clock, "product", lambda self, outputs, inputs, rank: 1.0 if rank is None else 2.0
    )
    applied = contexts.applied(lowrank, context_of(tiny.checkpoint(), tmp_path, rank=5))
    assert [w.code for w in applied.warnings] == ["thin-products"]
    assert applied.warnings[0].message.startswith("12 of 12 factor pairs are slower")


def test_long_texts_give_fewer_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MOST_TOKENS", 100)
    applied = contexts.applied(lowrank, context_of(tiny.checkpoint(), tmp_path, rank=5))
    assert 80 < applied.method.detail["tokens"] <= 100


def test_layers_and_features_dropped_from_a_factorised_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names in the log are those of their time; a shared right factor is cut once, a table by its map."""
    made = tiny.checkpoint()
    options = {"rank": 12, "include": ("embeddings",), "settings": {"share_right": "true"}}
    contexts.applied(lowrank, context_of(made, tmp_path, method="whitening", **options))
    for cut in (Layers(keep=[1]), Width(keep=[i for i in range(32) if i % 4])):
        transforms.apply(made.model, cut)
        made.log.transforms.append(cut)
    now = logits(made, "bert")
    again = tiny.reload(made, tmp_path / "out")
    torch.testing.assert_close(logits(again, "bert"), now, rtol=0, atol=TOLERANCE)
    attention = again.model.get_submodule("bert.encoder.layer.0.attention.self")
    assert attention.query.first is attention.value.first
    assert attention.query.first.in_features == 24
    monkeypatch.setattr(
        merging.Clock, "product", lambda self, outputs, inputs, rank: 1.0 if rank is None else 2.0
    )
    contexts.applied(lowrank, context_of(again, tmp_path, merge=True))
    merged = tiny.reload(again, tmp_path / "merged")
    torch.testing.assert_close(logits(merged, "bert"), now, rtol=0, atol=TOLERANCE)
    assert isinstance(merged.model.get_submodule("bert.encoder.layer.0.attention.self.key"), torch.nn.Linear)
