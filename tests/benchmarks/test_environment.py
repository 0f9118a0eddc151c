"""What other programs say of the machine, and the commands that a result advises to run again."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cnpp_trt.benchmarks import environment as environment_module
from cnpp_trt.benchmarks.environment import GpuSampler, environment, gpu_memory_used
from cnpp_trt.benchmarks.latency.bench import BenchSettings, _command
from cnpp_trt.gpu import Gpu, GpuSearch


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


def test_the_gpu_is_asked_for_by_its_uuid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi and CUDA count GPUs in different orders."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" > {shlex.quote(str(tmp_path / "asked"))}\necho "1 MiB"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    gpu = Gpu("NVIDIA H200", (9, 0), 1 << 30, "13.0", 132, "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f")
    monkeypatch.setattr(environment_module, "find_gpu", lambda: GpuSearch(gpu))
    assert gpu_memory_used() == 1 << 20
    assert f"--id={gpu.uuid}" in (tmp_path / "asked").read_text().split()


def test_the_gpu_is_watched_while_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end, which cuts the last line off; `[N/A]` stays what it is."""
    lines = [
        "1980 MHz, 2619 MHz, 310.52 W, 61, 0x0000000000000000",
        "345 MHz, 2619 MHz, 98.10 W, 58, 0x0000000000000004",
        "1755 MHz, 2619 MHz, [N/A], 70, 0x0000000000000004",
    ]
    program = tmp_path / "nvidia-smi"
    printed = "\n".join([*lines, "1200 MHz, 26"])
    program.write_text(f"#!/bin/sh\nprintf %s {shlex.quote(printed)}\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with GpuSampler() as sampler:
        time.sleep(0.5)
    assert sampler.ranges == {
        "clocks.sm": "345 MHz to 1980 MHz",
        "clocks.mem": "2619 MHz",
        "power.draw": "310.52 W, 98.10 W, [N/A]",
        "temperature.gpu": "58 to 70",
        "clocks_throttle_reasons.active": "0x0000000000000000, 0x0000000000000004",
    }


def test_without_nvidia_smi_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with GpuSampler() as sampler:
        pass
    assert sampler.ranges == {}


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
