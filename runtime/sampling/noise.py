"""PyTorch's CPU random generator in NumPy: the noise that `torch.randn(shape, generator=g)` draws, without PyTorch.

The pieces, with the places in PyTorch's sources that they follow:

- the raw numbers: MT19937, as in `ATen/core/MT19937RNGEngine.h`, which is NumPy's `MT19937` with the state of
  Matsumoto and Nishimura's `init_genrand`;
- 16 values or more: `normal_fill` in `ATen/native/cpu/DistributionTemplates.h`, a Box–Muller transform in float32 on
  blocks of 16 uniforms of 24 bits;
- fewer than 16: `normal_distribution<double>` in `ATen/core/DistributionsHelper.h`, one Box–Muller pair at a time in
  float64, whose second value waits in the generator for the next short draw.

The stream of raw numbers is PyTorch's to the bit. The values agree to a few float32 ulps, because PyTorch's vectorized
`log`, `sin` and `cos` differ from NumPy's (and from its own on CPUs without AVX2) in the last bits.
"""

import math

import numpy as np
import numpy.typing as npt

from ...errors import UserError

BLOCK = 16
"""Values per Box–Muller block: 8 pairs, the radii from the first half of the uniforms, the angles from the second."""


class TorchGenerator:
    """`torch.Generator("cpu").manual_seed(seed)`: stateful, so consecutive draws continue the stream as PyTorch does.

    Args:
        seed: 0 … 2**64 − 1. PyTorch seeds MT19937 with the low 32 bits only, so 2**32 + 5 draws what 5 draws.

    Raises:
        UserError: the seed is outside that range, or no whole number.
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= int(seed) < 2**64:
            raise UserError(f"seed {seed!r} cannot be used: give a whole number from 0 to 2**64 - 1")
        self.seed = int(seed)
        self._engine = np.random.MT19937()
        # Position 624 says that the whole key is used up: the first draw twists it, as PyTorch's engine does.
        self._engine.state = {"bit_generator": "MT19937", "state": {"key": _init_genrand(self.seed), "pos": 624}}
        self._next_normal: float | None = None

    def randn(self, *shape: int) -> npt.NDArray[np.float32]:
        """Standard normal values, as `torch.randn(shape, generator=…, dtype=torch.float32)` draws them.

        Args:
            shape: of the result; none for a scalar array.

        Returns:
            float32 array of that shape, in C order.
        """
        size = math.prod(shape)
        values = self._normal_fill(size) if size >= BLOCK else self._normal_serial(size)
        return values.reshape(shape)

    def _normal_fill(self, size: int) -> npt.NDArray[np.float32]:
        whole = size - size % BLOCK
        uniform = self._uniform(size)
        values = np.empty(size, np.float32)
        values[:whole] = _box_muller(uniform[:whole])
        if whole != size:
            # A ragged end: PyTorch draws the last 16 values anew, over part of the last whole block.
            values[-BLOCK:] = _box_muller(self._uniform(BLOCK))
        return values

    def _normal_serial(self, size: int) -> npt.NDArray[np.float32]:
        values = np.empty(size, np.float32)
        for i in range(size):
            if self._next_normal is not None:
                values[i], self._next_normal = self._next_normal, None
                continue
            u1, u2 = self._uniform_double(), self._uniform_double()
            radius, theta = math.sqrt(-2.0 * math.log1p(-u2)), 2.0 * math.pi * u1
            values[i], self._next_normal = radius * math.cos(theta), radius * math.sin(theta)
        return values

    def _uniform(self, size: int) -> npt.NDArray[np.float32]:
        """[0, 1) from the low 24 bits of each raw number (`uniform_real` in `ATen/core/TransformationHelper.h`)."""
        return (self._engine.random_raw(size) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def _uniform_double(self) -> float:
        """[0, 1) from the low 53 bits of `random64()`, whose high half is drawn first."""
        high, low = (int(raw) for raw in self._engine.random_raw(2))
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53


def _init_genrand(seed: int) -> npt.NDArray[np.uint32]:
    """MT19937's first state, uint32 [624], from the low 32 bits of the seed (`mt19937::init_with_uint32`)."""
    # Not NumPy's own seeding: that mixes seeds of more than 32 bits in by another scheme, PyTorch drops the high bits.
    state = [seed & 0xFFFFFFFF]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ (state[-1] >> 30)) + i) & 0xFFFFFFFF)
    return np.array(state, np.uint32)


def _box_muller(uniform: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """`NormalFill16` on every block: float32 [16 n] in [0, 1) → float32 [16 n], standard normal."""
    u1, u2 = uniform.reshape(-1, 2, BLOCK // 2).swapaxes(0, 1)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - u1))  # 1 − u1 in (0, 1], which the logarithm can take
    theta = np.float32(2 * math.pi) * u2
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1).reshape(-1)
