"""Commands that are interrupted: what a test does a little of, and the reliability program a lot."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from cnpp_trt.files import PARTIAL, PROGRESS
from PIL import Image

LIMIT = 5.0
"""Seconds in which a command must have ended after a signal."""
LATEST = 12.0
# What of the outcomes is wrong.
WRONG = ("a traceback", "not one line", "another exit status", "longer than 5 s", "left files", "left processes",
         "the next one failed")  # fmt: skip


def commands(bundle: Path, half: Path, checkpoint: Path, folder: Path) -> dict[str, list[str]]:
    """The command lines that are interrupted, each of some seconds.

    Args:
        bundle, half, checkpoint: of the tiny model: fp32, fp16, and what they were exported from.
        folder: for what they write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image = folder / "seg.png"
    Image.fromarray(np.full((64, 64, 3), 120, np.uint8)).save(image)
    lines: dict[str, Sequence[object]] = {
        "run": ["run", "--bundle", bundle, "--cond", "seg", "--image", image, "--steps", 300, "--out", folder / "runs"],
        "export": ["export", "--model", checkpoint, "--cond", "seg", "--out", folder / "exports" / "bundle"],
        "build": ["build", "--bundle", half, "--cond", "seg", "--flavor", "tensorrt-rtx", "--plans", folder / "plans"],
        "bench": [
            "bench", "--bundle", bundle, "--model", checkpoint, "--contender", "pytorch", "--contender",
            "onnxruntime-cpu", "--rounds", 1, "--seconds", 1, "--steps", 30, "--num-images", 4,
            "--no-waterfall", "--out", folder / "results",
        ],
    }  # fmt: skip
    return {name: [sys.executable, "-m", "cnpp_trt", *map(str, line)] for name, line in lines.items()}


def interrupt(line: Sequence[str], moments: int, folder: Path, seed: int = 0) -> Counter[str]:
    """SIGINT or SIGTERM at random moments of a command, every fourth time twice, and what became of each.

    Args: folder: of all that it writes; CNPP_TRT_HOME is in it too.

    A moment is within the command's own time, and within its first `LATEST` seconds.
    """
    env = {**os.environ, "CNPP_TRT_HOME": str(folder / "home")}
    start = time.monotonic()
    subprocess.run(line, check=True, capture_output=True, env=env, timeout=900, cwd=folder)
    whole, found, chosen = time.monotonic() - start, Counter[str](), random.Random(seed)
    for i in range(moments):
        _clear(folder)
        found[_one(line, env, folder, chosen.uniform(0.1, min(whole, LATEST)), chosen.choice([2, 15]), i % 4 == 3)] += 1
    ended = subprocess.run(line, capture_output=True, env=env, timeout=900, cwd=folder)
    if ended.returncode:
        found[WRONG[6]] += 1
    return found


def _one(line: Sequence[str], env: dict[str, str], folder: Path, delay: float, kind: int, twice: bool) -> str:
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True, start_new_session=True, cwd=folder
    )
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=delay)
        return "had ended"
    sent = time.monotonic()
    process.send_signal(kind)
    if twice:
        time.sleep(0.1)
        process.send_signal(kind)
    try:
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return WRONG[3]
    seconds = time.monotonic() - sent
    word = {2: "interrupted", 15: "terminated"}[kind]
    said = [text for text in err.splitlines() if text.startswith(word) and " graphs are kept" not in text]
    if process.returncode == -kind and not err:
        return "had not begun"  # Python itself was starting, and no code of ours had run
    if "Traceback" in err:
        return WRONG[0]
    if process.returncode == 0:
        return "had ended"
    if process.returncode != 128 + kind:
        return WRONG[2]
    if len(said) != 1:
        return WRONG[1]
    if seconds > LIMIT:
        return WRONG[3]
    if _leftovers(folder):
        return WRONG[4]
    time.sleep(0.5)
    if _alive(process.pid):
        os.killpg(process.pid, signal.SIGKILL)
        return WRONG[5]
    return "ended with one line"


def _alive(group: int) -> bool:
    """Whether a process of the group still runs; one that has ended is listed until init asks for its status."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = stat.read_text("utf-8", "replace").rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


def _leftovers(folder: Path) -> list[Path]:
    """What is half-made: hidden files and folders but those that the next export goes on with."""
    hidden = [p for p in folder.rglob("*") if p.name.startswith(".") and "home" not in p.parts]
    kept = [p for p in hidden if PARTIAL in p.name and (p / PROGRESS).is_file()]
    return [p for p in hidden if p not in kept and p.parent not in kept]


def _clear(folder: Path) -> None:
    """What earlier commands finished, so that the next one has something to do."""
    import shutil

    for name in ("exports", "plans", "results", "runs"):
        shutil.rmtree(folder / name, ignore_errors=True)
