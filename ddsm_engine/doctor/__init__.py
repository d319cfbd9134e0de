"""``ddsm doctor``: what is installed, what each backend can do on this machine, and how to repair what is wrong.

``--json`` prints one object, ``format_version`` 1:

- ``format``: ``"ddsm-doctor"``
- ``program``: ``version`` (null where the package is not installed), ``python``, ``executable``, ``platform``
- ``libraries``: of each requirement ``name``, ``required``, ``extras``, ``installed`` (null where it is not)
- ``backends``: of each installed one ``name``, ``works``, ``error``, ``device``, ``offers``, ``auto_precision``,
  ``threads``, ``cuda``, ``cuda_error``; those for a GPU where there is one, TensorRT-RTX without one, too
- ``processor``: ``model``, ``features``, ``cores``
- ``limits``: ``cgroup``, ``cpu_quota`` in CPUs, ``cpuset``, ``memory_limit_mb``, ``memory_room_mb`` in MiB
- ``gpu``: ``driver``, ``devices``, ``slots`` on the PCI bus
- ``cuda``: ``works``, ``gpu``, ``compute_capability``, ``version``, ``errors`` by library; empty where there is no GPU
- ``cache``: ``path``, ``writable``, ``files``, ``size_mb``, ``leftovers``
- ``findings``: of each ``severity`` (``problem`` or ``note``), ``expected``, ``found``, ``repair``

Exit code 1 says that there is a problem; notes leave it 0.
"""

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ddsm_engine.cli import guarded, refuse
from ddsm_engine.doctor import backends, cuda, libraries, machine
from ddsm_engine.doctor.backends import Backend
from ddsm_engine.doctor.cuda import Cuda
from ddsm_engine.doctor.finding import Finding
from ddsm_engine.doctor.libraries import DISTRIBUTION, Library
from ddsm_engine.doctor.machine import Cache, Gpu, Limits, Processor
from ddsm_engine.engine_cache import user_cache_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """Everything that was looked at; ``installed`` holds every distribution's version by its normalised name."""

    installed: Mapping[str, str]
    libraries: tuple[Library, ...]
    backends: tuple[Backend, ...]
    processor: Processor
    limits: Limits = field(default_factory=Limits)
    gpu: Gpu = field(default_factory=Gpu)
    cuda: Cuda = field(default_factory=Cuda)
    cache: Cache

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong or worth knowing, problems first."""
        found = (
            *libraries.check_libraries(self.libraries),
            *libraries.check_clash(self.installed, gpu=bool(self.gpu.devices)),
            *backends.check_backends(self.backends, self.libraries, self.gpu),
            *backends.check_gpu(self.gpu, self.installed),
            *backends.check_torch(self.backends, self.libraries, self.installed, self.gpu),
            *cuda.check_driver(self.gpu, self.installed),
            *cuda.check_cuda(self.cuda, self.gpu, self.installed, shutil.which("nvcc")),
            *cuda.check_architecture(self.cuda, {backend.name: backend.offers for backend in self.backends}),
            *backends.check_threads(self.backends, self.limits),
            *machine.check_memory(self.limits),
            *machine.check_cache(self.cache),
        )
        return tuple(sorted(found, key=lambda finding: finding.severity != "problem"))

    @property
    def program(self) -> dict[str, str | None]:
        """The package's version, and what runs it."""
        return {
            "version": self.installed.get(DISTRIBUTION),
            "python": platform.python_version(),
            "executable": sys.executable,
            "platform": platform.platform(),
        }

    def to_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints; the module says what is in it."""
        return {
            "format": "ddsm-doctor",
            "format_version": 1,
            "program": self.program,
            "libraries": [asdict(library) for library in self.libraries],
            "backends": [asdict(backend) for backend in self.backends],
            "processor": asdict(self.processor),
            "limits": asdict(self.limits),
            "gpu": asdict(self.gpu),
            "cuda": asdict(self.cuda),
            "cache": asdict(self.cache),
            "findings": [asdict(finding) for finding in self.findings],
        }


def examine(root: Path = Path("/")) -> Examination:
    """Look at everything; ``root`` holds ``proc``, ``sys`` and ``dev``."""
    installed, gpu = libraries.installed_versions(), machine.read_gpu(root)
    return Examination(
        installed=installed,
        libraries=libraries.read_libraries(libraries.own_requirements(), installed),
        backends=backends.read_backends(gpu),
        processor=machine.read_processor(root),
        limits=machine.read_limits(root),
        gpu=gpu,
        cuda=cuda.read_cuda(gpu),
        cache=machine.read_cache(user_cache_folder()),
    )


def describe(examination: Examination) -> str:
    """The report for people: facts by section, findings last."""
    e, program = examination, examination.program
    missing = [
        f"{lib.name} ({', '.join(extras)})"
        for lib in e.libraries
        if lib.installed is None and (extras := [extra for extra in lib.extras if extra != "dev"])
    ]
    lines = [
        f"ddsm-engine {program['version'] or 'not installed'}, Python {program['python']}, {program['platform']}",
        "libraries",
        *(f"  {lib.name:18} {lib.installed:14} {lib.required}" for lib in e.libraries if lib.installed is not None),
        f"  not installed: {', '.join(missing) or 'none'}",
        "backends",
        *([f"  {backend.name:18} {_backend(backend)}" for backend in e.backends] or ["  none"]),
        "processor",
        f"  {e.processor.model}, {e.processor.cores} cores; {' '.join(e.processor.features) or 'no known features'}",
        "limits",
        f"  {_limits(e.limits)}",
        "GPU",
        f"  {', '.join(e.gpu.devices) or 'none'}" + (f"; driver {e.gpu.driver}" if e.gpu.driver else ""),
        *_cuda(e.cuda),
        "cache",
        f"  {e.cache.path}: {e.cache.files} files, {e.cache.size_mb:.1f} MB"
        + ("" if e.cache.writable else "; cannot be written"),
        "findings" if e.findings else "findings: none",
    ]
    for finding in e.findings:
        lines.append(f"  {finding.severity}: expected {finding.expected}; found {finding.found}")
        lines += [f"    repair: {finding.repair}"] if finding.repair else []
    return "\n".join(lines)


def _backend(backend: Backend) -> str:
    if not backend.works:
        return f"broken: {backend.error}"
    on_cuda = "works on CUDA" if backend.cuda else "not on CUDA" if backend.cuda_error else ""
    parts = [
        "works",
        backend.device,
        " ".join(backend.offers),
        f"auto takes {backend.auto_precision}" if backend.auto_precision else "",
        f"{backend.threads} threads" if backend.threads else "",
        on_cuda,
    ]
    return "; ".join(filter(None, parts))


def _cuda(found: Cuda) -> list[str]:
    errors = [f"{name}: {error}" for name, error in found.errors.items()]
    works = (
        [f"CUDA {found.version}, compute capability {found.compute_capability}, runs a kernel"] if found.works else []
    )
    return [f"  {line}" for line in works + errors]


def _limits(limits: Limits) -> str:
    quota = f"{limits.cpu_quota:g} CPUs" if limits.cpu_quota else "no CPU quota"
    memory = f"at most {limits.memory_limit_mb} MB" if limits.memory_limit_mb else "no memory limit"
    room = f"{limits.memory_room_mb} MB free" if limits.memory_room_mb is not None else ""
    group = f"cgroup v{limits.cgroup}" if limits.cgroup else "no cgroup"
    return "; ".join(filter(None, [group, quota, limits.cpuset and f"CPUs {limits.cpuset}", memory, room]))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = argparse.ArgumentParser(prog="ddsm doctor", description="Say what is installed, what works, and what to do.")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the report")
    arguments = p.parse_args(argv)
    examinations: list[Examination] = []

    def command() -> None:
        examinations.append(examine())
        text = json.dumps(examinations[0].to_json(), indent=1) if arguments.json else describe(examinations[0])
        print(text)  # noqa: T201 - the answer

    code = guarded(command)
    problems = sum(finding.severity == "problem" for e in examinations for finding in e.findings)
    if code == 0 and problems:
        return refuse(f"{problems} problem{'s' if problems > 1 else ''} found; each is named above with its repair")
    return code
