"""Where was this measured? The block that every result carries."""

import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("ddsm-engine", "numpy", "openvino", "onnxruntime", "torch")
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def environment() -> dict[str, Any]:
    """CPU, cores, library versions, date, command line and, in a checkout, the commit."""
    model, features = cpu()
    return {
        "cpu": model,
        "cpu_features": list(features),
        "cores": cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        # Whole paths are the reader's of one machine; their last part says enough.
        "command": " ".join(Path(word).name if word.startswith("/") else word for word in sys.argv),
        "commit": _commit(),
    }


def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, tuple[str, ...]]:
    """The processor's name and which of ``FEATURES`` it has."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), ()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    return fields.get("model name", platform.machine()), tuple(feature for feature in FEATURES if feature in flags)


def nvidia_driver(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The version of NVIDIA's kernel module, ``580.65.06``; empty where there is none."""
    try:
        found = re.search(r"\s(\d{3,}\.[\d.]+)\s", file.read_text(encoding="utf-8") + "\n")
    except OSError:
        found = None
    return found[1] if found else ""


def cores() -> int:
    """The cores that this process may use: its affinity, which a cpuset narrows, but no CPU quota does."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, marked when files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],  # noqa: S607 - the user's own git
            cwd=folder, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
