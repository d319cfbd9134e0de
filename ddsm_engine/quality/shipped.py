"""What comes with the package: a classifier of Fashion-MNIST, and the statistics of that training set.

Card: ``data/README.md``. Both are written by ``python -m ddsm_export.training.classifier``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

from ddsm_engine.errors import MetricError
from ddsm_engine.files import sha256_of
from ddsm_engine.quality.features import Features, identity_of
from ddsm_engine.quality.statistics import Statistics, read_statistics

CLASSIFIER: Final = "fashion_mnist_classifier.onnx"
STATISTICS: Final = "fashion_mnist_statistics.safetensors"
CARD: Final = "README.md"

DATA_SHA256: Final = "f21823848e3746519cfba6963d2cdca7d14fb77efc488374f5e245a186d0b3c7"
"""Of Fashion-MNIST's 60,000 training images, uint8, padded to 32x32."""
SHAPE: Final = (1, 32, 32)
LABEL: Final = "classifier features"


def shipped_classifier() -> Features:
    """The classifier, whose features are those of its last layer but one.

    Raises:
        BackendError: neither ONNX Runtime nor OpenVINO is installed.
    """
    with _shipped(CLASSIFIER) as file:
        return Features.open(file, SHAPE, label=LABEL)


def shipped_statistics() -> Statistics:
    """What the classifier says of the training images, and their quantiles.

    Raises:
        MetricError: a file that is damaged.
    """
    with _shipped(CLASSIFIER) as file:
        identity = identity_of(sha256_of(file))
    with _shipped(STATISTICS) as file:
        return read_statistics(file, data=DATA_SHA256, features=identity)


@contextmanager
def _shipped(name: str) -> Iterator[Path]:
    with as_file(files("ddsm_engine") / "quality" / "data" / name) as file:
        if not file.is_file():
            raise MetricError(f"{file} is missing from the installation; install ddsm-engine again")
        yield file
