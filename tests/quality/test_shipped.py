"""The classifier and the statistics that come with the package are what their card says."""

import importlib.util
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from ddsm_engine.errors import MetricError
from ddsm_engine.files import sha256_of
from ddsm_engine.onnx_file import check_onnx
from ddsm_engine.quality import shipped as module
from ddsm_engine.quality.kernel import REAL_ROWS
from ddsm_engine.quality.shipped import (
    CARD,
    CLASSIFIER,
    DATA_SHA256,
    SHAPE,
    STATISTICS,
    shipped_classifier,
    shipped_statistics,
)
from ddsm_engine.quality.sliced_wasserstein import DIRECTIONS, QUANTILES
from tests.quality.networks import noise

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "ddsm_engine/quality/data"


def test_they_are_small() -> None:
    assert sum((FOLDER / name).stat().st_size for name in (CLASSIFIER, STATISTICS)) <= 2_000_000


def test_the_classifier_is_a_file_that_a_bundle_could_hold() -> None:
    check_onnx(FOLDER / CLASSIFIER)
    assert b".py" not in (FOLDER / CLASSIFIER).read_bytes(), "a stack trace of the exporter's"


def test_the_classifier_gives_features_of_any_number_of_images() -> None:
    classifier = shipped_classifier()
    images = noise(9, SHAPE)
    found = classifier(images)
    assert found.shape == (9, 64)
    assert np.concatenate([classifier(images[:2]), classifier(images[2:])]) == pytest.approx(found, rel=1e-4, abs=1e-4)


def test_both_libraries_give_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    images = noise(9, SHAPE)
    one = shipped_classifier()(images)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    assert shipped_classifier()(images) == pytest.approx(one, rel=1e-3, abs=1e-3)


def test_the_statistics_are_of_the_training_images_and_of_this_network() -> None:
    statistics = shipped_statistics()
    assert statistics.data == DATA_SHA256
    assert statistics.images == 60_000
    assert statistics.features["network"] == sha256_of(FOLDER / CLASSIFIER)
    assert statistics.rows.shape == (REAL_ROWS, 64)
    assert statistics.quantiles is not None
    assert statistics.quantiles.shape == (QUANTILES, DIRECTIONS)
    assert (np.diff(statistics.quantiles, axis=0) >= 0).all()


def test_no_feature_outweighs_the_others() -> None:
    """The norm knows the last batches of training, whose images were mirrored and shifted."""
    statistics = shipped_statistics()
    assert np.abs(statistics.mean).max() < 0.5
    assert np.diag(statistics.covariance) == pytest.approx(np.ones(64), abs=0.5)


def test_the_kept_rows_are_a_sample_of_what_mean_and_covariance_tell() -> None:
    statistics = shipped_statistics()
    error = np.sqrt(np.diag(statistics.covariance) / REAL_ROWS)
    assert np.abs((statistics.rows.mean(0) - statistics.mean) / error).max() < 5
    assert np.cov(statistics.rows.T) == pytest.approx(statistics.covariance, abs=0.25)


def test_the_card_says_what_is_in_the_files() -> None:
    card = (FOLDER / CARD).read_text(encoding="utf-8")
    with safe_open(FOLDER / STATISTICS, "np") as file:
        accuracy = float(file.metadata()["accuracy"])
    assert accuracy >= 0.91
    assert f"**{100 * accuracy:.2f} %**" in card
    assert f"`{DATA_SHA256}`" in card
    assert "MIT licence, Copyright 2017 Zalando SE" in card
    for name in (CLASSIFIER, STATISTICS):
        assert f"`{name}` ({(FOLDER / name).stat().st_size / 1e6:.2f} MB)" in card


def test_the_floor_falls_with_the_number_of_images() -> None:
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) \| (-?[\d.]+) \| ([\d.]+) \|$", (FOLDER / CARD).read_text(), re.M)
    assert [row[0] for row in rows] == ["10,000", "5,000", "1,000", "250"]
    for column in (1, 3):
        values = [float(row[column]) for row in rows]
        assert values == sorted(values)
    assert all(abs(float(row[2])) < 0.01 for row in rows)


@contextmanager
def replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installation in a folder of its own."""
    (folder / "quality").mkdir()
    shutil.copytree(FOLDER, folder / "quality/data")
    monkeypatch.setattr(module, "files", lambda name: folder)
    yield folder / "quality/data"


@pytest.mark.parametrize("name", [CLASSIFIER, STATISTICS])
def test_a_missing_file_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with replaced(tmp_path, monkeypatch) as folder:
        (folder / name).unlink()
        with pytest.raises(MetricError, match=f"{name} is missing from the installation; install ddsm-engine again"):
            shipped_statistics()


def test_statistics_of_another_network_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with replaced(tmp_path, monkeypatch) as folder:
        shipped_statistics()
        with (folder / CLASSIFIER).open("ab") as file:
            file.write(b"\0")
        with pytest.raises(MetricError, match="its network is "):
            shipped_statistics()
