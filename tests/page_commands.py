"""The commands of a page of documents, run as they stand."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path


def commands_of(page: Path) -> list[str]:
    """The lines of its blocks of shell commands."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def run_commands(lines: list[str], tmp_path: Path, needed: Mapping[str, str] | None = None) -> Path:
    """Runs each in one empty folder, which is returned; `cnpp-trt` is this checkout's. Each must succeed.

    Args:
        needed: options with the module that a line needs which has one; without it the line is left out.
    """
    env = {**os.environ, "CNPP_TRT_HOME": str(tmp_path / "home")}
    env["PATH"] = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), env["PATH"]])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cnpp-trt").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cnpp_trt "$@"\n')
    (tmp_path / "bin" / "cnpp-trt").chmod(0o755)
    here = tmp_path / "here"
    here.mkdir()
    for line in _possible(lines, needed or {}):
        ended = subprocess.run(["bash", "-c", line], cwd=here, env=env, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, f"{line}\n{ended.stderr}"
    return here


def _possible(lines: list[str], needed: Mapping[str, str]) -> Iterator[str]:
    for line in lines:
        if not any(option in line and find_spec(module) is None for option, module in needed.items()):
            yield line
