"""Does the fit find the weights that made the values, and say honestly how well it predicts?"""

import itertools

import numpy as np
import pytest

from ddsm_engine.search.space import Space
from ddsm_engine.search.surrogate import fit_surrogate, piecewise_probes

SPACE = Space(("a", "b", "c", "d"), (1,) * 24)
RNG = np.random.default_rng(0)
TABLE = RNG.uniform(0.5, 1.5, (24, 1)) * np.array([8.0, 3.0, 1.0, 0.0])
BAND_WEIGHTS = np.repeat([0.0, 1.0, 2.0, 0.5, 0.0, 4.0], 4)


def true_value(genome: tuple[int, ...], table: np.ndarray = TABLE, weights: np.ndarray = BAND_WEIGHTS) -> float:
    return 7.0 + float((weights * table[np.arange(24), genome]).sum())


def test_weights_that_made_the_values_are_found() -> None:
    probes = [*SPACE.uniform(), *piecewise_probes(SPACE, 30, seed=1)]
    surrogate = fit_surrogate([TABLE], probes, [true_value(genome) for genome in probes])
    assert surrogate.r2 > 0.98
    assert surrogate.rank_correlation > 0.98
    for genome in piecewise_probes(SPACE, 20, seed=2):
        assert surrogate.predict(genome) == pytest.approx(true_value(genome), rel=0.05)
    assert (surrogate.errors >= 0).all()


def test_a_second_kind_of_error_is_used_where_it_explains_more() -> None:
    other = RNG.uniform(0, 2, (24, 4)) * np.array([1, 1, 1, 0])
    probes = piecewise_probes(SPACE, 60, seed=3)
    values = [true_value(genome, other) for genome in probes]
    both, one = fit_surrogate([TABLE, other], probes, values), fit_surrogate([TABLE], probes, values)
    assert both.r2 > one.r2


def test_values_without_any_cause_are_not_claimed_to_be_predicted() -> None:
    probes = piecewise_probes(SPACE, 30, seed=4)
    surrogate = fit_surrogate([TABLE], probes, np.random.default_rng(5).normal(size=30).tolist())
    assert surrogate.r2 < 0.3, "each is predicted by the others alone"


def test_values_that_are_all_alike_are_the_baseline() -> None:
    probes = piecewise_probes(SPACE, 10, seed=6)
    surrogate = fit_surrogate([TABLE], probes, [3.0] * 10)
    assert (surrogate.r2, surrogate.rank_correlation) == (0.0, 0.0)
    assert surrogate.predict(probes[0]) == pytest.approx(3.0)


def test_an_error_below_nothing_counts_as_nothing() -> None:
    better = TABLE.copy()
    better[:, 2] = -1.0
    probes = piecewise_probes(SPACE, 30, seed=7)
    surrogate = fit_surrogate([better], probes, [true_value(genome) for genome in probes])
    assert (surrogate.errors[:, 2] == 0).all()


def test_probes_are_seeded_different_and_of_two_to_four_runs() -> None:
    probes = piecewise_probes(SPACE, 40, seed=8)
    assert probes == piecewise_probes(SPACE, 40, seed=8) != piecewise_probes(SPACE, 40, seed=9)
    assert len(set(probes)) == 40
    runs = {1 + sum(a != b for a, b in itertools.pairwise(genome)) for genome in probes}
    assert runs == {2, 3, 4}


def test_a_small_space_has_no_more_probes_than_candidates() -> None:
    tiny = Space(("a", "b"), (5, 5))
    assert sorted(piecewise_probes(tiny, 10, seed=0)) == [(0, 1), (1, 0)]
    assert piecewise_probes(Space(("a",), (5, 5)), 10, seed=0) == []
    assert len(piecewise_probes(Space(("a", "b"), (1,) * 5), 1000, seed=0)) == 2 * (4 + 6 + 4), "1 to 3 of 4 cuts"
