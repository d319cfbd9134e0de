"""How much of a strategy's GFLOPs becomes time?

    python -m benchmarks.strategy_latency --bundle cifar10.bundle

Whole runs at full width, at every other width and with the published strategy, on every backend, and the full width in
torch beside them. A machine's speed drifts, so all runs are cut into chunks that take turns, and so do single calls of
every variant, whose sum a run is compared with.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch

from benchmarks._comparison import PAUSE_S
from benchmarks._report import Benchmark, Record
from benchmarks._strategy_latency_report import FULL, SEARCHED, details, draw, summary
from benchmarks._torch_walks import Walk, check_answers, draw_batch, make_walks
from benchmarks.cifar10 import PUBLISHED, SCHEDULE, SEED, STRATEGY, cifar10_bundle, say, some_calls
from benchmarks.dynamic_torch import draw_noise
from ddsm_engine.backends import artefact_backends, open_engines
from ddsm_engine.bundle import Bundle
from ddsm_engine.cli import batch_sizes
from ddsm_engine.cost import gflops
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.peak import matmul_peak_gflops
from ddsm_engine.measure.timing import time_in_turns
from ddsm_engine.noise import INITIAL, SeededNoise
from ddsm_engine.pipeline import Pipeline
from ddsm_engine.plan import Plan
from ddsm_engine.scheduler import Scheduler
from ddsm_engine.spec import EIGHTHS

MIN_CALLS: Final = 4
"""Of a run in a turn, so that the first ones, which find others' weights in the caches, do not make the figure."""

ISOLATED_REPEATS: Final = 3
"""Calls of each variant in a turn, one right after the other as in a run, after one that is not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to run.

    Attributes:
        calls: Calls of the full width and of the strategy: as many as the schedule has timesteps is DDPM as published,
            fewer are an evenly strided DDIM (η = 1).
        chunk: Calls of a turn.
        uniform_calls: Calls of every other run, in all.
    """

    calls: int = 100
    chunk: int = 10
    uniform_calls: int = 20


@dataclass(slots=True)
class Tally:
    """What the turns of one run add up to.

    Attributes:
        calls: Made.
        macs: True MACs of these calls, per image.
        conv_linear_macs: Those of convolutions and linears alone.
        seconds: Wall time, of the engines and of all else.
        engine_s: Wall time inside the engines.
        isolated_s: What as many calls of the same variants took one by one, in the same turns.
        pace: Of every turn, seconds per GFLOP and image.
    """

    calls: int = 0
    macs: int = 0
    conv_linear_macs: int = 0
    seconds: float = 0.0
    engine_s: float = 0.0
    isolated_s: float = 0.0
    pace: list[float] = field(default_factory=list)

    def add(self, bundle: Bundle, plan: Plan, seconds: float, engine_s: float = 0.0, isolated_s: float = 0.0) -> None:
        """Count a turn in which these calls were made."""
        variants = [bundle.variants[identifier] for identifier in plan.variants]
        macs = sum(variant.macs for variant in variants)
        self.pace.append(seconds / gflops(macs))
        self.calls += len(variants)
        self.macs += macs
        self.conv_linear_macs += sum(variant.conv_linear_macs for variant in variants)
        self.seconds += seconds
        self.engine_s += engine_s
        self.isolated_s += isolated_s


def options(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--bundle", type=Path, help="folder to reuse, or to leave it in (default: temporary)")
    p.add_argument("--batch-size", default="1,16", metavar="N,…", help="images at a time (default 1,16)")
    p.add_argument("--calls", type=int, default=100, help="of a run; 1000 is DDPM, as published (default 100)")
    p.add_argument("--chunk", type=int, default=10, help="calls of a run before the next one's turn (default 10)")
    p.add_argument(
        "--uniform-calls", type=int, default=20,
        help=f"of every run but the full width and the strategy, whose seconds are scaled; {MIN_CALLS} a turn at least "
        "(default 20)",
    )  # fmt: skip


def measure(arguments: argparse.Namespace, record: Record, save: Callable[[], None]) -> None:
    """Measure every backend installed but the eager reference, at every batch size.

    Raises:
        BackendError: an option out of range, or runs that do not compute the same thing.
    """
    settings = Settings(calls=arguments.calls, chunk=arguments.chunk, uniform_calls=arguments.uniform_calls)
    check_settings(settings)
    batches = batch_sizes(arguments.batch_size)
    record |= {"calls": settings.calls, "timesteps": SCHEDULE.timesteps, "chunk": settings.chunk}
    record |= {"published": PUBLISHED, "targets": []}
    with cifar10_bundle(arguments.bundle) as bundle:
        for backend in artefact_backends():
            for batch in batches:
                say(f"{backend}, batch {batch}")
                record["targets"].append(measure_target(bundle, backend, batch, settings))
                save()


def check_settings(settings: Settings) -> None:
    """Refuse what could not be run.

    Raises:
        BackendError: an option out of range.
    """
    if not 2 <= settings.calls <= SCHEDULE.timesteps:
        raise BackendError(f"a run has 2 to {SCHEDULE.timesteps} calls, found --calls {settings.calls}")
    if min(settings.chunk, settings.uniform_calls) < 1:
        raise BackendError(
            f"expected --chunk and --uniform-calls of at least 1, found {settings.chunk} and {settings.uniform_calls}"
        )


def measure_target(bundle: Bundle, backend: str, batch: int, settings: Settings) -> Record:
    """Check, then time all runs of one backend at one batch size, and the full width in torch, in turns.

    Returns:
        ``backend``, ``precision``, ``batch``, ``peak_gflops``, ``relative_l2`` by run, ``runs`` and ``peers`` (see
        ``pace``, ``speed_up`` and ``overhead``), ``best_peer`` and ``r_over_torch``.

    Raises:
        BackendError: runs that do not compute the same thing; nothing was timed.
    """
    spec = bundle.manifest.spec
    with (
        Pipeline.from_bundle(bundle.path, backend=backend) as pipe,
        closing(Scheduler((batch, *spec.sample_shape))) as isolated,
    ):
        plans = make_plans(pipe, settings.calls)
        walks = make_walks(bundle, plans[FULL])
        differences = check_answers(pipe, plans, batch, walks)
        open_isolated(isolated, pipe)
        precision = pipe.precision
        peaks = {name: matmul_peak_gflops(name) for name in dict.fromkeys((precision, "fp32"))}
        tallies = take_turns(pipe, plans, isolated, walks, settings)
    calls = settings.calls
    runs = {
        name: pace(tallies[name], calls, batch, peaks[precision])
        | speed_up(tallies[name], tallies[FULL])
        | overhead(tallies[name], calls, batch)
        for name in plans
    }
    peers = {name: pace(tallies[name], calls, batch, peaks["fp32"]) for name in walks}
    best_peer = min(peers, key=lambda name: float(peers[name]["s_per_image"]))
    return {
        "backend": backend,
        "precision": precision,
        "batch": batch,
        "peak_gflops": peaks[precision],
        "relative_l2": differences,
        "runs": runs,
        "peers": peers,
        "best_peer": best_peer,
        "r_over_torch": r_over_torch(peers[best_peer], runs[SEARCHED]),
    }


def make_plans(pipe: Pipeline, calls: int) -> dict[str, Plan]:
    """The full width, the published strategy and every other width: all of DDPM, or an even part with as much noise."""
    eighths = {f"uniform {k}/8": f"uniform:{k}/8" for k in EIGHTHS[:-1]}
    strategies: dict[str, str | Path] = {FULL: "uniform:8/8", SEARCHED: STRATEGY, **eighths}
    if calls == pipe.bundle.manifest.spec.timesteps:
        return {name: pipe.plan(strategy) for name, strategy in strategies.items()}
    return {name: pipe.plan(strategy, "ddim", calls, eta=1.0) for name, strategy in strategies.items()}


# --- taking turns -----------------------------------------------------------------------------------------------------


def take_turns(
    pipe: Pipeline, plans: Mapping[str, Plan], isolated: Scheduler, walks: Mapping[str, Walk], settings: Settings
) -> dict[str, Tally]:
    """Time a chunk of every run after the other, and again, until all of their calls are made."""
    bundle, start = pipe.bundle, torch.from_numpy(isolated.x)
    tallies = {name: Tally() for name in (*plans, *walks)}
    for whole, part in turns(settings):
        isolated_ms = {
            variant: time_in_turns({variant: engine.run}, repeats=ISOLATED_REPEATS, warmup=1)[variant].median_ms
            for variant, engine in isolated.engines.items()
        }
        for name, plan in plans.items():
            own = some_calls(plan, whole if name in (FULL, SEARCHED) else part)
            time.sleep(PAUSE_S)
            drawn = draw_batch(pipe, own, len(isolated.x))
            isolated_s = sum(isolated_ms[variant] for variant in own.variants) / 1e3
            tallies[name].add(bundle, own, drawn.latency_ms / 1e3, drawn.engine_ms / 1e3, isolated_s)
        own = some_calls(plans[FULL], part)
        for name, walk in walks.items():
            time.sleep(PAUSE_S)
            started = time.perf_counter()
            walk(own, start, draw_noise)
            tallies[name].add(bundle, own, time.perf_counter() - started)
    return tallies


def turns(settings: Settings) -> Iterator[tuple[list[int], list[int]]]:
    """The calls of every turn: the whole chunk, and the even part of it that the shorter runs make."""
    count = -(-settings.calls // settings.chunk)
    few = max(MIN_CALLS, -(-settings.uniform_calls // count))
    for chunk in np.array_split(np.arange(settings.calls), count):
        part = np.linspace(0, len(chunk) - 1, min(few, len(chunk))).round().astype(int)
        yield chunk.tolist(), chunk[part].tolist()


def open_isolated(isolated: Scheduler, pipe: Pipeline) -> None:
    """Open every variant once more, as the pipeline does, on random inputs."""
    bundle, tables = pipe.bundle, pipe.bundle.time_tables()
    SeededNoise(SEED).fill(isolated.x, INITIAL, 0)
    opened = open_engines(pipe.backend, bundle, bundle.manifest.variants, len(isolated.x), pipe.options)
    for name, engine in opened.items():
        table = tables[name]
        isolated.add(name, engine, table.features)
        isolated.features[name][...] = table[[table.timesteps // 2]]


# --- what the turns say -----------------------------------------------------------------------------------------------


def pace(own: Tally, calls: int, batch: int, peak_gflops: float) -> Record:
    """Seconds per image of ``calls`` calls, images per second, and the share of the machine's peak."""
    s_per_image = own.seconds / own.calls * calls / batch
    return {
        "calls": own.calls,
        "seconds": own.seconds,
        "s_per_image": s_per_image,
        "images_per_s": 1 / s_per_image,
        "mfu": gflops(own.macs) * batch / own.seconds / peak_gflops,
    }


def speed_up(own: Tally, full: Tally) -> Record:
    """What the arithmetic promises over the full width, what the clock says, and the part of it that arrived: R."""
    theoretical = full.macs / full.calls * own.calls / own.macs
    realised = full.seconds / full.calls * own.calls / own.seconds
    # R is the pace of the full width over the run's own; of a turn, in which the machine's speed hardly changed, too.
    turns = [of_full / of_own for of_full, of_own in zip(full.pace, own.pace, strict=True)]
    return {
        "theoretical": theoretical,
        "theoretical_conv_linear": full.conv_linear_macs / full.calls * own.calls / own.conv_linear_macs,
        "realised": realised,
        "r": realised / theoretical,
        "r_of_turns": turns,
    }


def overhead(own: Tally, calls: int, batch: int) -> Record:
    """The run beside the sum of its isolated calls, and its time outside the engines."""
    host_s = own.seconds - own.engine_s
    return {
        "predicted_s_per_image": own.isolated_s / own.calls * calls / batch,
        "measured_over_predicted": own.seconds / own.isolated_s,
        "host_us_per_call": 1e6 * host_s / own.calls,
        "host_share": host_s / own.seconds,
    }


def r_over_torch(peer: Record, own: Record) -> float:
    """R over what torch makes of the full width: its seconds / ours with the strategy / theoretical.

    Net R is that over the best of all peers, which take their turns in ``peers``.
    """
    return float(peer["s_per_image"] / own["s_per_image"] / own["theoretical"])


BENCHMARK: Final = Benchmark(
    name="strategy_latency",
    doc=__doc__ or "",
    options=options,
    measure=measure,
    details=details,
    summary=summary,
    draw=draw,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
