"""Features of images by networks of every kind, and one line for every network that gives none."""

import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddsm_engine.errors import BackendError, MetricError
from ddsm_engine.files import sha256_of
from ddsm_engine.quality.features import BATCH, PYTORCH_FID, Features
from ddsm_engine.quality.inception import inception_input
from tests.hostile.corpus import HOSTILE_MODELS
from tests.quality.networks import SHAPE, noise, onnx_network, torchscript_network, weights


def linear(features: int = 5) -> nn.Sequential:
    layer = nn.Linear(192, features, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weights(features)).T)
    return nn.Sequential(nn.Flatten(), layer)


def without(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else found(name))


@pytest.mark.parametrize("library", ["onnxruntime", "openvino", "torch"])
@pytest.mark.parametrize("count", [1, BATCH, BATCH + 3])
def test_every_library_computes_the_features(
    library: str, count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if library == "openvino":
        without("onnxruntime", monkeypatch)
    images = noise(count)
    path = (
        torchscript_network(tmp_path / "net.pt", linear())
        if library == "torch"
        else onnx_network(tmp_path / "net.onnx", weights())
    )
    features = Features.open(path, SHAPE)
    found = features(images)
    assert found.dtype == np.float32
    assert found == pytest.approx(images.reshape(count, -1) @ weights(), rel=1e-4, abs=1e-4)
    assert features.label == f"{path.name} features"
    assert features.identity == {"description": "features", "network": sha256_of(path), "preparation": "none"}


def test_features_of_one_pixel_lose_it(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 8), nn.Tanh())
    assert Features.open(torchscript_network(tmp_path / "net.pt", network), SHAPE)(noise(4)).shape == (4, 6)


class Shown(nn.Module):
    """Answers with the middle rows of what it is shown."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :, 100:104].flatten(1)


def test_inception_is_shown_its_own_form_of_the_images(tmp_path: Path) -> None:
    path = torchscript_network(tmp_path / "net.pt", Shown(), torch.zeros(2, 3, 299, 299))
    features, images = Features.open(path, (1, 32, 32), preparation=PYTORCH_FID), noise(3, (1, 32, 32))
    assert (features(images) == inception_input(images)[:, :, 100:104].reshape(3, -1)).all()
    assert features.identity["preparation"] == "pytorch-fid"


class Reshaped(nn.Module):
    """A network of the wrong output."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Tensor) -> Any:
        return self.answer(images)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda x: x, r"must answer 2 images with features .* found shape \[2, 3, 8, 8\]"),
        (lambda x: x.flatten(), r"found shape \[384\]"),
        (lambda x: x.flatten(1).T, r"found shape \[192, 2\]"),
        (lambda x: x.flatten(1).repeat(1, 22), r"at most 4096\], found shape \[2, 4224\]"),
        (lambda x: x.flatten(1)[:, :0], r"found shape \[2, 0\]"),
        (lambda x: x.flatten(1) / 0, "not all finite numbers"),
        (lambda x: (x.flatten(1), x), "answers with tuple, expected one tensor"),
    ],
)
def test_a_network_that_gives_no_features_is_refused(
    answer: Callable[[Tensor], Any], said: str, tmp_path: Path
) -> None:
    path = torchscript_network(tmp_path / "net.pt", Reshaped(answer))
    with pytest.raises(MetricError, match=said) as refused:
        Features.open(path, SHAPE)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("library", ["onnxruntime", "openvino"])
def test_integers_are_no_features(library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    if library == "openvino":
        without("onnxruntime", monkeypatch)
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("Cast", ["flat"], ["y"], to=TensorProto.INT64)
    ]  # fmt: skip
    sides = (
        [helper.make_tensor_value_info(name, kind, None if name == "y" else ["batch", *SHAPE])]
        for name, kind in (("x", TensorProto.FLOAT), ("y", TensorProto.INT64))
    )
    graph = helper.make_graph(nodes, "integers", *sides)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "n.onnx")
    with pytest.raises(MetricError, match=r"n\.onnx answers with int64"):
        Features.open(tmp_path / "n.onnx", SHAPE)


@pytest.mark.parametrize("library", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "change", [{"shape": (3, 9, 9)}, {"shape": (1, 8, 8)}, {"batch": 7}], ids=["size", "channels", "batch"]
)
def test_a_network_of_other_images_is_refused(
    library: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    if library == "openvino":
        without("onnxruntime", monkeypatch)
    pixels = int(np.prod(change.get("shape", SHAPE)))
    path = onnx_network(tmp_path / "net.onnx", weights(pixels=pixels), **change)
    capfd.readouterr()
    with pytest.raises(MetricError, match=r"net\.onnx does not take images \[2, 3, 8, 8\]: "):
        Features.open(path, SHAPE)
    assert "".join(capfd.readouterr()) == ""


def test_a_torchscript_network_of_other_images_is_refused(tmp_path: Path) -> None:
    path = torchscript_network(tmp_path / "net.pt", linear())
    with pytest.raises(MetricError, match=r"net.pt does not take images \[2, 3, 9, 9\]: "):
        Features.open(path, (3, 9, 9))


@pytest.mark.parametrize("name", ["net.pt", "net.onnx", "net"])
@pytest.mark.parametrize("content", [b"", b"a text", b"PK\x03\x04 and no more", bytes(1000)])
def test_a_file_that_is_no_network_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MetricError, match="cannot be opened as a feature network") as refused:
        Features.open(tmp_path / name, SHAPE)
    assert "bundle" not in str(refused.value)


class Attack:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("wrapped", [False, True], ids=["pickle", "torch.save"])
def test_a_pickle_is_refused_and_its_code_is_not_run(wrapped: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "was here", tmp_path / "weights.pth"
    if wrapped:
        torch.save({"weight": Attack(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Attack(marker)))
    with pytest.raises(MetricError, match=r"weights\.pth cannot be opened .*: it is neither \.onnx nor TorchScript"):
        Features.open(path, SHAPE)
    assert not marker.exists()
    torch.load(path, weights_only=False) if wrapped else pickle.loads(path.read_bytes())
    assert marker.exists(), "the attack is real"


@pytest.mark.parametrize("name", ["missing.onnx", "."])
def test_what_is_no_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(MetricError, match="is no file; expected a feature network"):
        Features.open(tmp_path / name, SHAPE)


@pytest.mark.parametrize("name", HOSTILE_MODELS)
def test_an_onnx_file_that_a_bundle_must_not_hold_is_not_opened_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddsm_engine.quality.features._open_onnxruntime", lambda path: pytest.fail("it was opened"))
    path = tmp_path / "hostile.onnx"
    path.write_bytes(HOSTILE_MODELS[name]().SerializeToString())
    with pytest.raises(MetricError, match="cannot be opened as a feature network"):
        Features.open(path, SHAPE)


def test_without_a_library_the_way_to_one_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"needs ONNX Runtime or OpenVINO: pip install 'ddsm-engine\[cpu\]'"):
        Features.open(onnx_network(tmp_path / "net.onnx", weights()), SHAPE)
