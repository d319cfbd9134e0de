"""What does changing the variant cost, beyond a step that does not change it?

    python -m benchmarks.swap_cost --bundle cifar10.bundle

Every engine is open and bound to the same buffers, so a swap itself does nothing; what it can cost is cache: the other
variant's weights and activations have pushed this one's out. Two variants alternate in runs of three calls, in the loop
that draws images; the first call of a run is compared with the last one.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks._report import Benchmark, Record, machine_line, spread, table
from benchmarks.cifar10 import cifar10_bundle, variants_of
from ddsm_engine.backends import artefact_backends, open_engines
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.measure.timing import summarise
from ddsm_engine.noise import SeededNoise
from ddsm_engine.plan import plan_calls
from ddsm_engine.samplers import make_sampler
from ddsm_engine.scheduler import Scheduler

EIGHTHS: Final = (2, 4, 6, 8)
RUN: Final = 3
"""Calls of one variant before the other's turn."""


def options(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--bundle", type=Path, help="folder to reuse, or to leave it in (default: temporary)")
    p.add_argument("--batch-size", type=int, default=1)
    p.add_argument("--rounds", type=int, default=20, help="swaps in either direction, after one that is not counted")


def measure(arguments: argparse.Namespace, record: Record, save: Callable[[], None]) -> None:
    """Measure every pair on every backend installed but the eager reference."""
    record |= {"batch": arguments.batch_size, "backends": {}}
    with cifar10_bundle(arguments.bundle, EIGHTHS) as bundle:
        for backend in artefact_backends():
            record["backends"][backend] = measure_pairs(bundle, backend, arguments.batch_size, arguments.rounds)
            save()


def measure_pairs(bundle: Bundle, backend: str, batch: int, rounds: int) -> Record:
    """Let every two of the widths alternate; both directions come from one plan.

    Raises:
        BackendError: a state that is not finite, which no image would be either.
    """
    spec, options = bundle.manifest.spec, EngineOptions()
    chosen = variants_of(bundle, EIGHTHS)
    scheduler = Scheduler((batch, *spec.sample_shape))
    try:
        for name, engine in open_engines(backend, bundle, chosen, batch, options).items():
            scheduler.add(name, engine, spec.time_features)
        pairs = [
            pair
            for one, other in itertools.combinations(chosen, 2)
            for pair in alternate(bundle, scheduler, one, other, rounds)
        ]
        precision = scheduler.engines[chosen[0].id].precision
    finally:
        scheduler.close()
    return {"precision": precision, "pairs": pairs}


def alternate(bundle: Bundle, scheduler: Scheduler, one: Variant, other: Variant, rounds: int) -> list[Record]:
    """Time the loop on ``one`` × 3, ``other`` × 3, ``one`` × 3 …: what the first and the last call of a run take."""
    runs = [one, other] * (rounds + 1)
    calls = [variant.id for variant in runs for _ in range(RUN)]
    # The predicted clean image is clipped, so that random weights stay finite.
    sampler = make_sampler("ddim", bundle.manifest.noise_schedule, len(calls), clip_sample=1.0)
    plan = plan_calls(calls, sampler, bundle.time_tables())
    clock = scheduler.run(plan, SeededNoise(0).starting_at(0))
    took_ms = ((clock[:, 1] - clock[:, 0]) / 1e6).reshape(len(runs), RUN)
    gap_ms = np.append(0.0, (clock[1:, 0] - clock[:-1, 1]) / 1e6).reshape(len(runs), RUN)
    return [
        {
            "from": before.id,
            "to": after.id,
            "width": bundle.manifest.spec.label(after.width),
            "from_width": bundle.manifest.spec.label(before.width),
            "first": asdict(summarise(took_ms[own, 0])),
            "inside": asdict(summarise(took_ms[own, -1])),
            "gap_first": asdict(summarise(gap_ms[own, 0])),
            "gap_inside": asdict(summarise(gap_ms[own, -1])),
        }
        # The first run of each is the warm-up.
        for own, before, after in ((slice(2, None, 2), other, one), (slice(3, None, 2), one, other))
    ]


def details(record: Record) -> str:
    """A table per backend, as Markdown without a heading."""
    parts = []
    for backend, found in record["backends"].items():
        lines = [
            [
                f"{pair['from_width']} → {pair['width']}", spread(pair["inside"]), spread(pair["first"]),
                f"{_extra_ms(pair):+.2f}", f"{100 * _extra_ms(pair) / pair['inside']['median_ms']:+.0f} %",
                f"{1e3 * pair['gap_inside']['median_ms']:.0f} → {1e3 * pair['gap_first']['median_ms']:.0f}",
            ]
            for pair in found["pairs"]
        ]  # fmt: skip
        head = ["swap", "call inside a run, ms", "first call after the swap, ms", "extra, ms", "extra", "host gap, µs"]
        parts += [f"{backend} {found['precision']}, batch {record['batch']}", table(head, lines)]
    return "\n\n".join([*parts, machine_line(record)])


def _extra_ms(pair: Mapping[str, Mapping[str, float]]) -> float:
    return pair["first"]["median_ms"] - pair["inside"]["median_ms"]


BENCHMARK: Final = Benchmark(
    name="swap_cost",
    doc=__doc__ or "",
    options=options,
    measure=measure,
    details=details,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
