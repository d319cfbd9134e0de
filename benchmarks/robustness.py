"""What was done to break it, and what broke?

    python -m benchmarks.robustness

Kills and races of every command that writes, the corpus of hostile files, coverage-guided fuzzing of every reader of
foreign files, and a long soak with random strategies: each is a module of ``tests/`` that the test suite runs in small,
run here in large. A part is written when it ends; the same command goes on where it was stopped.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, Final

from benchmarks._report import Benchmark, Record, in_short, machine_line, table
from ddsm_engine.backends import artefact_backends
from ddsm_engine.errors import OutputError
from tests.robustness import processes

READERS: Final = ("manifest", "strategy", "flagfile", "checkpoint", "supernet", "onnx")


def options(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--bundle", type=Path, help="the test suite's small bundle (default: exported anew)")
    p.add_argument("--kills", type=int, default=1000)
    p.add_argument("--races", type=int, default=90)
    p.add_argument("--calls", type=int, default=100_000, help="engine calls of each backend's soak")
    p.add_argument("--fuzz-seconds", type=int, default=60, help="per reader; needs atheris: pip install -e '.[fuzz]'")


def measure(arguments: argparse.Namespace, record: Record, save: Callable[[], None]) -> None:
    """Run the parts that the result does not hold yet.

    Raises:
        OutputError: a part broke something.
    """
    with tempfile.TemporaryDirectory() as folder:
        bundle = arguments.bundle.absolute() if arguments.bundle else export_small_bundle(Path(folder))
        seconds = str(arguments.fuzz_seconds)
        # A part raises when something broke, so what is written held.
        parts: dict[str, Callable[[], object]] = {
            "hostile": count_hostile,
            "kills": lambda: call("kills", "--bundle", bundle, "--kills", arguments.kills),
            "races": lambda: call("races", "--bundle", bundle, "--races", arguments.races),
            "soak": lambda: [
                call("soak", "--bundle", bundle, "--backend", backend, "--calls", arguments.calls)
                for backend in artefact_backends()
            ],
            "fuzz": lambda: {reader: fuzz(reader, seconds, Path(folder)) for reader in READERS},
        }
        for name, part in parts.items():
            if name not in record:
                print(f"{name} …", file=sys.stderr, flush=True)
                record[name] = part()
                save()


def export_small_bundle(folder: Path) -> Path:
    """The bundle of the test suite: 8x8 images, seven widths, random weights."""
    from tests.conftest import export_tiny

    export_tiny(folder / "tiny.bundle")
    return folder / "tiny.bundle"


def call(module: str, *arguments: object) -> Any:  # noqa: ANN401 - the module's own JSON
    """Run a module of ``tests/robustness`` and read what it prints."""
    return json.loads(_run(f"tests.robustness.{module}", *arguments).stdout)


def count_hostile() -> Record:
    """Let the suite feed every hostile file to its command."""
    done = _run("pytest", "-q", "-n", "0", "tests/hostile/test_corpus.py")
    from tests.hostile.corpus import CASES

    commands = [case.command for case in CASES]
    return {
        "files": {command: commands.count(command) for command in sorted(set(commands))},
        "tests": done.stdout.strip().splitlines()[-1],
    }


def fuzz(reader: str, seconds: str, folder: Path) -> Record:
    """Fuzz one reader; libFuzzer says how often it was called."""
    done = _run("tests.hostile.fuzz", reader, "--seconds", seconds, "--output", folder / "found")
    found = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stdout + done.stderr)
    return {"executions": int(found[1]) if found else 0, "seconds": int(seconds)}


def _run(module: str, *arguments: object) -> "CompletedProcess[str]":
    done = processes.run("-m", module, *arguments)
    if done.returncode != 0:
        raise OutputError(f"{module} found something: {(done.stderr or done.stdout)[-800:]}")
    return done


# What is printed


def details(record: Record) -> str:
    """Every part that was run, as Markdown without a heading."""
    parts = []
    if "kills" in record:
        lines = [[name, str(t["kills"]), _counts(t["states"])] for name, t in record["kills"].items()]
        parts.append(table(["command", "kill -9", "what was found right after"], lines))
    if "races" in record:
        lines = [[name, str(sum(ends.values())), _counts(ends)] for name, ends in record["races"].items()]
        parts.append(table(["two processes at once", "times", "how they ended"], lines))
    if "hostile" in record:
        lines = [[command, str(count)] for command, count in record["hostile"]["files"].items()]
        parts.append(table(["command", "hostile files refused with one line"], lines))
    if "fuzz" in record:
        lines = [[reader, f"{f['executions']:,}", str(f["seconds"])] for reader, f in record["fuzz"].items()]
        parts.append(table(["reader", "fuzzed inputs", "seconds"], lines))
    if "soak" in record:
        head = ["backend", "calls", "swaps", "resident, MB", "leaked bytes", "per call", "repeats with the same bytes"]
        lines = [
            [
                s["backend"], f"{s['calls']:,}", f"{s['swaps']:,}", f"{s['resident_mb']:.0f}", f"{s['leaked_bytes']:,}",
                f"{s['bytes_per_call']:.2f}", str(s["same_bytes"]),
            ]
            for s in record["soak"]
        ]  # fmt: skip
        parts.append(table(head, lines))
    return "\n\n".join([*parts, machine_line(record)])


def summary(record: Record) -> str:
    """What was done, and how it ended, a line each."""
    killed = sum(tally["kills"] for tally in record["kills"].values())
    raced = sum(sum(ends.values()) for ends in record["races"].values())
    files = sum(record["hostile"]["files"].values())
    fuzzed = sum(f["executions"] for f in record["fuzz"].values())
    lines = [
        f"{killed:,} `kill -9` at random moments of every command that writes: the old state or the new one, always",
        f"{raced:,} times two processes writing the same thing at once: one wins, none corrupts",
        f"{files:,} broken and malicious files: each refused with one line",
        f"{fuzzed:,} fuzzed inputs of every reader: no traceback, no hang",
        *(
            f"{s['calls']:,} {s['backend']} calls with random strategies: memory grew by {max(s['leaked_bytes'], 0):,} "
            f"bytes; the same images in all of {s['same_bytes']} repeats"
            for s in record["soak"]
        ),
    ]
    return "\n".join(f"- {line}" for line in lines) + f"\n\n{in_short(record)}"


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(found.items()))


BENCHMARK: Final = Benchmark(
    name="robustness",
    doc=__doc__ or "",
    options=options,
    measure=measure,
    details=details,
    summary=summary,
    resumes=True,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
