"""A model spread over memory and disk answers as it did whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdcli.models import placement
from tests import tiny


@pytest.mark.filterwarnings("ignore")  # accelerate counts what it offloads
def test_a_spread_model_gives_the_same_logits(tmp_path: Path) -> None:
    made = tiny.checkpoint(layers=4)
    batch = tiny.batch()
    with torch.inference_mode():
        want = made.model(**batch).logits
    size = sum(p.numel() * 4 for p in made.model.parameters())
    placement.spread(made, torch.device("cpu"), tmp_path / "offload", limit=size // 2)
    assert made.notes == ["spread over cpu, disk"]
    assert list((tmp_path / "offload").glob("*.dat"))  # a part of it really is on disk
    assert any(p.device.type == "meta" for p in made.model.parameters())
    with torch.inference_mode():
        got = made.model(**batch).logits
    assert torch.equal(got, want)
    assert made.device == torch.device("cpu")


def test_weight_bytes_are_those_of_float32(tmp_path: Path) -> None:
    path = tiny.saved(tmp_path / "model")
    assert placement.weight_bytes(path) == sum(p.numel() * 4 for p in tiny.checkpoint().model.parameters())
    assert placement.fits(path, torch.device("cpu"))
