"""The Fréchet distance against its textbook form, closed forms, and resamples drawn one by one."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import sqrtm

from ddsm_engine.quality.frechet import Frechet, moments


def normals(seed: int, rows: int, features: int, scale: float = 1.0, shift: float = 0.0) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((rows, features)) @ random.standard_normal((features, features))
    return (scale * mixed + shift).astype(np.float32)


def distance(rows: NDArray[np.float32], real: NDArray[np.float32]) -> float:
    return float(Frechet.to(*moments(real))(rows, np.ones((1, len(rows)), np.int64))[0])


def textbook(rows: NDArray[np.float32], real: NDArray[np.float32]) -> float:
    """As Heusel et al. 2017 write it, by a root of a matrix that is not symmetric."""
    one, other = (each.astype(np.float64) for each in (rows, real))
    covariances = np.atleast_2d(np.cov(one.T)), np.atleast_2d(np.cov(other.T))
    root = sqrtm(covariances[0] @ covariances[1])
    apart = one.mean(0) - other.mean(0)
    return float(apart @ apart + np.trace(covariances[0] + covariances[1] - 2 * root.real))


@pytest.mark.parametrize(("rows", "features"), [(200, 1), (50, 7), (500, 33), (8, 8), (9, 8)])
def test_it_is_the_textbook_formula(rows: int, features: int) -> None:
    found, real = normals(1, rows, features, 0.7, 0.3), normals(2, 300, features)
    # sqrtm leaves an imaginary part of about 1e-8 where a covariance lacks a rank.
    assert distance(found, real) == pytest.approx(textbook(found, real), rel=1e-6)


@pytest.mark.parametrize("rows", [2, 5, 16, 17])
def test_fewer_images_than_features_have_the_distance_of_their_low_rank_normal(rows: int) -> None:
    """By the eigenvalues of S S', which need no root of either."""
    found, real = normals(3, rows, 16), normals(4, 400, 16)
    mean, covariance = moments(real)
    own_mean, own = moments(found)
    crossed = np.sqrt(np.clip(np.linalg.eigvals(own @ covariance).real, 0, None)).sum()
    expected = ((own_mean - mean) ** 2).sum() + np.trace(own + covariance) - 2 * crossed
    assert distance(found, real) == pytest.approx(expected, rel=1e-6)


def test_in_one_dimension_it_is_the_difference_of_means_and_of_deviations() -> None:
    random = np.random.default_rng(0)
    one, other = (random.normal(m, s, (4000, 1)).astype(np.float32) for m, s in ((1, 2), (-0.5, 3)))
    expected = (one.mean() - other.mean()) ** 2 + (one.std(ddof=1) - other.std(ddof=1)) ** 2
    assert distance(one, other) == pytest.approx(expected, rel=1e-5)


def test_equal_images_have_none() -> None:
    rows = normals(5, 300, 20)
    assert 0 <= distance(rows, rows) < 1e-9


def test_a_shift_adds_its_square() -> None:
    rows = normals(6, 300, 4)
    assert distance(rows + np.float32(2), rows) == pytest.approx(4 * 4, rel=1e-5)


@pytest.mark.parametrize("rows", [12, 60])
def test_a_resample_has_the_distance_of_its_images_written_out(rows: int) -> None:
    found, real = normals(7, rows, 20), normals(8, 400, 20)
    random = np.random.default_rng(0)
    picked = [random.integers(0, rows, rows) for _ in range(3)]
    counts = np.array([np.bincount(each, minlength=rows) for each in picked])
    expected = [distance(found[each], real) for each in picked]
    assert Frechet.to(*moments(real))(found, counts) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rows", [5, 40])
def test_few_real_images_are_no_obstacle(rows: int) -> None:
    """Their covariance lacks ranks, which rounding makes a little less than nothing. The distance is symmetric."""
    found, real = normals(11, rows, 16), normals(12, 5, 16)
    assert distance(found, real) == pytest.approx(distance(real, found), rel=1e-6)


def test_features_that_never_vary_are_no_obstacle() -> None:
    rows, real = normals(9, 100, 3), normals(10, 100, 3)
    rows[:, 1] = real[:, 1] = 0.25
    without = distance(rows[:, [0, 2]], real[:, [0, 2]])
    assert distance(rows, real) == pytest.approx(without, rel=1e-6)
