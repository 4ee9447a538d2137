"""Question: how much accuracy do other pruners keep at the same share of the encoder's multiply-accumulates?

Prunes heads and neurons of a fine-tuned BERT classifier, without any training afterwards, with

    torch-pruning   group Taylor importance, as its example for BERT uses it: `uniform`, every layer alike, and
                    `global`, all layers ranked together. Residual widths stay; the neurons spend what is left.
    textpruner      the iterated importance of TextPruner in our own words, because the package needs the head
                    pruning that transformers 5 has dropped: `even`, every layer alike, and `uneven`.

The rows (drawn by the seed as `kdcli prune` draws them), their labels, the counting of multiply-accumulates and the
measured split are kdcli's, so that only the choice of what to remove differs. Accuracy is of the pruned torch model
on the whole test split. Prints one Markdown table; with --results FILE what was found is kept and not run again.

    python benchmarks/prune_peers.py --model DIR --data DIR --peer-python VENV/bin/python

The other Python needs torch-pruning and everything that kdcli needs; without --peer-python this one is used.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TORCH_PRUNING = ("torch-pruning uniform", "torch-pruning global")
TEXTPRUNER = ("textpruner even", "textpruner uneven")
ITERATIONS = 16  # of TextPruner; its own best


@dataclass
class Bench:
    """A fresh model with what is needed to prune and to judge it."""

    checkpoint: Any
    layers: Sequence[Any]
    batches: list[tuple[dict[str, Any], Any]]  # inputs and labels, shuffled rows
    tokens: float  # mean length of the training rows
    test: Any  # Encoded

    def macs(self) -> float:
        from kdcli.stages.prune.budget import layer_macs

        return sum(layer_macs(layer, self.tokens) for layer in self.layers)

    def accuracy(self) -> float:
        from kdcli.inputs import batching
        from kdcli.inputs.feeding import torch_runner

        run, right = torch_runner(self.checkpoint), 0
        for rows in batching.inference_batches(self.test.lengths, 64):
            logits = run(batching.collate(self.test, rows, self.checkpoint.pad_id))
            right += int((logits.argmax(1) == self.test.labels[rows]).sum())
        return right / len(self.test)


def bench(model: str, data: str, seed: int, samples: int, batch_size: int = 32) -> Bench:
    """Load model and data, and draw the rows."""
    import torch

    from kdcli.data import sources
    from kdcli.families.stack import encoder_layers
    from kdcli.inputs import batching
    from kdcli.inputs.feeding import model_inputs
    from kdcli.inputs.splits import Splits
    from kdcli.models.checkpoint import load

    made = load(Path(model))
    splits = Splits(sources.load(data), made)
    train = splits["train"]
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(train), min(samples, len(train)), replace=False)
    assert train.labels is not None
    batches = []
    for at in np.split(rows, range(batch_size, len(rows), batch_size)):
        inputs = model_inputs(made.model, batching.collate(train, at, made.pad_id), "cpu")
        batches.append((inputs, torch.from_numpy(train.labels[at])))
    layers = encoder_layers(made.model, made.family)
    return Bench(made, layers, batches, float(train.lengths.mean()), splits["test"])


def losses(given: Bench) -> Iterator[None]:
    """Add the gradient of every batch's mean loss to the weights of the encoder, one batch a turn."""
    import torch
    from torch.nn import functional

    model = given.checkpoint.model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("embeddings.weight"))
    for inputs, labels in given.batches:
        with torch.enable_grad():
            functional.cross_entropy(model(**inputs).logits, labels).backward()
        yield


# torch-pruning


def torch_pruning(given: Bench, share: float, *, together: bool) -> None:
    """Group Taylor, one shot: heads by the ratio that was asked for, neurons by whatever then meets the budget."""
    for _ in losses(given):
        pass
    whole, dense = given.checkpoint.model, given.macs()

    def attempt(neurons: float) -> None:
        from kdcli.families.stack import encoder_layers

        given.checkpoint.model = copy.deepcopy(whole)
        for now, before in zip(
            given.checkpoint.model.parameters(), whole.parameters(), strict=True
        ):  # deepcopy leaves gradients out
            now.grad = before.grad
        given.layers = encoder_layers(given.checkpoint.model, given.checkpoint.family)
        cut_by_groups(given, 1 - share, neurons, together=together)

    met, missed = 1.0, 0.0  # ratios of neurons to remove
    while missed < met - 0.002:
        middle = (met + missed) / 2
        attempt(middle)
        met, missed = (middle, missed) if given.macs() <= share * dense else (met, middle)
    attempt(met)


def cut_by_groups(given: Bench, heads: float, neurons: float, *, together: bool) -> None:
    """Prune by the dependency graph; nothing of the residual width goes."""
    import torch_pruning as tp  # type: ignore[import-not-found, unused-ignore]
    from torch import nn

    model: Any = given.checkpoint.model
    free = {
        id(part) for layer in given.layers for part in (layer.query, layer.key, layer.value, layer.ffn_in)
    }
    fixed = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding) and id(m) not in free]
    counts = {part: layer.heads for layer in given.layers for part in (layer.query, layer.key, layer.value)}
    inputs = {key: value[:1, :8] for key, value in given.batches[0][0].items()}
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.GroupTaylorImportance(),
        global_pruning=together,
        pruning_ratio=neurons,
        head_pruning_ratio=heads,
        num_heads=counts,
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=fixed,
        output_transform=lambda output: output.logits.sum(),
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for layer in given.layers:
        attention: Any = layer.module.get_submodule(layer.family.attention)
        attention.num_attention_heads, attention.all_head_size = layer.heads, layer.query.out_features


# TextPruner


def textpruner(given: Bench, share: float, *, even: bool) -> None:
    """Estimate, remove the least important units, and again, until the budget is met.

    A head scores |sum of w * dL/dw| over its columns of the output projection. A neuron scores the same over its
    column of the second feed-forward matrix; when all layers are to be alike, that of its row and bias in the first
    one is added. Scores are summed over batches. Numbers of heads and of neurons fall in equal steps.
    """
    from kdcli.stages.prune.budget import head_macs, neuron_macs

    layers, count, budget = given.layers, len(given.layers), share * given.macs()
    heads, neurons = sum(x.heads for x in layers), sum(x.neurons for x in layers)
    # Alike in every layer means a whole number of heads a layer.
    left_heads = count * round(share * heads / count) if even else round(share * heads)
    a_head, a_neuron = head_macs(layers[0], given.tokens), neuron_macs(layers[0], given.tokens)
    for step in range(1, ITERATIONS + 1):
        head_scores, neuron_scores = importance(given, even=even)
        now = heads - round((heads - left_heads) * step / ITERATIONS)
        for layer, kept in zip(layers, stay(head_scores, now, even=even), strict=True):
            layer.keep_heads(kept)
        # Heads that stay because their layer would have none are paid for by neurons.
        left_heads = max(left_heads, sum(x.heads for x in layers) if step == ITERATIONS else 0)
        left_neurons = int((budget - left_heads * a_head) / a_neuron / count) * count
        now = neurons - round((neurons - left_neurons) * step / ITERATIONS)
        for layer, kept in zip(layers, stay(neuron_scores, now, even=even), strict=True):
            layer.keep_neurons(kept)


def importance(given: Bench, *, even: bool) -> tuple[list[Any], list[Any]]:
    """Scores of all heads and neurons, a tensor a layer."""
    heads: list[Any] = [0.0 for _ in given.layers]
    neurons: list[Any] = [0.0 for _ in given.layers]

    def product(parameter: Any) -> Any:
        return (parameter * parameter.grad).detach()

    for _ in losses(given):
        for i, layer in enumerate(given.layers):
            columns = product(layer.attention_output.weight).sum(0)
            heads[i] = heads[i] + columns.view(-1, layer.head_size).sum(1).abs()
            if even:
                rows = product(layer.ffn_in.weight).sum(1) + product(layer.ffn_in.bias)
                neurons[i] = neurons[i] + rows.abs()
            neurons[i] = neurons[i] + product(layer.ffn_out.weight).sum(0).abs()
        given.checkpoint.model.zero_grad()
    return heads, neurons


def stay(scores: list[Any], total: int, *, even: bool) -> list[list[int]]:
    """Which units of every layer stay, the best ``total`` of all; a layer that would lose all keeps its best."""
    import torch

    if even:
        return [s.argsort(descending=True)[: total // len(scores)].sort().values.tolist() for s in scores]
    order = torch.cat(scores).argsort(descending=True, stable=True)
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[:total]] = True
    parts = list(kept.split([len(s) for s in scores]))
    for part, score in zip(parts, scores, strict=True):
        if not part.any():
            part[score.argmax()] = True
    return [part.nonzero()[:, 0].tolist() for part in parts]


METHODS: dict[str, Callable[[Bench, float], None]] = {
    "torch-pruning uniform": lambda given, share: torch_pruning(given, share, together=False),
    "torch-pruning global": lambda given, share: torch_pruning(given, share, together=True),
    "textpruner even": lambda given, share: textpruner(given, share, even=True),
    "textpruner uneven": lambda given, share: textpruner(given, share, even=False),
}


def run_one(given: argparse.Namespace) -> None:
    """One method, budget and seed in this process; prints one line of JSON."""
    made = bench(given.model, given.data, given.seed, given.samples)
    dense = made.macs()
    started = time.process_time()  # other work on the machine does not count
    METHODS[given.one](made, given.share)
    seconds = time.process_time() - started
    found = {
        "accuracy": made.accuracy(),
        "kept": made.macs() / dense,
        "seconds": seconds,
        "heads": [layer.heads for layer in made.layers],
        "neurons": [layer.neurons for layer in made.layers],
    }
    print(json.dumps(found))


def run_all(given: argparse.Namespace) -> None:
    """Every method at every share, each in a process of its own, then the table."""
    dense = bench(given.model, given.data, 0, 1).accuracy()
    print(
        f"dense: {100 * dense:.2f}\n\n| method | asked | MACs kept | accuracy | lost | CPU seconds | heads | neurons |"
    )
    print("|---" * 8 + "|", flush=True)
    for name in given.methods or METHODS:
        for share in given.shares:
            # Three draws of the rows in the middle, where methods differ most; elsewhere one.
            seeds = given.seeds if share == given.shares[0] else given.seeds[:1]
            rows = [in_peer(given, name, share, seed) for seed in seeds]
            values = [100 * row["accuracy"] for row in rows]
            shown = f"{statistics.mean(values):.2f}"
            if len(values) > 1:
                shown += f" ± {statistics.stdev(values):.2f} ({', '.join(f'{v:.2f}' for v in values)})"
            cells = [
                name,
                f"{share:.0%}",
                ", ".join(sorted({f"{100 * row['kept']:.1f}%" for row in rows})),
                shown,
                f"{100 * dense - statistics.mean(values):.2f}",
                f"{statistics.mean(row['seconds'] for row in rows):.0f}",
                " ".join(str(x) for x in rows[0]["heads"]),
                " ".join(str(x) for x in rows[0]["neurons"]),
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


def in_peer(given: argparse.Namespace, name: str, share: float, seed: int) -> dict[str, Any]:
    """The result of one run, from the file of results or from a process of its own."""
    key = [Path(given.model).name, name, share, seed, given.samples]
    if given.results and given.results.is_file():
        for line in given.results.read_text(encoding="utf-8").splitlines():
            found: dict[str, Any] = json.loads(line)
            if found["key"] == key:
                return found
    python = given.peer_python if name in TORCH_PRUNING else sys.executable
    words = ["--model", given.model, "--data", given.data, "--samples", str(given.samples)]
    words += ["--one", name, "--share", str(share), "--seed", str(seed)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [python, __file__, *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found = {"key": key, **json.loads(done.stdout.splitlines()[-1])}
    if given.results:
        with given.results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(found) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.75, 0.3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--one", choices=list(METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        run_one(given)
    else:
        run_all(given)


if __name__ == "__main__":
    main()
