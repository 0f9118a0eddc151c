"""TensorRT's real Python bindings over a library that stands for TensorRT's own, which are gigabytes.

The bindings are a wheel of a megabyte (wheels.py). `build` compiles `library.c` in the place of what it is linked
against, with the functions that it asks for, and `environment` makes the variables of a process in which
`import tensorrt` then works.
"""

import ctypes
import os
import re
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The lowest that the extra `gpu` takes, and the last of either major version.
VERSIONS = {"10.13": "tensorrt-cu12-bindings==10.13.0.35", "10.16": "tensorrt-cu12-bindings==10.16.1.11"}
VERSIONS |= {"11.4": "tensorrt-cu13-bindings==11.4.0.106"}

# Where the object of library.c lies.
PLACE = 0x10000

# What `tensorrt` is: TensorRT-RTX's package, which is installed, says the same of its own bindings.
_PACKAGE = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
_FACTORIES = ("createInferBuilder_INTERNAL", "createInferRuntime_INTERNAL")
# Where the function `log` is in a logger's table: from 11 on two more and a destructor, which takes two, are before it.
_LOG = {10: 0, 11: 4}


def build(bindings: Path, folder: Path) -> None:
    """Compiles the libraries that the bindings are linked against.

    Args:
        bindings: the folder of the unpacked wheel.
        folder: where the libraries go.
    """
    (folder / "tensorrt").mkdir()
    (folder / "tensorrt" / "__init__.py").write_text(_PACKAGE)
    module = bindings / "tensorrt_bindings" / "tensorrt.so"
    needed = re.findall(r"\(NEEDED\).*\[(lib\w+)\.so\.(\d+)\]", _output("readelf", "--dynamic", "--wide", module))
    wanted = {name: int(major) for name, major in needed if name.startswith("libnv")}
    assert set(wanted) == {"libnvinfer", "libnvinfer_plugin", "libnvonnxparser"}, wanted
    # No version, and in no library that this process has loaded, as Python and the C library are.
    lines = [line.split() for line in _output("nm", "--dynamic", "--undefined-only", module).splitlines()]
    here = ctypes.CDLL(None)
    names = [name for kind, name in lines if kind == "U" and "@" not in name and not hasattr(here, name)]
    assert {*_FACTORIES, "createNvOnnxParser_INTERNAL"} <= set(names) and len(names) < 20, names
    kinds = {name: "FACTORY" for name in _FACTORIES} | {"createNvOnnxParser_INTERNAL": "PARSER"}
    symbols = " ".join(f"{kinds.get(name, 'NOTHING')}({name})" for name in names)
    for name, major in wanted.items():
        library = f"{name}.so.{major}"
        line = ["gcc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-Wl,-soname,{library}"]
        line += [f"-DLOG={_LOG[major]}", f"-DPLACE={PLACE}", f"-DSYMBOLS={symbols}"]
        line += ["-o", str(folder / library), str(HERE / "library.c")]
        ended = subprocess.run(line, capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(f"gcc cannot compile the stub:\n{ended.stderr}")


def environment(bindings: Path, folder: Path, gives: str, base: dict[str, str] | None = None) -> dict[str, str]:
    """The variables of a process that is to import these bindings.

    Args:
        bindings: the folder of the unpacked wheel.
        folder: where `build` put the libraries.
        gives: see library.c.
        base: the variables to begin with; those of this process where None.
    """
    made = {**(os.environ if base is None else base), "TENSORRT_STUB": gives}
    for name, first in (("LD_LIBRARY_PATH", [folder]), ("PYTHONPATH", [folder, bindings])):
        made[name] = os.pathsep.join([*map(str, first), *filter(None, [made.get(name)])])
    return made


def _output(*line: str | Path) -> str:
    return subprocess.run([*map(str, line)], check=True, capture_output=True, text=True).stdout
