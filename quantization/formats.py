"""The two number formats: int8 and fp8 E4M3, symmetric, weights with a scale for each output channel."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class NumberFormat:
    """A format that values are rounded to.

    Attributes:
        name: `int8` or `fp8`.
        largest: the largest number it has, on both sides of 0.
    """

    name: str
    largest: float

    def scale(self, largest: NDArray[Any] | float, dtype: np.dtype[Any]) -> NDArray[Any]:
        """What the numbers are multiplied with to be values as large as `largest`, in `dtype`, which is never 0."""
        least = np.finfo(dtype).tiny * self.largest
        found: NDArray[Any] = (np.maximum(np.asarray(largest, np.float64), least) / self.largest).astype(dtype)
        return found

    def quantize(self, values: NDArray[Any], scale: NDArray[Any], axis: int) -> NDArray[Any]:
        """The numbers nearest to the values; `scale` has one value for each index of `axis`."""
        along = [1] * values.ndim
        along[axis] = -1
        divided = values.astype(np.float32) / scale.astype(np.float32).reshape(along)
        clipped = np.clip(divided, -self.largest, self.largest)
        rounded: NDArray[Any]
        if self.name == "int8":
            rounded = np.rint(clipped).astype(np.int8)
        else:
            from ml_dtypes import float8_e4m3fn

            rounded = clipped.astype(float8_e4m3fn)
        return rounded


# -128 is left out: TensorRT wants ranges that are the same on both sides.
INT8 = NumberFormat("int8", 127.0)
FP8 = NumberFormat("fp8", 448.0)
FORMATS = {f.name: f for f in (INT8, FP8)}
