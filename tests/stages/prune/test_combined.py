"""Vocabulary, layers and width, alone and together: what goes, what is reported, what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from kdcli.errors import InputError, UsageError
from kdcli.families import stack
from kdcli.inputs.splits import Splits
from kdcli.models import checkpoint as checkpoints
from kdcli.models.checkpoint import Checkpoint, fresh
from kdcli.models.small import StaticConfig
from kdcli.models.transforms import TransformLog
from kdcli.progress import Progress
from kdcli.request import Common, Request
from kdcli.run import dry_run, life
from kdcli.stages.prune import options as base
from kdcli.stages.prune import stage as prune
from kdcli.stages.prune.budget import layer_macs, macs_at_width
from kdcli.stages.prune.options import PruneOptions
from tests import tiny
from tests.stages import contexts
from tests.stages.contexts import rows
from tests.stages.prune.test_stage import context_of, logits


def without(texts, words: set[str]):
    """The same texts without some words, so that a vocabulary has something to lose."""
    kept = [" ".join(w for w in text.split() if w not in words) or "the" for text in texts.first]
    return replace(texts, first=kept)


def vocab_context(made, work: Path, **options):
    gone = {"great", "awful", "music", "scene"}
    context = context_of(made, work, **options)
    splits = {
        "train": without(rows(64, 1), gone),
        "validation": without(rows(24, 2), gone),
        "test": rows(40, 3),
    }
    context.dataset = replace(context.dataset, splits=splits)
    context.encoded = Splits(context.dataset, made)
    return context, gone


def test_parts_are_put_in_order() -> None:
    assert base.parts_of("neurons+layers+heads") == ("layers", "heads+neurons")
    assert base.parts_of("heads+width+vocab") == ("vocab", "width", "heads")
    assert base.parts_of("vocab") == ("vocab",)
    for wrong, message in (
        ("layer", "did you mean 'layers'"),
        ("layers+weights", "unknown"),
        ("heads+heads", "twice"),
    ):
        with pytest.raises(UsageError, match=message):
            base.parts_of(wrong)


@pytest.mark.parametrize(("sparsity", "left"), [(0.0, 6), (0.5, 3), (0.3, 4), (0.99, 1), (None, 4)])
def test_sparsity_of_layers_is_their_share(sparsity: float | None, left: int, tmp_path: Path) -> None:
    made = tiny.checkpoint(layers=6)
    before = logits(made.model, "bert")
    applied = contexts.applied(
        prune, context_of(made, tmp_path, structure="layers", sparsity=sparsity, settings={"samples": "16"})
    )
    detail = applied.method.detail["parts"]["layers"]
    assert detail["layers_after"] == left == len(stack.encoder_layers(made.model, made.family))
    assert applied.method.detail["encoder_macs_kept"] == pytest.approx(left / 6)
    assert torch.equal(logits(made.model, "bert"), before) == (left == 6)
    gone = [row["layer"] for row in applied.method.layers if not row["macs_after"]]
    assert gone == [i for i in range(6) if i not in detail["kept"]]
    assert sorted(step["dropped"] for step in detail["steps"]) == gone
    assert torch.equal(logits(tiny.reload(made, tmp_path / "out").model, "bert"), logits(made.model, "bert"))


def test_budget_of_layers_counts_macs_of_uneven_layers(tmp_path: Path) -> None:
    made = tiny.checkpoint(layers=4)
    stack.encoder_layers(made.model, made.family)[1].keep_neurons(range(4))
    detail = contexts.applied(prune, context_of(made, tmp_path, structure="layers", budget=0.6)).method.detail
    assert detail["encoder_macs_kept"] <= 0.6
    assert detail["parts"]["layers"]["layers_after"] >= 2
    with pytest.raises(UsageError, match="one of 4 has to stay"):
        contexts.applied(
            prune, context_of(tiny.checkpoint(layers=4), tmp_path, structure="layers", budget=0.2)
        )


def test_layers_by_list_and_preset(tmp_path: Path) -> None:
    for settings, kept in (({"keep": "0,2,3"}, [0, 2, 3]), ({"preset": "top", "keep_layers": "2"}, [2, 3])):
        made = tiny.checkpoint(layers=4)
        options = {"structure": "layers", "method": "layer-preset", "settings": settings}
        applied = contexts.applied(prune, context_of(made, tmp_path, **options))
        assert applied.method.detail["parts"]["layers"]["kept"] == kept
        assert applied.method.params.items() >= settings.items() - {("keep_layers", "2")}
    with pytest.raises(UsageError, match="has 4 layers"):
        contexts.applied(
            prune,
            context_of(
                tiny.checkpoint(layers=4), tmp_path, structure="layers", settings={"keep_layers": "5"}
            ),
        )


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"sparsity": 0.5}, 16),
        ({"sparsity": 0.0}, 32),
        ({"sparsity": 0.99}, 8),
        ({"settings": {"width": "20"}}, 20),
        ({"budget": 1.0}, 32),
    ],
)
def test_width_is_cut_in_eights(options: dict, left: int, tmp_path: Path) -> None:
    made = tiny.checkpoint()
    applied = contexts.applied(prune, context_of(made, tmp_path, structure="width", **options))
    assert stack.width_of(made.model, made.family) == left
    assert applied.method.detail["parts"]["width"]["width_after"] == left
    assert [w.code for w in applied.warnings] == (["width-untrained"] if left < 32 else [])


def test_budget_of_width_is_met_by_the_widest_that_fits(tmp_path: Path) -> None:
    made = tiny.checkpoint(hidden=64)
    layers = stack.encoder_layers(made.model, made.family)
    tokens = 7.5
    expected = {w: macs_at_width(layers, tokens, w) for w in (64, 40)}
    assert expected[64] == sum(layer_macs(x, tokens) for x in layers)
    applied = contexts.applied(prune, context_of(made, tmp_path, structure="width", budget=0.7))
    assert expected[40] != expected[64]
    kept = applied.method.detail["encoder_macs_kept"]
    assert 0.7 - 8 / 64 < kept <= 0.7
    stack.keep_features(made.model, made.family, range(40))
    assert sum(layer_macs(x, tokens) for x in layers) == pytest.approx(expected[40])
    with pytest.raises(UsageError, match="cannot be met by width"):
        contexts.applied(prune, context_of(tiny.checkpoint(), tmp_path, structure="width", budget=0.05))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_unused_tokens_go_and_the_data_is_read_again(family: str, tmp_path: Path) -> None:
    made = tiny.checkpoint(family)
    context, gone = vocab_context(made, tmp_path, structure="vocab")
    given, before = context.checkpoint, len(made.tokenizer)
    used = set(given.tokenizer.get_vocab()) - gone
    train = context.encoded["train"]
    applied = contexts.applied(prune, context)
    after = applied.checkpoint
    assert after is context.checkpoint
    assert after.tokenizer is not given.tokenizer
    assert set(after.tokenizer.get_vocab()) == used  # every other word occurs
    detail = applied.method.detail["parts"]["vocab"]
    assert (detail["tokens_before"], detail["tokens_after"]) == (before, before - len(gone))
    assert after.config.vocab_size == before - len(gone)
    assert detail["split"] == "test"
    assert detail["unknown_share_before"] == 0
    words = [text.split() for text in context.dataset.splits["test"].first]
    assert detail["unknown_share_after"] == pytest.approx(
        sum(w in gone for row in words for w in row) / sum(map(len, words))
    )
    assert detail["rows_tokenised_differently"] == sum(any(w in gone for w in row) for row in words)
    assert [w.code for w in applied.warnings] == ["unknown-tokens"]
    again = context.encoded["train"]
    names = given.tokenizer.convert_ids_to_tokens(train.ids.tolist())
    assert after.tokenizer.convert_ids_to_tokens(again.ids.tolist()) == names
    # The same answers for the training rows, read by either tokenizer.
    plain = tiny.checkpoint(family)
    with torch.no_grad():
        for i in range(3):
            old, new = (torch.from_numpy(x.take([i]).ids.astype(np.int64))[None] for x in (train, again))
            assert torch.equal(plain.model(input_ids=old).logits, after.model(input_ids=new).logits)


def test_further_texts_and_a_higher_count(tmp_path: Path) -> None:
    file = tmp_path / "more.txt"
    file.write_text("a great scene\nthe great music\n", encoding="utf-8")
    sizes = []
    for settings in ({"vocab_text": str(file)}, {"vocab_text": str(file), "min_count": "2"}, {}):
        made = tiny.checkpoint()
        context, _ = vocab_context(made, tmp_path, structure="vocab", settings=settings)
        contexts.applied(prune, context)
        words = set(context.checkpoint.tokenizer.get_vocab())
        sizes.append([w in words for w in ("great", "scene", "awful")])
    assert sizes == [[True, True, False], [True, False, False], [False, False, False]]


def static() -> Checkpoint:
    tok = tiny.tokenizer()
    config = StaticConfig(num_labels=2, hidden_size=16, intermediate_size=8, vocab_size=len(tok) + 2)
    return Checkpoint(fresh(config).eval(), tok, list(tiny.LABELS), TransformLog(), Path("/nonexistent"))


def test_a_student_that_is_no_transformer_loses_tokens_but_nothing_else(tmp_path: Path) -> None:
    made = static()
    context, gone = vocab_context(made, tmp_path, structure="vocab")
    prune.prepare(context)
    applied = contexts.applied(prune, context)
    detail = applied.method.detail["parts"]["vocab"]
    assert detail["tokens_before"] - detail["tokens_after"] == len(gone)
    assert detail["table_values_after"] == 16 * detail["tokens_after"]
    assert applied.method.layers == []
    assert "encoder_macs_kept" not in applied.method.detail
    context, _ = vocab_context(made, tmp_path, structure="vocab+layers", settings={"keep_layers": "1"})
    with pytest.raises(InputError, match="no heads, neurons") as caught:
        prune.prepare(context)
    assert "--structure vocab" in str(caught.value.hint)


def test_everything_at_once_under_one_budget(tmp_path: Path) -> None:
    made = tiny.checkpoint(layers=4)
    settings = {"keep_layers": "3", "width": "24", "taylor.samples": "32", "steps": "2"}
    context, _ = vocab_context(
        made,
        tmp_path,
        structure="neurons+vocab+layers+width+heads",
        method="taylor",
        budget=0.3,
        settings=settings,
    )
    applied = contexts.applied(prune, context)
    method = applied.method
    assert method.name == "token-count+layer-kl+width-energy+taylor"
    assert list(method.detail["parts"]) == ["vocab", "layers", "width", "heads+neurons"]
    assert [t.op for t in applied.checkpoint.log.transforms] == ["vocab", "layers", "width", "cut"]
    layers = stack.encoder_layers(made.model, made.family)
    assert len(layers) == 3
    assert stack.width_of(made.model, made.family) == 24
    # The budget is a share of the model as it came: one head is 2 % of it.
    assert 0.3 - 0.03 < method.detail["encoder_macs_kept"] <= 0.3
    assert method.detail["encoder_macs_after"] == pytest.approx(
        sum(r["macs_after"] for r in method.layers), abs=4
    )
    assert method.params["structure"] == "vocab+layers+width+heads+neurons"
    assert method.params["taylor.samples"] == 32
    assert method.params["layer-kl.samples"] == 512
    given = applied.checkpoint
    again = tiny.reload(given, tmp_path / "out")
    inputs = given.tokenizer(["good film", "a bad and boring story"], padding=True, return_tensors="pt")
    with torch.no_grad():
        pair = [
            m.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            for m in (given, again)
        ]
    assert torch.equal(*pair)


def test_a_budget_that_layers_alone_have_met_takes_no_head(tmp_path: Path) -> None:
    made = tiny.checkpoint(layers=4)
    applied = contexts.applied(
        prune,
        context_of(
            made, tmp_path, structure="layers+heads+neurons", budget=0.5, settings={"keep_layers": "2"}
        ),
    )
    assert [w.code for w in applied.warnings] == ["budget-met"]
    assert all(x.heads == 4 and x.neurons == 48 for x in stack.encoder_layers(made.model, made.family))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "layer+heads"}, "did you mean 'layers'"),
        ({"structure": "vocab", "sparsity": 0.5}, "nothing to go to"),
        ({"structure": "layers", "budget": 0.5, "settings": {"keep_layers": "2"}}, "says it already"),
        ({"structure": "layers+width", "sparsity": 0.5}, "add --set keep_layers=N|add --set width=N"),
        ({"structure": "width+heads", "sparsity": 0.5}, "the width goes"),
        ({"structure": "layers", "method": "taylor"}, "use layer-kl or layer-preset"),
        ({"structure": "layers", "method": "layer-kill"}, "did you mean 'layer-kl'"),
        ({"structure": "layers", "settings": {"preset": "top"}}, "unknown setting 'preset'"),
        ({"structure": "layers", "settings": {"taylor.samples": "8"}}, "unknown setting"),
        ({"structure": "layers", "sparsity": 1.0}, "below 1"),
        ({"structure": "layers", "budget": 0.0}, "above 0"),
        ({"structure": "layers", "sparsity": 0.5, "budget": 0.5}, "give one of them"),
        ({"structure": "layers", "epochs": -1}, "at least 0"),
        ({"structure": "layers", "schedule": "gradual", "epochs": 1}, "alone"),
        (
            {"structure": "layers+heads", "schedule": "gradually", "settings": {"keep_layers": "1"}},
            "schedule",
        ),
        ({"structure": "layers", "target_speedup": 2.0}, "heads and neurons alone"),
        ({"structure": "vocab", "settings": {"min_count": "0"}}, "min_count=0"),
        ({"structure": "vocab", "settings": {"vocab_text": "/nowhere"}}, "no such file"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(
    options: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        prune.prepare(context_of(tiny.checkpoint(layers=3), tmp_path, **options))
    assert re.search(message, f"{caught.value}; {caught.value.hint}")


def test_recovery_asks_the_dense_model_in_its_own_tokens(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "cache"))
    seen = []
    from kdcli.training import teacher

    def outputs(dense, train, **_):
        seen.append(dense.tokenizer.convert_ids_to_tokens(train.ids.tolist()))
        assert len(dense.tokenizer) == dense.config.vocab_size
        return real(dense, train, **_)

    real = teacher.outputs
    monkeypatch.setattr(teacher, "outputs", outputs)
    made = checkpoints.load(tiny.saved(tmp_path / "model"))
    context, _ = vocab_context(made, tmp_path, structure="vocab", epochs=1, lr=1e-3)
    expected = made.tokenizer.convert_ids_to_tokens(context.encoded["train"].ids.tolist())
    applied = contexts.applied(prune, context)
    assert seen == [expected]
    assert applied.method.detail["recovery"]["epochs"] == 1


def data_with_rare_words(place: Path) -> Path:
    """Rows whose test split has two words that the others lack."""
    tiny.write_data(place)
    for split in ("train", "validation"):
        file = place / f"{split}.csv"
        file.write_text(file.read_text().replace("music", "plot").replace("great", "good"), encoding="utf-8")
    return place


def run(model: Path, data: Path, out: Path, settings: dict | None = None, **options) -> dict:
    request = Request(
        stage="prune",
        model=str(model),
        options=PruneOptions(**options),
        common=Common(out=out, data=str(data), settings=settings or {}),
    )
    assert "token-count" in str(dry_run.plan(request, Progress()))
    assert life.run(request, Progress()) is not None
    return json.loads((out / "report.json").read_text())


def accuracy(out: Path, data: Path) -> float:
    """By onnxruntime and the tokenizer alone."""
    tok = Tokenizer.from_file(str(out / "tokenizer.json"))
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    names = json.loads((out / "config.json").read_text())["id2label"]
    lines = (data / "test.csv").read_text().splitlines()[1:]
    right = 0
    for sentence, label in (line.rsplit(",", 1) for line in lines):
        e = tok.encode(sentence)
        given = {"input_ids": [e.ids], "attention_mask": [e.attention_mask], "token_type_ids": [e.type_ids]}
        got = session.run(None, {x.name: np.array(given[x.name]) for x in session.get_inputs()})[0]
        right += names[str(int(got[0].argmax()))] == label
    return right / len(lines)


def test_the_stage_measures_and_ships_the_cut_vocabulary(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "cache"))
    out, data = tmp_path / "out", data_with_rare_words(tmp_path / "data")
    model = tiny.saved(tmp_path / "model", layers=3)
    report = run(model, data, out, {"keep_layers": "2"}, structure="vocab+layers")
    detail = report["method"]["detail"]["parts"]["vocab"]
    assert detail["tokens_after"] == detail["tokens_before"] - 2
    assert detail["rows_tokenised_differently"] > 0
    assert report["parity"]["passed"]
    # The report counts what anybody with the directory counts.
    assert report["after"]["quality"]["accuracy"]["value"] == pytest.approx(accuracy(out, data))
    plain = AutoModelForSequenceClassification.from_pretrained(out).eval()
    tok, made = AutoTokenizer.from_pretrained(out), checkpoints.load(out)
    given = tok(["good film", "great music"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(plain(**given).logits, made.model(**given).logits, atol=1e-5)


def test_a_static_student_is_pruned_and_trained(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KDCLI_CACHE", str(tmp_path / "cache"))
    out, data, model = tmp_path / "out", data_with_rare_words(tmp_path / "data"), tmp_path / "model"
    made = static()
    model.mkdir()
    checkpoints.save(made, model)
    report = run(model, data, out, structure="vocab", epochs=1, lr=1e-3)
    assert report["method"]["detail"]["recovery"]["epochs"] == 1
    assert report["method"]["layers"] == []
    assert report["after"]["size"]["parameters"] < report["before"]["size"]["parameters"]
    assert report["after"]["quality"]["accuracy"]["value"] == pytest.approx(accuracy(out, data))
    assert len(checkpoints.load(out).tokenizer) == len(made.tokenizer) - 2
