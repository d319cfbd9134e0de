"""``python -m ddsm_engine.doctor.probe NAME``: the process that imports a backend and runs one operator on it.

What a library prints, or how it ends its process, is then no concern of the doctor's.
"""

import importlib.util
import io
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_engine.backends import open_device
from ddsm_engine.backends.device import Device, DeviceEngine, StagedEngine
from ddsm_engine.backends.engine import Engine, EngineOptions
from ddsm_engine.bundle import Parity, TensorInfo, Variant
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.environment import cores, cpu

MODEL = Path(__file__).with_name("relu.onnx")
"""Opset 18, y = Relu(x), both float32 [batch, 4]; a file of the package, for there may be no folder to write one to."""

X = np.array([[-1.0, 0.0, 0.5, 2.0]], np.float32)
RELU = np.array([[0.0, 0.0, 0.5, 2.0]], np.float32)
"""Numbers that bf16 holds exactly."""

VARIANT = Variant(
    id="relu", role="probe", precision="fp32", file=MODEL.name, sha256="", size_bytes=0, width=4,
    inputs=(TensorInfo(name="x", dtype="float32", shape=("batch", 4)),),
    outputs=(TensorInfo(name="y", dtype="float32", shape=("batch", 4)),),
    macs=0, conv_linear_macs=0, params=0, parity=Parity(relative_l2=0, max_abs=0, tolerance=0, backend=""),
)  # fmt: skip
"""The model as one of a bundle, of which engines on a GPU are opened."""


def run_on(engine: Engine) -> None:
    """Run the model and compare.

    Raises:
        BackendError: it fails, or gives other numbers.
    """
    y = np.full_like(RELU, np.nan)
    engine.bind({"x": X.copy()}, {"y": y})
    engine.run()
    engine.close()
    if not np.array_equal(y, RELU):
        raise BackendError(f"Relu of {X.tolist()} came out as {y.tolist()}")


def run_on_gpu(name: str, open_on: Callable[[Device], DeviceEngine]) -> str:
    """Open an engine as a run does, on a stream of a GPU, and run the model; returns the GPU's name.

    Raises:
        BackendError: there is no GPU, or it fails, or gives other numbers.
    """
    device = open_device(name)
    with device.current():
        engine = open_on(device)
    run_on(StagedEngine(device, engine, device.close))
    return device.properties.name


def openvino() -> dict[str, Any]:
    """What OpenVINO can do here."""
    from ddsm_engine.backends.openvino import OpenVINOEngine, core

    engine = OpenVINOEngine(MODEL, {"x": X.shape}, EngineOptions())
    run_on(engine)
    latency = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    compiled = core().compile_model(core().read_model(MODEL), "CPU", latency)
    return {
        "device": core().get_property("CPU", "FULL_DEVICE_NAME"),
        "offers": core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
        "auto_precision": engine.precision,
        "threads": compiled.get_property("INFERENCE_NUM_THREADS"),
    }


def onnxruntime() -> dict[str, Any]:
    """What ONNX Runtime can do here, on the CPU and, where it offers CUDA, there."""
    # Imports the library, too, with its telemetry switched off.
    from ddsm_engine.backends.onnxruntime import OnnxRuntimeEngine

    before = _threads()
    engine = OnnxRuntimeEngine(MODEL, EngineOptions())
    # It has no property for this; its pool is one less than it uses, for the caller works, too.
    threads = None if before is None else (_threads() or before) - before + 1
    run_on(engine)
    from ddsm_engine.backends.onnxruntime_cuda import PROVIDER, OnnxRuntimeCudaEngine, providers

    found: dict[str, Any] = {"offers": providers(), "auto_precision": engine.precision, "threads": threads}
    if PROVIDER in found["offers"]:
        options = EngineOptions(device="cuda")
        try:
            run_on_gpu("onnxruntime", lambda device: OnnxRuntimeCudaEngine(device, MODEL, VARIANT, len(X), options))
            found["cuda"] = True
        except BackendError as error:
            found["cuda_error"] = str(error)
    return found


def native() -> dict[str, Any]:
    """What our own kernels can do here, once they are compiled."""
    from ddsm_engine.backends.native import library
    from ddsm_kernels.unet_cpu import Layer, Program

    program = Program(kernels := library(), 1, cores())
    out = program.image(1, 2)
    middle = Layer(kernels, np.eye(9, dtype=np.float32)[4:5])
    program.convolve(program.gather(1, 2), out, middle, np.zeros(1, np.float32))
    program.scatter(out)
    network, y = program.finish(), np.full_like(X, np.nan)
    network.bind(sample=X, output=y)
    network.run()
    if not np.array_equal(y, X):
        raise BackendError(f"the pixels {X.tolist()} came out as {y.tolist()}")
    return {
        "device": cpu()[0],
        "offers": [f"vectors of {kernels.lanes} numbers"],
        "auto_precision": "fp32",
        "threads": cores(),
    }


def torch() -> dict[str, Any]:
    """What torch can do here, and on a GPU whether Triton launches our kernel."""
    import torch as library

    def relu(device: str) -> None:
        y = library.relu(library.from_numpy(X.copy()).to(device)).cpu().numpy()
        if not np.array_equal(y, RELU):
            raise BackendError(f"Relu of {X.tolist()} came out as {y.tolist()} on {device}")

    relu("cpu")
    cuda = library.cuda.is_available()
    found = {
        "offers": [f"CUDA {library.version.cuda}"] if library.version.cuda else [],
        "auto_precision": "fp32",
        "threads": library.get_num_threads(),
        "cuda": cuda,
    }
    if cuda:
        relu("cuda")
        if importlib.util.find_spec("triton") is not None:
            try:
                fused_norm("cuda")
            except Exception as error:  # it asserts, runs other programs, and raises errors of its own
                found["cuda_error"] = said(error)
    return found


def fused_norm(where: str) -> None:
    """Launch the kernel that takes the place of torch's norms, and compare.

    Raises:
        BackendError: it gives other numbers.
        Exception: whatever Triton raises.
    """
    import torch as library

    from ddsm_kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference

    x, weight = library.from_numpy(X.copy()).reshape(1, X.size, 1, 1), library.ones(X.size)
    expected = group_norm_silu_reference(x, 2, weight, weight, 1e-5)
    found = group_norm_silu(x.to(where), 2, weight.to(where), weight.to(where), 1e-5).cpu()
    if not library.allclose(found, expected, rtol=1e-4, atol=1e-5):
        raise BackendError(f"the fused norm of {X.tolist()} came out as {found.flatten().tolist()}")


def tensorrt() -> dict[str, Any]:
    """What TensorRT can do here: it is asked only where there is a GPU."""
    return _tensorrt("tensorrt")


def tensorrt_rtx() -> dict[str, Any]:
    """What TensorRT-RTX can do here; it builds on a machine without a GPU, too."""
    return _tensorrt("tensorrt-rtx")


def _tensorrt(name: str) -> dict[str, Any]:
    from ddsm_engine.backends.tensorrt import TensorRTEngine, import_tensorrt
    from ddsm_engine.backends.tensorrt_build import build_engine

    trt = import_tensorrt(name)
    listed = getattr(trt, "ComputeCapability", None)  # TensorRT-RTX's
    kinds = [kind for kind in dir(listed) if kind.startswith("SM")]
    found: dict[str, Any] = {"offers": sorted(kinds, key=lambda kind: int(kind[2:]))}
    built = build_engine(trt, MODEL.read_bytes(), {"x": X.shape}, log=io.StringIO())
    try:
        shapes = {"x": X.shape, "y": X.shape}
        gpu = run_on_gpu(name, lambda device: TensorRTEngine(device, trt, built.engine, shapes, "fp32"))
    except BackendError as error:
        if name == "tensorrt":
            raise
        return found | {"cuda_error": str(error)}
    return found | {"cuda": True, "device": gpu}


def torch_compile() -> dict[str, Any]:
    """What torch's compiler can do here."""
    import torch as library

    x = library.from_numpy(X.copy()).to("cuda")
    y = library.compile(library.relu)(x).cpu().numpy()
    if not np.array_equal(y, RELU):
        raise BackendError(f"Relu of {X.tolist()} came out as {y.tolist()}")
    return {"cuda": True, "device": library.cuda.get_device_name()}


DOUBLE = 'extern "C" __global__ void twice(float *x) { x[threadIdx.x] *= 2; }'


def cuda() -> dict[str, Any]:
    """What can be done with CUDA itself: its libraries one by one, then a kernel."""
    errors: dict[str, str] = {}

    def attempt(name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # whatever a broken installation raises is the answer
            errors[name] = said(error)

    attempt("pycuda", lambda: importlib.import_module("pycuda.driver"))
    attempt("cuda-bindings", lambda: importlib.import_module("cuda.bindings.driver"))
    if "cuda-bindings" not in errors:
        attempt("nvrtc", lambda: importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion())
    found: dict[str, Any] = {}
    if not errors:
        attempt("kernel", lambda: found.update(_kernel()))
    return found | {"works": not errors, "errors": errors}


def _kernel() -> Mapping[str, str]:
    from ddsm_engine.backends.cuda import open_device

    device = open_device()
    gpu = device.properties
    with device.current():
        address = device.allocate(X.nbytes)
        device.upload(address, X)
        device.launch(DOUBLE, "twice", 1, X.size, address)
        found = np.empty_like(X)
        device.download(found, address)
    device.close()
    if not np.array_equal(found, 2 * X):
        raise BackendError(f"twice {X.tolist()} came out as {found.tolist()}")
    version = ".".join(str(part) for part in gpu.cuda)
    return {"gpu": gpu.name, "compute_capability": gpu.compute_capability, "version": version}


def _threads() -> int | None:
    try:
        return len(list(Path("/proc/self/task").iterdir()))
    except OSError:
        return None


def said(error: Exception) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


PROBES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "openvino": openvino, "onnxruntime": onnxruntime, "native": native, "torch": torch,
    "tensorrt": tensorrt, "tensorrt-rtx": tensorrt_rtx, "torch-compile": torch_compile, "cuda": cuda,
}  # fmt: skip


def main(name: str) -> None:
    """Try one thing and print what was found as one line of JSON."""
    try:
        found = {"works": True, **PROBES[name]()}
    except Exception as error:  # whatever a broken installation raises is the answer
        found = {"error": said(error)}
    print(json.dumps({"found": found}), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main(sys.argv[1])
