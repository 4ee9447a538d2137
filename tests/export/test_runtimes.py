"""Which onnxruntime a graph needs: the same from a scheme's name and from the finished graph."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from kdcli.export import runtimes


def model_of(nodes: list, opset: int = 17, ir: int = 8):
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    made = helper.make_graph(nodes, "g", [value], [value])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def node(kind: str, inputs: list[str] | None = None, **attributes: int):
    return helper.make_node(kind, inputs or ["x"], ["x"], domain="com.microsoft", **attributes)


@pytest.mark.parametrize(
    ("nodes", "version"),
    [
        ([], "1.15"),
        ([node("Attention"), node("QAttention")], "1.15"),
        ([node("MatMulNBits", bits=4)], "1.17"),
        ([node("MatMulNBits", bits=4), node("MatMulNBits", bits=8)], "1.23"),
        ([node("MatMulNBits", bits=2)], "1.24"),
        ([node("GatherBlockQuantized", bits=4)], "1.23"),
        ([node("MultiHeadAttention", ["q", "k", "v", "", "mask"])], "1.15"),
        ([node("MultiHeadAttention", ["q", "k", "v", "", "", "bias"])], "1.20"),
    ],
)
def test_the_operator_that_is_youngest_decides(nodes: list, version: str) -> None:
    assert runtimes.of_graph(model_of(nodes)) == version


@pytest.mark.parametrize(("opset", "ir"), [(18, 8), (17, 9)])
def test_what_was_not_measured_is_not_claimed(opset: int, ir: int) -> None:
    assert runtimes.of_graph(model_of([], opset, ir)) is None


def test_the_newest_that_was_tried_is_the_one_that_the_tests_run_with() -> None:
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8")
    assert f"onnxruntime=={runtimes.NEWEST}." in pins
    assert importlib.metadata.version("onnxruntime").startswith(f"{runtimes.NEWEST}.")
