"""Writers that are killed: what a test does a little of, and the reliability program a lot."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from cnpp_trt.bundles.bundle import Bundle
from cnpp_trt.engines.store import PlanStore
from cnpp_trt.errors import CnppError

# What of the outcomes is wrong.
WRONG = ("left a damaged bundle or plan", "the next one failed", "left files behind")


def kill_exports(checkpoint: Path, moments: int, folder: Path, seed: int = 0) -> Counter[str]:
    """SIGKILL at random moments of `cnpp-trt export` of one condition, and what became of each.

    After each, the bundle is whole or not there. Nothing is cleared in between: each export goes on from what the last
    one left, and when all are killed one more is left to finish.
    """
    out = folder / "exported" / "bundle"

    def look() -> None:
        if out.exists():
            Bundle.open(out).verify()
            shutil.rmtree(out)

    return _kill(["export", "--model", checkpoint, "--cond", "seg", "--out", out], moments, out.parent, look, seed)


def kill_builds(bundle: Path, moments: int, folder: Path, seed: int = 0) -> Counter[str]:
    """As `kill_exports`, of `cnpp-trt build` from an fp16 bundle: every plan in the store is whole."""
    plans = folder / "plans"

    def look() -> None:
        for plan in PlanStore(plans).plans():
            if damage := plan.integrity_error():
                raise CnppError(damage)
            shutil.rmtree(plan.folder)

    line = ["build", "--bundle", bundle, "--cond", "seg", "--flavor", "tensorrt-rtx", "--plans", plans]
    return _kill(line, moments, plans, look, seed)


def _kill(arguments: Sequence[object], moments: int, store: Path, look: Callable[[], None], seed: int) -> Counter[str]:
    line = [sys.executable, "-m", "cnpp_trt", *map(str, arguments)]
    env = {**os.environ, "CNPP_TRT_HOME": str(store.parent / "home")}
    start = time.monotonic()
    subprocess.run(line, check=True, capture_output=True, env=env, timeout=900)
    whole, found, chosen = time.monotonic() - start, Counter[str](), random.Random(seed)
    look()
    for _ in range(moments):
        process = subprocess.Popen(
            line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env, start_new_session=True
        )
        try:
            status = process.wait(chosen.uniform(0, whole))
            outcome = "ended before" if status == 0 else WRONG[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = "killed, and what was there was whole"
        try:
            look()
        except CnppError:
            outcome = WRONG[0]
        found[outcome] += 1
    if subprocess.run(line, capture_output=True, env=env, timeout=900).returncode:
        found[WRONG[1]] += 1
    found[WRONG[2]] += sum(p.name.startswith(".") for p in store.rglob("*"))
    return found
