"""What each backend can do on this machine, found out by running it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddsm_engine.backends import BACKENDS, GPU_BACKENDS, INSTALL, installed_backends, is_installed
from ddsm_engine.doctor.finding import Finding
from ddsm_engine.doctor.libraries import Library
from ddsm_engine.doctor.machine import Gpu, Limits

TIMEOUT_S = 120
EXPORTERS = ("onnx", "onnxscript")
"""Without these torch exports nothing, and the run time needs none of it."""

WITHOUT_A_GPU = ("tensorrt-rtx",)
"""Of the backends for a GPU those that can do something where there is none: it builds."""

PACKAGES = {"tensorrt-rtx": "tensorrt-rtx-cu13", "torch-compile": "torch"}
"""What is installed for a backend, where it has another name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What one installed backend can do here.

    Attributes:
        name: One of ``backends.BACKENDS`` or ``GPU_BACKENDS``.
        works: It ran a model of one operator and gave the right numbers; TensorRT-RTX without a GPU: it built it.
        error: Why it does not work.
        device: The processor as the backend calls it.
        offers: OpenVINO's capabilities, ONNX Runtime's providers, the CUDA release that torch was built for, or the
            GPUs that TensorRT-RTX lists.
        auto_precision: What ``--precision auto`` takes.
        threads: What it starts without ``--threads``; None where that cannot be seen.
        cuda: It ran the model on CUDA, too.
        cuda_error: Why it did not, where it offers CUDA; of torch, why Triton launches nothing there.
    """

    name: str
    works: bool = False
    error: str = ""
    device: str = ""
    offers: tuple[str, ...] = ()
    auto_precision: str = ""
    threads: int | None = None
    cuda: bool = False
    cuda_error: str = ""


def read_backends(gpu: Gpu) -> tuple[Backend, ...]:
    """Probe every installed backend that can do something here."""
    found = [probe(name) for name in installed_backends()]
    for name in filter(is_installed, GPU_BACKENDS if gpu.devices else WITHOUT_A_GPU):
        # What torch cannot do, its compiler cannot either, and one line says so.
        if name != "torch-compile" or any(backend.name == "torch" and backend.cuda for backend in found):
            found.append(probe(name))
    return tuple(found)


def probe(name: str, *, search_path: Iterable[str | Path] | None = None, timeout_s: float = TIMEOUT_S) -> Backend:
    """Run a model of one operator on one backend; see ``ask``."""
    answer = ask(name, search_path=search_path, timeout_s=timeout_s)
    return Backend(name=name, **{**answer, "offers": tuple(answer.get("offers", ()))})


def ask(name: str, *, search_path: Iterable[str | Path] | None = None, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Let ``doctor.probe`` try something, and return what it found, or why not as ``error``.

    It runs in a process of its own: a native library that does not fit the machine can end its process, or never
    return, and neither may end the doctor.

    Args:
        name: What: a backend, or ``cuda``.
        search_path: Where that process looks for modules (default: where this one does).
        timeout_s: How long it may take.
    """
    folders = os.pathsep.join(str(folder) for folder in (sys.path if search_path is None else search_path) if folder)
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-P", "-m", "ddsm_engine.doctor.probe", name],
            capture_output=True, text=True, check=False, timeout=timeout_s, env={**os.environ, "PYTHONPATH": folders},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout_s:g} s"}
    # A library may print lines of its own.
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"found": ')]
    if done.returncode == 0 and answers:
        found: dict[str, Any] = json.loads(answers[-1])["found"]
        return found
    end = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
    return {"error": ": ".join([f"its process ended with {end}", *done.stderr.splitlines()[-1:]])}


def check_backends(backends: Iterable[Backend], libraries: Iterable[Library], gpu: Gpu) -> Iterator[Finding]:
    """What is broken, and whether anything is there to run on."""
    required = {library.name: library.required for library in libraries if library.installed is not None}
    if not (backends := tuple(backends)):
        yield Finding("problem", f"one backend of {', '.join(BACKENDS)}", "none is installed", INSTALL["openvino"])
    for backend in backends:
        if not backend.works:
            again = _reinstall(backend, required)
            yield Finding("problem", f"{backend.name} runs a model of one operator", backend.error, again)
        elif backend.cuda_error and gpu.devices:
            again = _repair_on_gpu(backend, required)
            yield Finding("problem", f"{backend.name} on {gpu.devices[0]}", backend.cuda_error, again)


def _repair_on_gpu(backend: Backend, required: Mapping[str, str]) -> str:
    if backend.name == "onnxruntime":
        return "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'ddsm-engine[gpu]'"
    return _repair_triton(backend.cuda_error) if backend.name == "torch" else _reinstall(backend, required)


def _repair_triton(error: str) -> str:
    """What its first launch lacks: it compiles its own way to the driver."""
    if "CalledProcessError" in error or "C compiler" in error:
        return "sudo apt-get install -y gcc python3-dev"
    return "sudo /sbin/ldconfig" if "libcuda" in error else "pip install triton"


def _reinstall(backend: Backend, required: Mapping[str, str]) -> str:
    if backend.name == "torch-compile" and any(words in backend.error for words in ("riton", "CalledProcessError")):
        return _repair_triton(backend.error)
    if backend.name == "native":
        return "sudo apt-get install --reinstall g++"
    package = PACKAGES.get(backend.name, backend.name)
    if backend.name == "onnxruntime" and "onnxruntime-gpu" in required:
        package = "onnxruntime-gpu"
    # On PyPI itself are stubs that fetch the libraries from NVIDIA's index.
    index = "--extra-index-url https://pypi.nvidia.com " if package == "tensorrt" else ""
    return f"pip install --force-reinstall {index}'{package}{required.get(package, '')}'"


def check_gpu(gpu: Gpu, installed: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the GPU and the build of ONNX Runtime fit each other."""
    if gpu.driver and not gpu.devices:
        yield Finding(
            "note",
            "a GPU beside its driver",
            f"NVIDIA driver {gpu.driver}, but no GPU can be reached from here (a container needs --gpus all)",
        )
    if gpu.devices and "onnxruntime-gpu" not in installed:
        yield Finding(
            "note",
            f"onnxruntime-gpu for {gpu.devices[0]}",
            "it is not installed; everything runs on the CPU",
            "pip uninstall -y onnxruntime && pip install 'ddsm-engine[gpu]'",
        )
    if not gpu.devices and "onnxruntime-gpu" in installed:
        yield Finding(
            "note",
            "onnxruntime where there is no GPU",
            f"onnxruntime-gpu {installed['onnxruntime-gpu']}, which runs on the CPU only here",
            "pip uninstall -y onnxruntime-gpu && pip install 'ddsm-engine[cpu]'",
        )


def check_torch(
    backends: Iterable[Backend], libraries: Iterable[Library], installed: Mapping[str, str], gpu: Gpu
) -> Iterator[Finding]:
    """Torch that nothing needs here, gigabytes of CUDA where there is no GPU, or a GPU that torch cannot use."""
    if "torch" not in installed:
        return
    if not any(name in installed for name in EXPORTERS):
        yield Finding(
            "note",
            "no torch: the run time needs none, and export needs onnx and onnxscript beside it",
            f"torch {installed['torch']}, of use only for training and as the reference backend",
            "pip uninstall -y torch",
        )
    torch = next((backend for backend in backends if backend.name == "torch" and backend.works), None)
    for_cuda = torch is not None and torch.offers
    required = next((library.required for library in libraries if library.name == "torch"), "")
    if torch is not None and not for_cuda and gpu.devices:
        yield Finding(
            "note",
            f"torch built for CUDA, for {gpu.devices[0]}",
            f"torch {installed['torch']}, which runs on the CPU only",
            f"pip install --force-reinstall --index-url https://download.pytorch.org/whl/cu130 'torch{required}'",
        )
    if for_cuda and not gpu.devices:
        # Other packages need the nvidia- libraries only together with a GPU build.
        others = sorted(name for name in installed if name.startswith("nvidia-") or name == "triton")
        others = [] if "onnxruntime-gpu" in installed else others
        yield Finding(
            "note",
            "torch's CPU build where there is no GPU",
            f"torch {installed['torch']} built for CUDA, with gigabytes that nothing here can use",
            f"pip uninstall -y {' '.join(['torch', *others])} && "
            f"pip install --index-url https://download.pytorch.org/whl/cpu 'torch{required}'",
        )


def check_threads(backends: Iterable[Backend], limits: Limits) -> Iterator[Finding]:
    """More threads than the CPU quota lets run at once stop each other in every period."""
    eager = [backend for backend in backends if limits.cpu_quota and (backend.threads or 0) > limits.cpu_quota]
    if limits.cpu_quota and eager:
        yield Finding(
            "note",
            f"at most as many threads as the CPU quota of {limits.cpu_quota:g} CPUs lets run",
            ", ".join(f"{backend.name} starts {backend.threads}" for backend in eager),
            f"ddsm run --threads {max(1, int(limits.cpu_quota))}",
        )
