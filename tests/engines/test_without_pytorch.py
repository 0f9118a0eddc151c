"""Plans are built from a bundle alone, where PyTorch and the checkpoint are not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

CODE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Blocker())
sys.argv[0] = "cnpp-trt"
from cnpp_trt.cli import main
main()
"""


def run(*arguments: Any) -> str:
    line = [sys.executable, "-c", CODE, *map(str, arguments)]
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
