"""Question: what do the factorisations of convolutions cost and save, beside tensorly's own plain use?

A small network (convolutions 1 -> 32 -> 64 -> 64 of 3x3 and one linear layer) is trained on scikit-learn's 8x8 digits,
once for every seed; a third of the images judge it. Then its convolutions are factorised without data:

- even: each method of kdcli, every convolution at the share of its own parameters.
- weighed: the same with shares by the divergence that each layer alone causes on 256 training images, as
  `kdcli lowrank --budget` does; the better of the two by that divergence is kept.
- evbmf: ranks of the analytic variational Bayesian estimate; they follow no budget.
- plain: what a user of tensorly would write: `partial_tucker`, `parafac` and `tensor_train` as they come, with the
  largest even ranks whose factors fit into the share of every convolution.

"kept" is the share of the convolutions' parameters, "epoch" the accuracy after one more epoch of training on the
labels. Latency is onnxruntime's at one thread, the median of 300 runs at batch 1 and of 60 at batch 64. Seconds are
those of the factorisation of all layers, the search of the shares included.

    python benchmarks/lowrank_conv.py [--seeds 3] [--budgets 0.6,0.4,0.2]
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kdcli  # noqa: F401 - first: it switches off telemetry, which onnxruntime decides on when it is loaded

# isort: split
import numpy as np
import onnxruntime
import tensorly
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from tensorly.decomposition import parafac, partial_tucker, tensor_train
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdcli.export.quiet import quiet
from kdcli.models import conv_factors
from kdcli.models.conv_factors import KINDS
from kdcli.registry import load
from kdcli.stages.lowrank import rank_budget
from kdcli.stages.lowrank.rank_budget import Choices
from kdcli.stages.lowrank.rule import ConvolutionRule
from kdcli.tasks.classification import CLASSIFICATION

EPOCHS, BATCH, RATE = 15, 64, 1e-3
TRIED = 5


class Net(nn.Module):
    """Maps images (B, 1, 8, 8) to an object with ``logits`` (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 64, 3, padding=1)
        self.third = nn.Conv2d(64, 64, 3, padding=1)
        self.classifier = nn.Linear(64 * 4, 10)

    def forward(self, image: Tensor) -> SimpleNamespace:
        x = F.max_pool2d(F.relu(self.second(F.relu(self.first(image)))), 2)
        x = F.max_pool2d(F.relu(self.third(x)), 2)
        return SimpleNamespace(logits=self.classifier(x.flatten(1)))


def convolutions(net: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in net.named_modules() if conv_factors.is_convolution(layer)}


def weights(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


def train(net: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), rate)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(images[rows]).logits, labels[rows]).backward()
            optimizer.step()
    net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((net(images).logits.argmax(1) == labels).double().mean())


def macs(net: nn.Module) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        net(torch.zeros(1, 1, 8, 8))
    return counter.get_total_flops() // 2


class _Logits(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image).logits


def latency(net: nn.Module) -> tuple[float, float]:
    """Milliseconds of a batch of 1 and of 64."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        with quiet(), torch.no_grad():
            torch.onnx.export(
                _Logits(net).eval(),
                (torch.zeros(2, 1, 8, 8),),
                path,
                dynamo=False,
                opset_version=17,
                input_names=["image"],
                dynamic_axes={"image": {0: "batch"}},
            )
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = []
    for batch, runs in ((1, 300), (64, 60)):
        feed = {"image": np.random.default_rng(0).random((batch, 1, 8, 8), dtype=np.float32)}
        session.run(None, feed)
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            session.run(None, feed)
            times.append(time.perf_counter() - start)
        found.append(1e3 * float(np.median(times)))
    return found[0], found[1]


def even(rule: ConvolutionRule, kind: str, layers: Mapping[str, Any], budget: float) -> dict[str, Any]:
    ranks: dict[str, Any] = {}
    for name, layer in layers.items():
        fitting = [
            r
            for r in rule.ladder(layer)
            if conv_factors.parameters(layer, kind, r) <= budget * weights(layer)
        ]
        ranks[name] = fitting[-1] if fitting else None
    return ranks


def factorise(net: nn.Module, rule: ConvolutionRule, ranks: Mapping[str, Any]) -> nn.Module:
    made = copy.deepcopy(net)
    for name, layer in convolutions(net).items():
        if ranks[name] is not None:
            made.set_submodule(name, rule.decompose(layer, ranks[name], rule.config()))
    return made


def weighed(net: nn.Module, rule: ConvolutionRule, kind: str, budget: float, images: Tensor) -> nn.Module:
    layers, batches = convolutions(net), [{"image": part} for part in images.split(BATCH)]
    with torch.no_grad():
        dense = [net(**batch).logits for batch in batches]
    choices, steps = {}, {}
    for name, layer in layers.items():
        steps[name] = rule.ladder(layer)
        if not steps[name]:
            continue
        at = np.unique(np.linspace(0, len(steps[name]) - 1, TRIED).astype(int))
        harm = []
        for i in at:
            alone = factorise(net, rule, dict.fromkeys(layers) | {name: steps[name][i]})
            harm.append(rank_budget.divergence(CLASSIFICATION, alone, dense, batches))
        logs = np.log(np.maximum(np.maximum.accumulate(harm[::-1])[::-1], 1e-9))
        damage = np.append(np.exp(np.interp(np.arange(len(steps[name])), at, logs)), 0.0)
        cost = [*(conv_factors.parameters(layer, kind, r) for r in steps[name]), weights(layer)]
        choices[name] = Choices(range(len(cost)), np.array(cost, float), damage)
    fixed = sum(weights(layer) for name, layer in layers.items() if name not in choices)
    picked = rank_budget.least(choices, budget * sum(map(weights, layers.values())) - fixed)
    ranks = dict.fromkeys(layers) | {n: steps[n][i] if i < len(steps[n]) else None for n, i in picked.items()}
    candidates = [factorise(net, rule, r) for r in (even(rule, kind, layers, budget), ranks)]
    return min(candidates, key=lambda made: rank_budget.divergence(CLASSIFICATION, made, dense, batches))


def plain(net: nn.Module, kind: str, budget: float) -> nn.Module:
    """tensorly's functions with what they do by default; the result as chains, for parameters and latency."""
    made = copy.deepcopy(net)
    for name, layer in convolutions(net).items():
        o, i, h, w = layer.weight.shape
        kernel = layer.weight.detach().numpy()
        fits = None
        for share in np.linspace(1.0, 0.0, 400, endpoint=False):
            if kind == "cp":
                ranks: tuple[int, ...] = (max(1, round(share * o * i * h * w / (o + i + h + w))),)
            elif kind == "tucker2":
                ranks = (max(1, round(share * i)), max(1, round(share * o)))
            else:
                ranks = tuple(max(1, round(share * most)) for most in conv_factors.train_limits(layer))
            if conv_factors.parameters(layer, kind, ranks) <= budget * weights(layer):
                fits = ranks
                break
        if fits is None:
            continue
        if kind == "tucker2":
            (core, (u, v)), _ = partial_tucker(kernel, rank=[fits[1], fits[0]], modes=[0, 1])
            factors = [torch.tensor(v.T.copy())[None], torch.tensor(core)[None], torch.tensor(u)[None]]
        elif kind == "cp":
            a, b, c, d = parafac(kernel, fits[0]).factors
            factors = [
                torch.tensor(b.T.copy())[None],
                *(torch.tensor(f.T.copy())[None, :, None] for f in (c, d)),
            ]
            factors.append(torch.tensor(a)[None])
        else:
            cores = tensor_train(kernel.transpose(1, 2, 3, 0), [1, *fits, 1]).factors
            fits = tuple(core.shape[2] for core in cores[:-1])
            factors = [torch.tensor(core.transpose(2, 0, 1).copy())[None] for core in cores]
            factors[0] = torch.tensor(cores[0][0].T.copy())[None]
            factors[-1] = torch.tensor(cores[-1][..., 0].T.copy())[None]
        made.set_submodule(name, conv_factors.fill(conv_factors.build(layer, kind, fits), layer, factors))
    return made


Found = dict[tuple[str, str, str], list[dict[str, float]]]


class Bench:
    """One trained network, and what became of its copies."""

    def __init__(self, seed: int, images: Tensor, labels: Tensor, found: Found) -> None:
        torch.manual_seed(seed)
        order = torch.randperm(len(images))
        fit, test = order[: 2 * len(order) // 3], order[2 * len(order) // 3 :]
        self.fit, self.test = (images[fit], labels[fit]), (images[test], labels[test])
        self.seed, self.found, self.net = seed, found, Net()
        train(self.net, *self.fit, EPOCHS, RATE, seed)
        self.total = sum(map(weights, convolutions(self.net).values()))

    def record(self, way: str, kind: str, budget: str, make: Callable[[], nn.Module]) -> None:
        start = time.perf_counter()
        try:
            made = make()
        except Exception as error:  # what a user of the plain functions would see
            print(f"seed {self.seed} {way} {kind} {budget}: {type(error).__name__}: {error}")
            return
        row = {"seconds": time.perf_counter() - start}
        row["kept"] = (weights(made) - weights(self.net.classifier)) / self.total
        row |= {"macs": macs(made), "accuracy": accuracy(made, *self.test)}
        row["ms_1"], row["ms_64"] = latency(made)
        train(made, *self.fit, 1, RATE, self.seed)
        row["epoch"] = accuracy(made, *self.test)
        self.found.setdefault((way, kind, budget), []).append(row)

    def run(self, kind: str, budgets: Sequence[str]) -> None:
        net, rule, layers = self.net, load("lowrank", kind, ConvolutionRule), convolutions(self.net)
        for text in budgets:
            budget = float(text)
            shares = even(rule, kind, layers, budget)
            self.record("even", kind, text, partial(factorise, net, rule, shares))
            self.record("weighed", kind, text, partial(weighed, net, rule, kind, budget, self.fit[0][:256]))
            self.record("plain", kind, text, partial(plain, net, kind, budget))
        ranks = {name: rule.by_evbmf(layer) for name, layer in layers.items()}
        pay = {
            name: r if conv_factors.parameters(layers[name], kind, r) < weights(layers[name]) else None
            for name, r in ranks.items()
        }
        self.record("evbmf", kind, "", partial(factorise, net, rule, pay))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budgets", default="0.6,0.4,0.2")
    parser.add_argument("--methods", default=",".join(KINDS))
    parser.add_argument("--json", type=Path, help="also write every measurement there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # tensorly's own, in its plain use
    print(
        f"tensorly {tensorly.__version__}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    )
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target)
    found: Found = {}
    for seed in range(arguments.seeds):
        bench = Bench(seed, images, labels, found)
        bench.record("dense", "", "", partial(copy.deepcopy, bench.net))
        for kind in arguments.methods.split(","):
            bench.run(kind, arguments.budgets.split(","))
    print(
        "way     method       budget   kept   MACs  accuracy        epoch           batch 1 ms  64 ms  seconds"
    )
    for (way, kind, budget), rows in found.items():
        mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        spread = {key: 100 * float(np.std([row[key] for row in rows])) for key in ("accuracy", "epoch")}
        print(
            f"{way:7} {kind:12} {budget:6} {mean['kept']:6.1%} {mean['macs'] / 1e6:5.2f}M "
            f"{100 * mean['accuracy']:6.2f} (sd {spread['accuracy']:4.2f}) "
            f"{100 * mean['epoch']:6.2f} (sd {spread['epoch']:4.2f}) "
            f"{mean['ms_1']:10.3f} {mean['ms_64']:6.2f} {mean['seconds']:8.2f}"
        )
    if arguments.json:
        rows = [{"way": w, "method": k, "budget": b, "runs": r} for (w, k, b), r in found.items()]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
