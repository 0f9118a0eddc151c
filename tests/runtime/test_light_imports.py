"""Runtime and engines neither import nor need PyTorch, diffusers or transformers: they run where those cannot be."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Control, Request
from hints import hint

pytestmark = pytest.mark.slow

HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxscript",
    "huggingface_hub",
    "kornia",
    "scipy",
)

PROGRAM = Path(__file__).parent.parent / "programs" / "without_packages.py"


def python(function: str, *arguments: Any) -> str:
    """What a function of PROGRAM prints in a fresh interpreter in which the heavy packages are blocked."""
    line = [sys.executable, str(PROGRAM), ",".join(HEAVY), function, *map(str, arguments)]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_block_blocks() -> None:
    with pytest.raises(AssertionError, match="blocked"):
        python("imports", "torch")


def test_every_module_of_runtime_and_engines_imports() -> None:
    names = python("every_module_of_runtime_and_engines_imports").split()
    expected = {"cnpp_trt.runtime.pipeline", "cnpp_trt.runtime.backends.tensorrt", "cnpp_trt.runtime.text.tokenizer"}
    assert expected | {"cnpp_trt.engines.build", "cnpp_trt.bundles.bundle"} <= set(names)


def test_images_without_pytorch_are_the_same_bytes(tiny: Any, control_image: Any, tmp_path: Any) -> None:
    image = control_image(*tiny.size)
    np.save(tmp_path / "control.npy", image)
    python("images_without_pytorch_are_the_same_bytes", tiny.bundle, tmp_path)
    here = tiny.pipeline(Request("a house", "", [Control("seg", image)], 3, scheduler="lcm", seed=7))
    drawn = np.load(tmp_path / "drawn.npz")
    np.testing.assert_array_equal(drawn["images"], here.images)
    np.testing.assert_array_equal(drawn["latents"], here.latents)


def test_the_commands_run(tiny: Any, control_image: Any, tmp_path: Any) -> None:
    from PIL import Image

    Image.fromarray(control_image(*tiny.size)).save(tmp_path / "depth.png")
    drawn = python(
        "command", "run", "--bundle", tiny.bundle, "--cond", "depth", "--image", tmp_path / "depth.png",
        "--steps", 2, "--seed", 1, "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    picture = json.loads(drawn)["images"][0]
    again = json.loads(
        python("command", "run", "--repeat", picture, "--bundle", tiny.bundle, "--out", tmp_path, "--json")
    )
    assert again["max_difference"] == 0
    assert "is whole" in python("command", "verify", tiny.bundle)


def test_export_says_what_to_install(tmp_path: Any) -> None:
    line = [str(PROGRAM), ",".join(HEAVY), "command_says_its_status", "export", "--cond", "seg"]
    env = {**os.environ, "CNPP_TRT_HOME": str(tmp_path)}  # where no bundle has the condition already
    ended = subprocess.run([sys.executable, *line], capture_output=True, text=True, timeout=60, env=env)
    assert ended.stdout.split() == ["1"]
    assert len(ended.stderr.splitlines()) == 1
    assert re.search(hint("export"), ended.stderr)
