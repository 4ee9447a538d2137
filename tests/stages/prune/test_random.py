"""Random surgery on random small models of every family: they reload, export, and have the parameters they should."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from kdcli.data.sources import Rows
from kdcli.export import graph as graphs
from kdcli.families import stack
from kdcli.inputs import text
from kdcli.models import tokens, transforms
from kdcli.models.checkpoint import Checkpoint, load
from kdcli.models.transforms import Cut, Layers, Vocab, Width
from kdcli.progress import Progress
from kdcli.timing import Timings
from tests import tiny

HIDDEN, HEADS, HEAD_SIZE, NEURONS, POSITIONS = 32, 4, 8, 48, 42


@dataclass
class Sizes:
    """What the test itself knows about the model."""

    family: str
    vocabulary: int
    width: int
    layers: list[tuple[int, int]]  # heads and neurons

    def parameters(self) -> int:
        """Counted by hand: tables, projections that are left, norms, the head of the classifier."""
        d = self.width
        segments = 0 if self.family in ("distilbert", "mpnet") else 2
        total = d * (self.vocabulary + POSITIONS + segments) + 2 * d
        for heads, neurons in self.layers:
            inner = heads * HEAD_SIZE
            total += 3 * (d + 1) * inner + d * inner + d
            total += (d + 1) * neurons + d * neurons + d + 4 * d
        head_biases = 32 * HEADS if self.family == "mpnet" else 0  # by bucket of distance
        return total + (d + 1) * HIDDEN + (HIDDEN + 1) * 2 + head_biases


def some(rng: random.Random, count: int, least: int = 0) -> list[int]:
    return sorted(rng.sample(range(count), rng.randint(least, count)))


def operate(rng: random.Random, made: Checkpoint, sizes: Sizes) -> None:
    """One random transform of model, log and expected sizes."""
    kind = rng.choice(["heads", "neurons", "both", "layers", "width", "vocab"])
    if kind == "vocab":
        vocabulary = tokens.Vocabulary(made.tokenizer)
        kept = vocabulary.protected(made.config)
        kept |= np.array([rng.random() < 0.7 for _ in kept])
        ids = np.flatnonzero(vocabulary.closed(kept)).tolist()
        made.tokenizer = tokens.cut_tokenizer(made.tokenizer, ids)
        tokens.keep_tokens(made.model, ids)
        made.log.transforms.append(Vocab(before=sizes.vocabulary, after=len(ids)))
        sizes.vocabulary = len(ids)
        return
    done: Cut | Layers | Width
    if kind == "layers":
        kept_layers = some(rng, len(sizes.layers), 1)
        sizes.layers = [sizes.layers[i] for i in kept_layers]
        done = Layers(keep=kept_layers)
    elif kind == "width":
        features = some(rng, sizes.width, max(2, sizes.width // 2))
        sizes.width = len(features)
        done = Width(keep=features)
    else:
        done = Cut()
        for index, (heads, neurons) in enumerate(sizes.layers):
            if kind in ("heads", "both") and rng.random() < 0.7:
                done.heads[index] = some(rng, heads)
                heads = len(done.heads[index])
            if kind in ("neurons", "both") and rng.random() < 0.7:
                # Often the same number in every layer, which config.json can express.
                even = neurons // 2
                done.neurons[index] = (
                    some(rng, neurons) if kind == "both" else sorted(rng.sample(range(neurons), even))
                )
                neurons = len(done.neurons[index])
            sizes.layers[index] = (heads, neurons)
    transforms.apply(made.model, done)
    made.log.transforms.append(done)


def logits(made: Checkpoint) -> torch.Tensor:
    given = made.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return made.model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits


TEXTS = [tiny.sentence(random.Random(n), n % 2 == 0) for n in range(12)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("seed", range(2))
def test_random_pruning_reloads_exports_and_counts(family: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"{family}-{seed}")
    count = rng.randint(2, 4)
    made = load(tiny.saved(tmp_path / "model", family, seed=seed, layers=count))
    sizes = Sizes(family, len(made.tokenizer), HIDDEN, [(HEADS, NEURONS)] * count)
    assert sum(p.numel() for p in made.model.parameters()) == sizes.parameters()
    for stage in range(2):  # what was pruned, saved and loaded is pruned again
        for _ in range(rng.randint(1, 3)):
            operate(rng, made, sizes)
        expected = logits(made)
        assert sum(p.numel() for p in made.model.parameters()) == sizes.parameters()
        assert [(x.heads, x.neurons) for x in stack.encoder_layers(made.model, made.family)] == sizes.layers
        made = tiny.reload(made, tmp_path / str(stage))
        assert torch.equal(logits(made), expected)
        assert sum(p.numel() for p in made.model.parameters()) == sizes.parameters()
        assert len(made.tokenizer) == made.config.vocab_size == sizes.vocabulary
    encoded = text.encode(Rows(TEXTS, None, None), made.tokenizer, made.max_length, None)
    path = tmp_path / "model.onnx"
    timings = Timings()
    # Raises when the graph, fused or not, does not agree with the checkpoint.
    made_graph = graphs.build(made, path, encoded, threads=1, timings=timings, progress=Progress())
    assert made_graph.parity.passed
    session = onnxruntime.InferenceSession(str(path))
    given = made.tokenizer(TEXTS, padding=True, return_tensors="np", return_token_type_ids=True)
    got = session.run(None, {x.name: given[x.name] for x in session.get_inputs()})[0]
    assert np.abs(got - logits(made).numpy()).max() < 1e-4
