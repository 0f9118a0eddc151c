"""`consistency --ray`: the records of one process, from two workers of which one is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cnpp_trt.bundles.embedded import assemble


def workers_of(name: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (path / "cmdline").read_bytes().split(b"\0")[0]
            if command.startswith(b"ray::Worker") and f"CNPP_TEST={name}\0".encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


def records(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".jsonl", ".png")
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_same_records(tmp_path: Path, command: Callable[..., Any]) -> None:
    """To the byte, in their order, also of another bundle beside the deployed one."""
    pytest.importorskip("ray")
    for name in ("bundle", "other"):
        assemble("miniature-lcm", tmp_path / name)
    words = ["consistency", "--bundle", tmp_path / "bundle", "--against", tmp_path / "other", "--cond", "seg"]
    words += ["--cond", "canny", "--prompts", 12, "--num-images", 2, "--backend", "onnxruntime-cpu", "--threads", 1]
    whole = command(*words, "--out", tmp_path / "whole", "--json")
    assert whole.status == 0, whole.err
    name = f"{os.getpid()}-{time.monotonic_ns()}"
    line = [sys.executable, "-m", "cnpp_trt", *map(str, words), "--out", str(tmp_path / "out"), "--json"]
    process = subprocess.Popen(
        [*line, "--ray", "local", "--workers", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "CNPP_TEST": name},
    )  # fmt: skip
    first = tmp_path / "out" / "deployed" / "seg" / "records-1of1.jsonl"
    until = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < until:
        if first.exists() and first.read_bytes().count(b"\n") > 2:
            os.kill(workers_of(name)[0], signal.SIGKILL)
            break
        time.sleep(0.02)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "a worker was lost" in err
    assert records(tmp_path / "out") == records(tmp_path / "whole")
    assert json.loads(out)["conditions"] == json.loads(whole.out)["conditions"]


def test_workers_are_rays(refused: Callable[..., str]) -> None:
    assert "--workers are Ray's" in refused("consistency", "--workers", 2)
