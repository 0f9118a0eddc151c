"""Capsules read by NumPy and PyTorch, from memory on the host: only the device differs on a GPU."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch.utils.dlpack
from cnpp_trt.runtime import dlpack


class Memory:
    """What owns the values."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values


class Producer:
    """As DeviceArray, on the host."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def __dlpack__(self, **_: Any) -> Any:
        values = self.memory.values
        return dlpack.capsule(values.ctypes.data, values.shape, values.dtype, (dlpack.CPU, 0), self.memory)

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CPU, 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4, 5), (2, 0, 3)])
@pytest.mark.parametrize("read", [np.from_dlpack, torch.utils.dlpack.from_dlpack])
def test_a_consumer_shares_the_memory(read, shape, dtype):
    memory = Memory(np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype))
    alive = weakref.ref(memory)
    array = read(Producer(memory))
    assert np.array_equal(np.asarray(array), memory.values) and np.asarray(array).dtype == dtype
    memory.values[...] = 3
    assert np.array_equal(np.asarray(array), memory.values)
    del memory
    gc.collect()
    assert alive() is not None
    del array
    gc.collect()
    assert alive() is None and not dlpack._shared


def test_a_capsule_that_nobody_reads_frees_its_memory():
    memory = Memory(np.zeros(3))
    alive = weakref.ref(memory)
    capsule = Producer(memory).__dlpack__()
    del memory
    gc.collect()
    assert alive() is not None
    del capsule
    gc.collect()
    assert alive() is None and not dlpack._shared
