"""Where a measurement was taken: what its figures depend on, and nothing that names the machine or its user."""

import os
import platform
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..messages import printable
from ..versions import PACKAGES, __version__, installed

_GPU_FIELDS = ("name", "driver_version", "memory.total", "compute_cap", "clocks.sm", "clocks.mem", "clocks.max.sm",
               "power.limit", "power.draw", "temperature.gpu")  # fmt: skip
_ROOT = Path(__file__).parent.parent


def environment(threads: int | None = None) -> dict[str, Any]:
    """System, CPU, memory in bytes, GPU with its clocks and power limit, package versions, commit.

    Args:
        threads: that the measured ones were given; None for every physical core.
    """
    return {
        "cnpp-trt": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "memory_bytes": memory_bytes(),
        "gpu": gpu_state(),
        "versions": installed(PACKAGES),
    }


def cpu_name() -> str:
    """The processor's name, as the operating system knows it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or "unknown"


def gpu_state() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU, by its own field names; None without one."""
    return _nvidia_smi(*_GPU_FIELDS)


def gpu_memory_used() -> int | None:
    """Bytes in use on the first GPU, by whomever; None without one, or where its driver does not say."""
    used = _nvidia_smi("memory.used") or {}
    number = used.get("memory.used", "").split()[:1]  # `[N/A]` where the driver does not know it
    return int(number[0]) * 2**20 if number and number[0].isdecimal() else None


def memory_bytes() -> int:
    """Of this machine's host memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def physical_cores() -> int:
    """That this process may run on: what every backend uses by default."""
    threads = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for thread in threads:
        siblings = Path(f"/sys/devices/system/cpu/cpu{thread}/topology/thread_siblings_list")
        cores.add(siblings.read_text("utf-8").strip() if siblings.is_file() else str(thread))
    return len(cores)


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


def _nvidia_smi(*fields: str) -> dict[str, str] | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, map(printable, answer.stdout.strip().split(",")), strict=False))


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
