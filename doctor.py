"""What this machine has and what works on it: `cnpp-trt doctor`, made to be pasted into an issue."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from . import __version__
from .bundle import MANIFEST
from .gpu import Gpu, find_gpu
from .places import home

PACKAGES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-python",
    "cuda-core",
    "openvino",
    "polygraphy",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxscript",
    "tokenizers",
    "opencv-python-headless",
    "pillow",
)
EXPORT_MODULES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors")


def examine() -> dict[str, Any]:
    """Versions, providers, GPU, TensorRT flavours, folders, and what works here. Nothing heavier than onnxruntime is
    imported."""
    versions = {name: installed([name]).get(name) for name in PACKAGES}
    providers = _providers()
    gpu = _gpu()
    flavours = [name for name in ("tensorrt", "tensorrt-rtx") if versions[name]]
    root = home()
    bundles = sorted(p.parent.name for p in root.glob(f"bundles/*/{MANIFEST}"))
    plans = len(list(root.glob("plans/*/plan.json")))
    existing = next(p for p in (root, *root.parents) if p.exists())
    return {
        "cnpp-trt": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions,
        "onnxruntime_providers": providers,
        "gpu": gpu,
        "tensorrt_flavours": flavours,
        "home": str(root),
        "home_free_gib": round(shutil.disk_usage(existing).free / 2**30, 1),
        "bundles": bundles,
        "plans": plans,
        "works": _works(versions, providers),
    }


def describe(found: dict[str, Any]) -> str:
    """`examine`'s findings as text, one fact a line."""
    lines = [
        f"cnpp-trt {found['cnpp-trt']}, Python {found['python']}, {found['platform']}, {found['cpus']} CPUs",
        *(f"  {name} {there or 'not installed'}" for name, there in found["versions"].items()),
        f"ONNX Runtime providers: {', '.join(found['onnxruntime_providers']) or 'none'}",
        f"GPU: {found['gpu'] or 'none found (nvidia-smi does not answer)'}",
        f"TensorRT flavours: {', '.join(found['tensorrt_flavours']) or 'none'}",
        f"home: {found['home']} ({found['home_free_gib']} GiB free)",
        f"bundles: {', '.join(found['bundles']) or 'none'}; {found['plans']} TensorRT plans",
        *(f"{'ok     ' if not missing else 'missing'}  {what}{': ' + missing if missing else ''}"
          for what, missing in found["works"].items()),
    ]  # fmt: skip
    return "\n".join(lines)


def _works(versions: dict[str, str | None], providers: list[str]) -> dict[str, str]:
    """What one can do here; an empty string where it works, else what to install."""
    lacking = [name for name in EXPORT_MODULES if find_spec(name) is None]
    gpu = find_gpu()
    found_gpu = isinstance(gpu, Gpu)
    no_gpu = "" if isinstance(gpu, Gpu) else gpu
    both = versions["onnxruntime"] and versions["onnxruntime-gpu"]
    return {
        "run on ONNX Runtime, CPU": (
            "onnxruntime and onnxruntime-gpu are both installed and break each other: uninstall both, install one"
            if both
            else ("" if "CPUExecutionProvider" in providers else "pip install 'cnpp-trt[cpu]'")
        ),
        "export checkpoints": f"pip install 'cnpp-trt[export]' (lacks {', '.join(lacking)})" if lacking else "",
        "run on OpenVINO, CPU": "" if versions["openvino"] else "pip install 'cnpp-trt[openvino]'",
        "build TensorRT plans": (
            ""
            if versions["tensorrt-rtx"] or (versions["tensorrt"] and found_gpu)
            else f"pip install 'cnpp-trt[{'gpu' if found_gpu else 'rtx'}]'"
        ),
        "run TensorRT plans": no_gpu or _lacking(versions, ("cuda-python", "cuda-core"), ("tensorrt", "tensorrt-rtx")),
        "run on ONNX Runtime, CUDA": no_gpu
        or _lacking(versions, ("cuda-python", "cuda-core", "onnxruntime-gpu"))
        or ("" if "CUDAExecutionProvider" in providers else "onnxruntime-gpu finds no CUDA provider"),
    }


def _lacking(versions: dict[str, str | None], needed: Sequence[str], one_of: Sequence[str] = ()) -> str:
    missing = [name for name in needed if not versions[name]]
    if one_of and not any(versions[name] for name in one_of):
        missing.append(" or ".join(one_of))
    return f"pip install 'cnpp-trt[gpu]' (lacks {', '.join(missing)})" if missing else ""


def installed(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those of `packages` that are installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    except Exception as e:  # a broken native library must not hide the rest of the findings
        print(f"onnxruntime cannot be imported: {e}", file=sys.stderr)
        return []
    return list(onnxruntime.get_available_providers())


def _gpu() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().replace("\n", "; ") or None
