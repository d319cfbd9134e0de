import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ddsm_engine.backends import (
    BACKENDS,
    choose_backend,
    device_of,
    engine_target,
    installed_backends,
    open_engine,
    open_engines,
)
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.backends.native import NativeEngine
from ddsm_engine.backends.onnxruntime import OnnxRuntimeEngine
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import BackendError
from ddsm_engine.parity import answer, make_probes
from tests.conftest import CONFIG, STATE, TINY
from tests.oracle.dynamic_unet import dynamic_unet
from tests.tolerances import FORWARD

FP32 = EngineOptions(precision="fp32", threads=1)
VARIANTS = [f"w{width:03d}" for width in TINY.widths()]


def forward(backend: str, bundle: Bundle, variant: str, x: NDArray[np.float32], t: list[int]) -> NDArray[np.float32]:
    engine = open_engine(backend, bundle, bundle.variants[variant], len(x), FP32)
    out = np.full_like(x, np.nan)
    engine.bind({"sample": x, "time_features": bundle.time_table(bundle.full)[t]}, {"out_sample": out})
    engine.run()
    engine.close()
    return out


def relative_l2(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_variant_on_every_backend_is_the_dynamic_network(
    backend: str, variant: str, batch: int, bundle: Bundle
) -> None:
    x = np.random.default_rng(batch).standard_normal((batch, *TINY.sample_shape), dtype=np.float32)
    t = [0, 999, 412][:batch]
    width_mult = bundle.variants[variant].width / TINY.base_channels
    expected = dynamic_unet(CONFIG, STATE, torch.from_numpy(x), torch.tensor(t), width_mult).numpy()
    assert expected.std() > 0.05, "outputs must be of order one for the comparison to mean anything"
    assert relative_l2(forward(backend, bundle, variant, x, t), expected) <= FORWARD[backend]


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_a_batch_split_over_streams_is_put_together_again(batch: int, bundle: Bundle) -> None:
    x = np.random.default_rng(batch).standard_normal((batch, *TINY.sample_shape), dtype=np.float32)
    t = [0, 999, 412, 3][:batch]
    options = EngineOptions(precision="fp32", threads=2)
    assert engine_target("openvino", options, batch)["streams"] == (1 if batch == 3 else 2)
    engine = open_engine("openvino", bundle, bundle.variants["w020"], batch, options)
    out = np.full_like(x, np.nan)
    engine.bind({"sample": x, "time_features": bundle.time_table(bundle.full)[t]}, {"out_sample": out})
    engine.run()
    engine.close()
    width_mult = bundle.variants["w020"].width / TINY.base_channels
    expected = dynamic_unet(CONFIG, STATE, torch.from_numpy(x), torch.tensor(t), width_mult).numpy()
    assert relative_l2(out, expected) <= FORWARD["openvino"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_width_is_told_apart(backend: str, bundle: Bundle) -> None:
    x = np.random.default_rng(0).standard_normal((1, *TINY.sample_shape), dtype=np.float32)
    expected = dynamic_unet(CONFIG, STATE, torch.from_numpy(x), torch.tensor([500]), 7 / 8).numpy()
    assert relative_l2(forward(backend, bundle, "w032", x, [500]), expected) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_a_batch_is_the_same_alone(backend: str, bundle: Bundle) -> None:
    x = np.random.default_rng(1).standard_normal((3, *TINY.sample_shape), dtype=np.float32)
    together = forward(backend, bundle, "w020", x, [7, 7, 7])
    alone = forward(backend, bundle, "w020", x[1:2].copy(), [7])
    assert relative_l2(together[1:2], alone) <= FORWARD[backend]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_engine_reads_and_writes_the_bound_arrays_in_place(backend: str, bundle: Bundle) -> None:
    x = np.ones((2, *TINY.sample_shape), np.float32)
    out = np.full_like(x, np.nan)
    engine = open_engine(backend, bundle, bundle.variants["w008"], 2, FP32)
    engine.bind({"sample": x, "time_features": bundle.time_table(bundle.full)[[5, 5]]}, {"out_sample": out})
    engine.run()
    first = out.copy()
    x[...] = 0.5
    engine.run()
    second = out.copy()
    x[...] = 1.0
    engine.run()
    engine.close()
    assert np.isfinite(first).all()
    assert not np.array_equal(first, second)
    assert np.array_equal(first, out), "the same input gives the same bits"


@pytest.mark.parametrize("batch", [1, 3])
def test_native_engines_opened_together_share_their_weights_and_answer_as_alone(batch: int, bundle: Bundle) -> None:
    probe = make_probes(TINY, bundle.time_table(bundle.full), (batch,))
    together = open_engines("native", bundle, bundle.manifest.variants, batch, FP32)
    assert all(isinstance(engine, NativeEngine) for engine in together.values())
    for variant in bundle.manifest.variants:
        alone = answer(lambda size, v=variant: open_engine("native", bundle, v, size, FP32), probe)  # type: ignore[misc]
        assert np.array_equal(alone[0], answer(lambda size, v=variant: together[v.id], probe)[0])  # type: ignore[misc]
    held = [
        {id(array): array.nbytes for array in engine.network.arrays}
        for engine in open_engines("native", bundle, bundle.manifest.variants, batch, FP32).values()
        if isinstance(engine, NativeEngine)
    ]
    all_seven = sum({key: size for of_engine in held for key, size in of_engine.items()}.values())
    assert all_seven < 0.7 * sum(sum(of_engine.values()) for of_engine in held)


def test_native_weights_of_another_network_are_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    wider = replace(TINY, base_channels=2 * TINY.base_channels)
    monkeypatch.setattr(Bundle, "spec", lambda self, variant: wider)
    with pytest.raises(BackendError, match="does not hold the weights of this supernet; export the bundle again"):
        open_engine("native", bundle, replace(bundle.full, width=wider.base_channels), 1, FP32)


def test_without_a_compiler_there_is_no_native_backend(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "native" not in installed_backends()
    with pytest.raises(BackendError, match="the backend native is not installed: sudo apt-get install g\\+\\+"):
        open_engine("native", bundle, bundle.full, 1, FP32)


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("onnxruntime", EngineOptions(device="cuda"), "onnxruntime backend needs an NVIDIA GPU"),
        ("torch", EngineOptions(device="cuda"), "torch backend needs an NVIDIA GPU"),
        ("openvino", EngineOptions(device="cuda"), "runs on the CPU"),
        ("torch-compile", EngineOptions(device="cuda"), "torch-compile backend needs an NVIDIA GPU"),
        ("torch-compile", EngineOptions(), "runs on a GPU, found --device cpu"),
        ("tensorrt-rtx", EngineOptions(), "runs on a GPU, found --device cpu"),
        ("openvino", EngineOptions(precision="fp16"), "fp32 or bf16 on a CPU"),
        ("native", EngineOptions(precision="bf16"), "computes in fp32"),
        ("onnxruntime", EngineOptions(precision="fp16"), "no fp16 arithmetic"),
        ("onnxruntime", EngineOptions(precision="bf16"), "no bf16 arithmetic"),
        ("torch", EngineOptions(precision="bf16"), "fp32 reference"),
    ],
)
def test_a_device_or_precision_that_is_not_there_is_refused(
    backend: str, options: EngineOptions, message: str, bundle: Bundle
) -> None:
    if options.device == "cuda" and torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    with pytest.raises(BackendError, match=message):
        open_engine(backend, bundle, bundle.variants["w008"], 1, options)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendError, match="expected auto, openvino, onnxruntime, native, torch"):
        choose_backend("tflite", "cpu")


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_file_that_is_no_network_is_refused(backend: str, bundle: Bundle, tmp_path: Path) -> None:
    from ddsm_engine.backends.onnxruntime import OnnxRuntimeEngine
    from ddsm_engine.backends.openvino import OpenVINOEngine

    file = tmp_path / "model.onnx"
    file.write_bytes(b"not a network")
    shapes = {t.name: t.at_batch(1) for t in bundle.variants["w008"].inputs}
    with pytest.raises(BackendError, match="cannot open"):
        OpenVINOEngine(file, shapes, FP32) if backend == "openvino" else OnnxRuntimeEngine(file, FP32)


def test_the_run_time_needs_no_torch_and_no_exporter() -> None:
    code = """
import importlib, sys
for name in ("torch", "onnx", "onnxscript", "ddsm_export"):
    sys.modules[name] = None  # importing any of them fails from here on
for name in ("", ".run", ".inspect", ".verify", ".build", ".doctor", ".measure.latency"):
    importlib.import_module("ddsm_engine" + name)
heavy = {"openvino", "onnxruntime", "matplotlib", "scipy", "tensorrt"} & set(sys.modules)
sys.exit(f"imported without being asked: {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_onnx_runtime_s_threads_stop_when_a_call_ends(bundle: Bundle) -> None:
    """Or the first call of the next variant shares the cores with them."""
    engine = OnnxRuntimeEngine(bundle.artefact(bundle.full), FP32)
    assert engine._session.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"
    engine.close()


@pytest.mark.parametrize(
    ("backend", "device", "expected"),
    [
        ("auto", "auto", "cpu"),
        ("tensorrt", "auto", "cuda"),
        ("torch", "cuda:0", "cuda"),
        ("torch", torch.device("cuda"), "cuda"),
        ("torch", torch.device("cuda", 0), "cuda"),
        ("tensorrt", torch.device("cpu"), "cpu"),
    ],
)
def test_a_device_may_be_spelled_as_torch_does(backend: str, device: object, expected: str) -> None:
    assert device_of(backend, device) == expected


@pytest.mark.parametrize("device", ["gpu", "CPU", "cuda:1", torch.device("cuda", 1), "", None])
def test_a_device_that_is_none_is_refused_and_not_replaced(device: object) -> None:
    with pytest.raises(BackendError, match=r"expected the device auto, cpu, cuda, found .* CUDA_VISIBLE_DEVICES"):
        device_of("torch", device)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "expected the device cpu or cuda, found 'gpu'"),
        ({"precision": "fp64"}, "expected a precision of auto, fp32, fp16, bf16, found 'fp64'"),
        ({"precision": None}, "found None"),
        ({"threads": 1.5}, r"expected 0 to 1024 threads, found 1\.5"),
        ({"threads": True}, "found True"),
    ],
)
def test_options_that_no_engine_has_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        EngineOptions(**options)
