"""Tensors in a file: the same numbers, no memory of the process, and nothing left behind."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from kdcli.models import checkpoint as checkpoints
from kdcli.models import mapped
from kdcli.models.integers import Integers
from tests import tiny


def anonymous() -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon"))


def test_shapes_types_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    wanted = [
        (torch.Size(shape), kind)
        for shape, kind in [((3, 5), torch.float32), ((7,), torch.int8), ((2, 2), torch.float32)]
    ]
    made = mapped.empty(wanted)
    assert [(t.shape, t.dtype) for t in made] == wanted
    for number, tensor in enumerate(made):
        tensor.fill_(number + 1)
    assert [float(t.float().mean()) for t in made] == [1, 2, 3]  # none lies on another
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reason", ["full", "other system"])
def test_without_a_file_they_are_in_memory(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if reason == "full":
        monkeypatch.setattr(mapped.os, "posix_fallocate", full, raising=False)
        monkeypatch.setattr(torch.UntypedStorage, "from_file", full)
    else:
        monkeypatch.setattr(mapped, "_in_file", lambda size: None)
    one, two = mapped.empty([(torch.Size((3, 5)), torch.float32), (torch.Size((7,)), torch.int8)])
    assert (one.shape, one.dtype, two.shape, two.dtype) == ((3, 5), torch.float32, (7,), torch.int8)
    assert float(one.sum()) == int(two.sum()) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_large_model_is_filled_without_memory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "LARGE", 1 << 20)
    model = nn.Linear(2048, 4096)
    before = anonymous()
    mapped.parameters(model)
    with torch.no_grad():
        model.weight.copy_(torch.arange(4096.0)[:, None].expand(-1, 2048))
        model.bias.fill_(1)
    # 32 MiB of weights were given back and none were taken.
    assert anonymous() < before - (20 << 20)
    x = torch.ones(1, 2048)
    assert torch.equal(model(x)[0, :3], torch.tensor([1.0, 2049.0, 4097.0]))


def test_a_checkpoint_that_is_only_measured_is_read_into_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "LARGE", 1)
    filled: list[nn.Module] = []
    real = mapped.parameters
    monkeypatch.setattr(mapped, "parameters", lambda model: filled.append(model) or real(model))
    made = tiny.checkpoint()
    (tmp_path / "m").mkdir()
    checkpoints.save(made, tmp_path / "m")
    own, in_file = checkpoints.load(tmp_path / "m"), checkpoints.load(tmp_path / "m", in_file=True)
    assert len(filled) == 1
    for name, weight in own.model.state_dict().items():
        assert torch.equal(in_file.model.state_dict()[name], weight)


def test_small_ones_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 4)
    place = model.weight.data_ptr()
    mapped.parameters(model)
    assert model.weight.data_ptr() == place
    values = torch.randint(-8, 8, (4, 8), dtype=torch.int8)
    given = {"w": Integers(values, torch.ones(4, 1), bits=4)}
    assert mapped.integers(given)["w"] is given["w"]
    monkeypatch.setattr(mapped, "LARGE", 1)
    moved = mapped.integers(given)["w"]
    assert moved.values.data_ptr() != values.data_ptr()
    assert torch.equal(moved.values, values)
    assert torch.equal(moved.dense(), given["w"].dense())
