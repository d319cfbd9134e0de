"""``python -m ddsm_engine.doctor.probe BACKEND``: the process that imports a backend and runs one operator on it."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_engine.backends.engine import Engine, EngineOptions
from ddsm_engine.doctor.backends import Backend
from ddsm_engine.errors import BackendError

MODEL = Path(__file__).with_name("relu.onnx")
"""Opset 18, y = Relu(x), both float32 [batch, 4]; a file of the package, for there may be no folder to write one to."""

X = np.array([[-1.0, 0.0, 0.5, 2.0]], np.float32)
RELU = np.array([[0.0, 0.0, 0.5, 2.0]], np.float32)
"""Numbers that bf16 holds exactly."""


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
    import onnxruntime as ort

    found = {"offers": ort.get_available_providers(), "auto_precision": engine.precision, "threads": threads}
    if "CUDAExecutionProvider" in found["offers"]:
        try:
            run_on(OnnxRuntimeEngine(MODEL, EngineOptions(device="cuda")))
            found["cuda"] = True
        except BackendError as error:
            found["cuda_error"] = str(error)
    return found


def torch() -> dict[str, Any]:
    """What torch can do here."""
    import torch as library

    def relu(device: str) -> None:
        y = library.relu(library.from_numpy(X.copy()).to(device)).cpu().numpy()
        if not np.array_equal(y, RELU):
            raise BackendError(f"Relu of {X.tolist()} came out as {y.tolist()} on {device}")

    relu("cpu")
    cuda = library.cuda.is_available()
    if cuda:
        relu("cuda")
    return {
        "offers": [f"CUDA {library.version.cuda}"] if library.version.cuda else [],
        "auto_precision": "fp32",
        "threads": library.get_num_threads(),
        "cuda": cuda,
    }


def _threads() -> int | None:
    try:
        return len(list(Path("/proc/self/task").iterdir()))
    except OSError:
        return None


def main(name: str) -> None:
    """Probe one backend and print what was found as one line of JSON."""
    try:
        found = {"works": True, **{"openvino": openvino, "onnxruntime": onnxruntime, "torch": torch}[name]()}
    except Exception as error:  # whatever a broken installation raises is the answer
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    print(json.dumps(asdict(Backend(name=name, **found))), flush=True)  # noqa: T201 - the answer


if __name__ == "__main__":
    main(sys.argv[1])
