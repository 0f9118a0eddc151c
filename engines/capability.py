"""Which nodes of a graph a flavor of TensorRT can parse, by Polygraphy's `inspect capability`."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ..errors import BackendError, UserError
from ..install import found, needs
from .flavor import Flavor

_RUN = "import sys; from polygraphy.tools import main; sys.exit(main())"


def capability(flavor: Flavor, onnx: Path) -> str:
    """Polygraphy's findings on an ONNX file: fully supported, or which nodes are not and why.

    Raises:
        UserError: there is no such file.
        BackendError: polygraphy is not installed or fails.
    """
    if not onnx.is_file():
        raise UserError(f"there is no ONNX file {onnx}: a bundle's graphs are its `.onnx` files")
    if not found("polygraphy"):
        raise BackendError(needs("engines capability", "polygraphy"))
    # Polygraphy decides once, when it is imported, which flavor it imports: hence a process of its own.
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1" if flavor.rtx else "0"}
    line = [sys.executable, "-c", _RUN, "inspect", "capability", str(onnx.absolute())]
    with tempfile.TemporaryDirectory() as folder:  # it writes the subgraphs that are supported where it runs
        ended = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=folder)
    findings = [text for text in ended.stdout.splitlines() if "'colored' module" not in text]
    if ended.returncode:
        reason = " ".join((ended.stderr or ended.stdout).split())[-300:]
        raise BackendError(f"polygraphy cannot inspect {onnx}: {reason}")
    return "\n".join(findings).strip()
