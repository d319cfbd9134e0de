"""How far are drawn images from real ones? The kernel inception distance (KID, Bińkowski et al. 2018).

In place of Inception, which knows photographs, a small classifier is trained on the real images themselves. A KID can
only be compared with one of the same features.
"""

import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cifar10 import SEED
from ddsm_engine.dataset import load_images
from ddsm_engine.errors import DataError

Images = NDArray[np.float32]
Features = NDArray[np.float64]

BLOCKS: Final = 8
"""Disjoint parts of either side, each with an estimate of its own; their spread is the standard error."""

LEAST_ACCURACY: Final = 0.85
"""Of the classifier on the test images; features of one that knows less say little about garments."""

CLASSES: Final = 10
EPOCHS: Final = 2
BATCH: Final = 128
LEARNING_RATE: Final = 1e-3
IDX_UINT8_LABELS: Final = 0x00000801


# --- the distance -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kid:
    """An estimate of KID.

    Attributes:
        mean: Over the blocks; without bias, so that it may fall below 0 where the distributions are alike.
        standard_error: Of the mean, from the blocks' spread.
    """

    mean: float
    standard_error: float


def kid(found: Features, real: Features) -> Kid:
    """KID between two sets of features, [N, F] and [M, F]: the mean of ``mmd2`` over ``BLOCKS`` disjoint blocks."""
    pairs = zip(np.array_split(found, BLOCKS), np.array_split(real, BLOCKS), strict=True)
    each = np.array([mmd2(one, other) for one, other in pairs])
    return Kid(float(each.mean()), float(each.std(ddof=1)) / math.sqrt(BLOCKS))


def mmd2(one: Features, other: Features) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy, with the kernel (x · y / F + 1)³.

    Bińkowski et al. 2018, equation 4. Either side holds two rows at least.
    """
    return _mean_of_others(one) + _mean_of_others(other) - 2 * float(_kernel(one, other).mean())


def _mean_of_others(x: Features) -> float:
    """The kernel's mean over all pairs of different rows."""
    kernel = _kernel(x, x)
    return float((kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1)))


def _kernel(one: Features, other: Features) -> Features:
    cubed: Features = (one @ other.T / one.shape[1] + 1) ** 3
    return cubed


# --- the features -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class RealImages:
    """What drawn images are compared with.

    Attributes:
        classifier: Trained on the training images; the layer before the last one holds the features.
        accuracy: Its share of right answers on the test images.
        features: Of the test images, [N, F].
    """

    classifier: nn.Sequential
    accuracy: float
    features: Features

    def kid_of(self, images: Images) -> Kid:
        """KID of images [N, C, H, W] in [-1, 1], ``2 * BLOCKS`` of them at least, and the test images."""
        return kid(features_of(self.classifier, images), self.features)

    def floor(self) -> Kid:
        """KID of one half of the test images and the other: what images as good as real ones have."""
        half = len(self.features) // 2
        return kid(self.features[:half], self.features[half:])


def learn_real_images(folder: Path, image_size: int) -> RealImages:
    """Train the classifier on the images in a folder of Fashion-MNIST's four IDX files, plain or gzip.

    Images are padded and scaled as ``ddsm train`` does it. One thread trains, so that the same folder gives the same
    features however many cores there are, and a busy machine is no slower for threads that wait for each other.

    Raises:
        DataError: a file that is missing or is not what its name says, or a classifier below ``LEAST_ACCURACY``.
    """
    images, labels = _load(folder, "train", image_size)
    test_images, test_labels = _load(folder, "t10k", image_size)
    with _one_thread():
        classifier = train_classifier(images, labels)
        with torch.inference_mode():
            answers = torch.cat([classifier(part).argmax(1) for part in _in_batches(test_images)]).numpy()
    accuracy = float((answers == test_labels).mean())
    if accuracy < LEAST_ACCURACY:
        raise DataError(
            f"the classifier names {100 * accuracy:.1f} % of the test images in {folder} rightly, expected at least "
            f"{100 * LEAST_ACCURACY:.0f} %; KID on its features would say little: check that these are the four files "
            f"of Fashion-MNIST"
        )
    return RealImages(classifier, accuracy, features_of(classifier, test_images))


def train_classifier(images: Images, labels: NDArray[np.int64]) -> nn.Sequential:
    """Train three convolutions and two linear layers on images [N, C, H, W] and their classes [N]; always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        network = _network(images.shape[1], images.shape[2])
        optimiser = torch.optim.Adam(network.parameters(), LEARNING_RATE)
        for _ in range(EPOCHS):
            for picked in torch.utils.data.BatchSampler(torch.randperm(len(images)).tolist(), BATCH, drop_last=False):
                answers = network(torch.from_numpy(images[picked]))
                loss = F.cross_entropy(answers, torch.from_numpy(labels[picked]))
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
    return network.eval()


def features_of(classifier: nn.Sequential, images: Images) -> Features:
    """Features [N, F] of images [N, C, H, W]: what the classifier's last layer reads."""
    with torch.inference_mode():
        features: Tensor = torch.cat([classifier[:-1](part) for part in _in_batches(images)])
        return features.numpy().astype(np.float64)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _in_batches(images: Images) -> Sequence[Tensor]:
    return torch.split(torch.from_numpy(images), BATCH)


def _network(channels: int, image_size: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, wider in ((channels, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(wide, wider, 3, stride=2, padding=1), nn.ReLU()]
    hidden = nn.Linear(128 * (image_size // 8) ** 2, 128)
    return nn.Sequential(*layers, nn.Flatten(), hidden, nn.ReLU(), nn.Linear(128, CLASSES))


# --- the files --------------------------------------------------------------------------------------------------------


def _load(folder: Path, part: str, image_size: int) -> tuple[Images, NDArray[np.int64]]:
    """Images float32 [N, 1, H, W] in [-1, 1] and their classes."""
    pixels = load_images(_file(folder, f"{part}-images-idx3-ubyte"), channels=1, image_size=image_size)
    file = _file(folder, f"{part}-labels-idx1-ubyte")
    labels = _read_labels(file)
    if len(labels) != len(pixels):
        raise DataError(f"{file} holds {len(labels)} labels, expected one for each of {len(pixels)} images")
    return pixels.astype(np.float32) / np.float32(127.5) - 1, labels


def _file(folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise DataError(f"{folder} holds no {name}, plain or .gz; name the folder of Fashion-MNIST's four IDX files")


def _read_labels(file: Path) -> NDArray[np.int64]:
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as opened:
            magic, count = (int.from_bytes(opened.read(4), "big") for _ in range(2))
            data = opened.read(1 << 20)  # more than there are; a bomb is not unpacked
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} could not be read as labels: {error}") from error
    labels = np.frombuffer(data, np.uint8)
    if magic != IDX_UINT8_LABELS or count != len(labels) or labels.max(initial=0) >= CLASSES:
        raise DataError(f"{file} is not an IDX file of labels below {CLASSES} (magic {magic:#010x}, {count} announced)")
    return labels.astype(np.int64)
