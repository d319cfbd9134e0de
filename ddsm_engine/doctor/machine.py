"""The processor, the limits of the control group, the GPU and the cache folder."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ddsm_engine.doctor.finding import Finding
from ddsm_engine.errors import OutputError
from ddsm_engine.files import SUFFIX, only_one_process
from ddsm_engine.measure.environment import cores, cpu, nvidia_driver

NO_LIMIT = 1 << 60
"""Version 1 writes "no limit" as the largest multiple of the page size."""

ROOM_MB = 1_300
"""All seven widths of the paper's CIFAR-10 network at batch 1 on OpenVINO: 1248 MB at their peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """The CPU: its name, the features that change speed, and the cores that this process may use."""

    model: str
    features: tuple[str, ...]
    cores: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the control group and the machine leave to this process.

    Attributes:
        cgroup: The version that was found, 1 or 2; None where there is none.
        cpu_quota: CPUs' worth of time; None where there is no quota.
        cpuset: The CPUs that it may run on, as ``0-3``.
        memory_limit_mb: None where there is no limit.
        memory_room_mb: What is left under that limit, and on the machine; None where neither can be seen.
    """

    cgroup: int | None = None
    cpu_quota: float | None = None
    cpuset: str = ""
    memory_limit_mb: int | None = None
    memory_room_mb: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """NVIDIA's driver, the GPUs that can be reached, and where any are on the PCI bus, with a driver or without."""

    driver: str = ""
    devices: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """The user's cache folder; ``leftovers`` are what killed processes left there."""

    path: str
    writable: bool
    files: int = 0
    size_mb: float = 0.0
    leftovers: tuple[str, ...] = ()


def read_processor(root: Path) -> Processor:
    """Read ``/proc/cpuinfo`` and this process's affinity."""
    model, features = cpu(root / "proc/cpuinfo")
    return Processor(model=model, features=features, cores=cores())


def read_limits(root: Path) -> Limits:
    """The tightest limits from this process's control group up, version 1 or 2 (kernel docs, cgroup-v1, cgroup-v2)."""
    processor, memory, cpus = (_groups(root, name) for name in ("cpu", "memory", "cpuset"))
    limit, used = min((_memory(folder) for folder in memory), default=(NO_LIMIT, 0))
    room = [limit - used] if limit < NO_LIMIT else []
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), flags=re.MULTILINE)
    room += [int(found[1]) << 10] if found else []
    cpuset = [_read(folder / name) for folder in cpus for name in ("cpuset.cpus.effective", "cpuset.effective_cpus")]
    version_1 = any((folder / "cpu.cfs_quota_us").exists() for folder in processor)
    return Limits(
        cgroup=(1 if version_1 else 2) if processor or memory else None,
        cpu_quota=min((quota for folder in processor if (quota := _quota(folder))), default=None),
        cpuset=next(filter(None, cpuset), ""),
        memory_limit_mb=limit >> 20 if limit < NO_LIMIT else None,
        memory_room_mb=max(0, min(room)) >> 20 if room else None,
    )


def _groups(root: Path, controller: str) -> list[Path]:
    """This process's control group for one controller and all above it, innermost first."""
    mounts = root / "sys/fs/cgroup"
    for line in sorted(_read(root / "proc/self/cgroup").splitlines(), key=lambda line: line.startswith("0::")):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(",") or not controllers:
            mount = mounts / controllers if (mounts / controllers).is_dir() else mounts / controller
            # Inside a container the path may be the host's: then only the mount's own folder is there.
            inside = [part for part in path.split("/") if part not in ("", "..")]
            folders = [mount.joinpath(*inside[:depth]) for depth in range(len(inside), -1, -1)]
            if found := [folder for folder in folders if any(folder.glob(f"{controller}.*"))]:
                return found
    return []


def _quota(folder: Path) -> float | None:
    quota, period = [*_read(folder / "cpu.max").split(), "", ""][:2]
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _memory(folder: Path) -> tuple[int, int]:
    """Limit and use in bytes; what the kernel would give back when asked (file pages) is not in use."""
    limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
    used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
    file = re.search(r"^(?:total_)?inactive_file (\d+)$", _read(folder / "memory.stat"), flags=re.MULTILINE)
    return (
        min(int(limit), NO_LIMIT) if limit.isdigit() else NO_LIMIT,
        (int(used) if used.isdigit() else 0) - (int(file[1]) if file else 0),
    )


def _read(file: Path) -> str:
    """A small file of the kernel's; empty where it is not there."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def query_nvidia_smi() -> str:
    """One line a GPU, ``name, driver version, memory``; empty where there is no ``nvidia-smi`` or it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ""


def read_gpu(root: Path, query: Callable[[], str] = query_nvidia_smi) -> Gpu:
    """NVIDIA's driver and GPUs: from ``nvidia-smi``, else from the kernel's files."""
    rows = [[field.strip() for field in line.split(",")] for line in query().splitlines()]
    rows = [row for row in rows if len(row) == 3]
    nodes = sorted(path.name for path in (root / "dev").glob("nvidia[0-9]*"))
    return Gpu(
        driver=rows[0][1] if rows else nvidia_driver(root / "proc/driver/nvidia/version"),
        devices=tuple(f"{name} ({memory})" for name, _, memory in rows) or tuple(nodes),
        slots=tuple(
            sorted(
                slot.name
                for slot in (root / "sys/bus/pci/devices").glob("*")
                # NVIDIA's, and a display controller: its network cards and sound chips are others.
                if _read(slot / "vendor") == "0x10de" and _read(slot / "class").startswith("0x03")
            )
        ),
    )


def read_cache(folder: Path) -> Cache:
    """What the cache folder holds; it need not exist."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return Cache(
        path=str(folder),
        writable=nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK),
        files=len(files),
        size_mb=round(sum(path.stat().st_size for path in files) / 1e6, 3),
        leftovers=tuple(str(path) for path in sorted(folder.rglob(f".*{SUFFIX}")) if _is_left_over(path)),
    )


def _is_left_over(sibling: Path) -> bool:
    """Whether the process that wrote it is dead: the living hold it."""
    with suppress(OSError, OutputError), only_one_process(sibling):
        return True
    return False


def check_memory(limits: Limits) -> Iterator[Finding]:
    """Whether a large bundle fits."""
    if limits.memory_room_mb is not None and limits.memory_room_mb < ROOM_MB:
        limit = f"under the limit of {limits.memory_limit_mb} MB" if limits.memory_limit_mb else "on this machine"
        yield Finding(
            "note",
            f"{ROOM_MB} MB of memory: what seven widths of the CIFAR-10 network take on OpenVINO",
            f"{limits.memory_room_mb} MB are free {limit}; ONNX Runtime takes a quarter less, and small bundles fit",
            "ddsm run --backend onnxruntime --batch-size 1",
        )


def check_cache(cache: Cache) -> Iterator[Finding]:
    """Whether built engines can be kept, and what killed processes left."""
    if not cache.writable:
        yield Finding(
            "problem",
            f"a cache folder that can be written: {cache.path}",
            "it cannot be: no engine is kept, and every start compiles anew",
            'export XDG_CACHE_HOME="$(mktemp -d)"',
        )
    if cache.leftovers:
        yield Finding(
            "note",
            f"nothing unfinished in {cache.path}",
            f"{len(cache.leftovers)} leftovers of killed processes",
            f"rm -rf -- {shlex.join(cache.leftovers)}",
        )
