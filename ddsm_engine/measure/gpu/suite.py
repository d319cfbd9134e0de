"""``ddsm bench --suite gpu``: the parts one after the other, each written to the result as it ends."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from ddsm_engine.errors import BackendError, OutputError
from ddsm_engine.files import refuse_existing, write_atomically
from ddsm_engine.measure.gpu.machine import describe_machine, differing, find_gpu
from ddsm_engine.measure.gpu.parts import PARTS
from ddsm_engine.measure.gpu.targets import Result, verdict_table
from ddsm_engine.measure.gpu.work import read_rows
from ddsm_engine.measure.gpu.worker import open_bundles
from ddsm_engine.untrusted import parse_json, read_bytes

FORMAT: Final = "ddsm-gpu-suite"
FORMAT_VERSION: Final = 1
MAX_BYTES: Final = 16 << 20

DONE, FAILED, NOT_RUN = STATUSES = ("done", "failed", "not run")

GRACE_S: Final = 40.0
"""What a part may take beyond its share for what it had begun; after that it is stopped."""

RunPart = Callable[[str, Path, float], str | None]
"""(part, file of its rows, seconds) → None, or the line that says why it failed."""


def run_suite(
    paths: Sequence[Path], output: Path, names: Sequence[str], say: Callable[[str], None], run: RunPart | None = None
) -> None:
    """Measure what the result does not hold yet, and print the targets.

    Args:
        paths: Bundles, one for each image size.
        output: JSON; gone on with if it was begun here.
        names: Of the parts; none means all.
        say: Prints a line.
        run: Measures one part; a process of its own does if this is None.

    Raises:
        BackendError: there is no GPU (the targets are printed, and nothing is written), or parts that failed.
        BundleError: a bundle that cannot be used.
        OutputError: the result was begun elsewhere, or cannot be written.
    """

    def table(result: Result | None) -> str:
        return verdict_table(result, paths, output)

    try:
        gpu = find_gpu()
    except BackendError:
        say(table(None))
        raise
    result = begin(output, describe_machine(gpu, open_bundles(paths)))
    chosen = [name for name in PARTS if name in names or not names]
    started, shares = time.monotonic(), 0.0
    for name in chosen:
        if is_whole(result["parts"][name]):
            say(f"{name}: done before")
            continue
        # What a part leaves of its share is the next ones', and what it takes beyond it is taken from them.
        shares += PARTS[name].seconds
        seconds = shares - (time.monotonic() - started)
        if seconds <= 0:
            say(f"{name}: not run, the parts before it took its time; the same command goes on")
            continue
        say(f"{name} …")
        measure_part(result, name, seconds, run or _in_its_own_process(paths), lambda: save(result, output))
        say(f"{name}: {spell_part(result['parts'][name])}")
    say(f"\n{table(result)}\n\nwritten: {output}")
    failed = [name for name in chosen if result["parts"][name]["status"] == FAILED]
    if failed:
        raise BackendError(f"{len(failed)} of {len(chosen)} parts failed: {', '.join(failed)}; run it again for these")


def measure_part(result: Result, name: str, seconds: float, run: RunPart, save: Callable[[], None]) -> None:
    """Measure a part, or the rest of one, and save, whatever happens."""
    part = result["parts"][name]
    with tempfile.TemporaryDirectory(prefix="ddsm-gpu-suite-") as folder:
        file = Path(folder) / "rows.jsonl"
        kept = [row for row in part["rows"] if "error" not in row]  # what was refused is tried again
        file.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        started = time.monotonic()
        part |= {"status": NOT_RUN, "error": None}
        try:
            part["error"] = run(name, file, seconds)
            part["status"] = FAILED if part["error"] else DONE
        finally:
            part["seconds"] += time.monotonic() - started
            part["rows"], part["left_out"] = read_rows(file)
            save()


def _in_its_own_process(paths: Sequence[Path]) -> RunPart:
    def run(name: str, file: Path, seconds: float) -> str | None:
        words = [name, *map(str, paths), "--seconds", str(seconds), "--rows", str(file)]
        try:
            process = subprocess.run(  # noqa: S603 - this interpreter, no shell
                [sys.executable, "-m", "ddsm_engine.measure.gpu.worker", *words],
                capture_output=True, text=True, errors="replace", check=False, timeout=seconds + GRACE_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds + GRACE_S:.0f} s: what it had begun did not end"
        if not process.returncode:
            return None
        said = process.stderr.strip().splitlines() or [f"its process ended with {process.returncode}"]
        return said[-1].removeprefix("error: ")

    return run


# --- the result -------------------------------------------------------------------------------------------------------


def begin(output: Path, machine: dict[str, Any]) -> Result:
    """A new result, or the one that is there if it was begun on this machine, with this commit and these bundles.

    Raises:
        OutputError: it was not, is no result, or its folder cannot be written.
    """
    refuse_existing(output, force=True)
    if not output.exists():
        nothing = {"status": NOT_RUN, "seconds": 0.0, "rows": [], "left_out": [], "error": None}
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "environment": machine}
        return {**head, "parts": {name: {**nothing, "rows": [], "left_out": []} for name in PARTS}}
    result = load(output)
    if different := differing(result["environment"], machine):
        raise OutputError(f"{output} was begun with another {', '.join(different)}; choose another -o")
    return result


def load(path: Path) -> Result:
    """Read a result.

    Raises:
        OutputError: it is none, or of another version.
    """
    try:
        result = parse_json(read_bytes(path, MAX_BYTES))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} is no result of the GPU suite: {error}; choose another -o") from error
    if not isinstance(result, dict) or (result.get("format"), result.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise OutputError(f"{path} is no result of the GPU suite in format version {FORMAT_VERSION}; choose another -o")
    parts, where = result.get("parts"), result.get("environment")
    if not isinstance(where, dict) or not isinstance(parts, dict) or list(parts) != list(PARTS):
        raise OutputError(f"{path} does not hold the parts of this version of the GPU suite; choose another -o")
    for name, part in parts.items():
        if not isinstance(part, dict) or not _is_part(part):
            raise OutputError(f"{path} is damaged: {name} is no part as the GPU suite writes it; choose another -o")
    return result


def _is_part(part: dict[str, Any]) -> bool:
    rows, left_out = part.get("rows"), part.get("left_out")
    return (
        part.get("status") in STATUSES
        and isinstance(part.get("seconds"), float)
        and isinstance(rows, list)
        and isinstance(left_out, list)
        and all(isinstance(row, dict) for row in rows + left_out)
    )


def save(result: Result, output: Path) -> None:
    """Write the result, whole or not at all."""
    write_atomically(output, (json.dumps(result, indent=1) + "\n").encode())


def is_whole(part: dict[str, Any]) -> bool:
    """Whether nothing of a part is left to measure."""
    return part["status"] == DONE and not part["left_out"]


def spell_part(part: dict[str, Any]) -> str:
    """How a part ended, in a line."""
    refused = sum("error" in row for row in part["rows"])
    words = [f"{len(part['rows'])} rows in {part['seconds']:.0f} s"]
    words += [f"{refused} of them refused"] if refused else []
    words += [f"{len(part['left_out'])} left out as its share of the time was over"] if part["left_out"] else []
    words += [part["error"]] if part["error"] else []
    return f"{part['status']}, {'; '.join(words)}"
