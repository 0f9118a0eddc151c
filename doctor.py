"""What this machine has and what works on it: `cnpp-trt doctor`, made to be pasted into an issue."""

import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import places
from .errors import CnppError
from .gpu import Gpu, find_gpu
from .install import EXPORT_MODULES, install_command
from .install import found as can_import
from .messages import one_line
from .places import MANIFEST, home
from .versions import PACKAGES, __version__, installed


def examine() -> dict[str, Any]:
    """Examines this machine, importing nothing heavier than onnxruntime.

    Returns:
        JSON-able findings: versions, providers, GPU, TensorRT flavors, folders, and under `works` what can be done
        here, with None where it works and else what to do about it.
    """
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


def describe(findings: dict[str, Any]) -> str:
    """The findings of `examine` as text, one fact a line."""
    lines = [
        f"cnpp-trt {findings['cnpp-trt']}, Python {findings['python']}, {findings['platform']}, "
        f"{findings['cpus']} CPUs",
        *(f"  {name} {there or 'not installed'}" for name, there in findings["versions"].items()),
        f"ONNX Runtime providers: {', '.join(findings['onnxruntime_providers']) or 'none'}",
        f"GPU: {findings['gpu'] or 'none found by the NVIDIA driver'}",
        f"TensorRT flavors: {', '.join(findings['tensorrt_flavors']) or 'none'}",
        f"home: {findings['home']} ({findings['home_free_gib']} GiB free)",
        f"bundles: {', '.join(findings['bundles']) or 'none'}; {findings['plans']} TensorRT plans",
        *(f"{'ok     ' if not missing else 'missing'}  {what}{': ' + missing if missing else ''}"
          for what, missing in findings["works"].items()),
    ]  # fmt: skip
    return "\n".join(lines)


def _folders(root: Path) -> list[Path]:
    try:
        return [p for p in root.iterdir() if not p.name.startswith(".")]
    except OSError:
        return []


def _works(versions: dict[str, str | None], providers: list[str] | str) -> dict[str, str | None]:
    """What this machine can do: None where it works, else what to do about it."""
    search = find_gpu()
    missing = [name for name in EXPORT_MODULES if not can_import(name)]
    cuda = ("cuda-python", "cuda-core")
    return {
        "run on ONNX Runtime, CPU": _cpu(versions, providers),
        "export checkpoints": f"{install_command('export', 'cpu')} (lacks {', '.join(missing)})" if missing else None,
        "run on OpenVINO, CPU": None if versions["openvino"] else install_command("openvino"),
        "build TensorRT plans": (
            None
            if versions["tensorrt-rtx"] or (versions["tensorrt"] and search.gpu)
            else install_command("gpu" if search.gpu else "rtx")
        ),
        "run TensorRT plans": (
            search.reason or _lacking(versions, cuda, ("tensorrt", "tensorrt-rtx")) or _plans_that_run(search.gpu)
        ),
        "run on ONNX Runtime, CUDA": (
            search.reason
            or _lacking(versions, (*cuda, "onnxruntime-gpu"))
            or _no_provider("CUDA", providers)
            or _cuda_libraries(search.gpu)
        ),
    }


def _plans_that_run(gpu: Gpu | None) -> str | None:
    """Why no flavor of TensorRT runs, or none of the plans that are there; None where one does."""
    from .engines.flavor import installed_flavors, load_flavor
    from .engines.store import PlanStore

    assert gpu is not None
    reasons = []
    for name in installed_flavors():
        try:
            flavor = load_flavor(name)
            runtime = flavor.start_runtime(flavor.logger())
        except CnppError as e:
            reasons.append(str(e))
            continue
        plans = [p for p in PlanStore(None).plans() if (p.key.flavor, p.key.version) == (name, flavor.version)]
        refused = [
            flavor.invalidity(runtime, plan.header) if flavor.runs(plan.key.target, gpu) else "of another GPU"
            for plan in plans
        ]
        if None in refused or not plans:
            return None
        reasons.append(f"none of the {len(plans)} plans of {name} runs on {gpu.name}: {refused[0]}")
    return "; ".join(reasons)


def _cuda_libraries(gpu: Gpu | None) -> str | None:
    """Why ONNX Runtime's CUDA provider cannot be loaded; None where its libraries are there."""
    import onnxruntime

    from .runtime.backends.onnxruntime_cuda import cuda_version, missing_libraries, preload

    assert gpu is not None
    preload(onnxruntime)
    missing = missing_libraries(onnxruntime)
    helps = gpu.too_old_for(cuda_version(onnxruntime))
    if missing:
        return f"{', '.join(missing)} cannot be loaded: {helps or install_command('gpu')}"
    return helps


def _cpu(versions: dict[str, str | None], providers: list[str] | str) -> str | None:
    if versions["onnxruntime"] and versions["onnxruntime-gpu"]:
        return "onnxruntime and onnxruntime-gpu are both installed and break each other: uninstall both, install one"
    if providers == []:
        return install_command("cpu")
    return _no_provider("CPU", providers)


def _no_provider(device: str, providers: list[str] | str) -> str | None:
    if isinstance(providers, str):
        return providers
    return None if f"{device}ExecutionProvider" in providers else f"ONNX Runtime finds no {device} provider"


def _lacking(versions: dict[str, str | None], needed: Sequence[str], one_of: Sequence[str] = ()) -> str | None:
    missing = [name for name in needed if not versions[name]]
    if one_of and not any(versions[name] for name in one_of):
        missing.append(" or ".join(one_of))
    return f"{install_command('gpu')} (lacks {', '.join(missing)})" if missing else None


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
    gpu = find_gpu().gpu
    if gpu is None:
        return None
    return (
        f"{gpu.name}, {gpu.sm}, {gpu.multiprocessors} multiprocessors, {gpu.memory / 2**30:.1f} GiB, "
        f"driver for CUDA {gpu.cuda}"
    )
