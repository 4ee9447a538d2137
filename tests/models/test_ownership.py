"""What is in the weights is what runs: tensors without a place, missing ones, other shapes, label names, tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdcli.errors import InputError
from kdcli.models import checkpoint, inspect
from kdcli.tasks.multi_label import MultiLabel
from tests import tiny

State = dict[str, Tensor]


def edit(
    path: Path,
    change: Callable[[State], State | None] | None = None,
    drop: tuple[str, ...] = (),
    **config: Any,
) -> Path:
    """Change the weights of a checkpoint, and settings of its config.json."""
    if change is not None:
        state = load_file(path / checkpoint.WEIGHTS)
        changed = change(state)
        contiguous = {k: v.contiguous() for k, v in (state if changed is None else changed).items()}
        save_file(contiguous, path / checkpoint.WEIGHTS, metadata={"format": "pt"})
    content = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps({k: v for k, v in content.items() if k not in drop}))
    return path


def refuse(path: Path, match: str) -> None:
    """The stages and ``inspect`` say the same."""
    said = []
    for look in (checkpoint.load, lambda p: inspect.describe(str(p))):
        with pytest.raises(InputError, match=match) as caught:
            look(path)
        assert str(caught.value).isprintable(), "a message is one line"
        said.append(str(caught.value))
    assert said[0] == said[1]


def plain(path: Path, **inputs: Tensor) -> Tensor:
    """The answers of transformers alone."""
    from transformers import AutoModelForSequenceClassification

    with checkpoint.quiet(), torch.no_grad():
        logits: Tensor = AutoModelForSequenceClassification.from_pretrained(path).eval()(**inputs).logits
    return logits


def ours(path: Path, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = checkpoint.load(path).model(**inputs).logits
    return logits


def add(**tensors: Tensor) -> Callable[[State], None]:
    return lambda state: state.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})


SOME = torch.ones(32, 32)

FOREIGN: dict[str, Callable[[State], State | None]] = {
    "relative positions": add(bert__encoder__layer__0__attention__self__distance_embedding__weight=SOME),
    "a further layer": add(extra__weight=SOME),
    "a second head": add(classifier2__weight=SOME),
    "a layer beyond config.json": add(bert__encoder__layer__2__output__dense__weight=SOME),
    "a CRF": add(crf__transitions=torch.ones(2, 2)),
    "batch norm": add(bn__running_mean=torch.ones(32)),
    "a bias nobody asked for": add(bert__scale=torch.ones(1)),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_tensor_without_a_place_is_named(tmp_path: Path, case: str) -> None:
    path = tiny.saved(tmp_path)
    before = set(load_file(path / checkpoint.WEIGHTS))
    edit(path, FOREIGN[case])
    (name,) = set(load_file(path / checkpoint.WEIGHTS)) - before
    refuse(path, f"no place for: '{name}'")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (add(bert__encoder__layer__0__output__dense__lora_A__weight=torch.ones(4, 48)), "PEFT .*lora_A"),
        (add(prefix_encoder__embedding__weight=SOME), "prompt tuning .*prefix_encoder"),
        (add(bert__encoder__layer__0__output__adapters__x__weight=SOME), "adapter library .*adapters"),
    ],
)
def test_what_tuning_methods_leave_is_told_by_name(
    tmp_path: Path, tensors: Callable[[State], None], words: str
) -> None:
    refuse(edit(tiny.saved(tmp_path), tensors), words)


HARMLESS: dict[str, tuple[str, Callable[[State], State | None]]] = {
    "position ids": ("bert", add(bert__embeddings__position_ids=torch.arange(42)[None])),
    "masked words": ("bert", add(cls__predictions__transform__dense__weight=SOME)),
    "masked words of RoBERTa": ("roberta", add(lm_head__dense__weight=SOME)),
    "masked words of DistilBERT": ("distilbert", add(vocab_transform__weight=SOME)),
    "replaced words": ("electra", add(discriminator_predictions__dense__weight=SOME)),
    "RoBERTa's pooler": ("roberta", add(roberta__pooler__dense__weight=SOME)),
    "gamma and beta": (
        "bert",
        lambda state: {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for name, t in state.items()
        },
    ),
    "bfloat16": ("bert", lambda state: {name: t.bfloat16() for name, t in state.items()}),
    "float64": ("bert", lambda state: {name: t.double() for name, t in state.items()}),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_no_classifier_reads_is_harmless(tmp_path: Path, case: str) -> None:
    family, change = HARMLESS[case]
    path = edit(tiny.saved(tmp_path, family), change)
    batch = tiny.batch(family)
    # Not more than that transformers may run other kernels without eager attention: float32 rounding.
    assert torch.allclose(ours(path, **batch), plain(path, **batch), atol=1e-5)


def test_a_pooler_that_a_class_of_the_owner_may_read_is_named(tmp_path: Path) -> None:
    path = edit(
        tiny.saved(tmp_path, "roberta"), add(roberta__pooler__dense__weight=SOME), architectures=["Mine"]
    )
    refuse(path, "no place for: 'roberta.pooler.dense.weight'")


def test_names_of_a_wrapper_are_refused(tmp_path: Path) -> None:
    for i, prefix in enumerate(("module.", "_orig_mod.", "model.")):
        path = edit(
            tiny.saved(tmp_path / str(i)),
            lambda state, p=prefix: {p + k: v for k, v in state.items()},  # type: ignore[misc]
        )
        refuse(path, f"named '{prefix}...'")


@pytest.mark.parametrize(
    "name", ["bert.pooler.dense.weight", "classifier.bias", "bert.embeddings.LayerNorm.bias"]
)
def test_a_missing_tensor_beside_a_head_is_named(tmp_path: Path, name: str) -> None:
    refuse(
        edit(tiny.saved(tmp_path), lambda state: {k: v for k, v in state.items() if k != name}),
        f"lacks '{name}'",
    )


def test_an_encoder_lacks_only_what_is_trained_anew(tmp_path: Path) -> None:
    def encoder(state: State) -> State:
        return {k: v for k, v in state.items() if not k.startswith(("classifier", "bert.pooler"))}

    path = edit(tiny.saved(tmp_path), encoder, problem_type="multi_label_classification")
    loaded = checkpoint.load(path, labels=["a", "b", "c"])
    assert not loaded.has_head
    assert loaded.labels == ["a", "b", "c"]
    assert loaded.config.num_labels == 3
    assert loaded.config.problem_type is None, "its head is trained here, to choose one label"
    layer = "bert.encoder.layer.1.output.dense.weight"
    refuse(edit(path, lambda state: {k: v for k, v in state.items() if k != layer}), f"such as '{layer}'")


def test_an_encoder_with_an_unknown_head_is_not_fine_tuned_over_it(tmp_path: Path) -> None:
    path = edit(
        tiny.saved(tmp_path),
        lambda state: {k.replace("classifier", "my_head"): v for k, v in state.items()},
    )
    refuse(path, "no place for: 'my_head.bias', 'my_head.weight'")


def test_other_shapes_are_told_with_both(tmp_path: Path) -> None:
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    cut = edit(tiny.saved(tmp_path / "a"), lambda state: state.update({name: state[name][:40]}))
    refuse(cut, rf"'{name}' .*\[40, 32\].*\[48, 32\]")
    query = "bert.encoder.layer.0.attention.self.query.weight"
    heads = edit(
        tiny.saved(tmp_path / "b"),
        lambda state: state.update({query: state[query][8:]}),
        pruned_heads={"0": [0]},
    )
    refuse(heads, "heads were cut out .pruned_heads.")


REVERSED = ["positive", "negative"]
BACK: dict[str, Any] = {
    "id2label": {"0": "positive", "1": "negative"},
    "label2id": {"positive": 0, "negative": 1},
}


@pytest.mark.parametrize(
    "architectures",
    [
        None,
        [],
        ["BertForMultiLabelSequenceClassification"],
        ["BertModel"],
        ["BertForMaskedLM", "Mine"],
        "Mine",
    ],
)
def test_labels_are_the_models_whatever_architectures_says(tmp_path: Path, architectures: Any) -> None:
    path = edit(tiny.saved(tmp_path), architectures=architectures, **BACK)
    loaded = checkpoint.load(path, labels=sorted(REVERSED))
    assert loaded.has_head
    assert loaded.labels == REVERSED
    again = tiny.reload(loaded, tmp_path / "out")
    assert again.labels == REVERSED
    own = "Mine" in str(architectures) or "MultiLabel" in str(architectures)
    assert bool(loaded.doubts) == own, "a class that transformers does not have is said"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"id2label": None, "label2id": {"positive": 0, "negative": 1}}, REVERSED),
        ({"id2label": None, "label2id": {"positive": "0", "negative": "1"}}, REVERSED),
        ({"id2label": {"0": "positive", "1": "negative"}, "label2id": None}, REVERSED),
        ({"id2label": BACK["id2label"], "label2id": {"LABEL_0": 0, "LABEL_1": 1}}, REVERSED),
        ({"id2label": BACK["id2label"], "label2id": {"NEGATIVE": 1, "POSITIVE": 0, "pos": 0}}, REVERSED),
        ({"id2label": None, "label2id": None, "num_labels": 2}, ["LABEL_0", "LABEL_1"]),
        ({"id2label": None, "label2id": None}, ["LABEL_0", "LABEL_1"]),
        ({"id2label": {"0": 0, "1": 1}, "label2id": {"0": 0, "1": 1}}, ["0", "1"]),
    ],
)
def test_label_names_in_every_spelling(tmp_path: Path, config: dict[str, Any], expected: list[str]) -> None:
    path = edit(tiny.saved(tmp_path), **config)
    loaded = checkpoint.load(path, labels=["a", "b", "c"])
    assert loaded.labels == expected
    assert loaded.has_head
    assert inspect.describe(str(path))["labels"] == expected
    assert tiny.reload(loaded, tmp_path / "out").labels == expected


def test_the_head_says_how_many_labels_there_are(tmp_path: Path) -> None:
    five = {"classifier.weight": torch.ones(5, 32), "classifier.bias": torch.zeros(5)}
    path = edit(tiny.saved(tmp_path), lambda state: state.update(five), drop=("id2label", "label2id"))
    assert checkpoint.load(path, labels=["a", "b"]).labels == [f"LABEL_{i}" for i in range(5)]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"id2label": BACK["id2label"], "label2id": {"negative": 0, "positive": 1}}, "contradict each other"),
        ({"id2label": BACK["id2label"], "label2id": {"bad": 0, "good": 1}}, "does not have it"),
        ({"id2label": None, "label2id": {"a": 0, "b": 2}}, "another number, from 0 to 1"),
        ({"id2label": None, "label2id": {"a": 0, "b": 0}}, "another number, from 0 to 1"),
        ({"id2label": None, "label2id": {"a": "zero", "b": 1}}, "the number 'zero'"),
        ({"id2label": {"0": "a", "2": "b"}, "label2id": None}, "must have the keys 0 to 1"),
        (
            {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": None},
            "3 labels, but the head has 2 outputs",
        ),
        ({"id2label": None, "label2id": None, "num_labels": 3}, "3 labels, but the head has 2 outputs"),
    ],
)
def test_label_names_that_contradict(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    refuse(edit(tiny.saved(tmp_path), **config), words)


SIGMOID = "torch.nn.modules.activation.Sigmoid"


@pytest.mark.parametrize(
    "config",
    [
        {"problem_type": "multi_label_classification"},
        {"function_to_apply": "sigmoid"},
        {"sentence_transformers": {"activation_fn": SIGMOID}},
        {"sbert_ce_default_activation_function": SIGMOID},
    ],
)
def test_a_model_that_gives_several_labels_is_recognised(tmp_path: Path, config: dict[str, Any]) -> None:
    path = edit(tiny.saved(tmp_path), **config)
    assert checkpoint.load(path).task.name == "multi-label"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"problem_type": "regression"}, "has 2 outputs with problem_type 'regression'"),
        ({"problem_type": "ranking"}, "problem_type 'ranking' in .* is unknown to kdcli"),
        ({"architectures": ["BertForTokenClassification"]}, "tags single words"),
    ],
)
def test_a_task_that_kdcli_does_not_have(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    for by_kdcli in (False, True):
        path = edit(tiny.saved(tmp_path / str(by_kdcli), by_kdcli=by_kdcli), **config)
        with pytest.raises(InputError, match=words):
            checkpoint.load(path)


def test_one_output_is_a_score(tmp_path: Path) -> None:
    one = {"classifier.weight": torch.ones(1, 32), "classifier.bias": torch.zeros(1)}
    for name, config in (
        ("named", {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}),
        ("unnamed", {"id2label": None, "label2id": None}),
        ("said", {"id2label": {"0": "LABEL_0"}, "label2id": None, "problem_type": "regression"}),
    ):
        path = edit(tiny.saved(tmp_path / name), lambda state: state.update(one), **config)
        assert checkpoint.load(path).task.name == "regression"


def test_the_task_that_was_written_is_read_again(tmp_path: Path) -> None:
    made = tiny.checkpoint()
    made.task = MultiLabel(primary="macro_f1", thresholds=(0.25, 0.75))
    again = tiny.reload(made, tmp_path / "one")
    assert again.task == made.task
    again.task = MultiLabel(thresholds=None)
    checkpoint.rewrite_task(again, tmp_path / "one")
    assert checkpoint.load(tmp_path / "one").task == MultiLabel()
    assert tiny.reload(again, tmp_path / "two").task == MultiLabel()


def test_one_label_that_is_said_to_be_chosen_stays(tmp_path: Path) -> None:
    path = edit(tiny.saved(tmp_path), problem_type="single_label_classification", function_to_apply="sigmoid")
    assert checkpoint.load(path).has_head


WEIGHT = "bert.encoder.layer.0.attention.self.query.weight"


def integers(state: State) -> None:
    state[WEIGHT] = (state[WEIGHT] * 100).round().clamp(-127, 127).to(torch.int8)


QUANTISED: dict[str, tuple[Callable[[State], State | None] | None, dict[str, Any], str]] = {
    "bitsandbytes": (integers, {"quantization_config": {"load_in_8bit": True}}, "by bitsandbytes"),
    "bitsandbytes, no table": (
        add(bert__encoder__layer__0__attention__self__query__SCB=torch.ones(32)),
        {},
        "by bitsandbytes",
    ),
    "torchao": (None, {"quantization_config": {"quant_method": "torchao"}}, "by torchao"),
    "old llm-compressor": (
        integers,
        {"compression_config": {"quant_method": "compressed-tensors"}},
        "by compressed-tensors",
    ),
    "gptq": (None, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "by GPTQ"),
    "unheard of": (None, {"quantization_config": {"quant_method": "zipq"}}, "by zipq"),
    "quanto, no table": (
        add(bert__encoder__layer__0__attention__self__query__weight___data=torch.ones(2)),
        {},
        "optimum-quanto",
    ),
    "integers, no table": (integers, {}, "stored as I8"),
    "packed": (add(bert__pooler__dense__weight=torch.ones(32, 4, dtype=torch.int32)), {}, "stored as I32"),
    "fp8": (
        lambda state: state.update({WEIGHT: state[WEIGHT].to(torch.float8_e4m3fn)}),
        {},
        "stored as F8_E4M3",
    ),
    "64 bits": (lambda state: state.update({WEIGHT: state[WEIGHT].long()}), {}, "stored as I64"),
}


@pytest.mark.parametrize("case", QUANTISED)
def test_weights_of_another_quantiser(tmp_path: Path, case: str) -> None:
    change, config, words = QUANTISED[case]
    refuse(edit(tiny.saved(tmp_path), change, **config), f"already quantised by .*{words}|{words}")


def test_files_that_a_quantiser_leaves(tmp_path: Path) -> None:
    path = tiny.saved(tmp_path)
    (path / "quantize_config.json").write_text("{}")
    refuse(path, "already quantised by GPTQ")


def test_settings_that_transformers_ignores(tmp_path: Path) -> None:
    refuse(
        edit(tiny.saved(tmp_path / "a"), position_embedding_type="relative_key"), "position_embedding_type"
    )
    refuse(edit(tiny.saved(tmp_path / "b"), pre_seq_len=20), "trained prefix")
    assert checkpoint.load(edit(tiny.saved(tmp_path / "c"), position_embedding_type="absolute")).has_head


def test_settings_of_the_form_of_outputs_change_nothing(tmp_path: Path) -> None:
    batch = tiny.batch()
    want = plain(tiny.saved(tmp_path), **batch)
    edit(tmp_path, return_dict=False, output_attentions=True, output_hidden_states=True)
    assert torch.allclose(ours(tmp_path, **batch), want, atol=1e-5)  # as above


def test_directories_of_other_libraries(tmp_path: Path) -> None:
    setfit = tiny.saved(tmp_path / "setfit")
    (setfit / "model_head.pkl").write_bytes(b"\x80")
    refuse(setfit, "SetFit model")
    adapter = tiny.saved(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").write_bytes((adapter / "model.safetensors").read_bytes())
    refuse(adapter, "adapter beside its weights")
    graph = tiny.saved(tmp_path / "graph")
    (graph / "model.safetensors").unlink()
    (graph / "onnx").mkdir()
    (graph / "onnx" / "model.onnx").write_bytes(b"x")
    refuse(graph, "ONNX graph .onnx/model.onnx., but no weights")


def test_kdclis_own_weights_are_as_strict(tmp_path: Path) -> None:
    more = edit(tiny.saved(tmp_path / "more", by_kdcli=True), add(extra__weight=SOME))
    with pytest.raises(InputError, match=r"extra\.weight"):
        checkpoint.load(more)
    rounded = edit(tiny.saved(tmp_path / "integers", by_kdcli=True), integers)
    with pytest.raises(InputError, match=f"'{WEIGHT}' holds int8"):
        checkpoint.load(rounded)


def test_an_unknown_name_in_the_configuration_is_said_with_where_to_look(tmp_path: Path) -> None:
    path = edit(tiny.saved(tmp_path), hidden_act="nosuch")
    with pytest.raises(InputError, match=r"nothing named 'nosuch'.*hidden_act"):
        checkpoint.load(path)
