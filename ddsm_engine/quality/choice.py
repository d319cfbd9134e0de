"""Which metric do these options mean, and what does it compare with?"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from ddsm_engine.bundle import Bundle
from ddsm_engine.dataset import load_images
from ddsm_engine.errors import MetricError
from ddsm_engine.quality.features import PYTORCH_FID, Features
from ddsm_engine.quality.frechet import Frechet
from ddsm_engine.quality.kernel import Kernel, sample
from ddsm_engine.quality.metric import Description, Identity, Images, Metric, RowMetric, Rows
from ddsm_engine.quality.pixels import Pixels
from ddsm_engine.quality.shipped import DATA_SHA256, SHAPE, shipped_classifier, shipped_statistics
from ddsm_engine.quality.sliced_wasserstein import Projections, SlicedWasserstein, quantiles
from ddsm_engine.quality.statistics import RealImages, Statistics, statistics_of
from ddsm_engine.untrusted import brief

FRECHET: Final = "frechet"
KERNEL: Final = "kernel"
SLICED: Final = "sliced-wasserstein"
KINDS: Final = (FRECHET, KERNEL, SLICED)

TO_FULL_WIDTH: Final = " to the full width's images"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of commands that judge images."""
    group = parser.add_argument_group("how images are judged")
    group.add_argument(
        "--metric", choices=KINDS, help="default: frechet where there is a feature network, else sliced-wasserstein"
    )
    group.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="real images: a folder, .npz, an IDX file or CIFAR-10's .bin (default: the training set, where its "
        "statistics come with the package; else images of the full width)",
    )
    network = group.add_mutually_exclusive_group()
    network.add_argument(
        "--features", type=Path, metavar="FILE", help="a feature network of images in [-1, 1] (.onnx, TorchScript)"
    )
    network.add_argument(
        "--inception", type=Path, metavar="FILE", help="FID's Inception network; shown what pytorch-fid shows it"
    )


def choose_metric(
    bundle: Bundle,
    *,
    kind: str | None,
    data: Path | None,
    features: Path | None,
    inception: Path | None,
    instead: Callable[[], Images] | None,
) -> Metric:
    """The metric that these options mean for images of a bundle.

    Images are compared with ``data``; else with the training set of the bundle's supernet, where its statistics come
    with the package; else with ``instead``. Features are those of ``inception`` or ``features``; else of the classifier
    that comes with the package, where the real images are the ones that it learnt from; else there are none.

    Args:
        bundle: Whose images are judged.
        kind: One of ``KINDS``; None takes the Fréchet distance where there are features, else sliced Wasserstein.
        data: Real images, as ``load_images`` reads them.
        features: A feature network that reads images [N, C, H, W] in [-1, 1].
        inception: FID's network, shown pytorch-fid's preprocessing.
        instead: Draws images of the full width to compare with; None where that makes no sense.

    Raises:
        MetricError: options that do not go together, nothing to compare with, or a network that does not fit.
        DataError: real images that cannot be read or do not fit.
    """
    _refuse_contradictions(kind, features, inception)
    shape, network_file = bundle.manifest.spec.sample_shape, features or inception
    read = None if data is None else RealImages.of(load_images(data, channels=shape[0], image_size=shape[1]))
    trained_on = _training_data(bundle) if read is None else read.sha256
    if network_file is None and shape == SHAPE and trained_on == DATA_SHA256:
        return _to_shipped(kind or FRECHET)
    if network_file is None and kind == FRECHET:
        raise MetricError(
            "a Fréchet distance needs a feature network, and the one that comes with the package knows Fashion-MNIST "
            f"alone; give --inception or --features FILE, or choose --metric {KERNEL} or {SLICED}, which read pixels"
        )
    network = _open(features, inception, shape)
    real, suffix = (read, "") if read is not None else (_drawn(instead), TO_FULL_WIDTH)
    if network is None:
        return _of_pixels(kind or SLICED, real, suffix)
    return _of_features(kind or FRECHET, network, statistics_of(network, real), suffix)


def _refuse_contradictions(kind: str | None, features: Path | None, inception: Path | None) -> None:
    if kind not in (*KINDS, None):
        raise MetricError(f"unknown metric {brief(kind)}; expected {', '.join(KINDS)}")
    if features is not None and inception is not None:
        raise MetricError("a metric has one feature network; give --features or --inception")
    if kind == SLICED and (features or inception):
        raise MetricError(f"--metric {SLICED} reads pixels; leave the feature network out, or choose another --metric")


def _training_data(bundle: Bundle) -> object:
    """The SHA-256 of the images that the bundle's supernet was trained on, or None where nobody says."""
    found: object = bundle.manifest.provenance
    for name in ("supernet", "data", "sha256"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _open(features: Path | None, inception: Path | None, shape: tuple[int, int, int]) -> Features | None:
    if inception is not None:
        return Features.open(inception, shape, preparation=PYTORCH_FID)
    return None if features is None else Features.open(features, shape)


def _drawn(instead: Callable[[], Images] | None) -> RealImages:
    if instead is None:
        raise MetricError("there are no real images to compare with; give --data PATH")
    return RealImages.of(instead())


def _to_shipped(kind: str) -> Metric:
    """To the training images whose statistics come with the package."""
    statistics = shipped_statistics()
    if kind == SLICED:
        assert statistics.quantiles is not None
        return _sliced(Projections(Pixels(SHAPE)), statistics.quantiles, statistics.data, statistics.images)
    return _of_features(kind, shipped_classifier(), statistics)


def _of_features(kind: str, network: Features, statistics: Statistics, suffix: str = "") -> Metric:
    standard = network.preparation == PYTORCH_FID
    if kind == FRECHET:
        name = "FID" if standard else f"Fréchet distance on {network.label}"
        frechet = Frechet.to(statistics.mean, statistics.covariance)
        identity = _identity(kind, network, statistics.data, statistics.images)
        return RowMetric(name=name + suffix, identity=identity, description=network, discrepancy=frechet)
    name = "KID" if standard else f"kernel distance on {network.label}"
    return _kernel(name + suffix, network, statistics.rows, statistics.data, statistics.images)


def _of_pixels(kind: str, real: RealImages, suffix: str) -> Metric:
    count, pixels = len(real.pixels), Pixels(real.shape)
    if kind == KERNEL:
        return _kernel(
            f"kernel distance on pixels{suffix}", pixels, real.rows(pixels, sample(count)), real.sha256, count
        )
    projections = Projections(pixels)
    return _sliced(projections, quantiles(real.rows(projections)), real.sha256, count, suffix)


def _kernel(name: str, description: Description, rows: Rows, data: str, images: int) -> Metric:
    identity = {**_identity(KERNEL, description, data, images), "rows": len(rows)}
    return RowMetric(name=name, identity=identity, description=description, discrepancy=Kernel.to(rows))


def _sliced(projections: Projections, real: Rows, data: str, images: int, suffix: str = "") -> Metric:
    identity = {**_identity(SLICED, projections, data, images), "quantiles": len(real)}
    name = f"sliced Wasserstein distance of pixels{suffix}"
    return RowMetric(name=name, identity=identity, description=projections, discrepancy=SlicedWasserstein(real))


def _identity(kind: str, description: Description, data: str, images: int) -> Identity:
    return {"kind": kind, "data": data, "images": images, **description.identity}
