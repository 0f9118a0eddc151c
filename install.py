"""How to add an optional dependency to this copy of cnpp-trt: the command depends on how it was installed."""

import json
import shlex
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

# What is missing → the extra that brings it. `gpu` and `cpu` exclude each other.
EXTRAS = {
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "tensorrt": "gpu",
    "tensorrt_rtx": "rtx",
    "cuda": "gpu",
    "polygraphy": "rtx",
    "torch": "export",
    "diffusers": "export",
    "transformers": "export",
    "accelerate": "export",
    "safetensors": "export",
    "onnx": "export",
    "onnxscript": "export",
    "onnx_ir": "export",
    "huggingface_hub": "export",
    "jinja2": "bench",
    "matplotlib": "bench",
    "skimage": "bench",
    "torch_fidelity": "quality",
    "torchmetrics": "quality",
    "torchvision": "quality",
}
"""The extra of pyproject.toml for each optional module, by the name it is imported under."""


def install_command(*extras: str) -> str:
    """The command that adds extras to this copy, in backticks: `pip install 'cnpp-trt[cpu]'` where that works.

    A checkout or a wheel is no package that pip finds by its name: then the command names where it came from
    (an editable checkout, or `direct_url.json`, PEP 610).
    """
    python = f"{shlex.quote(sys.executable)} -m pip install"
    return f"`{python} {_requirement(','.join(extras))}`"


def needs(what: str, module: str) -> str:
    """One line for a missing module: what needs it, and the command that brings it."""
    top = module.partition(".")[0]
    command = install_command(EXTRAS[top]) if top in EXTRAS else f"`{shlex.quote(sys.executable)} -m pip install {top}`"
    return f"{what} needs {top}, which is not installed: {command}"


@cache
def _requirement(extras: str) -> str:
    """What pip is given, quoted for a shell."""
    here = Path(__file__).parent
    if (here / "pyproject.toml").is_file():
        return f"--editable {shlex.quote(f'{here}[{extras}]')}"
    try:
        text = distribution("cnpp-trt").read_text("direct_url.json")
    except PackageNotFoundError:
        text = None
    url = json.loads(text)["url"] if text else None
    if url is None:
        return shlex.quote(f"cnpp-trt[{extras}]")
    if url.startswith("file:"):
        return shlex.quote(f"{url2pathname(urlparse(url).path)}[{extras}]")
    return shlex.quote(f"cnpp-trt[{extras}] @ {url}")
