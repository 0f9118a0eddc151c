"""Images in the simulated GPU's memory, in and out; run by tests/runtime/backends/test_device_arrays.py."""

import ctypes
import gc
import sys
from dataclasses import replace
from typing import Any

import cuda.bindings.driver as driver
import numpy as np
from cnpp_trt.errors import UserError
from simulator import memory
from tensorrt_simulated import cpu, gpu, opened, request, same


def images_stay_on_the_device() -> None:
    """Read by their address, as a library does that takes the CUDA array interface."""
    pipeline = opened(warm=request())
    gc.collect()
    before = gpu.live_bytes()
    wanted = request(num_images_per_prompt=1, seed=5)
    gpu.clear()
    found = pipeline.on_device(wanted)
    nbytes = cpu(wanted).images.nbytes
    assert not any(call.startswith(f"cuMemcpyDtoHAsync_v2 {nbytes}") for call in gpu.trace()), gpu.trace()
    pipeline(request(seed=6))  # which overwrites the program's buffers
    expected = cpu(wanted)
    for array, values in ((found.images, expected.images), (found.latents, expected.latents)):
        told = array.__cuda_array_interface__
        assert (told["shape"], told["typestr"], told["version"]) == (values.shape, values.dtype.str, 3)
        assert told["stream"] == pipeline.backend.stream and told["data"][1] is False
        pipeline.backend.synchronize()
        read = np.frombuffer(memory(told["data"][0], values.nbytes), values.dtype).reshape(values.shape)
        assert np.array_equal(read, values) and np.array_equal(array.numpy(), values)
    assert gpu.live_bytes() >= before + nbytes
    assert found.timings["total"] > 0 and found.request.seeds == (5,) and repr(found.images).endswith("on GPU 0>")
    del found, array, told, read
    gc.collect()
    assert gpu.live_bytes() == before


def own_context() -> None:
    """As a process has it that uses CUDA itself: the pipeline leaves the current context as it is."""
    ok(driver.cuInit(0))
    ok(driver.cuCtxSetCurrent(ok(driver.cuDevicePrimaryCtxRetain(0))))


def ok(answer: Any) -> Any:
    """What a function of the driver gives; its status must be 0."""
    status, *values = answer
    assert status == driver.CUresult.CUDA_SUCCESS, status
    return values[0] if values else None


class Tensor:
    """An array in device memory of its own, filled on a stream of its own, as another library has it."""

    def __init__(self, pixels: Any, **changes: Any) -> None:
        self.stream, self.pixels = ok(driver.cuStreamCreate(0)), pixels
        self.address = ok(driver.cuMemAlloc(pixels.nbytes))
        ok(driver.cuMemcpyHtoDAsync(self.address, pixels.ctypes.data, pixels.nbytes, self.stream))
        self.changes = changes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        data, stream = (int(self.address), False), int(self.stream)
        told = {"shape": self.pixels.shape, "typestr": "|u1", "data": data, "strides": None, "stream": stream}
        return told | {"version": 3} | self.changes


def on_device(wanted: Any, **changes: Any) -> Any:
    """The request with its control images in device memory."""
    controls = [replace(c, image=Tensor(np.array(c.pixels), **changes)) for c in wanted.controls]
    return replace(wanted, controls=controls)


def control_images_are_read_on_the_device() -> None:
    """The producer's stream is slow: what does not wait for it reads zeros."""
    own_context()
    pipeline = opened(warm=request())
    for seed in (1, 2, 2):
        wanted = request("seg", "depth", seed=seed)
        found, there = pipeline.on_device(on_device(wanted)), pipeline(on_device(wanted))
        expected = cpu(wanted)
        assert np.array_equal(found.images.numpy(), expected.images) and same(there, expected)
        for image, own in zip(there.control_images, expected.control_images, strict=True):
            assert np.array_equal(image, own)
    gpu.clear()
    wanted = on_device(request())
    uploaded = wanted.controls[0].image.owner.pixels.nbytes
    pipeline.on_device(wanted)
    assert sum(call.startswith(f"cuMemcpyHtoDAsync_v2 {uploaded}") for call in gpu.trace()) == 1  # the test's own
    for changes, message in (
        ({"typestr": "<f4"}, "the seg image on a GPU must be uint8 [height, width, 3], not <f4"),
        ({"shape": (3, 64, 64)}, "not |u1 [3, 64, 64]"),
        ({"strides": (1, 64, 4096)}, "must be contiguous, with the color as the last dimension"),
        ({"shape": (8, 8, 3)}, "the seg image on the GPU has 8x8 pixels, the bundle"),
    ):
        try:
            pipeline(on_device(request(), **changes))
        except UserError as e:
            assert message in str(e), e
        else:
            raise AssertionError(message)
    try:
        cpu(on_device(request()))
    except UserError as e:
        assert "onnxruntime-cpu runs on the CPU: give it as a NumPy array" in str(e), e
    else:
        raise AssertionError("a CPU read device memory")


def dlpack_lets_the_consumer_wait() -> None:
    """The capsule is read as `dlpack.h` has it; the consumer's stream waits for the copy of the images."""
    own_context()
    pipeline = opened(warm=request())
    wanted = request(num_images_per_prompt=1, seed=5)
    found, expected = pipeline.on_device(wanted), cpu(wanted).images
    assert found.images.__dlpack_device__() == (2, 0)
    stream = ok(driver.cuStreamCreate(0))
    gpu.clear()
    capsule = found.images.__dlpack__(stream=int(stream), max_version=(1, 0))
    assert [call.split()[0] for call in gpu.trace() if "Event" in call][:3] == [
        "cuEventCreate", "cuEventRecord", "cuStreamWaitEvent"
    ]  # fmt: skip
    gpu.clear()
    found.images.__dlpack__(stream=-1)
    assert not any("Event" in call for call in gpu.trace())
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    raw = ctypes.string_at(pointer(capsule, b"dltensor"), 48)
    address, kind, index, ndim = (int.from_bytes(raw[a:b], "little") for a, b in ((0, 8), (8, 12), (12, 16), (16, 20)))
    assert (kind, index, ndim, raw[20], raw[21], raw[22]) == (2, 0, 4, 1, 8, 1)
    sizes = ctypes.cast(int.from_bytes(raw[24:32], "little"), ctypes.POINTER(ctypes.c_int64))
    assert tuple(sizes[:4]) == expected.shape
    ok(driver.cuStreamSynchronize(stream))
    read = np.frombuffer(memory(address, expected.nbytes), np.uint8).reshape(expected.shape)
    assert np.array_equal(read, expected)
    for wrong in ({"copy": True}, {"dl_device": (1, 0)}):
        try:
            found.images.__dlpack__(**wrong)
        except BufferError:
            continue
        raise AssertionError(wrong)


def requests_are_submitted() -> None:
    pipeline = opened(warm=request())
    first, last = pipeline.submit(request(seed=1)), pipeline.submit_on_device(request(seed=2))
    assert same(first.result(60), cpu(request(seed=1)))
    assert np.array_equal(last.result(60).images.numpy(), cpu(request(seed=2)).images)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[4:])
