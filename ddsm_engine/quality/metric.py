"""One interface for every metric, and how far chance could have moved what it says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.errors import MetricError

Images = NDArray[np.float32]
"""[N, C, H, W] in [-1, 1]."""
Rows = NDArray[np.float32]
"""[N, F]: what a distance reads of each image."""
Counts = NDArray[np.int64]
"""[R, N]: how often each of R resamples has each of N images; every resample has N images in all."""
Values = NDArray[np.float64]
Identity = Mapping[str, str | int]

LEAST_ROWS = 2


class Metric(Protocol):
    """How far images are from real ones; 0 is best.

    ``describe`` is the slow part, and depends on no other image: what was described once can be resampled at will.
    """

    @property
    def name(self) -> str:
        """As people read it."""
        ...

    @property
    def identity(self) -> Identity:
        """JSON values, others whenever the metric could answer otherwise by more than rounding."""
        ...

    def describe(self, images: Images) -> Rows:
        """What the distance reads of every image.

        Raises:
            MetricError: images that the metric does not take, or that leave the numbers.
        """
        ...

    def distance(self, rows: Rows) -> float:
        """The distance of the images that these rows describe.

        Raises:
            MetricError: fewer than ``LEAST_ROWS``, or a distance that is not a finite number.
        """
        ...

    def resampled(self, rows: Rows, counts: Counts) -> Values:
        """The distance [R] of every resample of the images.

        Raises:
            MetricError: as ``distance``.
        """
        ...

    def __call__(self, images: Images) -> float:
        """``distance(describe(images))``."""
        ...


class Description(Protocol):
    """Turns every image into a row, by itself."""

    @property
    def identity(self) -> Identity:
        """JSON values, others whenever the rows could be."""
        ...

    def __call__(self, images: Images) -> Rows:
        """[N, C, H, W] → [N, F].

        Raises:
            MetricError: images that it does not take.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMetric:
    """A metric made of a description of images and a distance between descriptions.

    Attributes:
        name: As people read it.
        identity: See ``Metric.identity``.
        description: From images to rows.
        discrepancy: From rows [N, F] and counts [R, N] to the distances [R] from the real images.
    """

    name: str
    identity: Identity
    description: Description
    discrepancy: Callable[[Rows, Counts], Values]

    def describe(self, images: Images) -> Rows:
        """See ``Metric.describe``."""
        if images.ndim != 4 or len(images) == 0:
            raise MetricError(f"{self.name}: expected images [N, C, H, W], found shape {list(images.shape)}")
        rows = self.description(images)
        if not np.isfinite(rows).all():
            raise MetricError(f"{self.name}: an image is described by what is not a finite number; it cannot be judged")
        return rows

    def distance(self, rows: Rows) -> float:
        """See ``Metric.distance``."""
        return float(self.resampled(rows, np.ones((1, len(rows)), np.int64))[0])

    def resampled(self, rows: Rows, counts: Counts) -> Values:
        """See ``Metric.resampled``."""
        if len(rows) < LEAST_ROWS:
            raise MetricError(f"{self.name} needs {LEAST_ROWS} images at least, found {len(rows)}")
        with np.errstate(over="ignore", invalid="ignore"):  # answered below, in one line
            values = self.discrepancy(rows, counts)
        if not np.isfinite(values).all():
            raise MetricError(
                f"{self.name} of {len(rows)} images is not a finite number; its features may be too large"
            )
        return values

    def __call__(self, images: Images) -> float:
        """See ``Metric``."""
        return self.distance(self.describe(images))


# --- intervals --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Interval:
    """Where the distance of endlessly many such images is likely to lie."""

    low: float
    high: float


def bootstrap(metric: Metric, rows: Rows, *, resamples: int = 200, seed: int = 0) -> Values:
    """The distances [resamples] of as many images, drawn with replacement from those described.

    The same seed and number of images draw the same image numbers, whatever the metric. Real images stay as they are.

    Raises:
        MetricError: fewer than ``LEAST_ROWS`` images, or a distance that is not a finite number.
    """
    count = len(rows)
    if count < LEAST_ROWS:
        raise MetricError(f"{metric.name} needs {LEAST_ROWS} images at least, found {count}")
    random = np.random.default_rng(seed)
    counts = random.multinomial(count, np.full(count, 1 / count), size=resamples)
    # A resample of one image alone has no spread to compare.
    while (alone := (counts > 0).sum(1) < LEAST_ROWS).any():
        counts[alone] = random.multinomial(count, np.full(count, 1 / count), size=int(alone.sum()))
    return metric.resampled(rows, counts)


def interval(metric: Metric, rows: Rows, *, resamples: int = 200, seed: int = 0, level: float = 0.95) -> Interval:
    """The basic bootstrap interval of ``metric.distance(rows)`` (Davison & Hinkley 1997, section 5.2).

    Resampled images repeat, and a Fréchet distance grows with what they lack: its resamples lie above the distance as
    the distance lies above the truth. The basic interval turns them around the distance, where the percentile interval
    would count that bias twice. It may therefore lie below the distance of few images altogether, and reach below 0.

    Args:
        metric: What describes and compares.
        rows: Of the images, from ``metric.describe``.
        resamples: How many are drawn.
        seed: Of which images are.
        level: The share of such intervals that hold the truth.

    Raises:
        MetricError: as ``bootstrap``.
    """
    return basic_interval(metric.distance(rows), bootstrap(metric, rows, resamples=resamples, seed=seed), level)


def paired_interval(
    metric: Metric, rows: Rows, other: Rows, *, resamples: int = 200, seed: int = 0, level: float = 0.95
) -> Interval:
    """The same of ``metric.distance(rows) - metric.distance(other)``, for images drawn from the same noise.

    A resample takes the same image numbers of both, so that what the noise alone decides cancels.

    Raises:
        MetricError: as ``bootstrap``, or another number of images on either side.
    """
    if len(rows) != len(other):
        raise MetricError(f"expected as many images on both sides, of the same noise, found {len(rows)}, {len(other)}")
    one, two = (bootstrap(metric, each, resamples=resamples, seed=seed) for each in (rows, other))
    return basic_interval(metric.distance(rows) - metric.distance(other), one - two, level)


def basic_interval(found: float, resampled: Values, level: float = 0.95) -> Interval:
    """The basic bootstrap interval of what was found, from what resamples gave; see ``interval``."""
    below, above = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(2 * found - float(above), 2 * found - float(below))
