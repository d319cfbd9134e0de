"""Statistics of real images are kept by data and network, read back as they were, and made anew if damaged."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ddsm_engine.engine_cache import user_cache_folder
from ddsm_engine.errors import MetricError
from ddsm_engine.quality import statistics as module
from ddsm_engine.quality.features import Features
from ddsm_engine.quality.kernel import sample
from ddsm_engine.quality.pixels import Pixels
from ddsm_engine.quality.statistics import RealImages, Statistics, read_statistics, save_statistics, statistics_of
from tests.quality.networks import SHAPE, noise, onnx_network, weights


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def features(tmp_path: Path) -> Features:
    return Features.open(onnx_network(tmp_path / "net.onnx", weights()), SHAPE)


@pytest.fixture
def real() -> RealImages:
    return RealImages.of(np.random.default_rng(0).integers(0, 256, (2500, *SHAPE), np.uint8))


def kept() -> list[Path]:
    return sorted((user_cache_folder() / "statistics").iterdir())


def equal(one: Statistics, other: Statistics) -> bool:
    same = all((getattr(one, name) == getattr(other, name)).all() for name in ("mean", "covariance", "rows"))
    return same and (one.data, one.images, one.features) == (other.data, other.images, other.features)


def test_real_images_are_seen_as_a_supernet_sees_them(real: RealImages) -> None:
    plain, pixels = Pixels(SHAPE), real.pixels.reshape(2500, -1)
    assert (real.rows(plain) == pixels.astype(np.float32) / np.float32(127.5) - 1).all()
    numbers = np.array([7, 2400])
    assert (real.rows(plain, numbers) == real.rows(plain)[numbers]).all()
    assert real.sha256 == hashlib.sha256(real.pixels.tobytes()).hexdigest()
    drawn = noise(5)
    assert (RealImages.of(drawn).rows(plain) == drawn.reshape(5, -1)).all()


def test_statistics_are_those_of_all_images(features: Features, real: RealImages) -> None:
    rows = real.rows(features).astype(np.float64)
    found = statistics_of(features, real)
    assert found.mean == pytest.approx(rows.mean(0))
    assert found.covariance == pytest.approx(np.cov(rows.T))
    assert (found.rows == rows[sample(2500)].astype(np.float32)).all()
    assert (found.data, found.images, found.features) == (real.sha256, 2500, features.identity)


def test_the_same_images_and_network_are_described_once(
    features: Features, real: RealImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = statistics_of(features, real)
    monkeypatch.setattr(RealImages, "rows", lambda *arguments: pytest.fail("described again"))
    assert equal(statistics_of(features, real), made)


def test_other_images_another_network_and_another_preparation_have_their_own(
    features: Features, real: RealImages, tmp_path: Path
) -> None:
    other_network = Features.open(onnx_network(tmp_path / "other.onnx", -weights()), SHAPE)
    renamed = Features(features.label, features.sha256, "another", features.path, features.network)
    other_images = RealImages.of(real.pixels[1:])
    for features_, images in ((features, real), (other_network, real), (features, other_images)):
        statistics_of(features_, images)
    assert len(kept()) == 3
    with pytest.raises(MetricError, match="its preparation is 'none', expected 'another'"):
        read_statistics(kept_of(features, real), data=real.sha256, features=renamed.identity)


def kept_of(features: Features, real: RealImages) -> Path:
    (path,) = (p for p in kept() if statistics_at(p, features, real))
    return path


def statistics_at(path: Path, features: Features, real: RealImages) -> bool:
    try:
        return bool(read_statistics(path, data=real.sha256, features=features.identity))
    except MetricError:
        return False


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def rewrite(change: Callable[[dict[str, Any], dict[str, str]], None]) -> Callable[[Path], None]:
    """A file that is whole and says something else."""

    def spoil(path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            header = dict(file.metadata())
        tensors = load_file(path)
        change(tensors, header)
        header["checksum"] = module._checksum(tensors)
        save_file(tensors, path, header)

    return spoil


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit": (flip_a_bit, "its numbers are not those that were written"),
    "cut off": (cut, "not readable"),
    "empty": (empty, "not readable"),
    "not finite": (rewrite(lambda t, h: t["mean"].fill(np.nan)), "its numbers are not those that were written"),
    "no mean": (rewrite(lambda t, h: t.__delitem__("mean")), "not readable"),
    "another size": (rewrite(lambda t, h: t.update(mean=t["mean"][:-1].copy())), "its tensors have the shapes"),
    "one row": (rewrite(lambda t, h: t.update(rows=t["rows"][:1].copy())), "its tensors have the shapes"),
    "one more": (rewrite(lambda t, h: t.update(more=np.zeros(3, np.float32))), "its tensors have the shapes"),
    "integers": (rewrite(lambda t, h: t.update(rows=t["rows"].astype("i4"))), "expected floating-point numbers"),
    "other data": (rewrite(lambda t, h: h.update(data="0" * 64)), "its data is '000"),
    "another format": (rewrite(lambda t, h: h.update(format="x")), "its format is 'x'"),
    "no count": (rewrite(lambda t, h: h.update(images="many")), "not readable"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_named_and_made_anew(
    name: str, features: Features, real: RealImages, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, said = DAMAGE[name]
    made = statistics_of(features, real)
    (path,) = kept()
    spoil(path)
    with pytest.raises(MetricError, match=said):
        read_statistics(path, data=real.sha256, features=features.identity)
    assert equal(statistics_of(features, real), made)
    (warning,) = caplog.messages
    assert str(path) in warning
    assert warning.endswith("computing anew")
    assert equal(read_statistics(path, data=real.sha256, features=features.identity), made)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_stops_nothing(
    features: Features, real: RealImages, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    assert statistics_of(features, real).images == 2500
    assert "cannot be kept" in caplog.text


def test_a_file_in_the_place_of_the_folder_stops_nothing(
    features: Features, real: RealImages, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("in the way")
    assert statistics_of(features, real).images == 2500
    assert "cannot be kept" in caplog.text


def test_a_half_is_as_large(features: Features, real: RealImages, tmp_path: Path) -> None:
    made = statistics_of(features, real)
    for half in (False, True):
        save_statistics(made, tmp_path / f"{half}.safetensors", half=half, words={"note": "x"})
    whole, rounded = (
        read_statistics(tmp_path / f"{half}.safetensors", data=real.sha256, features=features.identity)
        for half in (False, True)
    )
    assert equal(whole, made)
    assert rounded.rows == pytest.approx(made.rows, rel=1e-3)
    assert (rounded.covariance == made.covariance).all()
    sizes = [(tmp_path / f"{half}.safetensors").stat().st_size for half in (False, True)]
    assert sizes[0] - sizes[1] == pytest.approx(2 * made.rows.size, abs=100)


@pytest.mark.parametrize("count", [0, 1])
def test_one_image_is_nothing_to_compare_with(count: int) -> None:
    with pytest.raises(MetricError, match=f"at least 2 images to compare with, found {count}"):
        RealImages.of(np.zeros((count, *SHAPE), np.uint8))


def test_images_that_are_no_numbers_are_nothing_to_compare_with() -> None:
    images = noise(4)
    images[1, 0, 3, 3] = np.nan
    with pytest.raises(MetricError, match="hold values that are not finite"):
        RealImages.of(images)
