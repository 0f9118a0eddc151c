"""The question to the NVIDIA driver, asked of drivers that are not there, that find nothing, and that find a GPU."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from cnpp_trt.gpu import Gpu, GpuSearch, find_gpu


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    find_gpu.cache_clear()
    yield
    find_gpu.cache_clear()


def driver(status: int = 0, devices: int = 1, version: int = 13000, capability: tuple[int, int] = (9, 0)) -> Any:
    """A driver library, as far as it is asked; `calls` says what it was."""
    calls: list[str] = []

    def entry(name: str, answer: Callable[..., None] = lambda *a: None, result: int = 0) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            calls.append(name)
            answer(*arguments)
            return result

        return call

    def set_name(buffer: Any, size: int, device: int) -> None:
        assert device == 0
        buffer.value = b"NVIDIA H200"[: size - 1]

    def set_value(value: int) -> Callable[..., None]:
        return lambda out, *_: setattr(out._obj, "value", value)

    def set_attribute(out: Any, attribute: int, device: int) -> None:
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75, …_MINOR = 76 (cuda.h)
        out._obj.value = {75: capability[0], 76: capability[1]}[attribute]

    return SimpleNamespace(
        calls=calls,
        cuInit=entry("cuInit", result=status),
        cuDeviceGetCount=entry("cuDeviceGetCount", set_value(devices), status),
        cuDeviceGetName=entry("cuDeviceGetName", set_name),
        cuDeviceTotalMem_v2=entry("cuDeviceTotalMem_v2", set_value(150 * 10**9)),
        cuDeviceGetAttribute=entry("cuDeviceGetAttribute", set_attribute),
        cuDriverGetVersion=entry("cuDriverGetVersion", set_value(version)),
    )


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[str]]:
    """Puts a driver, or what opening it raises, in the real one's place; returns the names of opened libraries."""

    def put(library: Any) -> list[str]:
        opened: list[str] = []

        def load(name: str) -> Any:
            opened.append(name)
            if isinstance(library, Exception):
                raise library
            return library

        monkeypatch.setattr(ctypes, "CDLL", load)
        return opened

    return put


@pytest.mark.parametrize(("platform", "file"), [("linux", "libcuda.so.1"), ("win32", "nvcuda.dll")])
def test_no_driver(install: Any, monkeypatch: pytest.MonkeyPatch, platform: str, file: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    opened = install(OSError(f"{file}: cannot open shared object file: No such file or directory"))
    assert find_gpu() == GpuSearch(None, f"no NVIDIA driver ({file})")
    assert opened == [file]


@pytest.mark.parametrize(("status", "devices"), [(100, 0), (999, 1), (0, 0)])
def test_a_driver_without_a_gpu(install: Any, status: int, devices: int) -> None:
    library = driver(status, devices)
    install(library)
    assert find_gpu() == GpuSearch(None, f"the NVIDIA driver finds no GPU (cuInit: {status})")
    assert "cuDeviceGetName" not in library.calls


def test_a_gpu(install: Any) -> None:
    install(driver())
    found = find_gpu().gpu
    assert found == Gpu("NVIDIA H200", (9, 0), 150 * 10**9, "13.0")
    assert isinstance(found, Gpu)
    assert found.sm == "sm90"


@pytest.mark.parametrize(
    ("version", "cuda", "capability", "sm"),
    [(12080, "12.8", (8, 9), "sm89"), (13020, "13.2", (12, 0), "sm120"), (11040, "11.4", (7, 5), "sm75")],
)
def test_versions(install: Any, version: int, cuda: str, capability: tuple[int, int], sm: str) -> None:
    install(driver(version=version, capability=capability))
    found = find_gpu().gpu
    assert isinstance(found, Gpu)
    assert (found.cuda, found.sm) == (cuda, sm)


def test_the_driver_is_asked_once(install: Any) -> None:
    opened = install(driver())
    assert find_gpu() is find_gpu()
    assert len(opened) == 1


def test_this_machine() -> None:
    """Whatever it is: an answer that makes sense, in agreement with whether the library can be opened at all."""
    found = find_gpu()
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(library)
    except OSError:
        assert found == GpuSearch(None, f"no NVIDIA driver ({library})")
        return
    if found.gpu is not None:
        assert found.gpu.name
        assert found.gpu.compute_capability >= (3, 0)
        assert found.gpu.memory > 2**28
        assert 11 <= float(found.gpu.cuda) < 100
        assert found.reason == ""
    else:
        assert "no GPU" in found.reason
