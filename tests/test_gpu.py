"""The question to the NVIDIA driver, asked of drivers that are not there, that find nothing, and that find a GPU."""

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import cnpp_trt.gpu
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
        # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16, …_COMPUTE_CAPABILITY_MAJOR = 75, …_MINOR = 76 (cuda.h)
        out._obj.value = {16: 132, 75: capability[0], 76: capability[1]}[attribute]

    def set_uuid(out: Any, device: int) -> None:
        out.raw = bytes(range(16))

    return SimpleNamespace(
        calls=calls,
        cuInit=entry("cuInit", result=status),
        cuDeviceGetCount=entry("cuDeviceGetCount", set_value(devices), status),
        cuDeviceGetName=entry("cuDeviceGetName", set_name),
        cuDeviceTotalMem_v2=entry("cuDeviceTotalMem_v2", set_value(150 * 10**9)),
        cuDeviceGetAttribute=entry("cuDeviceGetAttribute", set_attribute),
        cuDeviceGetUuid_v2=entry("cuDeviceGetUuid_v2", set_uuid),
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
    uuid = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert found == Gpu("NVIDIA H200", (9, 0), 150 * 10**9, "13.0", 132, uuid)
    assert isinstance(found, Gpu)
    assert found.sm == "sm90"
    assert found.kind == "sm90-132-nvidia-h200"


def test_gpus_whose_plans_differ_are_of_different_kinds() -> None:
    """Of one compute capability, as they call themselves."""
    ada = [
        Gpu("NVIDIA L4", (8, 9), 24 << 30, "12.4", 58),
        Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24 << 30, "12.4", 128),
    ]
    hopper = [
        Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30, "12.4", 132),
        Gpu("NVIDIA H200", (9, 0), 141 << 30, "12.4", 132),
        Gpu("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (9, 0), 10 << 30, "12.4", 16),
    ]
    assert len({gpu.kind for gpu in ada + hopper}) == 5


@pytest.mark.parametrize(
    ("driver_cuda", "package", "helps"),
    [("12.2", 13, "to 580 or newer"), ("11.8", 12, "to 525 or newer"), ("13.0", 13, None), ("12.2", None, None)],
)
def test_a_driver_older_than_a_package(driver_cuda: str, package: int | None, helps: str | None) -> None:
    found = Gpu("NVIDIA H200", (9, 0), 150 * 10**9, driver_cuda).too_old_for(package)
    if helps is None:
        assert found is None
    else:
        assert found == (
            f"it is built for CUDA {package} and this machine's driver runs CUDA {driver_cuda}: "
            f"update the driver {helps}"
        )


def test_the_makefile_asks_it_before_anything_is_installed() -> None:
    ended = subprocess.run(
        [sys.executable, "-I", cnpp_trt.gpu.__file__], capture_output=True, text=True, check=True, timeout=60
    )
    assert ended.stdout == ("gpu\n" if find_gpu().gpu else "cpu\n")


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
