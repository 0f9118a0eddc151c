"""Where a measurement was taken: what its figures depend on, and nothing that names the machine or its user."""

import os
import platform
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import __version__
from ..doctor import PACKAGES, installed

_GPU_FIELDS = ("name", "driver_version", "memory.total", "compute_cap", "clocks.sm", "clocks.mem", "clocks.max.sm",
               "power.limit", "power.draw", "temperature.gpu")  # fmt: skip
_ROOT = Path(__file__).parent.parent


def environment(threads: int | None = None) -> dict[str, Any]:
    """System, CPU, memory in bytes, GPU with its clocks and power limit, package versions, commit.

    Args: threads: that the measured ones were given; None for every physical core.
    """
    return {
        "cnpp-trt": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "gpu": gpu_state(),
        "versions": installed(PACKAGES),
    }


def cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or "unknown"


def gpu_state() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU, by its own field names; None without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(_GPU_FIELDS, (value.strip() for value in answer.stdout.strip().split(",")), strict=False))


def commit() -> str | None:
    """Of the checkout that this runs from, with `+` where it was changed; None outside of one."""
    if not (_ROOT / ".git").exists():
        return None
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
