"""The lowrank stage on tiny models: what it factorises, what it reports, what it refuses."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from kdcli.data import text
from kdcli.data.sources import Dataset, Rows
from kdcli.errors import UsageError
from kdcli.methods import rank_budget
from kdcli.models import checkpoint as checkpoints
from kdcli.models import transforms
from kdcli.models.families import encoder_linears
from kdcli.models.layers import LowRankLinear
from kdcli.models.transforms import Cut, Factorise
from kdcli.progress import Progress
from kdcli.stages import lowrank
from kdcli.stages.base import Common, LowRankOptions, Request
from kdcli.stages.context import Context
from tests import tiny

# float32 sums in another order; logits are of order 1.
TOLERANCE = 1e-5


def rows(count: int, seed: int) -> Rows:
    rng = random.Random(seed)
    texts = [tiny.sentence(rng, i % 2 == 1) for i in range(count)]
    return Rows(texts, None, [tiny.LABELS[i % 2] for i in range(count)])


def context_of(made, work: Path, *, settings=None, seed: int = 0, **options) -> Context:
    splits = {"train": rows(80, 1), "validation": rows(16, 2)}
    index = {name: i for i, name in enumerate(made.labels)}
    return Context(
        request=Request(
            stage="lowrank",
            model="m",
            options=LowRankOptions(**options),
            common=Common(seed=seed, settings=settings or {}),
        ),
        checkpoint=made,
        dataset=Dataset("tiny", splits, "0" * 64, list(tiny.LABELS)),
        encoded={n: text.encode(s, made.tokenizer, made.max_length, index) for n, s in splits.items()},
        device=torch.device("cpu"),
        seed=seed,
        progress=Progress(),
        resume_dir=work / "resume",
    )


def logits(made, family: str) -> torch.Tensor:
    with torch.no_grad():
        return made.model(**tiny.batch(family, rows=20)).logits


def check_table(applied, budget: float | None = None) -> None:
    """What the table says is what the model is, and what was predicted is what was measured."""
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
            assert row["error_measured"] == pytest.approx(row["error_predicted"], rel=1e-3, abs=1e-6)
    detail = applied.method.detail
    for key in ("parameters_before", "parameters_after"):
        assert detail[key] == sum(row[key] for row in applied.method.layers)
    if budget is not None:
        assert budget * 0.9 < detail["parameters_kept"] <= budget


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_budget_on_every_family_and_back_from_disk(family: str, tmp_path: Path) -> None:
    made = tiny.checkpoint(family)
    names, dense = list(encoder_linears(made.model, made.family)), logits(made, family)
    applied = lowrank.apply(context_of(made, tmp_path, budget=0.7))
    check_table(applied, 0.7)
    assert [row["name"] for row in applied.method.layers] == names
    assert applied.warnings == []
    ranks = {row["name"]: row["rank"] for row in applied.method.layers if not row["kept_dense"]}
    assert made.log.transforms == [Factorise(ranks=ranks)]
    allocation = applied.method.detail["allocation"]
    assert (
        allocation["kl"][allocation["chosen"]] == min(allocation["kl"].values()) <= allocation["kl"]["even"]
    )
    assert allocation["held_rows"] == 20
    now = logits(made, family)
    assert float((now - dense).abs().max()) > 0
    again = tiny.reload(made, tmp_path / "out")
    torch.testing.assert_close(logits(again, family), now, rtol=0, atol=TOLERANCE)


def test_a_nearly_whole_budget_changes_little_and_more_budget_is_closer(tmp_path: Path) -> None:
    dense = logits(tiny.checkpoint(), "bert").log_softmax(-1)
    distances = []
    for budget in (0.3, 0.6, 0.97):
        made = tiny.checkpoint()
        check_table(lowrank.apply(context_of(made, tmp_path, budget=budget)), budget)
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
    values = iter([0.1 if name == better else 0.2 for name in ("even", "weighted", "between")])
    monkeypatch.setattr(rank_budget, "divergence", lambda *args: next(values))
    applied = lowrank.apply(context_of(made, tmp_path, budget=0.6))
    shares["even"] = rank_budget.even(sizes, 0.6)
    assert applied.method.detail["allocation"]["chosen"] == better
    assert {row["name"]: row["rank"] for row in applied.method.layers} == shares[better]


def test_none_of_the_three_means_budget(tmp_path: Path) -> None:
    applied = lowrank.apply(context_of(tiny.checkpoint(), tmp_path))
    assert applied.method.name == "whitening"
    assert applied.method.params["budget"] == lowrank.BUDGET
    check_table(applied, lowrank.BUDGET)


def test_rank_keeps_layers_dense_from_break_even_on(tmp_path: Path) -> None:
    applied = lowrank.apply(context_of(tiny.checkpoint(), tmp_path, rank=17))
    check_table(applied)
    # 32 x 32 breaks even at 16, 48 x 32 at 19.2.
    assert {tuple(r["shape"]): r["rank"] for r in applied.method.layers} == {
        (32, 32): None,
        (48, 32): 17,
        (32, 48): 17,
    }
    assert "allocation" not in applied.method.detail


def test_energy_keeps_the_fewest_directions_with_that_share(tmp_path: Path) -> None:
    few = lowrank.apply(context_of(tiny.checkpoint(), tmp_path, energy=0.8))
    check_table(few)
    errors = [row["error_predicted"] for row in few.method.layers]
    assert any(errors)
    assert max(errors) <= 0.2
    for row in few.method.layers:
        if row["rank"] is not None and row["rank"] > 1:
            fewer = lowrank.apply(
                context_of(tiny.checkpoint(), tmp_path, rank=row["rank"] - 1, include=(row["name"],))
            )
            assert fewer.method.layers[0]["error_predicted"] > 0.2


@pytest.mark.parametrize("options", [{"energy": 1.0}, {"rank": 1000}, {"rank": 20}])
def test_nothing_worth_factorising_is_a_warning(options: dict, tmp_path: Path) -> None:
    made = tiny.checkpoint()
    before = logits(made, "bert")
    applied = lowrank.apply(context_of(made, tmp_path, epochs=1, **options))
    assert [w.code for w in applied.warnings] == ["nothing-factorised"]
    assert "no rank is below break-even" in applied.warnings[0].message
    assert made.log.transforms == []
    assert all(row["kept_dense"] for row in applied.method.layers)
    assert applied.method.detail["parameters_kept"] == 1
    assert torch.equal(logits(made, "bert"), before)


def test_include_exclude_and_a_second_pass_over_what_is_left(tmp_path: Path) -> None:
    made = tiny.checkpoint()
    first = lowrank.apply(
        context_of(
            made, tmp_path, include=("*.intermediate.*", "*.output.*"), exclude=("*attention*",), rank=9
        )
    )
    names = [row["name"] for row in first.method.layers]
    assert len(names) == 4
    assert not any("attention" in name for name in names)
    second = lowrank.apply(context_of(made, tmp_path, budget=0.6))
    check_table(second, 0.6)
    assert len(second.method.layers) == 8
    assert all("attention" in row["name"] for row in second.method.layers)
    assert [len(t.ranks) for t in made.log.transforms] == [4, second.method.detail["factorised"]]
    now = logits(made, "bert")
    again = tiny.reload(made, tmp_path / "out")
    torch.testing.assert_close(logits(again, "bert"), now, rtol=0, atol=TOLERANCE)


def test_a_model_with_nothing_left(tmp_path: Path) -> None:
    made = tiny.checkpoint()
    lowrank.apply(context_of(made, tmp_path, rank=5))
    third = lowrank.apply(context_of(made, tmp_path))
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
    applied = lowrank.apply(context_of(made, tmp_path, budget=0.6))
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
        applied = lowrank.apply(context_of(made, tmp_path, seed=seed, settings={"samples": "32"}, budget=0.6))
        assert applied.method.detail["rows"] == 32
        assert applied.method.params["samples"] == 32
        found.append((made.model.state_dict(), applied.method))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(v, found[1][0][k]) for k, v in found[0][0].items())
    assert found[2][1].layers != found[0][1].layers


def test_recovery_follows_the_surgery(tmp_path: Path) -> None:
    made = checkpoints.load(tiny.saved(tmp_path / "m"))
    applied = lowrank.apply(context_of(made, tmp_path, rank=6, epochs=1, batch_size=16))
    assert applied.method.detail["recovery"]["epochs"] == 1
    assert applied.method.params["epochs"] == 1
    assert isinstance(made.model.get_submodule("bert.encoder.layer.0.output.dense"), LowRankLinear)
    again = tiny.reload(made, tmp_path / "out")
    torch.testing.assert_close(logits(again, "bert"), logits(made, "bert"), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.5, "rank": 4}, "--budget and --rank exclude each other"),
        ({"energy": 0.5, "rank": 4}, "--energy and --rank exclude each other"),
        ({"budget": 0.0}, r"--budget 0.0 is outside \(0, 1\)"),
        ({"budget": 1.0}, r"--budget 1.0 is outside \(0, 1\)"),
        ({"budget": 0.01}, "--budget 0.01 cannot be met"),
        ({"energy": 0.0}, r"--energy 0.0 is outside \(0, 1\]"),
        ({"energy": 1.1}, r"--energy 1.1 is outside \(0, 1\]"),
        ({"budget": float("nan")}, "--budget nan is outside"),
        ({"rank": 0}, "--rank 0 is below 1"),
        ({"rank": 4, "epochs": -1}, "--epochs -1 is negative"),
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
