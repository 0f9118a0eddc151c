"""DLPack capsules made with ctypes: a tensor's memory shared with another library, without a copy.

The layout is that of DLPack's `dlpack.h` (`DLManagedTensor`); who frees what is said in the Python array API standard,
"Data interchange mechanisms".
"""

import ctypes
import itertools
import math
from ctypes import pythonapi
from typing import Any

import numpy as np

CPU = 1
CUDA = 2
"""`DLDeviceType`: kDLCPU, kDLCUDA."""
# DLDataTypeCode, by NumPy's kinds.
_CODES = {"i": 0, "u": 1, "f": 2}
_NAME = b"dltensor"


class _Device(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


# What consumers hold, by the address of the managed tensor: the tensor, its shape and strides, and the memory's owner.
_shared: dict[int, tuple[Any, ...]] = {}

_Free = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@_Free  # type: ignore[untyped-decorator]
def _delete(address: int) -> None:
    _shared.pop(address, None)


@_Free  # type: ignore[untyped-decorator]
def _delete_unread(capsule: int) -> None:
    """The destructor of a capsule. A consumer renames the capsule that it reads, and calls the deleter itself."""
    if _is_valid(capsule, _NAME):
        _delete(_pointer(capsule, _NAME))


# The capsule as an address: as an object it would come to life again while it is destroyed.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", pythonapi))
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", pythonapi)
)


def capsule(address: int, shape: tuple[int, ...], dtype: np.dtype[Any], device: tuple[int, int], owner: object) -> Any:
    """A `PyCapsule` named "dltensor" for C-contiguous memory.

    Args:
        address: of the first value.
        shape, dtype: of the tensor; whole numbers and floats of 8 to 64 bits.
        device: `DLDeviceType` and index.
        owner: is kept alive until the consumer has freed its tensor, or the capsule was dropped unread.
    """
    ndim = len(shape)
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(ndim))
    sizes = (ctypes.c_int64 * (2 * ndim))(*itertools.chain(shape, strides))
    first = ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64))
    after = ctypes.cast(ctypes.byref(sizes, ndim * ctypes.sizeof(ctypes.c_int64)), ctypes.POINTER(ctypes.c_int64))
    kind = _DataType(_CODES[dtype.kind], 8 * dtype.itemsize, 1)
    tensor = _Tensor(address, _Device(*device), ndim, kind, first, after, 0)
    managed = _ManagedTensor(tensor, None, ctypes.cast(_delete, ctypes.c_void_p))
    own = ctypes.addressof(managed)
    _shared[own] = (managed, sizes, owner)
    return _new(own, _NAME, ctypes.cast(_delete_unread, ctypes.c_void_p))
