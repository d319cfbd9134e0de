"""Which metric a command's options mean, in words and in figures."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import DataError, DdsmError, MetricError
from ddsm_engine.quality import Images, Metric, add_options, choose_metric
from ddsm_engine.quality import choice as module
from ddsm_engine.quality.shipped import DATA_SHA256
from ddsm_engine.quality.statistics import RealImages
from tests.quality.networks import SHAPE, noise, onnx_network, torchscript_network, weights

GREY = (1, 32, 32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (120, 8, 8, 3), np.uint8)


@pytest.fixture
def data(pixels: NDArray[np.uint8], tmp_path: Path) -> Path:
    np.savez(tmp_path / "real.npz", images=pixels)
    return tmp_path / "real.npz"


@pytest.fixture
def network(tmp_path: Path) -> Path:
    return onnx_network(tmp_path / "net.onnx", weights())


def chosen(bundle: Bundle, **options: Any) -> Metric:
    return choose_metric(
        bundle, **(dict.fromkeys(("kind", "data", "features", "inception", "instead")) | options)
    )  # fmt: skip


def trained_on(bundle: Bundle, provenance: Any, shape: tuple[int, int, int] = GREY) -> Bundle:
    spec = replace(bundle.manifest.spec, channels=shape[0], image_size=shape[1])
    return replace(bundle, manifest=replace(bundle.manifest, spec=spec, provenance=provenance))


def on_fashion_mnist(bundle: Bundle, sha256: str = DATA_SHA256) -> Bundle:
    return trained_on(bundle, {"supernet": {"data": {"name": "train", "sha256": sha256}}})


def draw() -> Images:
    return noise(40, seed=7)


def never() -> Images:
    pytest.fail("images were drawn that nobody needs")


# --- what is chosen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "with_network", "name", "kept"),
    [
        (None, False, "sliced Wasserstein distance of pixels", "sliced-wasserstein"),
        ("sliced-wasserstein", False, "sliced Wasserstein distance of pixels", "sliced-wasserstein"),
        ("kernel", False, "kernel distance on pixels", "kernel"),
        (None, True, "Fréchet distance on net.onnx features", "frechet"),
        ("frechet", True, "Fréchet distance on net.onnx features", "frechet"),
        ("kernel", True, "kernel distance on net.onnx features", "kernel"),
    ],
)
@pytest.mark.parametrize("drawn", [False, True])
def test_the_name_says_what_is_compared_with_what(
    kind: str | None, with_network: bool, name: str, kept: str, drawn: bool, bundle: Bundle, data: Path, network: Path
) -> None:
    against: dict[str, Any] = {"instead": draw} if drawn else {"data": data, "instead": never}
    metric = chosen(bundle, kind=kind, features=network if with_network else None, **against)
    assert metric.name == name + (" to the full width's images" if drawn else "")
    assert metric.identity["kind"] == kept
    assert metric.identity["images"] == (40 if drawn else 120)
    near, far = metric(noise(60, seed=3)), metric(noise(60, seed=3, bright=0.5))
    assert abs(near) < far


def test_images_are_compared_with_real_ones_as_training_saw_them(
    bundle: Bundle, data: Path, network: Path, pixels: NDArray[np.uint8]
) -> None:
    real = (pixels.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)
    assert chosen(bundle, data=data)(real) < 1e-6
    assert chosen(bundle, data=data, features=network)(real) < 1e-6


def test_the_frechet_distance_on_a_linear_network_is_that_of_its_products(
    bundle: Bundle, data: Path, network: Path, pixels: NDArray[np.uint8]
) -> None:
    from scipy.linalg import sqrtm

    found = noise(50, bright=0.3)
    real = pixels.transpose(0, 3, 1, 2).reshape(120, -1) / 127.5 - 1
    one, other = found.reshape(50, -1).astype(np.float64) @ weights(), real @ weights()
    covariances = np.cov(one.T), np.cov(other.T)
    apart = one.mean(0) - other.mean(0)
    expected = apart @ apart + np.trace(sum(covariances) - 2 * sqrtm(covariances[0] @ covariances[1]).real)
    assert chosen(bundle, data=data, features=network)(found) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("kind", "name"), [(None, "FID"), ("frechet", "FID"), ("kernel", "KID")])
def test_only_on_inception_it_is_called_fid(
    kind: str | None, name: str, bundle: Bundle, data: Path, tmp_path: Path
) -> None:
    stand_in = nn.Sequential(nn.AvgPool2d(100), nn.Flatten())
    path = torchscript_network(tmp_path / "Inception", stand_in, torch.zeros(2, 3, 299, 299))
    metric = chosen(bundle, kind=kind, data=data, inception=path)
    assert metric.name == name
    assert np.isfinite(metric(noise(5)))
    small = torchscript_network(tmp_path / "small", nn.Sequential(nn.AvgPool2d(4), nn.Flatten()))
    assert "ID" not in chosen(bundle, kind=kind, data=data, features=small).name


def test_identities_differ_whenever_the_values_could(
    bundle: Bundle, data: Path, network: Path, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    np.savez(tmp_path / "fewer.npz", images=pixels[:-1])
    other = onnx_network(tmp_path / "other.onnx", 2 * weights())
    asked: list[dict[str, Any]] = [
        {"kind": kind, "data": images, "features": features}
        for images in (data, tmp_path / "fewer.npz")
        for kind, features in (
            ("frechet", network), ("kernel", network), ("frechet", other), ("kernel", None), (None, None),
        )
    ]  # fmt: skip
    identities = [chosen(bundle, **options).identity for options in asked]
    assert len({str(sorted(identity.items())) for identity in identities}) == len(asked)
    assert identities == [chosen(bundle, **options).identity for options in asked]
    for identity in identities:
        assert all(isinstance(name, str) and isinstance(value, str | int) for name, value in identity.items())
    assert identities[0]["network"] == chosen(bundle, data=data, features=network).identity["network"]


# --- what comes with the package --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (None, "Fréchet distance on classifier features"),
        ("frechet", "Fréchet distance on classifier features"),
        ("kernel", "kernel distance on classifier features"),
        ("sliced-wasserstein", "sliced Wasserstein distance of pixels"),
    ],
)
def test_a_supernet_of_fashion_mnist_is_judged_without_a_download(kind: str | None, name: str, bundle: Bundle) -> None:
    metric = chosen(on_fashion_mnist(bundle), kind=kind, instead=never)
    assert metric.name == name
    assert metric.identity["data"] == DATA_SHA256
    assert metric.identity["images"] == 60_000
    dark, bright = (metric(noise(20, GREY, bright=lift)) for lift in (-0.9, 0.9))
    assert 0 < dark < bright


def test_the_same_images_given_as_data_are_judged_alike(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the bundle was trained on."""
    images = np.zeros((5, 1, 32, 32), np.uint8)
    sha256 = RealImages.of(images).sha256
    monkeypatch.setattr(module, "DATA_SHA256", sha256)
    np.savez(tmp_path / "known.npz", images=images[:, 0])
    metric = chosen(trained_on(bundle, {}), data=tmp_path / "known.npz", instead=never)
    assert metric.name == "Fréchet distance on classifier features"
    assert metric.identity == chosen(on_fashion_mnist(bundle, sha256)).identity


@pytest.mark.parametrize(
    "provenance",
    [
        {},
        {"supernet": None},
        {"supernet": {"data": DATA_SHA256}},
        {"supernet": {"data": {"sha256": "0" * 64}}},
        {"supernet": {"data": {"sha256": [DATA_SHA256]}}},
        {"experts": {"data": {"sha256": DATA_SHA256}}},
    ],
)
def test_other_training_data_are_not_known(provenance: Any, bundle: Bundle) -> None:
    with pytest.raises(MetricError, match="no real images to compare with; give --data"):
        chosen(trained_on(bundle, provenance))


def test_a_claim_that_the_shape_contradicts_is_not_believed(bundle: Bundle) -> None:
    claimed = trained_on(bundle, {"supernet": {"data": {"sha256": DATA_SHA256}}}, SHAPE)
    assert chosen(claimed, instead=draw).name.endswith(" to the full width's images")


def test_a_network_of_ones_own_needs_images_of_ones_own(bundle: Bundle, tmp_path: Path) -> None:
    path = onnx_network(tmp_path / "net.onnx", weights(pixels=1024), shape=GREY)
    metric = chosen(on_fashion_mnist(bundle), features=path, instead=lambda: noise(30, GREY))
    assert metric.name == "Fréchet distance on net.onnx features to the full width's images"
    with pytest.raises(MetricError, match="give --data"):
        chosen(on_fashion_mnist(bundle), features=path)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (
            {"kind": "frechet", "instead": never},
            MetricError,
            "needs a feature network.*give --inception or --features",
        ),
        ({"kind": "fid"}, MetricError, "unknown metric 'fid'; expected frechet, kernel, sliced-wasserstein"),
        ({"features": Path("a"), "inception": Path("b")}, MetricError, "one feature network; give --features or"),
        (
            {"kind": "sliced-wasserstein", "features": Path("a")},
            MetricError,
            "reads pixels; leave",
        ),
        ({"features": Path("a"), "instead": never}, MetricError, "a is no file"),
        ({"data": Path("missing")}, DataError, "missing does not exist"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_drawn(
    options: dict[str, Any], error: type[DdsmError], said: str, bundle: Bundle
) -> None:
    with pytest.raises(error, match=said):
        chosen(bundle, **options)


def test_one_drawn_image_is_nothing_to_compare_with(bundle: Bundle) -> None:
    with pytest.raises(MetricError, match="at least 2 images to compare with, found 1"):
        chosen(bundle, instead=lambda: noise(1))


def test_the_options_are_those_of_the_choice() -> None:
    parser = argparse.ArgumentParser(prog="judge")
    add_options(parser)
    given = parser.parse_args(["--metric", "kernel", "--data", "d", "--features", "f"])
    assert vars(given) == {"metric": "kernel", "data": Path("d"), "features": Path("f"), "inception": None}
    assert set(vars(parser.parse_args([])).values()) == {None}
    for words in (["--features", "f", "--inception", "i"], ["--metric", "fid"]):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
