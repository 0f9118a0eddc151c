"""What a library is linked against, beside what readelf says of it."""

import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from cnpp_trt.runtime.backends.elf import linked_libraries

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libraries of Linux")


def libraries() -> list[Path]:
    folders = [Path(np.__file__).parent, Path(onnxruntime.__file__).parent / "capi"]
    found = [path for folder in folders for path in sorted(folder.rglob("*.so*"))]
    assert len(found) > 10
    return found


def test_it_says_what_readelf_says() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    for path in libraries():
        text = subprocess.run(["readelf", "-dW", path], capture_output=True, text=True, check=True).stdout
        assert linked_libraries(path) == re.findall(r"\(NEEDED\).*\[(.*)\]", text), path


@pytest.mark.parametrize(
    "content", [b"", b"\x7fELF", b"\x7fELF\x02\x01", b"no library" * 50, b"\x7fELF\x02\x01" + b"\xff" * 100]
)
def test_a_file_that_is_no_library(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.so").write_bytes(content)
    assert linked_libraries(tmp_path / "a.so") == linked_libraries(tmp_path) == linked_libraries(tmp_path / "no") == []


def test_a_damaged_library_raises_nothing(tmp_path: Path) -> None:
    draw = random.Random(0)
    content = min(libraries(), key=lambda path: path.stat().st_size).read_bytes()
    [table] = [int.from_bytes(content[32:40], "little")]
    for _ in range(400):
        damaged = bytearray(content[: draw.choice([len(content), draw.randrange(len(content))])])
        for _ in range(draw.randrange(1, 6)):
            # In the header, in the table of segments, or anywhere.
            at = draw.choice([draw.randrange(64), table + draw.randrange(56 * 12), draw.randrange(len(content))])
            if at < len(damaged):
                damaged[at] = draw.randrange(256)
        (tmp_path / "a.so").write_bytes(damaged)
        linked_libraries(tmp_path / "a.so")
