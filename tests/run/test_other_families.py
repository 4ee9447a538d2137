"""Architectures that kdcli does not operate on: each is run as transformers runs it, or refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcli.data import sources
from kdcli.errors import InputError
from kdcli.inputs import splits
from kdcli.models import checkpoint as checkpoints
from kdcli.models import students
from kdcli.probe import soundness
from kdcli.progress import Progress
from kdcli.request import Common, Request
from kdcli.run import life
from kdcli.stages.distill.options import DistillOptions
from kdcli.stages.evaluate.options import EvaluateOptions
from kdcli.training import teacher
from tests import tiny

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
KINDS: dict[str, dict[str, Any]] = {
    "albert": SMALL | {"embedding_size": 16},
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48}
    | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "convbert": SMALL | {"embedding_size": 32},
    "deberta-v2": SMALL
    | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    | {"type_vocab_size": 0},
    "fnet": SMALL,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 42},
    "roformer": SMALL,
    "xlnet": {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48},
    "xlm-roberta": SMALL | {"type_vocab_size": 1},
}


def saved(path: Path, kind: str, **more: Any) -> Path:
    """A random classifier of plain transformers."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tok = tiny.tokenizer("roberta")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tok),
        **({} if kind == "xlnet" else {"max_position_embeddings": 44}),
        pad_token_id=tok.pad_token_id,
        bos_token_id=tok.cls_token_id,
        eos_token_id=tok.sep_token_id,
        id2label=dict(enumerate(tiny.LABELS)),
        label2id={name: i for i, name in enumerate(tiny.LABELS)},
        **KINDS[kind] | more,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
    model.save_pretrained(path)
    tok.save_pretrained(path)
    return path


def accuracy(path: Path, data: Path) -> float:
    """Of plain transformers, one text at a time, with the directory's own tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = sources.load(str(data), columns=None, seed=0, offline=True).splits["test"]
    model, tok = (
        AutoModelForSequenceClassification.from_pretrained(path).eval(),
        AutoTokenizer.from_pretrained(path),
    )
    with torch.no_grad():
        logits = [model(**tok(text, return_tensors="pt")).logits[0] for text in rows.first]
    assert rows.labels is not None
    return float(
        np.mean([tiny.LABELS[int(z.argmax())] == y for z, y in zip(logits, rows.labels, strict=True)])
    )


def judge(path: Path, data: Path, **options: Any) -> life.Report:
    given = EvaluateOptions(models=(str(path),), batch_sizes=(1,), **options)
    common = Common(data=str(data))
    report = life.run(Request(stage="evaluate", model=None, options=given, common=common), Progress()).report
    assert report.after.quality is not None
    return report


@pytest.mark.parametrize("kind", ["albert", "deberta-v2", "xlm-roberta"])
def test_it_is_measured_as_plain_transformers_answers(kind: str, data_dir: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / kind, kind)
    report = judge(path, data_dir)
    assert report.after.quality is not None
    assert report.after.quality.accuracy.value == accuracy(path, data_dir)
    assert not {w.code for w in report.warnings} & {"measured-in-torch", "padding-matters", "unknown-class"}


def test_a_teacher_without_an_onnx_form_teaches(data_dir: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "bart", "bart")
    with pytest.raises(InputError, match="cannot be exported") as caught:
        judge(path, data_dir)
    assert "--runtime torch" in str(caught.value.hint)
    assert judge(path, data_dir, runtime="torch").after.quality.accuracy.value == accuracy(path, data_dir)
    options = DistillOptions(teachers=(str(path),), student="1x16", epochs=1, init="random", augment=0)
    common = Common(out=tmp_path / "student", data=str(data_dir))
    outcome = life.run(Request(stage="distill", model=None, options=options, common=common), Progress())
    assert outcome is not None
    report = outcome.report
    assert report.before is not None
    assert report.before.quality is not None
    assert report.before.quality.accuracy.value == accuracy(path, data_dir)
    assert {one.runtime for one in report.before.latency} == {"torch"}
    assert {one.runtime for one in report.after.latency} == {"onnx"}
    assert report.delta.speedup is None, "times of two runtimes are no speed-up"
    assert report.before.size.onnx_bytes is None
    assert report.delta.size_ratio is None
    assert "measured-in-torch" in {w.code for w in report.warnings}


def test_an_export_that_fails_is_told_in_one_line(
    data_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "fnet", "fnet")  # has an operator that ONNX lacks
    capfd.readouterr()
    with pytest.raises(InputError, match="cannot be exported"):
        judge(path, data_dir)
    seen = capfd.readouterr()
    assert "graph(" not in seen.out + seen.err, "torch dumps what it had so far"


def test_a_student_has_a_position_for_every_token_that_its_teacher_reads(tmp_path: Path) -> None:
    made = checkpoints.load(saved(tmp_path / "xlnet", "xlnet"))  # says -1 for its positions: it has no limit
    student = students.build(
        "1x16", made, list(tiny.LABELS), {}, init="random", seed=0, hub=Path, resolve=Path
    ).checkpoint
    assert student.config.max_position_embeddings == made.max_length == 40, "the tokenizer's limit"
    wide = checkpoints.load(saved(tmp_path / "xlmr", "xlm-roberta"))
    student = students.build(
        "1x16", wide, list(tiny.LABELS), {}, init="random", seed=0, hub=Path, resolve=Path
    ).checkpoint
    assert student.config.max_position_embeddings == wide.max_length


def test_an_architecture_that_reads_padding_is_said_to(data_dir: Path, tmp_path: Path) -> None:
    dataset = sources.load(str(data_dir), columns=None, seed=0, offline=True)
    made = checkpoints.load(saved(tmp_path / "a", "convbert"))
    encoded = splits.Splits(dataset, made)["test"]
    (warning,) = soundness.probe(made, encoded)
    assert warning.code == "padding-matters"
    # What it teaches is what it answers to texts alone.
    logits = teacher.outputs(made, encoded, device=torch.device("cpu"), progress=Progress())
    ids = [torch.tensor(row)[None] for row in np.split(encoded.ids, encoded.offsets[1:-1])]
    alone = [made.model(input_ids=row).logits for row in ids]
    assert np.allclose(logits, torch.cat(alone).detach().numpy(), atol=1e-4)  # float32 rounding in two shapes
    steady = checkpoints.load(saved(tmp_path / "b", "roformer"))
    assert soundness.probe(steady, encoded) == []


def test_an_architecture_that_fails_on_batches_is_refused(data_dir: Path, tmp_path: Path) -> None:
    dataset = sources.load(str(data_dir), columns=None, seed=0, offline=True)
    made = checkpoints.load(saved(tmp_path, "gpt2"))
    encoded = splits.Splits(dataset, made)["test"]
    assert soundness.probe(made, encoded) == []
    made.config.pad_token_id = None
    with pytest.raises(InputError, match="several texts at once") as caught:
        soundness.probe(made, encoded)
    assert "pad_token" in str(caught.value.hint)


def test_a_chunked_feed_forward_is_exported(data_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    path = tiny.saved(tmp_path)
    AutoConfig.from_pretrained(path, chunk_size_feed_forward=1).save_pretrained(path)
    report = judge(path, data_dir)
    assert report.after.quality is not None
    assert report.after.quality.accuracy.value == accuracy(path, data_dir)
