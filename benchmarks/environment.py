"""Where a measurement was taken: what its figures depend on, and nothing that names the machine or its user."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..gpu import find_gpu
from ..messages import printable
from ..versions import PACKAGES, __version__, installed

_GPU_FIELDS = ("name", "driver_version", "memory.total", "compute_cap", "clocks.sm", "clocks.mem", "clocks.max.sm",
               "power.limit", "power.draw", "temperature.gpu")  # fmt: skip
_SAMPLED = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_throttle_reasons.active")
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
    """What nvidia-smi says of CUDA's first GPU, by its own field names; None without one."""
    return _nvidia_smi(*_GPU_FIELDS)


class GpuSampler:
    """Clocks, power, temperature and what slows the GPU down, twice a second while it is a context.

    Attributes:
        ranges: by nvidia-smi's field names the smallest and largest value, or the values where they are no numbers;
            empty without a GPU that nvidia-smi knows.
    """

    def __init__(self) -> None:
        self.ranges: dict[str, str] = {}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "GpuSampler":
        query = _query(_SAMPLED)
        if query is not None:
            with suppress(OSError):
                self._process = subprocess.Popen(
                    [*query, "--loop-ms=500"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is None:
            return
        self._process.terminate()
        lines, _ = self._process.communicate()
        # The last line may be cut off.
        rows = [line.split(",") for line in lines.split("\n")[:-1]]
        columns = zip(*(row for row in rows if len(row) == len(_SAMPLED)), strict=True)
        for field, values in zip(_SAMPLED, columns, strict=False):
            self.ranges[field] = _range([printable(value.strip(), 80) for value in values])


def _range(values: list[str]) -> str:
    numbers = [re.match(r"\d+(\.\d+)?", value) for value in values]
    if not all(numbers) or any(value.startswith("0x") for value in values):
        return ", ".join(dict.fromkeys(values))
    found = sorted(zip((float(number[0]) for number in numbers if number), values, strict=True))
    return found[0][1] if found[0][0] == found[-1][0] else f"{found[0][1]} to {found[-1][1]}"


def gpu_memory_used() -> int | None:
    """Bytes in use on the first GPU, by whomever; None without one, or where its driver does not say."""
    used = _nvidia_smi("memory.used") or {}
    number = used.get("memory.used", "").split()[:1]  # `[N/A]` where the driver does not know it
    return int(number[0]) * 2**20 if number and number[0].isdecimal() else None


def gpu_memory() -> int:
    """Bytes of the first GPU; 0 without one."""
    gpu = find_gpu().gpu
    return gpu.memory if gpu else 0


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


def _query(fields: Sequence[str]) -> list[str] | None:
    """nvidia-smi's command line for CUDA's first GPU; None without the program.

    By its UUID: nvidia-smi counts GPUs in the order of their bus, CUDA by speed and only those that are visible.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    gpu = find_gpu().gpu
    return [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={gpu.uuid if gpu else 0}"]


def _nvidia_smi(*fields: str) -> dict[str, str] | None:
    query = _query(fields)
    if query is None:
        return None
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, map(printable, answer.stdout.strip().split(",")), strict=False))


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
