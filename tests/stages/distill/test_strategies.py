"""Every strategy end to end on tiny models: what comes out loads elsewhere, and the report tells its story."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from kdcli import tasks
from kdcli.errors import InputError, UsageError
from kdcli.models import checkpoint as checkpoints
from kdcli.models import ensemble
from kdcli.progress import Progress
from kdcli.request import Common, Request
from kdcli.run import life
from kdcli.stages.distill.options import DistillOptions
from kdcli.stages.distill.strategies.online import mutual
from kdcli.tasks.classification import CLASSIFICATION
from tests import tiny

pytestmark = pytest.mark.usefixtures("shared_exports")


def distill(teachers: list[Path], data: Path, out: Path, settings: dict | None = None, **options):
    given = {"student": "1x16", "epochs": 3, "lr": 5e-3, "init": "teacher"} | options
    given.setdefault("augment", None if given.get("strategy") == "online" else 1)
    request = Request(
        stage="distill",
        model=None,
        options=DistillOptions(teachers=tuple(map(str, teachers)), **given),
        common=Common(out=out, data=str(data), settings={"phases": "one"} | (settings or {})),
        argv=("kdcli", "distill"),
    )
    outcome = life.run(request, Progress())
    assert outcome is not None
    return outcome


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """A teacher that knows the task: the fine-tuned one that distill itself makes of an untrained encoder."""
    base = tmp_path_factory.mktemp("teacher")
    made = tiny.untrained()
    made.model.bert.save_pretrained(base / "encoder")
    made.tokenizer.save_pretrained(base / "encoder")
    settings = {"teacher_epochs": "12", "teacher_lr": "5e-3", "teacher_batch_size": "16"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCLI_CACHE", str(base / "cache"))
        found = distill([base / "encoder"], data_dir, base / "first", settings, epochs=1)
    return Path(found.report.method.detail["teacher"]["path"])


def by_onnxruntime(out: Path, data: Path) -> float:
    """Accuracy of model.onnx by onnxruntime and tokenizers alone."""
    import json

    from tokenizers import Tokenizer

    names = json.loads((out / "config.json").read_text(encoding="utf-8"))["id2label"]
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    with (data / "test.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    right = 0
    for row in rows:
        e = tokenizer.encode(row["text"])
        feed = {"input_ids": e.ids, "attention_mask": e.attention_mask, "token_type_ids": e.type_ids}
        given = {i.name: np.array([feed[i.name]], dtype=np.int64) for i in session.get_inputs()}
        right += names[str(int(session.run(None, given)[0].argmax()))] == row["label"]
    return right / len(rows)


def test_layerwise_is_one_graph_of_all_layers_students(teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = {"layer_epochs": "6", "teacher_lr": "5e-3", "teacher_batch_size": "16"}
    options = {"strategy": "layerwise", "epochs": 12, "augment": 4, "batch_size": 16}
    report = distill([teacher], data_dir, out, settings, **options).report
    layers = report.method.layers
    assert [row["layer"] for row in layers] == [1, 2]
    assert sum(row["weight"] for row in layers) == pytest.approx(1)
    for row in layers:
        assert 0.5 < row["teacher_accuracy"] <= 1
        assert 0.5 < row["student_accuracy"] <= 1
    found = checkpoints.load(out)
    assert found.model_type == "kdcli-ensemble"
    # One token table for both members: the point of sharing it.
    size = len(found.tokenizer)
    tables = [
        m for m in found.model.modules() if isinstance(m, torch.nn.Embedding) and m.num_embeddings == size
    ]
    assert len(tables) == 1
    assert report.after.quality.accuracy.value == by_onnxruntime(out, data_dir)
    assert report.method.detail["ensemble"]["test_accuracy"] == pytest.approx(
        report.after.quality.accuracy.value
    )


def test_the_ensemble_folds_back_into_one_student(teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    settings = {"layer_epochs": "1", "distill_ensemble": "true"}
    report = distill([teacher], data_dir, tmp_path / "out", settings, strategy="layerwise").report
    assert report.model.family == "bert"
    assert len(report.method.layers) == 2
    assert report.method.detail["layerwise"]["ensemble"]["members"] == 2
    assert report.after.quality.accuracy.value == by_onnxruntime(tmp_path / "out", data_dir)


def test_an_ensemble_is_the_mixture_of_its_members() -> None:
    members = [tiny.checkpoint(seed=n).model for n in range(3)]
    table = members[0].get_input_embeddings().weight.data
    for member in members:
        member.get_input_embeddings().weight.data.copy_(table)
    whole = ensemble.of_members(members, table)
    weights = torch.tensor([0.5, 0.3, 0.2])
    whole.log_weights.copy_(weights.log())
    batch = tiny.batch()
    with torch.no_grad():
        got = whole(**batch)["logits"].softmax(-1)
        want = sum(w * m(**batch).logits.softmax(-1) for w, m in zip(weights, members, strict=True))
    assert torch.allclose(got, want, atol=1e-6)  # float32 sums of three terms


def test_mixture_weights_have_the_highest_likelihood() -> None:
    generator = torch.Generator().manual_seed(0)
    answers = torch.randn(3, 200, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
    labels = torch.randint(0, 4, (200,), generator=generator)
    answers[1, torch.arange(200), labels] += 1.0  # the second member knows something
    answers = answers.log_softmax(-1)
    best = ensemble.mixture_weights(answers, labels)
    assert best.sum() == pytest.approx(1)
    assert best.argmax() == 1

    def likelihood(weights: torch.Tensor) -> float:
        mixed = (answers + weights.log()[:, None, None]).logsumexp(0)
        return float(mixed[torch.arange(200), labels].mean())

    for _ in range(50):  # no random mixture is better; 1e-6: 200 rounds stop that close to the top
        other = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample()
        assert likelihood(other) <= likelihood(best) + 1e-6


def test_peers_learn_from_each_other(teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = distill([teacher], data_dir, out, {"peers": "3"}, strategy="online", epochs=6).report
    accuracies, kept = report.method.detail["peers"], report.method.detail["kept"]
    assert len(accuracies) == 3
    assert accuracies[kept - 1] == max(accuracies)
    assert report.after.quality.accuracy.value == by_onnxruntime(out, data_dir)


def test_mutual_learning_is_the_sum_of_the_peers_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    every = [
        torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)
    ]
    targets = torch.tensor([0, 2, -100, 1])

    def soft(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.kl_div(
            own.log_softmax(-1), other.log_softmax(-1), reduction="batchmean", log_target=True
        )

    got = mutual(CLASSIFICATION, every, targets, 0.5, soft)
    want = 0.0
    for k, own in enumerate(every):
        p = own.detach().softmax(-1).numpy()
        hard = -sum(np.log(p[i, int(t)]) for i, t in enumerate(targets) if t >= 0) / 4
        kls = []
        for j, other in enumerate(every):
            if j != k:
                q = other.detach().softmax(-1).numpy()
                kls.append(float((q * (np.log(q) - np.log(p))).sum() / 4))
        want += 0.5 * hard + 0.5 * sum(kls) / 2
    assert float(got.detach()) == pytest.approx(want, rel=1e-6)  # the hard part is float32
    # Peers are detached: the first peer's gradient does not see what the others lose against it.
    alone = 0.5 * soft(every[0], every[1].detach()) * 0.5 + 0.5 * soft(every[0], every[2].detach()) * 0.5
    hard_part = (
        0.5 * torch.nn.functional.cross_entropy(every[0], targets, ignore_index=-100, reduction="sum") / 4
    )
    (one,) = torch.autograd.grad(got, every[0], retain_graph=True)
    (two,) = torch.autograd.grad(alone + hard_part, every[0])
    assert torch.allclose(one, two, atol=1e-6)


def test_a_teacher_is_trained_with_its_student(data_dir: Path, tmp_path: Path) -> None:
    made = tiny.untrained()
    made.model.bert.save_pretrained(tmp_path / "encoder")
    made.tokenizer.save_pretrained(tmp_path / "encoder")
    settings = {"online": "teacher", "teacher_lr": "5e-3"}
    options = {"strategy": "online", "epochs": 12, "batch_size": 16}
    report = distill([tmp_path / "encoder"], data_dir, tmp_path / "out", settings, **options).report
    assert report.before.quality.accuracy.value >= 0.85  # the teacher learned the task on the way
    assert report.method.detail["teacher"]["together_with_the_student"] is True
    assert report.after.quality.accuracy.value == by_onnxruntime(tmp_path / "out", data_dir)


def test_assistants_stand_between(teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    settings = {"assistants": "2x24,1x24"}
    report = distill([teacher], data_dir, tmp_path / "out", settings, strategy="assistant-chain").report
    chain = report.method.detail["chain"]
    assert [row["student"] for row in chain] == ["2x24", "1x24", "1x16"]
    assert [row["taught_by"] for row in chain] == ["the teacher", "2x24", "1x24"]
    sizes = [row["parameters"] for row in chain]
    assert sizes == sorted(sizes, reverse=True)
    assert report.after.quality.accuracy.value == by_onnxruntime(tmp_path / "out", data_dir)


def test_generations_teach_their_successors(teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    report = distill([teacher], data_dir, tmp_path / "out", {"generations": "3"}, strategy="self").report
    chain = report.method.detail["chain"]
    assert [row["student"] for row in chain] == ["1x16"] * 3
    assert report.method.detail["training"]["best_accuracy"] == max(
        row["validation_accuracy"] for row in chain
    )


def test_several_teachers_are_averaged(teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    # The same teacher twice is the same teacher; a random one with little weight changes the student.
    one = distill([teacher], data_dir, tmp_path / "one").path
    twice = distill([teacher, teacher], data_dir, tmp_path / "twice").path
    other = tiny.saved(tmp_path / "other", seed=5)
    mixed = distill([teacher, other], data_dir, tmp_path / "mixed", {"teacher_weights": "0.6,0.4"}).path
    a, b, c = (checkpoints.load(p).model.state_dict() for p in (one, twice, mixed))
    # float32 logits of a mean of probabilities: the targets differ by 1e-7, the trained weights by little more.
    assert all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)
    assert not all(torch.allclose(a[k], c[k], atol=1e-3) for k in a)


def test_teachers_that_do_not_fit_together_are_refused(teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 positive numbers are needed"):
        distill([teacher, teacher], data_dir, tmp_path / "out", {"teacher_weights": "1"})
    with pytest.raises(UsageError, match="has one teacher"):
        distill([teacher, teacher], data_dir, tmp_path / "out", strategy="online")
    with pytest.raises(InputError, match="another vocabulary"):
        distill([teacher, tiny.saved(tmp_path / "roberta", "roberta")], data_dir, tmp_path / "out")


@pytest.mark.parametrize("method", ["hidden", "pooled", "minilm", "rkd"])
def test_methods_add_up_and_leave_no_trace(
    teacher: Path, data_dir: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "out"
    report = distill([teacher], data_dir, out, methods=("response", method)).report
    assert report.method.name == f"response + {method}"
    assert report.method.detail["teacher_features"]["how"] == "on disk"
    names = set(checkpoints.load(out).model.state_dict())
    assert names == set(tiny.checkpoint().model.state_dict()) - {n for n in names if "layer.1." in n} - {
        n for n in tiny.checkpoint().model.state_dict() if "layer.1." in n
    }  # no projection in the student
    plain = distill([teacher], data_dir, tmp_path / "plain").path
    one, two = checkpoints.load(out).model.state_dict(), checkpoints.load(plain).model.state_dict()
    assert any(not torch.equal(one[k], two[k]) for k in one)  # the term did something


def test_features_from_disk_and_recomputed_train_alike(teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    methods = ("response", "hidden", "minilm")
    disk = distill([teacher], data_dir, tmp_path / "disk", methods=methods)
    live = distill([teacher], data_dir, tmp_path / "live", {"feature_cache_gib": "0"}, methods=methods)
    assert disk.report.method.detail["teacher_features"]["how"] == "on disk"
    assert live.report.method.detail["teacher_features"]["how"] == "recomputed"
    one = checkpoints.load(disk.path).model.state_dict()
    two = checkpoints.load(live.path).model.state_dict()
    # Stored in half precision (relative error 5e-4), trained for some steps: close, not equal.
    assert all(torch.allclose(one[k], two[k], atol=2e-2) for k in one)


def test_augmented_texts_are_unlabelled_and_counted(teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    report = distill([teacher], data_dir, tmp_path / "out", augment=3).report
    rows = report.method.detail["rows"]
    assert (rows["labelled"], rows["unlabelled"]) == (96, 0)
    assert 192 < rows["augmented"] <= 288  # short texts repeat each other, and repeats are left out
    none = distill([teacher], data_dir, tmp_path / "none", augment=0).report
    assert none.method.detail["rows"]["augmented"] == 0


@pytest.mark.filterwarnings("ignore")  # accelerate counts what it offloads
def test_a_teacher_larger_than_its_memory_teaches_from_disk(
    teacher: Path, data_dir: Path, tmp_path: Path
) -> None:
    whole = distill([teacher], data_dir, tmp_path / "whole", methods=("response", "hidden"))
    settings = {"teacher_memory_gib": "0.00005"}  # 54 kB; the teacher has 75 kB
    spread = distill([teacher], data_dir, tmp_path / "spread", settings, methods=("response", "hidden"))
    one, two = (checkpoints.load(p.path).model.state_dict() for p in (whole, spread))
    # The logits come from torch and not from onnxruntime: float32 rounding, through some steps of training.
    assert all(torch.allclose(one[k], two[k], atol=1e-3) for k in one)
    assert not list(tmp_path.glob(".*"))  # what was offloaded is gone


def test_two_phases_are_taken_when_the_trial_says_so(teacher: Path, data_dir: Path, tmp_path: Path) -> None:
    auto = distill([teacher], data_dir, tmp_path / "auto", {"phases": "auto"}).report.method.detail
    trial = auto["phases"]["trial"]
    assert auto["phases"]["used"] == ("two" if trial["two"] > trial["one"] else "one")
    assert trial["rows"] == 96
    # The trial leaves no trace: the student is the one that is trained when the answer is given beforehand.
    told = distill([teacher], data_dir, tmp_path / "told", {"phases": auto["phases"]["used"]})
    for name in ("model.safetensors", "model.onnx"):
        assert (tmp_path / "auto" / name).read_bytes() == (told.path / name).read_bytes()


def test_the_first_of_two_phases_takes_a_third_of_the_epochs(
    teacher: Path, data_dir: Path, tmp_path: Path
) -> None:
    detail = distill([teacher], data_dir, tmp_path / "out", {"phases": "two"}, epochs=6).report.method.detail
    assert detail["phases"]["first"]["epochs"] == 2
    assert detail["training"]["epochs"] == 4


@pytest.mark.parametrize("student", ["static", "cnn", "bilstm"])
def test_students_that_are_no_transformers_learn_in_two_phases(
    student: str, teacher: Path, data_dir: Path, tmp_path: Path
) -> None:
    report = distill([teacher], data_dir, tmp_path / "out", {"phases": "two"}, student=student).report
    assert report.method.detail["phases"]["used"] == "two"
    assert report.after.quality.accuracy.value == by_onnxruntime(tmp_path / "out", data_dir)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ("dkd",)}, "at least 3 classes"),
        ({"methods": ("logit-standardisation",)}, "two"),
        ({"methods": ("hidden",), "student": "cnn"}, "layers"),
        ({"methods": ("hidden",), "layer_map": "1:5"}, "2"),
        ({"layer_map": "3:1"}, "1"),
        ({"layer_map": "uniform"}, "no chosen method compares"),
    ],
)
def test_what_means_nothing_here_is_refused_before_the_teacher_is_trained(
    options: dict, words: str, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny.untrained()
    made.model.bert.save_pretrained(tmp_path / "encoder")
    made.tokenizer.save_pretrained(tmp_path / "encoder")
    monkeypatch.setattr("kdcli.training.teacher.fine_tuned", lambda *_, **__: pytest.fail("trained first"))
    with pytest.raises(UsageError, match=words):
        distill([tmp_path / "encoder"], data_dir, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def prices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences with a price of about 20,000, and an encoder without a head."""
    base, rng = tmp_path_factory.mktemp("prices"), random.Random(0)
    made = tiny.untrained()
    made.model.bert.save_pretrained(base / "encoder")
    made.tokenizer.save_pretrained(base / "encoder")
    rows = [
        {"text": tiny.sentence(rng, i % 2 == 1), "label": 20_000 + 1_000 * (i % 2) + rng.random()}
        for i in range(160)
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    (base / "prices.jsonl").write_text(content, encoding="utf-8")
    return base


def test_a_teacher_of_numbers_that_learns_along_starts_at_the_labels(prices: Path, tmp_path: Path) -> None:
    """From a head that gives numbers about 0, no rate would bring it to 20,000 in so few steps."""
    settings = {"online": "teacher"}
    found = distill(
        [prices / "encoder"], prices / "prices.jsonl", tmp_path / "out", settings, strategy="online", epochs=1
    )
    for model in (found.report.before, found.report.after):
        assert model.quality.metrics["rmse"].value < 2_000


def test_a_temperature_that_means_nothing_is_told(
    prices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda self, text: notes.append(text))
    teacher = tiny.of_task(tmp_path / "teacher", tasks.get("regression"), ["score"])
    distill([teacher], prices / "prices.jsonl", tmp_path / "out", temperature=4.0, epochs=1)
    assert any("the temperature changes nothing" in note for note in notes)
