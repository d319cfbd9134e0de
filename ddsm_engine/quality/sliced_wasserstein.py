"""The sliced Wasserstein distance of pixels (Rabin et al. 2011): needs no network and no download."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.noise import INITIAL, SeededNoise
from ddsm_engine.quality.metric import Counts, Identity, Images, Rows, Values
from ddsm_engine.quality.pixels import Pixels

DIRECTIONS = 128
QUANTILES = 1024
"""Of real images in every direction: at the middles of as many equal parts of the distribution."""
SEED = 0


@dataclass(frozen=True)
class Projections:
    """Pixels seen from ``DIRECTIONS`` random directions, always the same ones."""

    pixels: Pixels

    @property
    def identity(self) -> Identity:
        """See ``Description``."""
        return {**self.pixels.identity, "description": "projections", "directions": DIRECTIONS, "seed": SEED}

    @cached_property
    def directions(self) -> NDArray[np.float32]:
        """Unit vectors [C * H * W, DIRECTIONS]."""
        drawn = np.empty((DIRECTIONS, *self.pixels.shape), np.float32)
        SeededNoise(SEED).fill(drawn, INITIAL, 0)
        flat = drawn.reshape(DIRECTIONS, -1)
        unit: NDArray[np.float32] = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        return np.ascontiguousarray(unit.T)

    def __call__(self, images: Images) -> Rows:
        """[N, C, H, W] → [N, DIRECTIONS].

        Raises:
            MetricError: images of another shape.
        """
        rows: Rows = self.pixels(images) @ self.directions
        return rows


def quantiles(rows: Rows) -> Rows:
    """The quantiles [QUANTILES, F] of every column of rows [N, F]."""
    return np.sort(rows, axis=0)[_places(len(rows))]


def _places(count: int) -> NDArray[np.int64]:
    """Where the quantiles at (k + 1/2) / QUANTILES stand among so many sorted values: the smallest that reach them."""
    return -(-count * (2 * np.arange(QUANTILES) + 1) // (2 * QUANTILES)) - 1


@dataclass(frozen=True, slots=True, eq=False)
class SlicedWasserstein:
    """The root of the mean, over all directions, of the squared Wasserstein-2 distance between the projections.

    In one dimension that distance pairs equal quantiles: W₂² = ∫ (F⁻¹(u) - G⁻¹(u))² du, over ``QUANTILES`` of them.

    Attributes:
        real: Quantiles of real images [QUANTILES, F].
    """

    real: Rows

    def __call__(self, rows: Rows, counts: Counts) -> Values:
        """The distance [R] of every resample."""
        squared, places = np.zeros(len(counts)), _places(len(rows))
        for column, real in zip(rows.astype(np.float64).T, self.real.T, strict=True):
            order = np.argsort(column)
            ordered = column[order]
            for number, times in enumerate(counts[:, order]):
                squared[number] += np.mean((np.repeat(ordered, times)[places] - real) ** 2)
        distances: Values = np.sqrt(squared / self.real.shape[1])
        return distances
