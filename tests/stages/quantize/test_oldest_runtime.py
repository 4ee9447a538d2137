"""Which onnxruntime a scheme's graph will need."""

from __future__ import annotations

import pytest

from kdcli.stages.quantize import oldest_runtime
from kdcli.stages.quantize import plan as plans


@pytest.mark.parametrize(
    ("scheme", "settings", "embeddings", "version"),
    [
        ("dynamic-int8", {}, "int8", "1.15"),
        ("dynamic-int8", {"bits": "4"}, "int4", "1.23"),
        ("int4", {}, "int4", "1.23"),
        ("int4", {}, "int8", "1.17"),
        ("int4", {"bits": "3"}, "fp32", "1.17"),
        ("int4", {"bits": "6"}, "int8", "1.23"),
        ("int4", {"bits": "2"}, "int8", "1.24"),
        ("fp16", {}, "fp16", "1.15"),
        ("binary", {}, "int8", "1.15"),
        ("ternary", {"activations": "float"}, "int8", "1.24"),
    ],
)
def test_a_scheme_names_it_before_anything_is_made(
    scheme: str, settings: dict[str, str], embeddings: str, version: str
) -> None:
    found = plans.settle(scheme, settings)
    assert oldest_runtime.of_scheme(found.scheme, found.config, embeddings) == version
