"""Which GPU was it, driven by what? What a result says of itself, and whether it may be gone on with."""

import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from ddsm_engine.backends.device import DeviceProperties
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.environment import environment
from ddsm_engine.untrusted import one_line

LIBRARIES: Final = ("tensorrt", "tensorrt-rtx", "onnxruntime-gpu", "cuda-bindings", "pycuda", "triton")
"""Beside those of ``ddsm_engine.measure.environment``."""

CLOCKS: Final = ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit")

IDENTITY: Final = ("gpu", "cpu", "cores", "versions", "commit", "bundles")
"""What must be the same for two parts to stand in one table."""


def find_gpu() -> DeviceProperties:
    """The GPU that the suite runs on.

    Raises:
        BackendError: there is none, or nothing to reach it with.
    """
    try:
        # Its libraries come with the extra, and load the driver's when they are imported.
        from ddsm_engine.backends.cuda import properties
    except ImportError as error:
        raise BackendError(
            f"the GPU suite needs an NVIDIA GPU, its driver and 'ddsm-engine[gpu]', found that {one_line(error)}"
        ) from error
    return properties()


def describe_machine(gpu: DeviceProperties, bundles: Mapping[int, Bundle]) -> dict[str, Any]:
    """``ddsm_engine.measure.environment`` and the GPU, its clocks, its libraries, and the bundles by image size."""
    here = environment()
    here["versions"] |= {name: found for name in LIBRARIES if (found := _version(name))}
    return here | {
        "gpu": {
            "name": gpu.name,
            "compute_capability": gpu.compute_capability,
            "driver": gpu.driver,
            "cuda": ".".join(map(str, gpu.cuda)),
            "memory_bytes": gpu.memory_bytes,
        },
        "clocks": clocks(),
        "bundles": {str(size): bundle.manifest.checksum for size, bundle in sorted(bundles.items())},
    }


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What keeps two machines' parts from standing in one table."""
    return [name for name in IDENTITY if one.get(name) != other.get(name)]


def clocks() -> dict[str, str] | None:
    """Clocks (MHz) and power limit (W) of the first GPU, as ``nvidia-smi`` has them; None where it is silent."""
    query = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(CLOCKS, (word.strip() for word in said.stdout.split(",")), strict=False))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
