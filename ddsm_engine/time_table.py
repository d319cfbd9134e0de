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

    def __init__(self, rows: NDArray[np.float32]) -> None:
        """Take over a table, float32 [timesteps, features]."""
        self._rows = rows

    @classmethod
    def sinusoidal(cls, timesteps: int, features: int) -> "TimeTable":
        """The table of a network that was trained with ``sinusoid`` itself."""
        return cls(sinusoid(range(timesteps), features))

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
        rows = sinusoid(t, self.features)
        whole = (t == np.floor(t)) & (t >= 0) & (t < self.timesteps)
        rows[whole] = self._rows[t[whole].astype(np.int64)]
        return rows


def sinusoid(timesteps: Timesteps, features: int) -> NDArray[np.float32]:
    """Sine and cosine of t * 10000^(-2i / features), interleaved (Vaswani et al. 2017; pytorch-ddpm's order).

    Args:
        timesteps: Training timesteps, whole or fractional.
        features: Columns, even.

    Returns:
        float32 [len(timesteps), features]; exponents, frequencies and angles are rounded to float32, as the
        published table's are.
    """
    exponents = np.arange(0, features, 2, dtype=np.float32) / np.float32(features) * np.float32(np.log(1e4))
    # In float64, then rounded: float32 exponentials differ between libraries, and a timestep multiplies the difference.
    frequencies = np.exp(-exponents.astype(np.float64)).astype(np.float32)
    angles = np.asarray(timesteps, dtype=np.float32)[:, None] * frequencies
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(angles), features)
