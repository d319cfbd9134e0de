"""Real images, and what is kept of their features: made once for each set of images and network."""

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ddsm_engine.bundle import checksum_of
from ddsm_engine.engine_cache import user_cache_folder
from ddsm_engine.errors import MetricError, OutputError
from ddsm_engine.files import atomic_path, clear_leftovers
from ddsm_engine.quality.features import MAX_FEATURES, Features
from ddsm_engine.quality.frechet import moments
from ddsm_engine.quality.kernel import REAL_ROWS, sample
from ddsm_engine.quality.metric import Description, Identity, Images, Rows
from ddsm_engine.quality.sliced_wasserstein import DIRECTIONS, QUANTILES
from ddsm_engine.untrusted import brief, open_safetensors, shapes_of

FORMAT = "ddsm-statistics"
DESCRIBED = 1024
"""Images turned into floats at a time."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class RealImages:
    """What drawn images are compared with.

    Attributes:
        pixels: [N, C, H, W], uint8 as ``load_images`` reads them, or float32 in [-1, 1].
        sha256: Of their bytes; of uint8 ones it is what a supernet's provenance says of its training data.
    """

    pixels: NDArray[np.uint8] | Images
    sha256: str

    @classmethod
    def of(cls, pixels: NDArray[np.uint8] | Images) -> "RealImages":
        """These images.

        Raises:
            MetricError: too few to compare with, or values that are not finite.
        """
        if not np.isfinite(pixels).all():
            raise MetricError("the images to compare with hold values that are not finite numbers")
        if len(pixels) < 2:
            raise MetricError(f"expected at least 2 images to compare with, found {len(pixels)}")
        return cls(pixels, hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest())

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W]."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def rows(self, description: Description, numbers: NDArray[np.int64] | None = None) -> Rows:
        """Rows [N, F] of all images, or of those of these numbers."""
        pixels = self.pixels if numbers is None else self.pixels[numbers]
        parts = (pixels[first : first + DESCRIBED] for first in range(0, len(pixels), DESCRIBED))
        return np.concatenate([description(in_unit_range(part)) for part in parts])


def in_unit_range(pixels: NDArray[np.uint8] | Images) -> Images:
    """As the supernet saw them: 0…255 → [-1, 1]."""
    return pixels.astype(np.float32) / np.float32(127.5) - 1 if pixels.dtype == np.uint8 else pixels.astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """What is kept of the features of real images.

    Attributes:
        data: SHA-256 of the images.
        images: How many they are.
        features: The identity of what described them.
        mean: [F].
        covariance: [F, F].
        rows: Features of some of them, [M, F].
        quantiles: Of their projections, see ``sliced_wasserstein``; only in the file that is shipped.
    """

    data: str
    images: int
    features: Identity
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    rows: Rows
    quantiles: Rows | None = None


def statistics_of(features: Features, real: RealImages) -> Statistics:
    """The statistics of real images, from the user's cache folder where they were made before.

    A file there that is damaged is named in a warning and made anew. A folder that cannot be written is named, too, and
    stops nothing.
    """
    name = checksum_of({"data": real.sha256, "images": len(real.pixels), **features.identity})[:32]
    file = user_cache_folder() / "statistics" / f"{name}.safetensors"
    if os.access(file, os.R_OK):  # and not is_file, which another user's folder makes fail
        try:
            return read_statistics(file, data=real.sha256, features=features.identity)
        except MetricError as error:
            log.warning("%s; computing anew", error)
    rows = real.rows(features)
    made = Statistics(real.sha256, len(rows), features.identity, *moments(rows), rows[sample(len(rows))])
    try:
        clear_leftovers(file.parent, file.name)
        save_statistics(made, file)
    except (OSError, OutputError) as error:
        log.warning("the statistics of the real images cannot be kept in %s: %s", file, error)
    return made


def save_statistics(
    statistics: Statistics, path: Path, *, half: bool = False, words: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        statistics: Its content.
        path: Its name.
        half: Whether rows and quantiles are rounded to fp16.
        words: Added to its header.
    """
    kept = np.float16 if half else np.float32
    tensors: dict[str, NDArray[Any]] = {
        "mean": statistics.mean, "covariance": statistics.covariance, "rows": statistics.rows.astype(kept)
    }  # fmt: skip
    if statistics.quantiles is not None:
        tensors |= {"quantiles": statistics.quantiles.astype(kept)}
    header = {
        "format": FORMAT,
        "data": statistics.data,
        "images": str(statistics.images),
        **{name: str(value) for name, value in statistics.features.items()},
        "checksum": _checksum(tensors),
        **(words or {}),
    }
    with atomic_path(path) as temporary:
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, temporary, header)


def read_statistics(path: Path, *, data: str, features: Identity) -> Statistics:
    """Read what ``save_statistics`` wrote; shapes are known before a tensor is read.

    Args:
        path: The file.
        data: SHA-256 of the images that it must be of.
        features: The identity of what must have described them.

    Raises:
        MetricError: damaged, or of other images or features.
    """
    expected = {"format": FORMAT, "data": data, **{name: str(value) for name, value in features.items()}}
    try:
        with open_safetensors(path, "np") as file:
            header = file.metadata() or {}
            _check_header(header, expected)
            _check_shapes(shapes_of(file))
            tensors: dict[str, NDArray[Any]] = {name: file.get_tensor(name) for name in shapes_of(file)}
            images = int(header["images"])
        _check_numbers(tensors, header["checksum"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise MetricError(f"{path} is not readable as statistics of these images: {str(error)[:200]}") from error
    return Statistics(
        data,
        images,
        features,
        tensors["mean"].astype(np.float64),
        tensors["covariance"].astype(np.float64),
        tensors["rows"].astype(np.float32),
        tensors["quantiles"].astype(np.float32) if "quantiles" in tensors else None,
    )


def _check_header(header: Mapping[str, str], expected: Mapping[str, str]) -> None:
    for name, value in expected.items():
        if header.get(name) != value:
            raise ValueError(f"its {name} is {brief(header.get(name))}, expected {brief(value)}")


def _check_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    (features,) = shapes["mean"]
    rows = shapes["rows"][0]
    expected = {"mean": (features,), "covariance": (features, features), "rows": (rows, features)}
    if "quantiles" in shapes:
        expected |= {"quantiles": (QUANTILES, DIRECTIONS)}
    if shapes != expected or not 1 <= features <= MAX_FEATURES or not 2 <= rows <= REAL_ROWS:
        raise ValueError(f"its tensors have the shapes {brief(dict(shapes))}")


def _check_numbers(tensors: Mapping[str, NDArray[Any]], checksum: str) -> None:
    if checksum != _checksum(tensors) or not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("its numbers are not those that were written")


def _checksum(tensors: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of the numbers: a flipped bit would otherwise be believed."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode() + tensor.tobytes())
    return digest.hexdigest()
