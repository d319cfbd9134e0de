"""What every metric refuses, and whether intervals hold the truth as often as they say."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ddsm_engine.errors import MetricError
from ddsm_engine.quality import Images, Interval, Rows, bootstrap, interval, paired_interval
from ddsm_engine.quality.frechet import Frechet
from ddsm_engine.quality.metric import Counts, Identity, RowMetric, Values
from ddsm_engine.quality.pixels import Pixels
from tests.quality.networks import SHAPE, noise


@dataclass(frozen=True)
class Columns:
    """The first few pixels."""

    count: int

    @property
    def identity(self) -> Identity:
        return {"description": "columns"}

    def __call__(self, images: Images) -> Rows:
        return images.reshape(len(images), -1)[:, : self.count]


def mean_of(rows: Rows, counts: Counts) -> Values:
    """A distance whose theory is known: the mean of the first column."""
    return np.asarray(counts @ rows[:, 0].astype(np.float64) / counts.sum(1))


def metric_of(discrepancy: Any, columns: int = 1) -> RowMetric:
    return RowMetric(name="a metric", identity={}, description=Columns(columns), discrepancy=discrepancy)


MEAN = metric_of(mean_of)


def column(values: NDArray[np.float64]) -> Rows:
    return values.astype(np.float32)[:, None]


# --- the metric -------------------------------------------------------------------------------------------------------


def test_a_metric_is_its_distance_after_its_description() -> None:
    images = noise(20)
    assert MEAN(images) == MEAN.distance(MEAN.describe(images)) == pytest.approx(images[:, 0, 0, 0].mean(), abs=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_that_is_no_number_is_refused(value: float) -> None:
    images = noise(4)
    images[2, 0, 0, 0] = value
    with pytest.raises(MetricError, match="a metric: an image is described by what is not a finite number"):
        MEAN(images)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_distance_that_is_no_number_is_refused(value: float) -> None:
    metric = metric_of(lambda rows, counts: np.full(len(counts), value))
    with pytest.raises(MetricError, match="a metric of 3 images is not a finite number"):
        metric(noise(3))
    with pytest.raises(MetricError, match="a metric of 3 images is not a finite number"):
        interval(metric, metric.describe(noise(3)))


def test_features_too_large_for_a_covariance_are_refused_without_a_warning() -> None:
    metric = metric_of(Frechet.to(np.zeros(2), np.eye(2)), columns=2)
    rows = np.array([[3e38, 0], [-3e38, 1], [0, 2]], np.float32)
    assert np.isfinite(metric.distance(rows))
    with pytest.raises(MetricError, match="is not a finite number"):
        metric_of(Frechet.to(np.full(2, 1e300), np.eye(2)), columns=2).distance(rows)


@pytest.mark.parametrize("shape", [(0, *SHAPE), (4, 8, 8), (192,)])
def test_what_is_no_stack_of_images_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MetricError, match=r"expected images \[N, C, H, W\]"):
        MEAN(np.zeros(shape, np.float32))


def test_one_image_has_no_distance() -> None:
    rows = MEAN.describe(noise(1))
    for ask in (MEAN.distance, lambda rows: bootstrap(MEAN, rows), lambda rows: interval(MEAN, rows)):
        with pytest.raises(MetricError, match="a metric needs 2 images at least, found 1"):
            ask(rows)


def test_pixels_of_another_shape_are_refused() -> None:
    with pytest.raises(MetricError, match=r"expected images \[3, 8, 8\], found \[3, 8, 9\]"):
        Pixels(SHAPE)(noise(2, (3, 8, 9)))


# --- intervals --------------------------------------------------------------------------------------------------------


def test_resamples_draw_as_many_images_and_the_same_for_every_metric() -> None:
    drawn: list[Counts] = []

    def watched(rows: Rows, counts: Counts) -> Values:
        drawn.append(counts)
        return mean_of(rows, counts)

    for columns, seed in ((1, 0), (7, 0), (1, 1)):
        metric = metric_of(watched, columns)
        bootstrap(metric, metric.describe(noise(30, seed=columns)), resamples=50, seed=seed)
    one, same, other = drawn
    assert one.shape == (50, 30)
    assert (one.sum(1) == 30).all()
    assert (one == same).all()
    assert (one != other).any()


def test_no_resample_is_of_one_image_alone() -> None:
    rows = column(np.array([1.0, 2.0]))
    assert bootstrap(MEAN, rows, resamples=100) == pytest.approx(np.full(100, 1.5))


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(3, 2, 4000)
    found, error = interval(MEAN, column(values), resamples=2000), values.std() / 4000**0.5
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    narrower = interval(MEAN, column(values), resamples=2000, level=0.5)
    assert narrower.high - narrower.low == pytest.approx(2 * 0.674 * error, rel=0.1)


def test_the_interval_is_turned_around_the_distance() -> None:
    """Resamples with a tail above leave the truth below."""

    def lopsided(rows: Rows, counts: Counts) -> Values:
        return np.array([0.0]) if len(counts) == 1 else np.repeat([1.0, 5.0], len(counts) // 2)

    assert interval(metric_of(lopsided), column(np.arange(4.0)), level=1.0) == Interval(-5.0, -1.0)


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    random = np.random.default_rng(0)
    found = [interval(MEAN, column(random.exponential(1, 150)), resamples=300, seed=k) for k in range(300)]
    assert sum(each.low <= 1 <= each.high for each in found) / 300 == pytest.approx(0.94, abs=0.035)


def test_the_interval_of_a_frechet_distance_takes_its_bias_off() -> None:
    """Of 120 images in 8 dimensions it is too large by more than its spread; the truth is 1."""
    random = np.random.default_rng(0)
    frechet = metric_of(Frechet.to(np.zeros(8), np.eye(8)), columns=8)
    held = biased = 0
    for number in range(60):
        rows = random.standard_normal((120, 8)).astype(np.float32)
        rows[:, 0] += 1
        found = interval(frechet, rows, seed=number)
        middle = (found.low + found.high) / 2
        held += found.low <= 1 <= found.high
        biased += abs(frechet.distance(rows) - 1) > abs(middle - 1)
    assert held >= 48
    assert biased >= 36


def test_what_the_noise_decides_cancels_between_paired_images() -> None:
    shared = np.random.default_rng(0).normal(0, 5, 300)
    rows, other = column(shared + 0.4), column(shared + np.random.default_rng(1).normal(0, 0.1, 300))
    truth = float((rows - other).mean())
    paired = paired_interval(MEAN, rows, other)
    assert truth - 0.02 < paired.low < truth < paired.high < truth + 0.02
    alone = interval(MEAN, rows)
    assert alone.high - alone.low > 20 * (paired.high - paired.low)
    turned = paired_interval(MEAN, other, rows)
    assert (turned.low, turned.high) == pytest.approx((-paired.high, -paired.low))


def test_images_are_paired_one_by_one() -> None:
    with pytest.raises(MetricError, match="expected as many images on both sides, of the same noise, found 3, 4"):
        paired_interval(MEAN, column(np.arange(3.0)), column(np.arange(4.0)))


def test_equal_seeds_give_equal_intervals() -> None:
    rows = column(np.random.default_rng(0).normal(0, 1, 50))
    assert interval(MEAN, rows, seed=3) == interval(MEAN, rows, seed=3) != interval(MEAN, rows, seed=4)
