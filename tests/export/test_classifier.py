"""Does the classifier learn, always the same, from files that are what they say, and is what it writes read back?"""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ddsm_engine.errors import DataError
from ddsm_engine.quality.features import Features
from ddsm_engine.quality.shipped import CARD, CLASSIFIER, SHAPE, STATISTICS
from ddsm_engine.quality.statistics import RealImages, read_statistics
from ddsm_export.onnx import write_onnx
from ddsm_export.training import classifier as module
from ddsm_export.training.classifier import (
    accuracy,
    in_unit_range,
    load_part,
    main,
    make_classifier,
    train_classifier,
    varied,
)
from tests.conftest import Refusal


def idx(magic: int, *sizes: int) -> bytes:
    return struct.pack(f">{1 + len(sizes)}I", magic, *sizes)


def write_garments(folder: Path, *, per_class: int = 120, shuffle_test: bool = False, suffix: str = ".gz") -> None:
    """Stand-ins for Fashion-MNIST: a class is a bright bar, of the height that its number says."""
    random = np.random.default_rng(0)
    for part, count in (("train", per_class), ("t10k", per_class // 4)):
        labels = random.permutation(np.repeat(np.arange(10, dtype=np.uint8), count))
        pixels = random.integers(0, 60, (len(labels), 28, 28), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[2 : 4 + 2 * label, 6:22] += 180
        if part == "t10k" and shuffle_test:
            labels = random.permutation(labels)
        pack = gzip.compress if suffix else bytes
        images = idx(0x803, len(labels), 28, 28) + pixels.tobytes()
        (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(pack(images))
        (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(0x801, len(labels)) + labels.tobytes()))


def test_it_learns_the_same_every_time(tmp_path: Path) -> None:
    write_garments(tmp_path, suffix="")
    images, labels = load_part(tmp_path, "train")
    test_images, test_labels = load_part(tmp_path, "t10k")
    state = torch.random.get_rng_state()
    one, other = (train_classifier(images, labels, epochs=6) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state), "the process' own random numbers are left alone"
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert accuracy(one, test_images, test_labels) >= 0.9


def test_images_are_padded_and_scaled_as_the_supernet_saw_them(tmp_path: Path) -> None:
    write_garments(tmp_path, per_class=8)
    images, labels = load_part(tmp_path, "train")
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read()[16:], np.uint8).reshape(-1, 28, 28)
    assert images.shape == (80, *SHAPE)
    assert (images[:, 0, 2:30, 2:30] == pixels).all()
    assert images.sum(dtype=np.int64) == pixels.sum(dtype=np.int64)
    assert in_unit_range(np.array([[0, 255]], np.uint8)).tolist() == [[-1, 1]]
    assert sorted(set(labels.tolist())) == list(range(10))


def test_a_varied_image_is_the_same_one_mirrored_and_shifted() -> None:
    image = torch.full((1, 1, 32, 32), -1.0)
    image[0, 0, 2:30, 2:30] = torch.rand(28, 28, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    seen = set()
    for found in varied(image.repeat(400, 1, 1, 1)):
        matches = [
            (mirrored, down, right)
            for mirrored in (False, True)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if torch.equal(found[0], shifted(image[0, 0].flip(-1) if mirrored else image[0, 0], down, right))
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 50, "every shift, both ways round"


def shifted(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Onto a dark ground; nothing comes in on the other side."""
    moved = torch.full((36, 36), -1.0)
    moved[2 + down : 34 + down, 2 + right : 34 + right] = image
    return moved[2:34, 2:34]


def test_the_onnx_file_computes_what_the_network_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = module.Classifier()
    network(torch.randn(64, *SHAPE))  # so that the norms have seen something
    example = (torch.zeros(2, *SHAPE),)
    write_onnx(network.eval(), example, tmp_path / CLASSIFIER, inputs=["images"], outputs=["features", "logits"])
    images = np.random.default_rng(0).uniform(-1, 1, (7, *SHAPE)).astype(np.float32)
    with torch.inference_mode():
        expected = network(torch.from_numpy(images))[0].numpy()
    assert Features.open(tmp_path / CLASSIFIER, SHAPE)(images) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_what_is_written_is_whole_and_belongs_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_ACCURACY", 0.3)
    (tmp_path / "data").mkdir()
    write_garments(tmp_path / "data", per_class=120)
    make_classifier(tmp_path / "data", tmp_path / "out", epochs=4)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([CLASSIFIER, STATISTICS, CARD])
    features = Features.open(tmp_path / "out" / CLASSIFIER, SHAPE)
    images, _ = load_part(tmp_path / "data", "train")
    sha256 = RealImages.of(images).sha256
    statistics = read_statistics(tmp_path / "out" / STATISTICS, data=sha256, features=features.identity)
    assert statistics.images == 1200
    assert statistics.quantiles is not None
    card = (tmp_path / "out" / CARD).read_text(encoding="utf-8")
    assert "4 epochs of AdamW" in card
    assert "\n| 300 | " in card, "the floor of all test images"
    assert str(tmp_path) not in card


def spoil_labels(folder: Path) -> None:
    write_garments(folder, per_class=8, shuffle_test=True)


def lose_a_file(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte.gz").unlink()


def cut_labels(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(0x801, 3) + bytes(3)))


def swap_labels_for_images(folder: Path) -> None:
    images = (folder / "t10k-images-idx3-ubyte.gz").read_bytes()
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(images)


def damage_labels(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(50_000))[:-40])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_labels, "the classifier names "),
        (lose_a_file, "holds no train-labels-idx1-ubyte"),
        (cut_labels, "holds 3 labels, expected one for each of 20 images"),
        (swap_labels_for_images, "is not an IDX file of labels below 10"),
        (damage_labels, "could not be read as labels"),
    ],
)
def test_data_that_cannot_be_learnt_are_refused_and_nothing_is_written(
    spoil: Callable[[Path], None], words: str, tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EPOCHS", 1)
    (tmp_path / "data").mkdir()
    write_garments(tmp_path / "data", per_class=8)
    spoil(tmp_path / "data")
    assert words in refusal(main, tmp_path / "data", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_classifier_below_the_mark_is_refused_by_its_figure(tmp_path: Path) -> None:
    write_garments(tmp_path, per_class=8, shuffle_test=True)
    with pytest.raises(DataError, match=r"names \d+\.\d % of the test images .* expected at least 91 %"):
        make_classifier(tmp_path, tmp_path / "out", epochs=1)
