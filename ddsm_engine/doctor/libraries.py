"""Which libraries are installed, and which should be: the package's own metadata decides."""

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, requires

from ddsm_engine.backends import INSTALL
from ddsm_engine.doctor.finding import Finding, Severity

DISTRIBUTION = "ddsm-engine"

_REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)\s*(?:\[[^]]*])?\s*(?P<versions>[^;]*?)\s*"
    r"(?:;\s*(?:\([^()]*\)\s+and\s+)?extra == ['\"](?P<extra>[\w-]+)['\"])?"
)
_CLAUSE = re.compile(r"(>=|<=|==|!=|>|<)\s*([\d.]+)")
_COMPARE: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One requirement of the package beside what is installed.

    Attributes:
        name: The distribution's name.
        required: The versions that fit, such as ``>=2.11,<2.14``; empty means any.
        extras: The extras that ask for it; none where every command needs it.
        installed: The version found, or None.
    """

    name: str
    required: str
    extras: tuple[str, ...]
    installed: str | None


def installed_versions() -> dict[str, str]:
    """Every installed distribution by its normalised name; the one that Python would import comes first on its path."""
    found: dict[str, str] = {}
    for distribution in distributions():
        # An interrupted pip leaves folders without a name behind.
        if name := distribution.metadata["Name"]:
            found.setdefault(normalised(name), distribution.version)
    return found


def own_requirements() -> list[str]:
    """The requirements in the package's own metadata; none where it runs without being installed."""
    try:
        return requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return []


def normalised(name: str) -> str:
    """A distribution's name as the registries compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_libraries(requirements: Iterable[str], installed: Mapping[str, str]) -> tuple[Library, ...]:
    """Put each requirement beside what is installed.

    Args:
        requirements: Lines of the package's metadata, as ``numpy>=1.26`` or ``onnx>=1.21; extra == 'export'``.
        installed: Versions by normalised name.
    """
    versions: dict[str, set[str]] = {}
    extras: dict[str, list[str]] = {}
    for line in requirements:
        match = _REQUIREMENT.fullmatch(line.strip())
        # What is only required on another system is not missed here: what is not installed is no finding by itself.
        if match is None or normalised(match["name"]) == DISTRIBUTION:
            continue
        name = match["name"]
        versions.setdefault(name, set()).update(filter(None, match["versions"].strip("() ").split(",")))
        extras.setdefault(name, []).append(match["extra"] or "")
    return tuple(
        Library(
            name=name,
            required=",".join(sorted(versions[name], reverse=True)),
            extras=() if "" in extras[name] else tuple(extras[name]),
            installed=installed.get(normalised(name)),
        )
        for name in versions
    )


def fits(version: str, required: str) -> bool:
    """Whether a version meets every clause; releases are compared, marks of pre-releases and builds are not."""
    return all(
        _COMPARE[comparison](_release(version), _release(bound)) for comparison, bound in _CLAUSE.findall(required)
    )


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def check_libraries(libraries: Iterable[Library]) -> Iterator[Finding]:
    """What is missing, too old or too new."""
    if not (libraries := tuple(libraries)):
        yield Finding(
            "problem", "the package installed", "its metadata is missing: it runs from a folder", INSTALL["openvino"]
        )
    for library in libraries:
        if library.installed is None and library.extras == ():
            yield Finding("problem", library.name + library.required, "it is not installed", _install(library))
        elif library.installed is not None and not fits(library.installed, library.required):
            # The test tools of a contributor's extra are nobody else's problem.
            severity: Severity = "note" if library.extras == ("dev",) else "problem"
            found = f"{library.name} {library.installed}"
            yield Finding(severity, library.name + library.required, found, _install(library))


def _install(library: Library) -> str:
    return f"pip install --upgrade '{library.name}{library.required}'"


def check_clash(installed: Mapping[str, str], *, gpu: bool) -> Iterator[Finding]:
    """``onnxruntime`` and ``onnxruntime-gpu`` are one module under two names; the later overwrites the earlier."""
    both = [f"{name} {installed[name]}" for name in ("onnxruntime", "onnxruntime-gpu") if name in installed]
    if len(both) == 2:
        yield Finding(
            "problem",
            "onnxruntime or onnxruntime-gpu",
            f"{' and '.join(both)} in the same folder, each with files of the other's version",
            f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'ddsm-engine[{'gpu' if gpu else 'cpu'}]'",
        )
