"""Damage to bundles and killed writers: what the tests do a little of, and the reliability program a lot."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cnpp_trt import Control, Pipeline, Request
from cnpp_trt.bundle import Bundle
from cnpp_trt.errors import CnppError


@dataclass
class Flips:
    """Bundles with one flipped bit each: those that were refused, drew the same picture, or another in silence."""

    refused: int = 0
    same: int = 0
    silent: int = 0


def flip_bits(bundle: Path, count: int, folder: Path, seed: int = 0) -> Flips:
    """Flips one random bit of a copy of `bundle`, draws, and flips it back, `count` times.

    Files are chosen evenly, so that small ones are hit as often as weights; a position in its file evenly too.
    """
    copy = Path(shutil.copytree(bundle, folder / "flipped"))
    files = sorted(p for p in copy.rglob("*") if p.is_file() and p.stat().st_size)
    expected = _draw(copy)
    chosen, found = random.Random(seed), Flips()
    for _ in range(count):
        file = chosen.choice(files)
        position, bit = chosen.randrange(file.stat().st_size), 1 << chosen.randrange(8)
        _flip(file, position, bit)
        try:
            picture = _draw(copy)
        except CnppError as e:
            assert str(e).isprintable(), str(e)
            found.refused += 1
        else:
            if np.array_equal(picture, expected):
                found.same += 1
            else:
                found.silent += 1
        _flip(file, position, bit)
    return found


def _draw(folder: Path) -> np.ndarray:
    """One step with the bundle's first condition and its own settings."""
    pipeline = Pipeline.open(folder, "onnxruntime-cpu", threads=1)
    m = pipeline.bundle.manifest
    image = np.full((m.height, m.width, 3), 120, np.uint8)
    control = Control(next(iter(m.conditions)), image)
    result = pipeline(Request("a house", controls=[control], num_inference_steps=2, seed=1))
    return np.concatenate([result.images.reshape(-1), result.latents.view(np.uint8).reshape(-1)])


def _flip(file: Path, position: int, bit: int) -> None:
    with file.open("r+b") as f:
        f.seek(position)
        byte = f.read(1)[0]
        f.seek(position)
        f.write(bytes([byte ^ bit]))


@dataclass
class Kills:
    """What became of so many commands that were killed: afterwards the store was whole or empty, and the same command
    finished.

    Attributes:
        early: ended before they were killed.
        whole: the store could be opened after the kill.
        none: there was nothing to open.
        piled_up: hidden files and folders that were left after the command that finished.
    """

    killed: int = 0
    early: int = 0
    whole: int = 0
    none: int = 0
    piled_up: int = 0


def kill_exports(checkpoint: Path, moments: int, folder: Path, seed: int = 0) -> Kills:
    """SIGKILL at random moments of `cnpp-trt export`; after each, the bundle opens or is not there, and one at last is.

    Between kills nothing is cleared: each export goes on from what the last one left.
    """
    out = folder / "bundle"
    line = ["export", "--model", str(checkpoint), "--cond", "seg", "--out", str(out)]

    def look(found: Kills) -> None:
        if out.exists():
            Bundle.open(out).verify()
            found.whole += 1
            shutil.rmtree(out)
        else:
            found.none += 1

    return _kill(line, moments, folder, look, seed)


def kill_builds(bundle: Path, moments: int, folder: Path, seed: int = 0) -> Kills:
    """SIGKILL at random moments of `cnpp-trt build`; after each, every plan of the store is whole."""
    from cnpp_trt.engines.store import PlanStore

    plans = folder / "plans"
    line = ["build", "--bundle", str(bundle), "--cond", "seg", "--flavor", "tensorrt-rtx", "--plans", str(plans)]

    def look(found: Kills) -> None:
        there = PlanStore(plans).plans()
        assert not any(plan.damage() for plan in there)
        found.whole += bool(there)
        found.none += not there
        for plan in there:
            shutil.rmtree(plan.folder)

    return _kill(line, moments, folder, look, seed)


def _kill(arguments: Sequence[str], moments: int, folder: Path, look: Callable[[Kills], None], seed: int = 0) -> Kills:
    line = [sys.executable, "-m", "cnpp_trt", *arguments]
    env = {**os.environ, "CNPP_TRT_HOME": str(folder / "home")}
    start = time.monotonic()
    subprocess.run(line, check=True, capture_output=True, env=env, timeout=900)
    whole, found, chosen = time.monotonic() - start, Kills(), random.Random(seed)
    look(Kills())
    for _ in range(moments):
        process = subprocess.Popen(
            line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env, start_new_session=True
        )
        try:
            process.wait(chosen.uniform(0, whole))
            found.early += 1
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            found.killed += 1
        look(found)
    subprocess.run(line, check=True, capture_output=True, env=env, timeout=900)
    found.piled_up = sum(p.name.startswith(".") for p in folder.rglob("*") if "home" not in p.parts)
    look(Kills())
    return found
