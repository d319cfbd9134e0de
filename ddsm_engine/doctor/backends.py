"""What each backend can do on this machine, found out by running it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ddsm_engine.backends import BACKENDS, INSTALL, installed_backends
from ddsm_engine.doctor.finding import Finding
from ddsm_engine.doctor.libraries import Library
from ddsm_engine.doctor.machine import Gpu, Limits

TIMEOUT_S = 120
EXPORTERS = ("onnx", "onnxscript")
"""Without these torch exports nothing, and the run time needs none of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What one installed backend can do here.

    Attributes:
        name: One of ``backends.BACKENDS``.
        works: It ran a model of one operator and gave the right numbers.
        error: Why it does not work.
        device: The processor as the backend calls it.
        offers: OpenVINO's capabilities, ONNX Runtime's providers, or the CUDA release that torch was built for.
        auto_precision: What ``--precision auto`` takes.
        threads: What it starts without ``--threads``; None where that cannot be seen.
        cuda: It ran the model on CUDA, too.
        cuda_error: Why it did not, where it offers CUDA.
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


def read_backends() -> tuple[Backend, ...]:
    """Probe every installed backend."""
    return tuple(probe(name) for name in installed_backends())


def probe(name: str, *, search_path: Iterable[str | Path] | None = None, timeout_s: float = TIMEOUT_S) -> Backend:
    """Run a model of one operator on one backend.

    It runs in a process of its own: a native library that does not fit the machine can end its process, or never
    return, and neither may end the doctor.

    Args:
        name: One of ``backends.BACKENDS``.
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
        return Backend(name=name, error=f"no answer within {timeout_s:g} s")
    # A library may print lines of its own.
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"name": ')]
    if done.returncode == 0 and answers:
        answer = json.loads(answers[-1])
        return Backend(**{**answer, "offers": tuple(answer["offers"])})
    end = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
    return Backend(name=name, error=": ".join([f"its process ended with {end}", *done.stderr.splitlines()[-1:]]))


def check_backends(backends: Iterable[Backend], libraries: Iterable[Library], gpu: Gpu) -> Iterator[Finding]:
    """What is broken, and whether anything is there to run on."""
    required = {library.name: library.required for library in libraries if library.installed is not None}
    if not (backends := tuple(backends)):
        yield Finding("problem", f"one backend of {', '.join(BACKENDS)}", "none is installed", INSTALL["openvino"])
    for backend in backends:
        if not backend.works:
            package = "onnxruntime-gpu" if "onnxruntime-gpu" in required else "onnxruntime"
            package = package if backend.name == "onnxruntime" else backend.name
            again = f"pip install --force-reinstall '{package}{required.get(package, '')}'"
            yield Finding("problem", f"{backend.name} runs a model of one operator", backend.error, again)
        elif backend.cuda_error and gpu.devices:
            again = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'ddsm-engine[gpu]'"
            yield Finding("problem", f"{backend.name} on {gpu.devices[0]}", backend.cuda_error, again)


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
    """Torch that nothing needs here, or gigabytes of CUDA where there is no GPU."""
    if "torch" not in installed:
        return
    if not any(name in installed for name in EXPORTERS):
        yield Finding(
            "note",
            "no torch: the run time needs none, and export needs onnx and onnxscript beside it",
            f"torch {installed['torch']}, of use only for training and as the reference backend",
            "pip uninstall -y torch",
        )
    for_cuda = any(backend.name == "torch" and backend.offers for backend in backends)
    if for_cuda and not gpu.devices:
        required = next((library.required for library in libraries if library.name == "torch"), "")
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
