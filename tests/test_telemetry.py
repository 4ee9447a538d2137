"""No library tells anybody anything."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_XET_TELEMETRY_ENABLED": "0",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "DO_NOT_TRACK": "1",
}

_SESSION = """
import os, sys
from pathlib import Path
import kdcli
assert "onnxruntime" not in sys.modules
from kdcli.export import sessions
from onnx import TensorProto, helper, save
node = helper.make_node("Identity", ["x"], ["y"])
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
graph = helper.make_graph([node], "g", values[:1], values[1:])
save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "model.onnx")
sessions.open_session(Path("model.onnx"), threads=1)
import datasets, huggingface_hub.constants
assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY
assert not datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
"""


def test_a_session_writes_no_identifier(tmp_path: Path) -> None:
    # onnxruntime keeps quiet by itself where it sees a CI system or its own tests, so their variables go.
    quieting = ("CI", "ORT_RUNNING_UNIT_TESTS", "GITHUB_ACTIONS", "TF_BUILD", *SWITCHES)
    variables = {name: value for name, value in os.environ.items() if name not in quieting}
    home = tmp_path / "home"
    home.mkdir()
    variables |= {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "c"),
        "TMPDIR": str(home),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", _SESSION],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [p for p in home.rglob("*") if "Microsoft" in p.parts or p.name in (".ses", "deviceid")] == []


@pytest.mark.parametrize("said", [None, "0"])
def test_the_switches_are_set_before_anything_is_imported(said: str | None) -> None:
    variables = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    if said is not None:
        variables |= dict.fromkeys(SWITCHES, said)
    code = "import kdcli, os, sys; print([os.environ.get(n) for n in sys.argv[1:]])"
    done = subprocess.run(
        [sys.executable, "-c", code, *SWITCHES],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ast.literal_eval(done.stdout) == list(SWITCHES.values())
