"""Students without a transformer, against naive loops, against torch's own layers, and without padding."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdcli.errors import InputError, UsageError
from kdcli.export import fusion, sessions
from kdcli.export import onnx as exporter
from kdcli.inputs.feeding import model_inputs
from kdcli.inputs.text import TEXT
from kdcli.measure import compute
from kdcli.models import checkpoint as checkpoints
from kdcli.models import inspect, small, students
from kdcli.models.aliases import SMALL_STUDENTS, small_student
from kdcli.models.checkpoint import Checkpoint
from kdcli.models.transforms import TransformLog
from kdcli.stages.distill.options import STUDENT_PRESETS
from tests import tiny

WIDTH, INNER = 16, 12
WINDOWS = [1, 2, 3, 5]
# float32 sums of at most 100 terms of size 1 in another order; float64 references are as far away.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def made(kind: str, seed: int = 0, pair_token_id: int | None = None) -> Checkpoint:
    """A random model of the tiny vocabulary, every weight of a size that matters."""
    tok = tiny.tokenizer()
    torch.manual_seed(seed)
    config = small.KINDS[kind][0](
        vocab_size=len(tok),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        max_position_embeddings=40,
        pad_token_id=tok.pad_token_id,
        pair_token_id=pair_token_id,
        id2label=dict(enumerate(tiny.LABELS)),
        label2id={name: i for i, name in enumerate(tiny.LABELS)},
        **({"widths": WINDOWS} if kind == "cnn" else {}),
    )
    model = checkpoints.fresh(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return Checkpoint(model.eval(), tok, list(tiny.LABELS), TransformLog(), Path("/nonexistent"))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> np.ndarray:
    return model(input_ids=ids, attention_mask=mask).logits.numpy()


def rows(lengths: list[int], extra: int = 0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens (B, T) and their mask; what stands on padding is random too, so it must not matter."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + extra
    ids = torch.randint(0, len(tiny.tokenizer()), (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return ids, mask


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in model.named_parameters()}


def classified(model: nn.Module, pooled: np.ndarray) -> np.ndarray:
    w = weights(model)
    return pooled @ w["classifier.weight"].T + w["classifier.bias"]


@pytest.mark.parametrize("kind", SMALL_STUDENTS)
def test_padding_and_neighbours_in_the_batch_change_nothing(kind: str) -> None:
    model = made(kind).model
    lengths = [1, 2, 3, 9, 4]
    ids, mask = rows(lengths, extra=6)
    together = logits(model, ids, mask)
    for row, length in enumerate(lengths):
        alone = logits(model, ids[row : row + 1, :length])  # no mask: all tokens are real
        np.testing.assert_allclose(together[row : row + 1], alone, **CLOSE)
    assert np.ptp(together, axis=0).min() > 0.1  # the rows do differ


@pytest.mark.parametrize("kind", SMALL_STUDENTS)
def test_rows_of_special_tokens_alone_have_an_answer(kind: str) -> None:
    one = made(kind)
    batch = one.tokenizer(["", "a good film"], padding=True, return_tensors="pt")
    found = logits(one.model, batch["input_ids"], batch["attention_mask"])
    alone = one.tokenizer([""], return_tensors="pt")["input_ids"]
    assert alone.shape == (1, 2)
    np.testing.assert_allclose(found[:1], logits(one.model, alone), **CLOSE)
    # A row without any token cannot come out of a tokenizer; it must not spoil a batch either.
    assert np.isfinite(logits(one.model, alone, torch.zeros_like(alone))).all()


@pytest.mark.parametrize("kind", SMALL_STUDENTS)
def test_embeddings_may_be_given_in_place_of_ids(kind: str) -> None:
    model: Any = made(kind).model
    ids, mask = rows([5, 2])
    assert model.get_input_embeddings().weight.shape == (len(tiny.tokenizer()), WIDTH)
    with torch.no_grad():
        given = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask).logits.numpy()
    np.testing.assert_array_equal(given, logits(model, ids, mask))


@pytest.mark.parametrize("kind", SMALL_STUDENTS)
def test_the_classifier_reads_the_pooled_vector(kind: str) -> None:
    model: Any = made(kind).model
    assert isinstance(model.classifier, nn.Linear)
    seen = []
    model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ids, mask = rows([5, 2])
    found = logits(model, ids, mask)
    assert seen[0].shape == (2, model.classifier.in_features)
    np.testing.assert_allclose(classified(model, seen[0].double().numpy()), found, **CLOSE)


def test_static_is_the_loop_of_its_docstring() -> None:
    model = made("static").model
    ids, mask = rows([4, 1, 7])
    w = weights(model)
    for row, found in enumerate(logits(model, ids, mask)):
        vectors = [
            w["word_embeddings.weight"][i] for i, real in zip(ids[row], mask[row], strict=True) if real
        ]
        mean = sum(vectors) / len(vectors)
        centred = mean - mean.mean()
        normal = centred / math.sqrt((centred**2).mean() + 1e-5) * w["norm.weight"] + w["norm.bias"]
        inner = w["dense.weight"] @ normal + w["dense.bias"]
        hidden = np.array([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in inner])
        np.testing.assert_allclose(found, classified(model, hidden), **CLOSE)


def test_a_factor_on_all_embeddings_says_nothing_but_the_length_of_one_does() -> None:
    """Why there is no weight beside each embedding."""
    model: Any = made("static").model
    ids, mask = rows([4, 3])
    ids[1, 0] = ids[0, 0]
    before = logits(model, ids, mask)
    with torch.no_grad():
        model.word_embeddings.weight.mul_(3)
    # The norm adds 1e-5 to the variance, which is 0.06 and more here.
    np.testing.assert_allclose(logits(model, ids, mask), before, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        model.word_embeddings.weight[ids[0, 0]].mul_(3)
    assert np.abs(logits(model, ids, mask) - before).max() > 0.05


def test_cnn_is_the_loop_of_its_docstring() -> None:
    model = made("cnn").model
    ids, mask = rows([4, 1, 7])
    w = weights(model)
    for row, found in enumerate(logits(model, ids, mask)):
        text = [w["word_embeddings.weight"][i] for i, real in zip(ids[row], mask[row], strict=True) if real]
        pooled = []
        for number, width in enumerate(WINDOWS):
            kernel, bias = w[f"convolutions.{number}.weight"], w[f"convolutions.{number}.bias"]
            for which in range(INNER):
                answers = []
                for t in range(len(text)):
                    total = bias[which]
                    for place in range(width):
                        at = t - (width - 1) // 2 + place
                        if 0 <= at < len(text):
                            total += kernel[which, :, place] @ text[at]
                    answers.append(max(total, 0.0))
                pooled.append(max(answers))
        np.testing.assert_allclose(found, classified(model, np.array(pooled)), **CLOSE)


def test_bilstm_is_the_bidirectional_lstm_of_torch() -> None:
    model: Any = made("bilstm").model
    reference = nn.LSTM(WIDTH, INNER, batch_first=True, bidirectional=True)
    ahead, back = model.forwards.state_dict(), model.backwards.state_dict()
    reference.load_state_dict(ahead | {f"{name}_reverse": value for name, value in back.items()})
    lengths = [6, 1, 2, 9]
    ids, mask = rows(lengths, extra=3)
    together = logits(model, ids, mask)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            states = reference(model.word_embeddings(ids[row : row + 1, :length]))[0][0].double().numpy()
        pooled = np.concatenate([states.max(0), states.mean(0)])  # each with both directions side by side
        np.testing.assert_allclose(together[row], classified(model, pooled), **CLOSE)


@pytest.mark.parametrize("kind", SMALL_STUDENTS)
def test_saved_and_loaded_the_answers_are_the_same(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    one = made(kind)
    ids, mask = rows([5, 2, 8])
    again = tiny.reload(one, tmp_path)
    assert type(again.model) is type(one.model)
    assert again.max_length == 40
    np.testing.assert_array_equal(logits(again.model, ids, mask), logits(one.model, ids, mask))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    np.testing.assert_array_equal(logits(theirs, ids, mask), logits(one.model, ids, mask))
    (tmp_path / "kdcli.json").unlink()  # what transformers' own save_pretrained would leave
    plain = checkpoints.load(tmp_path)
    assert plain.has_head
    np.testing.assert_array_equal(logits(plain.model, ids, mask), logits(one.model, ids, mask))
    told = inspect.describe(str(tmp_path), offline=True)
    assert told["family"] == f"kdcli-{kind}"
    assert told["sizes"]["hidden_size"] == WIDTH
    assert told["sizes"].get("widths") == (WINDOWS if kind == "cnn" else None)


@pytest.mark.parametrize("kind", SMALL_STUDENTS)
def test_the_graph_answers_as_the_model_at_every_shape(kind: str, tmp_path: Path) -> None:
    one = made(kind)
    ids, mask = rows([2, 2])
    numpy = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "token_type_ids": 0 * ids.numpy()}
    names = list(model_inputs(one.model, numpy, "cpu"))
    assert names == ["input_ids", "attention_mask"]
    plain = tmp_path / "plain.onnx"
    exporter.export(one.model, TEXT.example(one.config.vocab_size, names, "cpu"), plain)
    files = [plain]
    if fusion.fuse(plain, tmp_path / "fused.onnx"):
        files.append(tmp_path / "fused.onnx")
    assert fusion.possible(plain) == (kind == "static")  # its norm and its GELU
    for file in files:
        run = sessions.runner(sessions.open_session(file, threads=1, spinning=False))
        for lengths, extra in (([1], 0), ([2], 0), ([9], 4), ([3, 1, 12], 0), ([4] * 7, 0), ([1, 2], 30)):
            ids, mask = rows(lengths, extra)
            found = run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
            np.testing.assert_allclose(found, logits(one.model, ids, mask), **CLOSE)


MACS = {
    "static": lambda t: WIDTH * INNER + INNER * 2,
    "cnn": lambda t: t * sum(WINDOWS) * WIDTH * INNER + len(WINDOWS) * INNER * 2,
    "bilstm": lambda t: 2 * t * 4 * INNER * (WIDTH + INNER) + 4 * INNER * 2,
}


@pytest.mark.parametrize("kind", SMALL_STUDENTS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_macs_are_those_of_the_formula(kind: str, tokens: int) -> None:
    assert compute.macs(made(kind).model, tokens) == MACS[kind](tokens)


def build(name: str, teacher: Checkpoint, init: str = "auto", labels: list[str] = tiny.LABELS, seed: int = 0):
    def hub(preset: str) -> Path:
        raise AssertionError("nobody publishes such a student")

    return students.build(name, teacher, labels, STUDENT_PRESETS, init=init, seed=seed, hub=hub, resolve=Path)


@pytest.mark.parametrize("kind", SMALL_STUDENTS)
def test_the_first_embeddings_are_the_teachers_best_projection(kind: str) -> None:
    teacher = tiny.checkpoint()
    found = build(f"{kind}-8", teacher)
    assert found.init == "teacher"
    assert found.checkpoint.max_length == teacher.max_length
    table = found.checkpoint.model.get_input_embeddings().weight.detach().double()
    wide = teacher.model.get_input_embeddings().weight.detach().double()
    left, values, _ = torch.linalg.svd(wide, full_matrices=False)
    best = left[:, :8] * values[:8]
    best = best / best.square().mean().sqrt()
    # Equal inner products: the same table up to a rotation. It is float32, and its entries are of size 1.
    torch.testing.assert_close(table @ table.T, best @ best.T, rtol=1e-4, atol=1e-4)


def test_a_seed_decides_the_rest_and_random_means_random() -> None:
    teacher = tiny.checkpoint()
    one, two, other = (build("cnn-8", teacher, seed=seed).checkpoint.model for seed in (3, 3, 4))
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == (name == "word_embeddings.weight" or a.ndim == 1)
    drawn = build("cnn-8", teacher, "random")
    assert drawn.init == "random"
    assert not torch.equal(drawn.checkpoint.model.get_input_embeddings().weight, one.word_embeddings.weight)
    assert build("static-64", teacher).init == "random"  # wider than the teacher's 32


def test_a_student_of_ones_own_keeps_all_but_its_head(tmp_path: Path) -> None:
    checkpoints.save(one := made("bilstm"), tmp_path)
    found = build(str(tmp_path), tiny.checkpoint(), labels=["x", "y", "z"])
    assert found.init == "checkpoint"
    assert found.checkpoint.model.classifier.out_features == 3
    state = found.checkpoint.model.state_dict()
    for name, value in one.model.state_dict().items():
        assert torch.equal(state[name], value) != name.startswith("classifier."), name


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("static", ("static", SMALL_STUDENTS["static"])),
        ("cnn-64", ("cnn", 64)),
        ("bilstm-8", ("bilstm", 8)),
        ("cnn-", None),
        ("cnn-x", None),
        ("static-1e2", None),
        ("tiny", None),
        ("lstm-8", None),
    ],
)
def test_names(name: str, found: tuple[str, int] | None) -> None:
    assert small_student(name) == found
    assert students.size_of(name, {}) == (None if found is None else (0, found[1]))


def test_names_that_make_no_model_are_refused() -> None:
    for name in ("static-4", "cnn-100", "bilstm-8192"):
        with pytest.raises(UsageError, match="8 to 4096 in steps of 8"):
            build(name, tiny.checkpoint())
    with pytest.raises(UsageError, match="no published weights of a 'static' student"):
        build("static", tiny.checkpoint(), "hub")
    with pytest.raises(InputError, match="'kdcli-cnn' has no heads") as caught:
        _ = made("cnn").family
    assert "--student static-64" in str(caught.value.hint)


def test_the_defaults_are_those_of_the_names() -> None:
    assert set(small.KINDS) == set(SMALL_STUDENTS)
    for kind, (config, model) in small.KINDS.items():
        assert config().hidden_size == SMALL_STUDENTS[kind]
        assert config.model_type == f"kdcli-{kind}"
        assert model.config_class is config
    assert small.CnnConfig().widths == [3, 4, 5]


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("cnn", {"widths": [3, 40]}, "widths in"),
        ("static", {"pair_token_id": "3"}, "pair_token_id in"),
        ("static", {"pair_token_id": -1}, "pair_token_id in"),
        ("bilstm", {"pair_token_id": 10**6}, "pair_token_id in"),
        ("cnn", {"widths": "345"}, "widths in"),
        ("cnn", {"widths": [3] * 1000}, "widths in"),
        ("cnn", {"intermediate_size": 1_000_000, "hidden_size": 10_000}, "describes"),
        ("bilstm", {"intermediate_size": 1_000_000}, "describes"),
        ("static", {"intermediate_size": 10**9}, "a whole number from 1 to"),
    ],
)
def test_a_hostile_configuration_is_refused_before_it_is_built(
    kind: str, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    checkpoints.save(made(kind), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=words):
        checkpoints.load(tmp_path)
