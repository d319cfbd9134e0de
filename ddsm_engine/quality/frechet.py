"""The Fréchet distance between two normal distributions with the means and covariances of features.

Dowson & Landau 1982; on Inception's features it is the FID of Heusel et al. 2017.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.quality.metric import Counts, Rows, Values

Array = NDArray[np.float64]


def moments(rows: Rows) -> tuple[Array, Array]:
    """Mean [F] and covariance [F, F] of rows [N, F], in float64 and divided by N - 1."""
    exact = rows.astype(np.float64)
    mean = exact.mean(0)
    exact -= mean
    return mean, exact.T @ exact / (len(rows) - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Frechet:
    """|μ - μ'|² + tr(S + S' - 2 (S S')^½) to real images of mean μ' and covariance S'.

    The trace of the root is the sum of the roots of the eigenvalues of S'^½ S S'^½, which is symmetric; S need not have
    full rank, so that fewer images than features will do.

    Attributes:
        mean: μ' [F].
        root: S'^½ [F, F].
    """

    mean: Array
    root: Array

    @classmethod
    def to(cls, mean: Array, covariance: Array) -> "Frechet":
        """To real images of this mean [F] and covariance [F, F]."""
        eigenvalues, vectors = np.linalg.eigh(covariance)
        return cls(mean, vectors * np.sqrt(np.clip(eigenvalues, 0, None)) @ vectors.T)

    def __call__(self, rows: Rows, counts: Counts) -> Values:
        """The distance [R] of every resample."""
        away = rows.astype(np.float64) - self.mean
        return np.array([self._of(away, weights) for weights in counts])

    def _of(self, away: Array, counts: NDArray[np.int64]) -> float:
        """The distance of rows [N, F], from which μ' is subtracted, of which each counts so many times [N]."""
        total = counts.sum()
        mean = counts @ away / total
        centred = (away - mean) * np.sqrt(counts / (total - 1))[:, None]  # S is centredᵀ · centred
        if len(centred) > len(mean):
            product = self.root @ (centred.T @ centred) @ self.root
        else:  # the same eigenvalues but for zeros, of a smaller matrix
            half = centred @ self.root
            product = half @ half.T
        if not np.isfinite(product).all():
            return float("nan")
        crossed = np.sqrt(np.clip(np.linalg.eigvalsh(product), 0, None)).sum()
        # Of equal distributions, rounding could leave a little less than nothing.
        return max(0.0, float(mean @ mean + np.vdot(centred, centred) + np.vdot(self.root, self.root) - 2 * crossed))
