"""The sliced Wasserstein distance against scipy's transport plan in one dimension, and closed forms."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from ddsm_engine.errors import MetricError
from ddsm_engine.quality.pixels import Pixels
from ddsm_engine.quality.sliced_wasserstein import DIRECTIONS, QUANTILES, Projections, SlicedWasserstein, quantiles
from tests.quality.networks import SHAPE, noise

PROJECTIONS = Projections(Pixels(SHAPE))


def distance(rows: NDArray[np.float32], real: NDArray[np.float32]) -> float:
    return float(SlicedWasserstein(quantiles(real))(rows, np.ones((1, len(rows)), np.int64))[0])


def transported(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The cheapest pairing of as many values, squared distances summed, by an assignment solver."""
    cost = (one[:, None].astype(np.float64) - other[None]) ** 2
    return float(cost[linear_sum_assignment(cost)].mean())


def test_directions_are_unit_vectors_always_the_same_and_all_over_the_sphere() -> None:
    directions = PROJECTIONS.directions
    assert directions.shape == (np.prod(SHAPE), DIRECTIONS)
    assert np.linalg.norm(directions, axis=0) == pytest.approx(np.ones(DIRECTIONS), rel=1e-6)
    assert (directions == Projections(Pixels(SHAPE)).directions).all()
    # Of independent uniform directions, a scalar product has variance 1 / dimension.
    products = (directions.T @ directions)[np.triu_indices(DIRECTIONS, 1)]
    assert products.std() == pytest.approx(np.prod(SHAPE) ** -0.5, rel=0.05)
    assert abs(products.mean()) < 0.01


@pytest.mark.parametrize("count", [4, 64, QUANTILES])
def test_it_is_the_cheapest_transport_along_every_direction(count: int) -> None:
    """Where the number of images divides that of the quantiles, no image is cut."""
    found, real = (PROJECTIONS(noise(count, seed=seed, bright=lift)) for seed, lift in ((1, 0.2), (2, 0.0)))
    some = slice(0, 5)
    expected = np.sqrt(np.mean([transported(*pair) for pair in zip(found.T[some], real.T[some], strict=True)]))
    assert distance(found[:, some], real[:, some]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [2, 3, 1000, 5000])
def test_equal_images_have_none_whatever_their_number(count: int) -> None:
    rows = PROJECTIONS(noise(count))
    assert distance(rows, rows) == 0


def test_a_shift_of_every_projection_is_the_distance() -> None:
    rows = PROJECTIONS(noise(500))
    assert distance(rows + np.float32(0.75), rows) == pytest.approx(0.75, rel=1e-5)


def test_two_images_stand_for_half_of_the_quantiles_each() -> None:
    rows = np.array([[3.0], [1.0]], np.float32)
    assert np.unique(quantiles(rows), return_counts=True)[1].tolist() == [QUANTILES // 2] * 2
    assert distance(rows, np.array([[1.0], [2.0], [3.0]], np.float32)) == pytest.approx((1 / 3) ** 0.5, rel=0.01)


def test_three_images_share_the_quantiles_evenly_from_both_ends() -> None:
    rows = np.array([[3.0], [1.0], [2.0]], np.float32)
    assert np.unique(quantiles(rows), return_counts=True)[1].tolist() == [341, 342, 341]


def test_a_resample_has_the_distance_of_its_images_written_out() -> None:
    found, real = PROJECTIONS(noise(30, bright=0.1)), PROJECTIONS(noise(200, seed=5))
    random = np.random.default_rng(0)
    picked = [random.integers(0, 30, 30) for _ in range(3)]
    counts = np.array([np.bincount(each, minlength=30) for each in picked])
    expected = [distance(found[each], real) for each in picked]
    assert SlicedWasserstein(quantiles(real))(found, counts) == pytest.approx(expected, rel=1e-12)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(MetricError, match=r"expected images \[3, 8, 8\], found \[1, 8, 8\]"):
        PROJECTIONS(noise(2, (1, 8, 8)))
