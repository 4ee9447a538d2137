"""The oldest onnxruntime that will run a scheme's graph, by what the scheme declares."""

from __future__ import annotations

from typing import Any

from kdcli import registry
from kdcli.export import runtimes
from kdcli.stages.quantize.scheme import Scheme

_SHOWN: tuple[tuple[str, str, dict[str, str], str], ...] = (
    ("`dynamic-int8`, `static-int8`, `int8-qat`, `fp16`, any setting", "dynamic-int8", {}, "int8"),
    ("these, `ternary` and `binary` with `--embeddings int4`", "dynamic-int8", {}, "int4"),
    ("`int4`", "int4", {}, "int4"),
    ("`int4 --embeddings int8`, also with `--set bits=3`", "int4", {}, "int8"),
    ("`int4 --set bits=5` to `8`", "int4", {"bits": "8"}, "int8"),
    ("`int4 --set bits=2`", "int4", {"bits": "2"}, "int8"),
    ("`ternary`, `binary`", "ternary", {}, "int8"),
    ("`ternary`, `binary` with `--set activations=float`", "ternary", {"activations": "float"}, "int8"),
)


def of_scheme(scheme: Scheme, config: Any, embeddings: str) -> str:
    """The oldest version that will run the graph of a scheme; a factorised model may need 1.20 besides.

    Args:
        scheme: Of ``quantize``.
        config: Its settings.
        embeddings: Format of the tables.
    """
    tables = ["GatherBlockQuantized, 4 bits"] if embeddings == "int4" else []
    return runtimes.oldest([*tables, *scheme.operators(config)])


def table() -> str:
    """What every scheme needs, in Markdown."""
    rows = []
    for said, name, settings, tables in _SHOWN:
        scheme = registry.load("quantize", name, Scheme)
        rows.append(f"| {said} | {of_scheme(scheme, scheme.configured(settings), tables)} |\n")
    return f"| `quantize` with | onnxruntime |\n|---|---|\n{''.join(rows)}"
