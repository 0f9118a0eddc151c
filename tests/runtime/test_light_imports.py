"""Runtime and engines neither import nor need PyTorch, diffusers or transformers: they run where those cannot be."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from cnpp_trt import Control, Request
from hints import hint

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

BLOCK = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Blocker())
"""


def python(code: str, *arguments: Any) -> str:
    """What a fresh interpreter prints in which the heavy packages are blocked."""
    line = [sys.executable, "-c", BLOCK + code, *map(str, arguments)]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_block_blocks() -> None:
    with pytest.raises(AssertionError, match="blocked"):
        python("import torch")


def test_every_module_of_runtime_and_engines_imports() -> None:
    names = python(
        """
import importlib, pkgutil, cnpp_trt
for package in ("engines", "runtime", "bundles"):
    path = importlib.import_module(f"cnpp_trt.{package}").__path__
    for module in pkgutil.walk_packages(path, f"cnpp_trt.{package}."):
        importlib.import_module(module.name)
        print(module.name)
for name in ("cli", "conditions", "doctor", "errors", "gpu"):
    importlib.import_module(f"cnpp_trt.{name}")
assert not {"tensorrt", "tensorrt_rtx", "cuda", "onnxruntime", "openvino"} & sys.modules.keys()
"""
    ).split()
    expected = {"cnpp_trt.runtime.pipeline", "cnpp_trt.runtime.backends.tensorrt", "cnpp_trt.runtime.text.tokenizer"}
    assert expected | {"cnpp_trt.engines.build", "cnpp_trt.bundles.bundle"} <= set(names)


def test_images_without_pytorch_are_the_same_bytes(tiny: Any, control_image: Any, tmp_path: Any) -> None:
    image = control_image(*tiny.size)
    np.save(tmp_path / "control.npy", image)
    python(
        """
import numpy as np
from cnpp_trt import Control, Pipeline, Request
bundle, folder = sys.argv[1:]
control = Control("seg", np.load(folder + "/control.npy"))
result = Pipeline.open(bundle, threads=1)(Request("a house", "", [control], 3, scheduler="lcm", seed=7))
np.savez(folder + "/drawn.npz", images=result.images, latents=result.latents)
assert not [m for m in ("torch", "diffusers", "transformers") if m in sys.modules]
""",
        tiny.bundle,
        tmp_path,
    )
    here = tiny.pipeline(Request("a house", "", [Control("seg", image)], 3, scheduler="lcm", seed=7))
    drawn = np.load(tmp_path / "drawn.npz")
    np.testing.assert_array_equal(drawn["images"], here.images)
    np.testing.assert_array_equal(drawn["latents"], here.latents)


def test_the_commands_run(tiny: Any, control_image: Any, tmp_path: Any) -> None:
    from PIL import Image

    Image.fromarray(control_image(*tiny.size)).save(tmp_path / "depth.png")
    code = "sys.argv[0] = 'cnpp-trt'\nfrom cnpp_trt.cli import main\nmain()"
    drawn = python(
        code, "run", "--bundle", tiny.bundle, "--cond", "depth", "--image", tmp_path / "depth.png",
        "--steps", 2, "--seed", 1, "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    picture = json.loads(drawn)["images"][0]
    again = json.loads(python(code, "run", "--repeat", picture, "--bundle", tiny.bundle, "--out", tmp_path, "--json"))
    assert again["max_difference"] == 0
    assert "is whole" in python(code, "verify", tiny.bundle)


def test_export_says_what_to_install(tmp_path: Any) -> None:
    code = """
sys.argv = ["cnpp-trt", "export", "--cond", "seg"]
from cnpp_trt import cli
try:
    cli.main()
except SystemExit as e:
    print(e.code)
"""
    ended = subprocess.run([sys.executable, "-c", BLOCK + code], capture_output=True, text=True, timeout=60)
    assert ended.stdout.split() == ["1"]
    assert len(ended.stderr.splitlines()) == 1
    assert re.search(hint("export"), ended.stderr)
