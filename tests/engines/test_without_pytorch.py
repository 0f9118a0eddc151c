"""Plans are built from a bundle alone, where PyTorch and the checkpoint are not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent.parent / "programs" / "without_packages.py"
BLOCKED = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors")


def run(*arguments: Any) -> str:
    line = [sys.executable, str(PROGRAM), ",".join(BLOCKED), "command", *map(str, arguments)]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_build_list_and_inspect(rtx: Any, real: Any, tmp_path: Path) -> None:
    store = ["--plans", tmp_path / "plans"]
    built = json.loads(run("build", "--bundle", real.folder, "--cond", "seg", "--json", *store))[0]
    assert set(built["built"]) == {g for g in real.manifest.graphs}
    listed = json.loads(run("engines", "list", "--json", *store))
    assert {plan["key"]["graph"] for plan in listed} == set(built["built"])
    assert "attention 14/14" in run("engines", "inspect", "unet", *store)


def test_capability(rtx: Any, real: Any) -> None:
    said = run("engines", "capability", real.folder / "update.onnx", "--flavor", "tensorrt-rtx")
    assert "fully supported" in said
