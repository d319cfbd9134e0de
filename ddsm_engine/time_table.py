"""What the network reads of a timestep: rows of a sinusoidal table, made on the host."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Timesteps = Sequence[float] | NDArray[np.float64] | NDArray[np.int64] | range


class TimeTable:
    """The table a network was trained with.

    A published checkpoint carries its own, whose float32 values are the ones the weights know: at an integer timestep
    its row is used as it is. A fractional timestep takes the formula, which agrees with the table to float32 rounding.
    """

    def __init__(self, rows: NDArray[np.float32], shift: int = 0) -> None:
        """Take over a table, float32 [timesteps, features]; ``shift`` is that of ``sinusoid``."""
        self._rows, self._shift = rows, shift

    @classmethod
    def sinusoidal(cls, timesteps: int, features: int, shift: int = 0) -> "TimeTable":
        """The table of a network that was trained with ``sinusoid`` itself."""
        return cls(sinusoid(range(timesteps), features, shift), shift)

    @property
    def timesteps(self) -> int:
        """Length of the training schedule."""
        return len(self._rows)

    @property
    def features(self) -> int:
        """Columns."""
        return int(self._rows.shape[1])

    def __getitem__(self, timesteps: Timesteps) -> NDArray[np.float32]:
        """Rows for these timesteps, float32 [len(timesteps), features]."""
        t = np.asarray(timesteps, dtype=np.float64)
        rows = sinusoid(t, self.features, self._shift)
        whole = (t == np.floor(t)) & (t >= 0) & (t < self.timesteps)
        rows[whole] = self._rows[t[whole].astype(np.int64)]
        return rows


def sinusoid(timesteps: Timesteps, features: int, shift: int = 0) -> NDArray[np.float32]:
    """Sine and cosine of t * 10000^(-i / (features / 2 - shift)), interleaved (pytorch-ddpm's order).

    Without a shift the frequencies are those of Vaswani et al. 2017; Ho et al. 2020 trained with a shift of 1, where
    the slowest is 1 / 10000 itself (diffusers: ``freq_shift``).

    Args:
        timesteps: Training timesteps, whole or fractional.
        features: Columns, even.
        shift: How many frequencies fewer the range from 1 to 1 / 10000 is divided into.

    Returns:
        float32 [len(timesteps), features]; exponents, frequencies and angles are rounded to float32, as the
        published table's are.
    """
    pairs, span = np.arange(features // 2, dtype=np.float32), np.float32(np.log(1e4))
    # The same number in two orders: pytorch-ddpm's, and that of diffusers, whose networks are the shifted ones.
    exponents = span * pairs / np.float32(features // 2 - shift) if shift else 2 * pairs / np.float32(features) * span
    # In float64, then rounded: float32 exponentials differ between libraries, and a timestep multiplies the difference.
    frequencies = np.exp(-exponents.astype(np.float64)).astype(np.float32)
    angles = np.asarray(timesteps, dtype=np.float32)[:, None] * frequencies
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(angles), features)
