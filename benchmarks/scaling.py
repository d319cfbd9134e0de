"""How do time, peak memory and cold start grow with batch, image size, steps and resident variants?

    python -m benchmarks.scaling --bundle scaling
    python -m benchmarks.scaling --update-readme benchmarks/results/FILE.json

One thing grows at a time, on the CIFAR-10 network with random weights. An engine is compared with the torch reference
before it is timed; memory and cold start are those of a fresh process that holds no torch.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks._comparison import refuse_unlike
from benchmarks._report import ROOT, Benchmark, Record
from benchmarks._scaling_report import details, draw, summary
from benchmarks.cifar10 import CIFAR10, STRATEGY, cifar10_bundle, eighths_of, say, variants_of
from ddsm_engine.backends import INSTALL, REFERENCE, artefact_backends, engine_target, open_engine
from ddsm_engine.backends.engine import Engine, EngineOptions
from ddsm_engine.bundle import MANIFEST, Bundle, Parity, Variant
from ddsm_engine.cost import gflops
from ddsm_engine.engine_cache import ENGINES
from ddsm_engine.errors import BackendError, OutputError
from ddsm_engine.measure.timing import time_in_turns
from ddsm_engine.parity import Engines, answer, compare, compare_variants, effective_precision, make_probes
from ddsm_engine.pipeline import Pipeline
from ddsm_engine.spec import EIGHTHS

WIDTHS: Final = (2, 4, 8)
"""Eighths of the full width, for batch and image size."""

BATCHES: Final = (1, 2, 4, 8, 16)
STEPS: Final = (10, 20, 50, 100)

RESIDENT: Final[Mapping[int, Sequence[int]]] = {1: (8,), 2: (2, 8), 4: (2, 4, 6, 8), 7: EIGHTHS}
"""Eighths of the full width by how many are open: the widest first, for a strategy needs it most."""

RESIDENT_BATCHES: Final = (1, 16)

COLD_STARTS: Final = 3
"""Fresh processes of which the median is quoted."""

BUDGET_S: Final = 120.0
"""Of one group of timings, about."""

At = Callable[[int], Bundle]
"""The bundle for an image size; exported when it is first asked for."""


def options(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--bundle", type=Path, metavar="FOLDER", help="holds a bundle per size, kept (default: temporary)")
    p.add_argument("--sizes", type=_positives, default=[32, 64, 128], metavar="N,…", help="default: 32,64,128")
    p.add_argument("--repeats", type=_positive, default=30, help="timed rounds of a group, at most (default: 30)")


def measure(arguments: argparse.Namespace, record: Record, save: Callable[[], None]) -> None:
    """Measure what the result does not hold yet, on every backend installed but the eager reference.

    Raises:
        OutputError: the result was begun with other options or precisions, or the folder is itself a bundle.
        BackendError: no backend is installed, or one that does not compute what the reference does.
    """
    names = artefact_backends()
    if not names:
        raise BackendError(f"no backend is installed that runs a bundle's artefacts: {INSTALL['onnxruntime']}")
    precisions = {name: str(engine_target(name, EngineOptions(), 1)["precision"]) for name in names}
    settings = {"sizes": arguments.sizes, "repeats": arguments.repeats, "precisions": precisions}
    if record.setdefault("settings", settings) != settings:
        raise OutputError("the result was begun with other options or backends; choose another --output")
    if arguments.bundle and (arguments.bundle / MANIFEST).is_file():
        raise OutputError(f"{arguments.bundle} is itself a bundle; name a folder that holds one for every image size")

    def part(question: str, backend: str, take: Callable[[], list[Record]]) -> None:
        parts = record.setdefault(question, {})
        if backend not in parts:
            say(f"{question}, {backend}")
            parts[backend] = take()
            save()

    with ExitStack() as stack:
        folder = arguments.bundle or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ddsm-scaling-")))

        @cache
        def at(size: int) -> Bundle:
            eighths = EIGHTHS if size == CIFAR10.image_size else WIDTHS
            spec = replace(CIFAR10, image_size=size)
            return stack.enter_context(cifar10_bundle(folder / f"cifar10-{size}.bundle", eighths, spec))

        for name in names:
            engines: Engines = (name, EngineOptions(precision="bf16" if precisions[name] == "bf16" else "fp32"))
            part("batch", name, partial(measure_batches, at, engines, arguments.repeats))
            part("size", name, partial(measure_sizes, at, arguments.sizes, engines, arguments.repeats))
            part("steps", name, partial(measure_steps, at, engines, arguments.repeats))
            part("resident", name, partial(measure_resident, at, engines))


# --- batch and image size ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """A variant at a batch size."""

    bundle: Bundle
    variant: Variant
    batch: int


def measure_batches(at: At, engines: Engines, repeats: int) -> list[Record]:
    """Time a call of every width at every batch size."""
    bundle = at(CIFAR10.image_size)
    return measure_cases([Case(bundle, v, b) for b in BATCHES for v in variants_of(bundle, WIDTHS)], engines, repeats)


def measure_sizes(at: At, sizes: Sequence[int], engines: Engines, repeats: int) -> list[Record]:
    """Time a call of every width at every image size, batch 1."""
    bundles = [at(size) for size in sizes]
    return measure_cases([Case(b, v, 1) for b in bundles for v in variants_of(b, WIDTHS)], engines, repeats)


def measure_cases(cases: Sequence[Case], engines: Engines, repeats: int) -> list[Record]:
    """Compare every case with the reference, time all of them in turns, then ask a fresh process each for its memory.

    Raises:
        BackendError: a case that is not what the reference computes; nothing was timed.
    """
    backend, options = engines
    calls: dict[str, Callable[[], object]] = {}
    parities = []
    with ExitStack() as stack:
        for number, case in enumerate(cases):
            engine = open_engine(backend, case.bundle, case.variant, case.batch, options)
            stack.callback(engine.close)
            parities.append(check_answer(case, engine, engines))
            calls[str(number)] = engine.run
        timings = time_in_turns(calls, repeats=repeats, budget_s=BUDGET_S)
    with tempfile.TemporaryDirectory(prefix="ddsm-no-engines-") as nothing:
        return [
            {
                "image_size": case.bundle.manifest.spec.image_size,
                "batch": case.batch,
                "eighths": int(eighths_of(case.bundle, case.variant)),
                "gflops": gflops(case.variant.macs),
                "relative_l2": parity.relative_l2,
                "timing": asdict(timing),
                "peak_bytes": hold_open(
                    case.bundle.path, [case.variant], engines, case.batch, Path(nothing), built=False
                )["peak_bytes"],
            }
            for case, parity, timing in zip(cases, parities, timings.values(), strict=True)
        ]  # fmt: skip


def check_answer(case: Case, engine: Engine, engines: Engines) -> Parity:
    """Let an engine that is about to be timed answer a random batch, and the reference the same.

    Raises:
        BackendError: they differ by more than the tolerance of what is computed in.
    """
    backend, options = engines
    (probe,) = make_probes(case.bundle.spec(case.variant), case.bundle.time_table(case.variant), [case.batch])
    reference = partial(open_engine, REFERENCE, case.bundle, case.variant, options=EngineOptions(precision="fp32"))
    found = np.full_like(probe["sample"], np.nan)
    engine.bind(probe, {"out_sample": found})
    engine.run()
    precision = effective_precision(case.variant.precision, options.precision)
    parity = compare([found], answer(reference, [probe]), precision=precision, backend=backend)
    refuse_unlike(case.variant.id, parity)
    return parity


# --- steps ------------------------------------------------------------------------------------------------------------


def measure_steps(at: At, engines: Engines, repeats: int) -> list[Record]:
    """Draw one image by the published strategy, in DDIM runs of every length, in turns.

    Raises:
        BackendError: a variant that is not what the reference computes; nothing was timed.
    """
    bundle = at(CIFAR10.image_size)
    check_variants(bundle, engines)
    engine_ms: dict[int, list[float]] = {steps: [] for steps in STEPS}
    with Pipeline(bundle, *engines) as pipe:
        strategy = pipe.strategy(STRATEGY)

        def draw_one(steps: int) -> None:
            # The predicted clean image is clipped, so that random weights stay finite.
            result = pipe(strategy, "ddim", steps, clip_sample=1.0)
            engine_ms[steps].append(result.trace.engine_ms)

        calls = {str(steps): partial(draw_one, steps) for steps in STEPS}
        timings = time_in_turns(calls, repeats=repeats, warmup=1, budget_s=BUDGET_S)
        macs = {
            steps: [bundle.variants[variant].macs for variant in pipe.plan(strategy, "ddim", steps).variants]
            for steps in STEPS
        }
    return [
        {
            "steps": steps,
            "gflops_per_call": gflops(statistics.mean(macs[steps])),
            "timing": asdict(timing),
            "engine_ms": statistics.median(engine_ms[steps][-timing.repeats :]),
        }
        for steps, timing in zip(STEPS, timings.values(), strict=True)
    ]


def check_variants(bundle: Bundle, engines: Engines) -> None:
    """Compare every variant of a bundle with the reference.

    Raises:
        BackendError: one that differs by more than the tolerance.
    """
    for row in compare_variants(bundle, (REFERENCE, EngineOptions(precision="fp32")), [engines]):
        refuse_unlike(row.variant, row.parity)


# --- resident variants ------------------------------------------------------------------------------------------------


def measure_resident(at: At, engines: Engines) -> list[Record]:
    """Open more and more variants in fresh processes: compiled there and, on OpenVINO, as ``ddsm build`` kept them.

    What is built goes into a copy of the bundle, and its key into a folder that takes the place of the user's.

    Raises:
        BackendError: a variant that is not what the reference computes, or a process that failed.
    """
    bundle = at(CIFAR10.image_size)
    check_variants(bundle, engines)
    backend, options = engines
    rows = []
    with tempfile.TemporaryDirectory(prefix="ddsm-resident-") as folder:
        own = Path(shutil.copytree(bundle.path, Path(folder) / "bundle", ignore=shutil.ignore_patterns(ENGINES)))
        own_cache = Path(folder) / "cache"
        for built in (False, True) if backend == "openvino" else (False,):
            for batch in RESIDENT_BATCHES:
                if built:
                    words = (own, "--batch-size", batch, "--precision", options.precision)
                    in_fresh_process("ddsm_engine.build", *words, cache_folder=own_cache)
                for count, eighths in RESIDENT.items():
                    variants = variants_of(bundle, eighths)
                    starts = [
                        hold_open(own, variants, engines, batch, own_cache, built=built) for _ in range(COLD_STARTS)
                    ]
                    medians = {
                        name: statistics.median(start[name] for start in starts)
                        for name in ("import_s", "cold_start_s", "peak_bytes")
                    }
                    rows.append({"batch": batch, "variants": count, "built": built, **medians})
    return rows


def hold_open(
    bundle: Path, variants: Sequence[Variant], engines: Engines, batch: int, cache_folder: Path, *, built: bool
) -> dict[str, float]:
    """What opening these variants and running each once takes in a fresh process; see ``benchmarks._resident``.

    Args:
        bundle: Its folder.
        variants: To hold open.
        engines: On what.
        batch: Images per call.
        cache_folder: In the place of the user's; an engine sealed with another key is not loaded.
        built: Whether all of the engines must be ones that were built before, or none.

    Raises:
        BackendError: the process failed, or found engines that it should not have, or too few.
    """
    backend, options = engines
    words = (bundle.absolute(), backend, "--variants", ",".join(variant.id for variant in variants))
    more = ("--batch-size", batch, "--precision", options.precision)
    found: dict[str, float] = json.loads(
        in_fresh_process("benchmarks._resident", *words, *more, cache_folder=cache_folder)
    )
    expected = len(variants) if built else 0
    if found["built"] != expected:
        raise BackendError(f"expected {expected} built engines of {bundle}, found {found['built']}")
    return found


def in_fresh_process(module: str, *words: object, cache_folder: Path) -> str:
    """Run a module; returns what it prints.

    Raises:
        BackendError: with the last line of its complaint.
    """
    process = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        cwd=ROOT, env={**os.environ, "XDG_CACHE_HOME": str(cache_folder)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if process.returncode:
        said = process.stderr.strip().splitlines() or [f"it ended with {process.returncode} and said nothing"]
        raise BackendError(f"{module} {' '.join(map(str, words[1:]))}: {said[-1].removeprefix('error: ')}")
    return process.stdout


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,4}", text):
        raise argparse.ArgumentTypeError("expected a whole number from 1 to 99999")
    return int(text)


def _positives(text: str) -> list[int]:
    return sorted({_positive(word) for word in text.split(",")})


BENCHMARK: Final = Benchmark(
    name="scaling",
    doc=__doc__ or "",
    options=options,
    measure=measure,
    details=details,
    summary=summary,
    draw=draw,
    resumes=True,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
