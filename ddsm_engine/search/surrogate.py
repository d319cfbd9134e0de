"""From errors of single calls to the metric of whole runs: a sum with fitted weights.

A squared error of the network matters more at one noise level than at another, and what that does to a metric no
formula says. A few candidates are drawn and judged, and weights are fitted: one for each band of consecutive groups,
none negative, pulled towards a common one where the candidates say little.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.search.space import Genome, Space

BANDS = 6
PULLS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths of the pull towards a common weight; the one that predicts left-out candidates best is taken."""

TRIES = 50
"""Times as many probes are drawn as are wanted, before fewer are taken."""


@dataclass(frozen=True, slots=True, eq=False)
class Surrogate:
    """What a candidate is expected to score.

    Attributes:
        errors: [groups, variants], what each choice adds to the metric.
        baseline: The metric where nothing is added: of the full width.
        r2: Share of the candidates' variance that is predicted, each by the others alone; below 0 a constant does
            better.
        rank_correlation: Spearman's, of the same predictions.
        candidates: How many it was fitted to.
    """

    errors: NDArray[np.float64]
    baseline: float
    r2: float
    rank_correlation: float
    candidates: int

    def predict(self, genome: Genome) -> float:
        """The metric that a candidate is expected to have."""
        return self.baseline + float(self.errors[np.arange(len(genome)), genome].sum())


def fit_surrogate(
    tables: Sequence[NDArray[np.float64]], genomes: Sequence[Genome], values: Sequence[float]
) -> Surrogate:
    """Fit the weights.

    Args:
        tables: [groups, variants] each: errors of one kind. What is below 0 counts as 0.
        genomes: Candidates that were judged.
        values: Their metric.
    """
    bands = _bands(len(tables[0]))
    scaled = np.stack([_scaled(table) for table in tables])
    features = np.array([_features(scaled, bands, genome) for genome in genomes])
    target = np.array(values)
    left_out = {pull: _predict_left_out(features, target, pull) for pull in PULLS}
    pull = min(PULLS, key=lambda each: float(((left_out[each] - target) ** 2).sum()))
    weights, baseline = _fit(features, target, pull)
    weights = weights.reshape(len(tables), -1)
    errors = np.einsum("kg,kgv->gv", weights[:, bands], scaled)
    spread = float(((target - target.mean()) ** 2).sum())
    r2 = 1 - float(((left_out[pull] - target) ** 2).sum()) / spread if spread else 0.0
    return Surrogate(errors, baseline, r2, _rank_correlation(left_out[pull], target), len(genomes))


def piecewise_probes(space: Space, count: int, *, seed: int) -> list[Genome]:
    """Candidates to fit a surrogate to: two to four runs of random lengths and variants, neighbours unlike each other.

    They are different; in a space that holds few of their kind there are fewer than ``count``.
    """
    rng = np.random.default_rng(seed)
    groups, variants = len(space.groups), len(space.variants)
    probes: list[Genome] = []
    if min(groups, variants) < 2:
        return probes
    for _ in range(TRIES * count):
        cuts = min(int(rng.integers(1, 4)), groups - 1)
        ends = [*sorted(rng.choice(np.arange(1, groups), cuts, replace=False).tolist()), groups]
        genome: list[int] = []
        for end in ends:
            others = [gene for gene in range(variants) if genome[-1:] != [gene]]
            genome += [int(rng.choice(others))] * (end - len(genome))
        if len(probes) < count and tuple(genome) not in probes:
            probes.append(tuple(genome))
    return probes


def _bands(groups: int) -> NDArray[np.int_]:
    """The band of each group."""
    return np.arange(groups) * min(BANDS, groups) // groups


def _scaled(table: NDArray[np.float64]) -> NDArray[np.float64]:
    positive = table.clip(min=0)
    return positive / (positive.mean() or 1.0)


def _features(scaled: NDArray[np.float64], bands: NDArray[np.int_], genome: Genome) -> NDArray[np.float64]:
    """The candidate's errors, summed over each band: [kinds * bands]."""
    chosen = scaled[:, np.arange(len(genome)), genome]
    return np.stack([chosen[:, bands == band].sum(axis=1) for band in range(bands[-1] + 1)], axis=1).ravel()


def _fit(features: NDArray[np.float64], target: NDArray[np.float64], pull: float) -> tuple[NDArray[np.float64], float]:
    """Weights, none negative, and the baseline, of any sign."""
    from scipy.optimize import nnls

    size = features.shape[1]
    together = np.full((size, size), 1 / size)
    # Rows that ask every weight to be the mean of all; columns of ±1 leave the baseline free.
    ridge = np.sqrt(pull * len(features)) * (np.eye(size) - together)
    free = np.ones((len(features), 1))
    matrix = np.block([[features, free, -free], [ridge, np.zeros((size, 2))]])
    solution, _ = nnls(matrix, np.concatenate([target, np.zeros(size)]))
    return solution[:size], float(solution[size] - solution[size + 1])


def _predict_left_out(features: NDArray[np.float64], target: NDArray[np.float64], pull: float) -> NDArray[np.float64]:
    predicted = np.empty_like(target)
    for index in range(len(target)):
        others = np.arange(len(target)) != index
        weights, baseline = _fit(features[others], target[others], pull)
        predicted[index] = features[index] @ weights + baseline
    return predicted


def _rank_correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    from scipy.stats import spearmanr

    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(spearmanr(one, other).statistic)
