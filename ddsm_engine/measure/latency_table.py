"""Measured tables that stay with their bundle, ``latency/<target>.json``: what a search weighs the variants by.

A table is one file, sealed as the manifest is: by the SHA-256 of all else that it says, the manifest's own checksum
among it. That guards against accidents and mix-ups, not against an author who means harm.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddsm_engine.bundle import MAX_COUNT, Bundle, checksum_of
from ddsm_engine.engine_cache import Target
from ddsm_engine.errors import BundleError, OutputError
from ddsm_engine.files import refuse_existing, write_atomically
from ddsm_engine.measure.timing import Timing
from ddsm_engine.untrusted import brief, parse_json, read_bytes

FORMAT = "ddsm-latency"
FORMAT_VERSION = 2
LATENCY = "latency"
MAX_TABLE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """How long a call of each variant took for one target.

    Attributes:
        target: What was timed: backend and its version, device, cores, threads, precision, batch.
        environment: Where and when, see ``ddsm_engine.measure.environment``.
        peak_gflops: The machine's matrix-product peak in the target's precision, GFLOP/s.
        timings: Of one call of the whole batch, by variant.
    """

    target: Target
    environment: Mapping[str, Any]
    peak_gflops: float
    timings: Mapping[str, Timing]


def latency_file(bundle: Bundle, target: Target) -> Path:
    """Where the table of a target lies, whether or not it was measured."""
    name = "{backend}-{precision}-b{batch}".format_map(target)
    return bundle.path / LATENCY / f"{name}-{checksum_of(target)[:12]}.json"


def check_writable(bundle: Bundle, target: Target) -> None:
    """Refuse, before minutes of measuring, a table that could not be kept; one that is there may be replaced.

    Raises:
        OutputError: the bundle is read-only, or its ``latency`` is a file or leads elsewhere.
    """
    file = latency_file(bundle, target)
    bundle.refuse_outside(file)
    refuse_existing(file, force=True)


def save_latency(bundle: Bundle, table: LatencyTable) -> Path:
    """Keep a table in the bundle, whole or not at all; one of the same target is replaced.

    Returns:
        Its file.

    Raises:
        OutputError: it cannot be written.
    """
    check_writable(bundle, table.target)
    file = latency_file(bundle, table.target)
    body = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "manifest": bundle.manifest.checksum,
        "target": dict(table.target),
        "environment": dict(table.environment),
        "peak_gflops": table.peak_gflops,
        "rows": [{"variant": variant} | asdict(table.timings[variant]) for variant in bundle.variants],
    }
    try:
        write_atomically(file, json.dumps(body | {"checksum": checksum_of(body)}, indent=1).encode() + b"\n")
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error}") from error
    return file


def load_latency(bundle: Bundle, target: Target) -> LatencyTable:
    """The table of a target, with a timing of every variant of the bundle.

    Raises:
        BundleError: not measured yet, damaged, newer, of another bundle or target, or with an impossible value.
    """
    file = latency_file(bundle, target)
    again = (
        f"ddsm bench {bundle.path} --backend {target['backend']} --precision {target['precision']} "
        f"--batch-size {target['batch']}" + (f" --threads {target['threads']}" if target["threads"] else "") + " --save"
    )
    if not file.exists():
        raise BundleError(f"{file} is missing: this machine was not measured with these options; {again}")
    if not bundle.is_inside(file):
        raise BundleError(f"{file} is a link that leaves the bundle; do not use it")
    try:
        return _parse(parse_json(read_bytes(file, MAX_TABLE_BYTES)), bundle, target)
    except KeyError as error:
        raise BundleError(f"{file} is no latency table: {error} is missing; {again}") from error
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(f"{file} is no latency table to use: {error}; {again}") from error


def _parse(data: object, bundle: Bundle, target: Target) -> LatencyTable:
    """Read what ``save_latency`` wrote.

    Raises:
        KeyError: a key is missing.
        TypeError, ValueError: anything else.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise TypeError(f"expected an object of the format {FORMAT!r}, found {brief(data)}")
    if data["format_version"] != FORMAT_VERSION:
        raise ValueError(f"expected format_version {FORMAT_VERSION}, found {brief(data['format_version'])}")
    if data.pop("checksum") != checksum_of(data):
        raise ValueError("it is damaged: its content is not what its checksum vouches for")
    if data["manifest"] != bundle.manifest.checksum:
        raise ValueError("it was measured on another bundle, or before this one was exported again")
    if data["target"] != dict(target):
        raise ValueError(f"it was measured for another target, {brief(data['target'])}")
    if not isinstance(data["environment"], dict) or not isinstance(data["rows"], list):
        raise TypeError("environment must be an object and rows a list")
    rows = [(row["variant"], _timing(row)) for row in data["rows"]]
    if [variant for variant, _ in rows] != list(bundle.variants):
        found = ", ".join(brief(variant) for variant, _ in rows[:20])
        raise ValueError(f"expected one row of each of {', '.join(bundle.variants)} in this order, found {found[:400]}")
    return LatencyTable(
        target, data["environment"], _number("peak_gflops", data["peak_gflops"], positive=True), dict(rows)
    )


def _timing(row: Mapping[str, Any]) -> Timing:
    p20, median, p80 = (_number(name, row[name], positive=True) for name in ("p20_ms", "median_ms", "p80_ms"))
    repeats = row["repeats"]
    if type(repeats) is not int or repeats < 1:
        raise TypeError(f"repeats must be a whole number of at least 1, found {brief(repeats)}")
    return Timing(median, p20, p80, repeats, _number("swap_ms", row["swap_ms"]))


def _number(name: str, value: object, *, positive: bool = False) -> float:
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not abs(value) <= MAX_COUNT
        or (positive and value <= 0)
    ):
        raise ValueError(f"{name} must be a {'positive ' if positive else ''}number, found {brief(value)}")
    return float(value)
