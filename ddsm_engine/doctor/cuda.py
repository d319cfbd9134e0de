"""The way to an NVIDIA GPU: driver, CUDA's libraries and their bindings, and the first gap on it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ddsm_engine.doctor.backends import TIMEOUT_S, ask
from ddsm_engine.doctor.finding import Finding
from ddsm_engine.doctor.libraries import fits
from ddsm_engine.doctor.machine import Gpu

CUDA_13_DRIVER = "580"
"""The oldest branch that speaks CUDA 13, for which the libraries below are built."""

GRAPH_DRIVER = "570"
"""The oldest branch that speaks CUDA 12.8, the first whose graphs can branch by a number (SWITCH)."""

FOR_CUDA_13: Mapping[str, str] = {
    "onnxruntime-gpu": ">=1.27", "cuda-bindings": ">=13", "tensorrt-cu13": "", "tensorrt-rtx-cu13": "",
    "tensorrt": ">=11", "nvidia-cublas": ">=13",
}  # fmt: skip
"""Distributions whose versions from here on need CUDA 13 (``nvidia-cublas`` is what torch's CUDA 13 builds bring)."""

ON_GPU = ("onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "tensorrt-rtx-cu13")
"""Who has one of these wants the GPU."""

UPDATE_DRIVER = (
    f"sudo ubuntu-drivers install --gpgpu nvidia:{CUDA_13_DRIVER}-server  # elsewhere: https://www.nvidia.com/drivers"
)

PYCUDA = "PATH=/usr/local/cuda/bin:$PATH pip install --no-cache-dir --no-binary pycuda{force} 'pycuda>=2025.1'"
"""It is built when it is installed: with a C++ compiler, and with nvcc and cuda.h of a CUDA toolkit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuda:
    """What a process on this machine can do with CUDA.

    Attributes:
        works: A kernel was compiled, run, and gave the right numbers.
        gpu: The GPU that it ran on.
        compute_capability: Of that GPU, ``9.0``.
        version: The newest CUDA that the driver speaks, ``13.0``.
        errors: Why not: by ``pycuda``, ``cuda-bindings``, ``nvrtc`` or ``kernel``, what was said.
    """

    works: bool = False
    gpu: str = ""
    compute_capability: str = ""
    version: str = ""
    errors: Mapping[str, str] = field(default_factory=dict)


def read_cuda(gpu: Gpu) -> Cuda:
    """Compile and run a kernel in a process of its own; where no GPU can be reached nothing is tried."""
    if not gpu.devices:
        return Cuda()
    found = ask("cuda", timeout_s=TIMEOUT_S)
    return Cuda(errors={"kernel": found["error"]}) if "error" in found else Cuda(**found)


def check_driver(gpu: Gpu, installed: Mapping[str, str]) -> Iterator[Finding]:
    """Whether there is a driver, and one that is new enough for what is installed."""
    wants = [f"{name} {installed[name]}" for name in FOR_CUDA_13 if fits_cuda_13(name, installed)]
    if not gpu.driver:
        if gpu.slots:
            yield Finding(
                "problem",
                f"NVIDIA's driver {CUDA_13_DRIVER} or newer for the GPU at {', '.join(gpu.slots)}",
                "no driver: nothing can run on that GPU",
                UPDATE_DRIVER,
            )
        elif useless := [name for name in ("tensorrt", "pycuda") if name in installed]:
            yield Finding(
                "note",
                f"an NVIDIA GPU and its driver for {' and '.join(useless)}",
                "neither: they are of no use here",
                f"pip uninstall -y {' '.join(useless)}",
            )
    elif not gpu.devices:
        return
    elif not fits(gpu.driver, f">={CUDA_13_DRIVER}") and wants:
        yield Finding(
            "problem",
            f"driver {CUDA_13_DRIVER} or newer: {', '.join(wants)} are built for CUDA 13",
            f"NVIDIA driver {gpu.driver}",
            UPDATE_DRIVER,
        )
    elif not fits(gpu.driver, f">={GRAPH_DRIVER}"):
        yield Finding(
            "note",
            f"driver {GRAPH_DRIVER} or newer (CUDA 12.8), where one launch does a whole run",
            f"NVIDIA driver {gpu.driver}: the host launches every call",
            UPDATE_DRIVER,
        )


def fits_cuda_13(name: str, installed: Mapping[str, str]) -> bool:
    """Whether what is installed under this name needs CUDA 13."""
    return name in installed and fits(installed[name], FOR_CUDA_13[name])


def check_cuda(cuda: Cuda, gpu: Gpu, installed: Mapping[str, str], toolkit: str | None) -> Iterator[Finding]:
    """What is missing or broken between Python and the GPU.

    Args:
        cuda: What was tried.
        gpu: What there is.
        installed: Versions by normalised name.
        toolkit: Where ``nvcc`` is, or None.
    """
    wanted = [f"{name} {installed[name]}" for name in ON_GPU if name in installed]
    if not gpu.devices or not wanted:
        return
    for name, use in (("pycuda", "memory and streams"), ("cuda-bindings", "graphs")):
        if name not in installed:
            yield Finding(
                "note",
                f"{name}, through which engines on {gpu.devices[0]} get {use}",
                f"{', '.join(wanted)} without it: nothing runs on the GPU",
                "pip install 'cuda-bindings>=13'" if name == "cuda-bindings" else PYCUDA.format(force=""),
            )
        elif name in cuda.errors:
            yield _broken(name, installed[name], cuda.errors[name], toolkit)
    if "nvrtc" in cuda.errors:
        expected = "NVRTC, which compiles kernels"
        yield Finding("problem", expected, cuda.errors["nvrtc"], "pip install --upgrade nvidia-cuda-nvrtc")
    if "kernel" in cuda.errors:
        yield Finding("problem", f"a kernel that runs on {gpu.devices[0]}", cuda.errors["kernel"], "nvidia-smi")


def _broken(name: str, version: str, error: str, toolkit: str | None) -> Finding:
    """An installed library that cannot be imported."""
    expected = f"{name} {version} that can be imported"
    if "libcuda.so" in error:
        # Containers get the driver's libraries from outside, those for computing only if asked for.
        return Finding(
            "problem", expected, error, "docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        )
    if name == "cuda-bindings":
        return Finding("problem", expected, error, "pip install --force-reinstall 'cuda-bindings>=13'")
    rebuild = PYCUDA.format(force=" --force-reinstall --no-deps")
    if "undefined symbol" in error:
        # A linker that drops what it thinks unneeded drops libcuda.
        return Finding("problem", expected, f"{error} (built without libcuda)", f"LDFLAGS=-Wl,--no-as-needed {rebuild}")
    without = "" if toolkit else "; no nvcc is on the PATH"
    return Finding("problem", expected, error + without, rebuild)


def check_architecture(cuda: Cuda, offers: Mapping[str, tuple[str, ...]]) -> Iterator[Finding]:
    """Whether TensorRT-RTX lists this GPU.

    Args:
        cuda: Which GPU it is.
        offers: Of each backend, what it offers.
    """
    listed = offers.get("tensorrt-rtx", ())
    architecture = f"SM{cuda.compute_capability.replace('.', '')}"
    if listed and cuda.compute_capability and architecture not in listed:
        yield Finding(
            "note",
            f"a GPU that TensorRT-RTX lists ({', '.join(listed)})",
            f"{cuda.gpu} ({architecture}), on which its engines may not load",
            "ddsm build --backend tensorrt BUNDLE",
        )
