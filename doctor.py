"""What this machine has and what works on it: `cnpp-trt doctor`, made to be pasted into an issue."""

import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import places
from .gpu import Gpu, find_gpu
from .install import EXPORT_MODULES, install_command
from .install import found as can_import
from .messages import one_line
from .places import MANIFEST, home
from .versions import PACKAGES, __version__, installed


def examine() -> dict[str, Any]:
    """Versions, providers, GPU, TensorRT flavors, folders, and what works here. Nothing heavier than onnxruntime is
    imported."""
    versions = {name: installed([name]).get(name) for name in PACKAGES}
    providers = _providers()
    gpu = _gpu()
    flavors = [name for name in ("tensorrt", "tensorrt-rtx") if versions[name]]
    root = home().absolute()
    bundles = sorted(folder.name for folder in _folders(places.bundles()) if (folder / MANIFEST).exists())
    plans = sum((folder / "plan.json").exists() for folder in _folders(places.plans()))
    existing = next(p for p in (root, *root.parents) if p.exists())
    return {
        "cnpp-trt": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions,
        "onnxruntime_providers": [] if isinstance(providers, str) else providers,
        "gpu": gpu,
        "tensorrt_flavors": flavors,
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
        f"GPU: {found['gpu'] or 'none found by the NVIDIA driver'}",
        f"TensorRT flavors: {', '.join(found['tensorrt_flavors']) or 'none'}",
        f"home: {found['home']} ({found['home_free_gib']} GiB free)",
        f"bundles: {', '.join(found['bundles']) or 'none'}; {found['plans']} TensorRT plans",
        *(f"{'ok     ' if not missing else 'missing'}  {what}{': ' + missing if missing else ''}"
          for what, missing in found["works"].items()),
    ]  # fmt: skip
    return "\n".join(lines)


def _folders(root: Path) -> list[Path]:
    try:
        return [p for p in root.iterdir() if not p.name.startswith(".")]
    except OSError:
        return []


def _works(versions: dict[str, str | None], providers: list[str] | str) -> dict[str, str]:
    """What one can do here; an empty string where it works, else what to do."""
    lacking = [name for name in EXPORT_MODULES if not can_import(name)]
    gpu = find_gpu()
    found_gpu = isinstance(gpu, Gpu)
    no_gpu = "" if isinstance(gpu, Gpu) else gpu
    both = versions["onnxruntime"] and versions["onnxruntime-gpu"]
    broken = providers if isinstance(providers, str) else ""
    there = [] if isinstance(providers, str) else providers
    return {
        "run on ONNX Runtime, CPU": (
            "onnxruntime and onnxruntime-gpu are both installed and break each other: uninstall both, install one"
            if both
            else broken or ("" if "CPUExecutionProvider" in there else install_command("cpu"))
        ),
        "export checkpoints": f"{install_command('export', 'cpu')} (lacks {', '.join(lacking)})" if lacking else "",
        "run on OpenVINO, CPU": "" if versions["openvino"] else install_command("openvino"),
        "build TensorRT plans": (
            ""
            if versions["tensorrt-rtx"] or (versions["tensorrt"] and found_gpu)
            else install_command("gpu" if found_gpu else "rtx")
        ),
        "run TensorRT plans": no_gpu or _lacking(versions, ("cuda-python", "cuda-core"), ("tensorrt", "tensorrt-rtx")),
        "run on ONNX Runtime, CUDA": no_gpu
        or _lacking(versions, ("cuda-python", "cuda-core", "onnxruntime-gpu"))
        or broken
        or ("" if "CUDAExecutionProvider" in there else "onnxruntime-gpu finds no CUDA provider"),
    }


def _lacking(versions: dict[str, str | None], needed: Sequence[str], one_of: Sequence[str] = ()) -> str:
    missing = [name for name in needed if not versions[name]]
    if one_of and not any(versions[name] for name in one_of):
        missing.append(" or ".join(one_of))
    return f"{install_command('gpu')} (lacks {', '.join(missing)})" if missing else ""


def _providers() -> list[str] | str:
    """ONNX Runtime's providers, none where it is not installed; in one line why where it cannot be imported."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return []
    except Exception as e:  # a broken native library must not hide the rest of the findings
        return f"onnxruntime cannot be imported: {one_line(e)}"
    return list(onnxruntime.get_available_providers())


def _gpu() -> str | None:
    gpu = find_gpu()
    if not isinstance(gpu, Gpu):
        return None
    return f"{gpu.name}, {gpu.sm}, {gpu.memory / 2**30:.1f} GiB, CUDA {gpu.cuda}"
