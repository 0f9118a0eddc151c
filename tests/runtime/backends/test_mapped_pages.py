"""What was read of a mapped file leaves the memory, and is read again by whoever looks."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from cnpp_trt.runtime.backends.mapped_pages import dropping_pages
from mapped import resident

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc and madvise(2) are Linux's")

SIZE = 8 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "with a space.data"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_pages_go_while_it_lasts_and_when_it_ends(file: Path) -> None:
    content = file.read_bytes()
    array = np.memmap(file, np.uint8, "r")
    assert array.tobytes() == content
    assert resident(file) == SIZE
    with dropping_pages([array[100:200]]):
        assert until(lambda: resident(file) == 0)
        assert array.tobytes() == content
    assert resident(file) == 0
    assert array.tobytes() == content


@pytest.mark.parametrize("mode", ["c", "r+"])
def test_what_can_be_written_stays(file: Path, mode: Literal["c", "r+"]) -> None:
    array: Any = np.memmap(file, np.uint8, mode)
    array[:] = 7
    with dropping_pages([array]):
        pass
    assert (array == 7).all()
    assert resident(file) == SIZE


def test_what_is_no_file_and_what_is_another_files_stays(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other.data"
    copy.write_bytes(file.read_bytes())
    mapped, other = (np.memmap(path, np.uint8, "r") for path in (file, copy))
    own = np.array(mapped)
    assert (own == other).all()
    with dropping_pages([own]):
        pass
    with dropping_pages([mapped]):
        pass
    assert resident(file) == 0
    assert resident(copy) == SIZE
    assert (own == mapped).all()


def test_a_file_that_goes_meanwhile(file: Path) -> None:
    content, array = file.read_bytes(), np.memmap(file, np.uint8, "r")
    with dropping_pages([array]):
        file.unlink()
    assert array.tobytes() == content
