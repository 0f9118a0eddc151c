"""What other programs say of the machine, and the commands that a result advises to run again."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cnpp_trt.benchmarks.environment import environment, gpu_memory_used
from cnpp_trt.benchmarks.latency.bench import BenchSettings, _command


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A program of that name that answers with these words."""

    def answers(text: bytes) -> None:
        (tmp_path / "answer").write_bytes(text)
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat {shlex.quote(str(tmp_path / 'answer'))}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return answers


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(b"1234 MiB\n", 1234 * 2**20), (b"[N/A]\n", None), (b"[Not Supported]\n", None), (b"\n", None), (b"", None)],
)
def test_used_memory_may_be_unknown(nvidia_smi: Any, answer: bytes, expected: int | None) -> None:
    """`[N/A]` is what drivers say of memory that is the host's, and of MIG."""
    nvidia_smi(answer)
    assert gpu_memory_used() == expected


def test_what_a_driver_says_is_printable(nvidia_smi: Any) -> None:
    nvidia_smi(b"A \x1b[31mGPU\x07, 580.1, 80 GiB, 9.0\n")
    found = environment()["gpu"]
    assert found["name"] == "A \\x1b[31mGPU\\x07" and found["compute_cap"] == "9.0"


def test_a_models_name_is_one_word_of_the_command() -> None:
    """As a shell reads it: the name comes from somebody's manifest."""
    name = "a'; touch owned; $(touch owned) `touch owned`"
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(model=name))
    command = _command(bundle, BenchSettings())
    show = f"{shlex.quote(sys.executable)} -c 'import sys; print(sys.argv[3])'"
    printed = subprocess.run(
        ["/bin/sh", "-c", command.replace("cnpp-trt", show, 1)], capture_output=True, text=True, check=True
    ).stdout
    assert printed == f"{name}\n"
