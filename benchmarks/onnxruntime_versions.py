"""Question: which onnxruntime opens and runs the graph of each scheme, and does it give the same answers?

    python benchmarks/onnxruntime_versions.py build --model DIR --data DIR --out OUT
    python benchmarks/onnxruntime_versions.py run --out OUT --python venv-1.15.1/bin/python [--python ...]
    python benchmarks/onnxruntime_versions.py table --out OUT

"build" makes one graph for every scheme and setting, from the given fine-tuned model and from random ones of the other
families with its tokenizer, and draws rows of test.csv. "run" gives all of them to an onnxruntime of another version:
each --python is an interpreter that has numpy and onnxruntime and nothing of kdcli. "table" prints, for every graph,
its opset, its IR version, the oldest version from which on every measured one opens and runs it, and how far the
logits of those are from the newest one's; it fails where kdcli names another version.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np

#: Name -> options and settings of `kdcli quantize`.
SCHEMES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "dynamic-int8": ({}, {}),
    "dynamic-int8, unsigned=true": ({}, {"unsigned": "true"}),
    "dynamic-int8, smooth=0.5": ({}, {"smooth": "0.5"}),
    "dynamic-int8, bits=4": ({}, {"bits": "4"}),
    "dynamic-int8, fp32 tables": ({"embeddings": "fp32"}, {}),
    "dynamic-int8, int4 tables": ({"embeddings": "int4"}, {}),
    "static-int8": ({"scheme": "static-int8"}, {}),
    "static-int8, unsigned=true": ({"scheme": "static-int8"}, {"unsigned": "true"}),
    "fp16": ({"scheme": "fp16"}, {}),
    "int4": ({"scheme": "int4"}, {}),
    "int4, symmetric=false": ({"scheme": "int4"}, {"symmetric": "false"}),
    "int4, compute=int8": ({"scheme": "int4"}, {"compute": "int8"}),
    "int4, int8 tables": ({"scheme": "int4", "embeddings": "int8"}, {}),
    "int4, fp32 tables": ({"scheme": "int4", "embeddings": "fp32"}, {}),
    **{
        f"int4, bits={bits}, int8 tables": ({"scheme": "int4", "embeddings": "int8"}, {"bits": str(bits)})
        for bits in (2, 3, 5, 6, 7, 8)
    },
    "int8-qat": ({"scheme": "int8-qat", "epochs": 1}, {}),
    "ternary": ({"scheme": "ternary", "epochs": 1}, {}),
    "ternary, activations=float": ({"scheme": "ternary", "epochs": 1}, {"activations": "float"}),
    "binary": ({"scheme": "binary", "epochs": 1}, {}),
    "binary, activations=float": ({"scheme": "binary", "epochs": 1}, {"activations": "float"}),
}
FAMILIES = ("roberta", "distilbert", "electra", "mpnet")
STUDENTS = ("static", "cnn", "bilstm")
SMALL_SCHEMES = ("dynamic-int8", "static-int8", "int4")

RUN = """
import json, sys
import numpy as np, onnxruntime
out, names = sys.argv[1], json.loads(sys.argv[2])
feeds = np.load(out + "/feeds.npz")
rows = int(feeds["rows"])
options = onnxruntime.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 4, 1
found = {}
for name, file in names.items():
    try:
        session = onnxruntime.InferenceSession(out + "/" + file, options, providers=["CPUExecutionProvider"])
        inputs = [i.name for i in session.get_inputs()]
        found[name] = [session.run(None, {k: feeds[f"{k}_{i}"] for k in inputs})[0][0].tolist() for i in range(rows)]
    except Exception as error:
        found[name] = str(error).strip().splitlines()[0][:300]
print(json.dumps({"version": onnxruntime.__version__, "found": found}))
"""


def build(given: argparse.Namespace) -> None:
    """Graphs, feeds and what is known of each graph."""
    import onnx
    import torch

    from kdcli.context import Context
    from kdcli.data import sources
    from kdcli.export import graph as graphs
    from kdcli.inputs import batching
    from kdcli.inputs.splits import Splits
    from kdcli.models import checkpoint as checkpoints
    from kdcli.progress import Progress
    from kdcli.request import Common, Request
    from kdcli.stages.lowrank import stage as lowrank
    from kdcli.stages.lowrank.options import LowRankOptions
    from kdcli.stages.quantize import stage as quantize
    from kdcli.stages.quantize.options import QuantizeOptions
    from kdcli.timing import Timings

    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    dataset = sources.load(str(given.data), columns=None, seed=0, offline=True)
    model = checkpoints.load(given.model)
    known = given.out / "graphs.json"
    splits = Splits(dataset, model)
    few: Any = {name: splits[name].take(np.arange(64)) for name in ("train", "validation", "test")}
    names: dict[str, dict[str, Any]] = json.loads(known.read_text()) if known.is_file() else {}

    def export(title: str, made: Any, options: Any, settings: dict[str, str]) -> None:
        if title in names:
            return
        stage = {QuantizeOptions: "quantize", LowRankOptions: "lowrank"}.get(type(options), "evaluate")
        clone = replace(made, model=copy.deepcopy(made.model), log=made.log.model_copy(deep=True))
        request = Request(stage=stage, model="m", options=options, common=Common(settings=settings))  # type: ignore[arg-type]
        context = Context(
            request, clone, dataset, few, torch.device("cpu"), 0, Progress(), given.out / "resume"
        )
        extra: dict[str, Any] = {}
        result = clone
        if stage != "evaluate":
            module: Any = {"quantize": quantize, "lowrank": lowrank}[stage]
            module.prepare(context)
            applied = module.apply(context)
            place = given.out / "checkpoint"
            place.mkdir(exist_ok=True)
            for old in place.iterdir():
                old.unlink()
            checkpoints.save(applied.checkpoint, place, integers=applied.integers, half=applied.half)
            result = checkpoints.load(place)
            extra = {"rewrite": applied.rewrite_onnx, "attention": applied.fusion, "exact": applied.exact}
        file = f"{len(names)}.onnx"
        graphs.build(
            result,
            given.out / file,
            few["test"],
            threads=1,
            timings=Timings(),
            progress=Progress(),
            **extra,
        )
        graph = onnx.load(str(given.out / file), load_external_data=False)
        opsets = {entry.domain or "ai.onnx": entry.version for entry in graph.opset_import}
        names[title] = {"file": file, "opset": opsets["ai.onnx"], "ir": graph.ir_version}
        names[title]["bytes"] = (given.out / file).stat().st_size
        known.write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
        print(title, names[title], file=sys.stderr, flush=True)

    if not (given.out / "feeds.npz").is_file():
        test = splits["test"]
        arrays: dict[str, Any] = {"rows": 8}
        for at, row in enumerate(np.linspace(0, len(test) - 1, 8).astype(int)):
            for name, array in batching.collate(test, np.array([row]), model.pad_id).items():
                arrays[f"{name}_{at}"] = array
        np.savez(given.out / "feeds.npz", **arrays)
    export("fp32", model, None, {})
    export("lowrank", model, LowRankOptions(method="svd", budget=0.5), {})
    for title, (options, settings) in SCHEMES.items():
        # A training takes its teacher from the disk.
        export(title, model, QuantizeOptions(calibration_samples=32, **options), settings)
    for family in FAMILIES:
        export(f"fp32 of {family}", random_model(family, model), None, {})
    for student in STUDENTS:
        made = random_model(f"kdcli-{student}", model)
        export(f"`{student}`, fp32", made, None, {})
        for scheme in SMALL_SCHEMES:
            if student != "cnn" and scheme == "static-int8":
                continue
            export(f"`{student}`, {scheme}", made, QuantizeOptions(scheme=scheme, calibration_samples=32), {})


def random_model(family: str, like: Any) -> Any:
    """Two layers of 128 with the tokenizer and labels of another model."""
    from transformers import AutoConfig

    from kdcli.models import checkpoint as checkpoints

    sizes = {"vocab_size": int(like.config.vocab_size), "pad_token_id": like.pad_id}
    labels = {"id2label": dict(enumerate(like.labels)), "label2id": {n: i for i, n in enumerate(like.labels)}}
    if family == "distilbert":
        sizes |= {"dim": 128, "n_layers": 2, "n_heads": 2, "hidden_dim": 256, "max_position_embeddings": 514}
    elif not family.startswith("kdcli-"):
        sizes |= {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 256,
        }
        sizes |= {"max_position_embeddings": 514}
        sizes |= {"embedding_size": 128} if family == "electra" else {}
    made = checkpoints.fresh(AutoConfig.for_model(family, **sizes, **labels))
    return replace(like, model=made.eval())


def run(given: argparse.Namespace) -> None:
    """Every graph with every onnxruntime."""
    names = json.loads((given.out / "graphs.json").read_text(encoding="utf-8"))
    files = json.dumps({name: one["file"] for name, one in names.items()})
    for python in given.python:
        done = subprocess.run([python, "-c", RUN, str(given.out), files], capture_output=True, text=True)
        if done.returncode:
            print(f"{python}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
            continue
        found = json.loads(done.stdout.strip().splitlines()[-1])
        (given.out / f"ran-{found['version']}.json").write_text(json.dumps(found["found"]), encoding="utf-8")
        failed = sum(isinstance(one, str) for one in found["found"].values())
        print(f"{found['version']}: {len(names) - failed} of {len(names)} run", file=sys.stderr, flush=True)


def table(given: argparse.Namespace) -> None:
    """Print what was measured; exit 1 where kdcli says something else."""
    import onnx

    from kdcli.export import runtimes

    names = json.loads((given.out / "graphs.json").read_text(encoding="utf-8"))
    ran = {
        path.stem.removeprefix("ran-"): json.loads(path.read_text()) for path in given.out.glob("ran-*.json")
    }
    versions = sorted(ran, key=lambda version: [int(part) for part in version.split(".")])
    print(f"measured: {', '.join(versions)}\n")
    print(
        common.header(
            ["graph", "opset", "IR", "oldest", "furthest logits", "other answers", "why not the one before"]
        )
    )
    wrong = []
    for name, one in names.items():
        newest = np.array(ran[versions[-1]][name])
        good: list[str] = []
        for version in reversed(versions):
            if not isinstance(ran[version].get(name), list):
                break
            good.append(version)
        far = max(float(np.abs(np.array(ran[v][name]) - newest).max()) for v in good)
        other = sum(int((np.array(ran[v][name]).argmax(1) != newest.argmax(1)).sum()) for v in good)
        oldest, before = good[-1], [v for v in versions if v not in good]
        reason = ran[before[-1]].get(name, "not run") if before else ""
        print(
            common.row(
                [name, str(one["opset"]), str(one["ir"]), oldest, f"{far:.2g}", str(other), str(reason)[:140]]
            )
        )
        claimed = runtimes.of_graph(onnx.load(str(given.out / one["file"])))
        if not oldest.startswith(f"{claimed}."):
            wrong.append(f"{name}: kdcli says {claimed}, measured {oldest}")
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(bool(wrong))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(required=True)
    for step in (build, run, table):
        own = steps.add_parser(step.__name__, help=step.__doc__)
        own.set_defaults(step=step)
        own.add_argument("--out", type=Path, required=True)
        if step is build:
            own.add_argument("--model", type=Path, required=True)
            own.add_argument("--data", type=Path, required=True)
        if step is run:
            own.add_argument("--python", action="append", required=True)
    given = parser.parse_args()
    given.step(given)


if __name__ == "__main__":
    main()
