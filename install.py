"""How to add an optional dependency to this copy of cnpp-trt: the command depends on how it was installed."""

import json
import shlex
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from .messages import one_line

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
    "fastapi": "service",
    "uvicorn": "service",
    "prometheus_client": "service",
    "python_multipart": "service",
    "websockets": "demo",
    "jinja2": "bench",
    "matplotlib": "bench",
    "skimage": "bench",
    "pyarrow": "batch",
    "ray": "ray",
    "fsspec": "remote",
    "optuna": "tune",
    "torch_fidelity": "quality",
    "torchmetrics": "quality",
    "torchvision": "quality",
}
"""The extra of pyproject.toml for each optional module, by the name it is imported under."""


EXPORT_MODULES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors", "onnxruntime")
"""What `export` imports: the extra, and an ONNX Runtime that compares each graph with PyTorch."""
REPORT_MODULES = ("jinja2", "matplotlib")
SERVICE_MODULES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
DEMO_MODULES = (*SERVICE_MODULES, "websockets")


def install_command(*extras: str) -> str:
    """The command that adds extras to this copy, in backticks: `pip install 'cnpp-trt[cpu]'` where that works.

    A checkout or a wheel is no package that pip finds by its name: then the command names where it came from
    (an editable checkout, or `direct_url.json`, PEP 610). Where `gpu` is wanted and ONNX Runtime for CPUs is installed,
    which it would break, the command to remove that comes first.
    """
    pip = f"{shlex.quote(sys.executable)} -m pip"
    command = f"`{pip} install {_requirement(','.join(dict.fromkeys(extras)))}`"
    if "gpu" in extras and _has_distribution("onnxruntime"):
        return f"`{pip} uninstall --yes onnxruntime`, then {command}"
    return command


def needs(what: str, *modules: str) -> str:
    """One line for modules that are missing: what needs them, and the command that brings them.

    Args:
        modules: the first is missing; of the others those that are missing too are named with it.
    """
    tops = [module.partition(".")[0] for module in modules]
    missing = tops[:1] + [top for top in dict.fromkeys(tops[1:]) if top != tops[0] and not found(top)]
    extras = [_extra(top) for top in missing if top in EXTRAS]
    unknown = [top for top in missing if top not in EXTRAS]
    # A module of no extra belongs to something installed that is not whole.
    commands = [install_command(*extras)] if extras else []
    commands += [f"`{shlex.quote(sys.executable)} -m pip install {shlex.join(unknown)}`"] if unknown else []
    verb = "is" if len(missing) == 1 else "are"
    return f"{what} needs {', '.join(missing)}, which {verb} not installed: {', then '.join(commands)}"


def cannot_import(what: str, error: ImportError, *modules: str) -> str:
    """One line for an import that failed: `needs` where a module is missing, else what the import says.

    Args:
        modules: everything optional that `what` needs, so that one command brings it all.
    """
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("cnpp_trt"):
        return needs(what, error.name, *modules)
    return f"{what} cannot be imported here: {one_line(error)}"


def found(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: in sys.modules without a spec
        return module in sys.modules


def _has_distribution(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _extra(module: str) -> str:
    """`rtx` brings CUDA's modules too, for those who use TensorRT-RTX."""
    return "rtx" if module == "cuda" and found("tensorrt_rtx") and not found("tensorrt") else EXTRAS[module]


@cache
def _requirement(extras: str) -> str:
    """What pip is given, quoted for a shell."""
    here = Path(__file__).resolve().parent
    if (here / "pyproject.toml").is_file():
        return f"--editable {shlex.quote(f'{here}[{extras}]')}"
    try:
        text = distribution("cnpp-trt").read_text("direct_url.json")
    except PackageNotFoundError:
        text = None
    if not text:
        return shlex.quote(f"cnpp-trt[{extras}]")
    record = json.loads(text)
    url = record["url"]
    if vcs := record.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    elif url.startswith("file:"):
        return shlex.quote(f"{url2pathname(urlparse(url).path)}[{extras}]")
    if subdirectory := record.get("subdirectory"):
        url += f"#subdirectory={subdirectory}"
    return shlex.quote(f"cnpp-trt[{extras}] @ {url}")
