"""The classifier of Fashion-MNIST whose features tell drawn garments from real ones.

    python -m ddsm_export.training.classifier FOLDER -o DIR

It trains on the four IDX files in FOLDER and writes what ``ddsm_engine/quality/data`` holds: the network as ONNX, the
statistics of the training images, and a card. One thread and one seed: the same folder gives the same network.
"""

import argparse
import gzip
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ddsm_engine.cli import guarded
from ddsm_engine.dataset import load_images
from ddsm_engine.errors import DataError
from ddsm_engine.files import atomic_path, clear_leftovers, write_atomically
from ddsm_engine.measure.environment import environment
from ddsm_engine.quality.features import Features
from ddsm_engine.quality.frechet import Frechet, moments
from ddsm_engine.quality.kernel import Kernel, sample
from ddsm_engine.quality.metric import Rows
from ddsm_engine.quality.pixels import Pixels
from ddsm_engine.quality.shipped import CARD, CLASSIFIER, LABEL, SHAPE, STATISTICS
from ddsm_engine.quality.sliced_wasserstein import DIRECTIONS, QUANTILES, Projections, SlicedWasserstein, quantiles
from ddsm_engine.quality.statistics import RealImages, Statistics, read_statistics, save_statistics
from ddsm_export.onnx import write_onnx

SEED: Final = 0
FEATURES: Final = 64
CLASSES: Final = 10

EPOCHS: Final = 10
BATCH: Final = 128
LEARNING_RATE: Final = 3e-3
"""At its highest: it rises over the first fifth of the steps and falls to nothing."""
WEIGHT_DECAY: Final = 1e-2
MOST_SHIFT: Final = 2
"""Pixels; the images are padded by as many, so that a shift loses nothing."""

LEAST_ACCURACY: Final = 0.91
"""Of the test images; features of a network that knows less say little about garments."""

FLOOR_PARTS: Final = (1, 2, 10, 40)
"""Into how many parts the test images are split to say what real images have."""

IDX_UINT8_LABELS: Final = 0x00000801


class Classifier(nn.Module):
    """Three convolutions and two linear layers; what lies between these two are the features.

    The features are of about unit variance each, by a norm without parameters, and are taken before the ReLU, where
    they are nearer to the normal distribution that a Fréchet distance takes them for.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for wide, wider in ((1, 32), (32, 64), (64, 128)):
            layers += [
                nn.Conv2d(wide, wider, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()
            ]  # fmt: skip
        hidden = nn.Linear(128 * (SHAPE[1] // 8) ** 2, FEATURES, bias=False)
        self.features = nn.Sequential(*layers, nn.Flatten(), hidden, nn.BatchNorm1d(FEATURES, affine=False))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(FEATURES, CLASSES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 1, 32, 32] in [-1, 1] → features [N, 64] and logits [N, 10]."""
        features = self.features(images)
        return features, self.head(features)


def train_classifier(images: NDArray[np.uint8], labels: NDArray[np.int64], *, epochs: int) -> Classifier:
    """Train on images [N, 1, 32, 32] and their classes [N]; the same images give the same network.

    Half of the images are mirrored and all are shifted by up to ``MOST_SHIFT`` pixels, anew in every epoch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = Classifier()
        optimiser = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
        steps = epochs * -(-len(images) // BATCH)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, steps, pct_start=0.2)
        for _ in range(epochs):
            for picked in np.split(torch.randperm(len(images)).numpy(), range(BATCH, len(images), BATCH)):
                _, logits = network(varied(in_unit_range(images[picked])))
                loss = F.cross_entropy(logits, torch.from_numpy(labels[picked]))
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                rate.step()
    return network.eval()


def varied(images: Tensor) -> Tensor:
    """Images [N, 1, 32, 32], half of them mirrored, each shifted by its own few pixels."""
    count, _, height, width = images.shape
    mirrored = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(-1), images)
    down, right = torch.randint(-MOST_SHIFT, MOST_SHIFT + 1, (2, count, 1))
    rows = ((torch.arange(height) + down) % height)[:, :, None]
    columns = ((torch.arange(width) + right) % width)[:, None, :]
    return mirrored[torch.arange(count)[:, None, None], 0, rows, columns][:, None]


def in_unit_range(pixels: NDArray[np.uint8]) -> Tensor:
    """As the supernet saw them: 0…255 → [-1, 1]."""
    return torch.from_numpy(pixels).float() / 127.5 - 1


def accuracy(network: Classifier, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """The share of images [N, 1, 32, 32] whose class [N] the network names."""
    with torch.inference_mode():
        parts = [network(in_unit_range(part))[1].argmax(1) for part in np.split(images, range(500, len(images), 500))]
    return float((torch.cat(parts).numpy() == labels).mean())


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- what is shipped --------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = argparse.ArgumentParser(prog="python -m ddsm_export.training.classifier", description=__doc__)
    p.add_argument("data", type=Path, metavar="FOLDER", help="Fashion-MNIST's four IDX files, plain or .gz")
    p.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where the files are written")
    arguments = p.parse_args(argv)
    return guarded(lambda: make_classifier(arguments.data, arguments.output, epochs=EPOCHS))


def make_classifier(data: Path, output: Path, *, epochs: int) -> None:
    """Train, and write network, statistics and card.

    Raises:
        DataError: files that are not Fashion-MNIST's, or a network below ``LEAST_ACCURACY``; nothing is written.
    """
    images, labels = load_part(data, "train")
    test_images, test_labels = load_part(data, "t10k")
    with _one_thread():
        network = train_classifier(images, labels, epochs=epochs)
        right = accuracy(network, test_images, test_labels)
    if right < LEAST_ACCURACY:
        raise DataError(
            f"the classifier names {100 * right:.1f} % of the test images in {data} rightly, expected at least "
            f"{100 * LEAST_ACCURACY:.0f} %; distances on its features would say little: check that these are the four "
            f"files of Fashion-MNIST"
        )
    for name in (CLASSIFIER, STATISTICS, CARD):
        clear_leftovers(output, name)
    with atomic_path(output / CLASSIFIER) as temporary:
        write_onnx(network, (torch.zeros(2, *SHAPE),), temporary, inputs=["images"], outputs=["features", "logits"])
    features = Features.open(output / CLASSIFIER, SHAPE, label=LABEL)
    projections = Projections(Pixels(SHAPE))
    made = describe(RealImages.of(images), features, projections)
    save_statistics(made, output / STATISTICS, half=True, words={"accuracy": str(right)})
    statistics = read_statistics(output / STATISTICS, data=made.data, features=made.features)
    floors = floors_of(RealImages.of(test_images), features, projections, statistics)
    write_atomically(output / CARD, card(output, statistics, right, floors, epochs).encode())


def describe(real: RealImages, features: Features, projections: Projections) -> Statistics:
    """The statistics of real images that are shipped, quantiles included."""
    rows = real.rows(features)
    mean, covariance = moments(rows)
    return Statistics(
        data=real.sha256,
        images=len(rows),
        features=features.identity,
        mean=mean,
        covariance=covariance,
        rows=rows[sample(len(rows))],
        quantiles=quantiles(real.rows(projections)),
    )


Floors = dict[int, tuple[float, float, float]]
"""Number of images → the Fréchet, the kernel and the sliced Wasserstein distance."""


def floors_of(test: RealImages, features: Features, projections: Projections, statistics: Statistics) -> Floors:
    """What real images that nothing was trained on have; of less than all of them, the mean over disjoint parts."""
    assert statistics.quantiles is not None
    described, projected = test.rows(features), test.rows(projections)
    frechet = Frechet.to(statistics.mean, statistics.covariance)
    kernel, sliced = Kernel.to(statistics.rows), SlicedWasserstein(statistics.quantiles)
    order = np.random.default_rng(SEED).permutation(len(described))
    floors = {}
    for parts in FLOOR_PARTS:
        split = np.array_split(order, parts)
        each = [
            (_value(frechet, described[part]), _value(kernel, described[part]), _value(sliced, projected[part]))
            for part in split
        ]
        found = np.mean(each, axis=0)
        floors[len(split[0])] = float(found[0]), float(found[1]), float(found[2])
    return floors


def _value(distance: Frechet | Kernel | SlicedWasserstein, rows: Rows) -> float:
    return float(distance(rows, np.ones((1, len(rows)), np.int64))[0])


def card(folder: Path, statistics: Statistics, right: float, floors: Floors, epochs: int) -> str:
    """The README beside the files."""
    sizes = " and ".join(
        f"`{name}` ({(folder / name).stat().st_size / 1e6:.2f} MB)" for name in (CLASSIFIER, STATISTICS)
    )
    facts = {
        "data": "Fashion-MNIST, 60,000 training and 10,000 test images, padded from 28x28 to 32x32; MIT licence, "
        "Copyright 2017 Zalando SE",
        "network": "three 3x3 convolutions of stride 2 (32, 64, 128 channels) with batch norm and ReLU, a linear layer "
        f"to {FEATURES} features and a batch norm without parameters; ReLU and a linear layer to {CLASSES} classes",
        "reads, answers": f"`images` [batch, 1, 32, 32] in [-1, 1] → `features` [batch, {FEATURES}], before their "
        f"ReLU, and `logits` [batch, {CLASSES}]",
        "trained with": f"`python -m ddsm_export.training.classifier FOLDER -o DIR`: {epochs} epochs of AdamW, batches "
        f"of {BATCH}, learning rate up to {LEARNING_RATE:g}, half of the images mirrored, all shifted by up to "
        f"{MOST_SHIFT} pixels, seed {SEED}, one thread, torch {environment()['versions']['torch']}",
        "test accuracy": f"**{100 * right:.2f} %** of the test images",
        "statistics": f"of the {statistics.images:,} training images (SHA-256 of their bytes `{statistics.data}`): "
        f"mean and covariance of the features in float64, {len(statistics.rows):,} rows of them in fp16; {QUANTILES:,} "
        f"quantiles of the pixels in each of {DIRECTIONS} directions in fp16",
        "weights' licence": "Apache-2.0, as the code",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    lines = "\n".join(
        f"| {count:,} | {frechet:.3f} | {kernel:.5f} | {sliced:.4f} |"
        for count, (frechet, kernel, sliced) in floors.items()
    )
    return f"""# Card: Fashion-MNIST classifier and statistics

{sizes}:
what `ddsm evaluate` and `ddsm search` judge images of Fashion-MNIST by, without a download. A distance on these
features is called *Fréchet distance on classifier features*. It is no FID, and compares with nothing but itself.

| | |
|---|---|
{table}

The floor: what the real test images, which nothing was trained on, have to the training images. Of less than all of
them it is the mean over disjoint random parts. The Fréchet and the sliced Wasserstein distance of few images are
larger, whatever the images; the kernel distance has no such bias.

| test images | Fréchet distance | kernel distance | sliced Wasserstein distance of pixels |
| ---: | ---: | ---: | ---: |
{lines}
"""


# --- the files --------------------------------------------------------------------------------------------------------


def load_part(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [N, 1, 32, 32] of ``train`` or ``t10k``, and their classes [N].

    Raises:
        DataError: a file that is missing or is not what its name says.
    """
    images = load_images(_file(folder, f"{part}-images-idx3-ubyte"), channels=1, image_size=SHAPE[1])
    file = _file(folder, f"{part}-labels-idx1-ubyte")
    labels = _read_labels(file)
    if len(labels) != len(images):
        raise DataError(f"{file} holds {len(labels)} labels, expected one for each of {len(images)} images")
    return images, labels


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


if __name__ == "__main__":
    sys.exit(main())
