"""The fixture `simulated_gpu` for test modules: runs programs of tests/programs where there is a simulated GPU."""

import importlib.util
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from . import simulator


@dataclass(frozen=True)
class SimulatedGpu:
    folder: Path

    def environment(self, **options: Any) -> dict[str, str]:
        """See simulator.environment."""
        made: dict[str, str] = simulator.environment(self.folder, **options)
        return made

    def program(self, module: str, function: str, *arguments: Any, timeout: float = 120, **options: Any) -> str:
        """What a function of tests/programs/`module`.py prints in a fresh interpreter; the test fails where it does.

        Args:
            arguments: of the function, as text.
            options: of simulator.environment.
        """
        script = Path(__file__).parent.parent / "programs" / f"{module}.py"
        return self._run(script, function, *arguments, timeout=timeout, **options)

    def _run(self, script: Path, *arguments: Any, timeout: float, **options: Any) -> str:
        line = [sys.executable, "-X", "faulthandler", str(script), *map(str, arguments)]
        env = self.environment(**options)
        ended = subprocess.run(line, capture_output=True, text=True, timeout=timeout, env=env)
        assert ended.returncode == 0, f"exit status {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        return ended.stdout


@pytest.fixture(scope="session")
def simulated_gpu(tmp_path_factory: pytest.TempPathFactory) -> SimulatedGpu:
    if not sys.platform.startswith("linux"):
        pytest.skip("the simulated GPU is a Linux library")
    if shutil.which("gcc") is None:
        pytest.skip("the simulated GPU is compiled with gcc, which is not installed")
    try:
        present = importlib.util.find_spec("cuda.core") is not None
    except ModuleNotFoundError:
        present = False
    if not present:
        pytest.skip("cuda-python is not installed")
    folder = tmp_path_factory.mktemp("simulated_gpu")
    simulator.build(folder)
    return SimulatedGpu(folder)
