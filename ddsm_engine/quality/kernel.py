"""The kernel distance: on Inception's features the KID of Bińkowski et al. 2018."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.quality.metric import Counts, Rows, Values

Array = NDArray[np.float64]

REAL_ROWS = 2048
"""Of real images that are kept; the distance has no bias however few they are."""

BLOCK = 1024
"""Rows whose kernels with all others are in memory at once."""


def sample(count: int) -> NDArray[np.int64]:
    """The numbers of the real images that are kept, of so many: ``REAL_ROWS`` at most, always the same ones."""
    return np.sort(np.random.default_rng(0).permutation(count)[:REAL_ROWS])


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """The unbiased estimate of the squared maximum mean discrepancy with the kernel (x · y / F + 1)³.

    Bińkowski et al. 2018, equation 4. Without bias it may fall below 0 where the distributions are alike.

    In a resample an image meets its own copies, which no two images of an endless supply are; such pairs are left out,
    as an image's pair with itself is. Counted in, they would add what all images have with themselves.

    Attributes:
        real: Rows of real images [M, F].
        within: The kernel's mean over their pairs.
    """

    real: Array
    within: float

    @classmethod
    def to(cls, real: Rows) -> "Kernel":
        """To real images of these rows [M, F], two at least."""
        exact = real.astype(np.float64)
        return cls(exact, float(_within(exact, np.ones((1, len(exact))))[0]))

    def __call__(self, rows: Rows, counts: Counts) -> Values:
        """The estimate [R] of every resample."""
        exact, weights = rows.astype(np.float64), counts.astype(np.float64)
        across = np.concatenate([_kernel(block, self.real).mean(1) for block in _blocks(exact)])
        estimates: Values = _within(exact, weights) + self.within - 2 * (weights @ across) / weights.sum(1)
        return estimates


def _within(rows: Array, weights: Array) -> Values:
    """The kernel's weighted mean [R] over all pairs of different rows."""
    total, first = np.zeros(len(weights)), 0
    for block in _blocks(rows):
        own = np.arange(first, first + len(block))
        kernel = _kernel(block, rows)
        kernel[own - first, own] = 0
        total += np.einsum("rb,rb->r", weights[:, own], weights @ kernel.T)
        first += len(block)
    means: Values = total / (weights.sum(1) ** 2 - (weights**2).sum(1))
    return means


def _blocks(rows: Array) -> list[Array]:
    return np.split(rows, range(BLOCK, len(rows), BLOCK))


def _kernel(one: Array, other: Array) -> Array:
    cubed: Array = (one @ other.T / one.shape[1] + 1) ** 3
    return cubed
