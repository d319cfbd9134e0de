"""``ddsm search BUNDLE``: which variant should serve which call, for every budget of time?"""

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_engine.bundle import Bundle
from ddsm_engine.cli import guarded
from ddsm_engine.dataset import load_images
from ddsm_engine.errors import OutputError, StrategyError
from ddsm_engine.files import clear_leftovers, only_one_process, write_atomically
from ddsm_engine.images import grid, png_of
from ddsm_engine.measure.environment import environment
from ddsm_engine.pipeline import Pipeline, choose_batch_size
from ddsm_engine.quality import Images, add_options
from ddsm_engine.quality.statistics import in_unit_range
from ddsm_engine.search.calibration import CALIBRATION_IMAGES, Calibration, calibrate
from ddsm_engine.search.cost import CallCost, counted_cost, measured_cost
from ddsm_engine.search.evaluation import Evaluation, evaluate_in_turns
from ddsm_engine.search.evolution import GENERATIONS, POPULATION, nsga2, random_search, scalar
from ddsm_engine.search.fast import best_within, chosen_within, fast_search
from ddsm_engine.search.record import (
    check_writable,
    front_names,
    put_into_bundle,
    record_of,
    spell_front,
    strategies_of,
)
from ddsm_engine.search.report import FULL, write_report
from ddsm_engine.search.sampling import Sampling, add_sampling_options, engine_options
from ddsm_engine.search.space import Genome, Space, groups_of
from ddsm_engine.search.surrogate import Surrogate
from ddsm_engine.search.trials import JOURNAL, PARTS, Calls, Judgement, Trials
from ddsm_engine.strategy import Strategy

LIBRARIES = ("scipy", "pymoo", "matplotlib")
METHODS = ("fast", "nsga2", "scalar", "random")
RECORD, REPORT = "search.json", "report.html"
HOLDOUT_SEED = 1 << 16
"""Added to the seed of every number that is reported."""
PICTURED = 16
PUBLISHED_WEIGHT = 0.1
"""Of a GFLOP, on CIFAR-10."""


def parser() -> argparse.ArgumentParser:
    """The options of ``search``."""
    p = argparse.ArgumentParser(
        prog="ddsm search",
        description="Search strategies for every budget of time, put them into the bundle, and write a report. A "
        "search that was stopped goes on when the same line is given again.",
    )
    p.add_argument("bundle", type=Path)
    p.add_argument("-o", "--output", type=Path, help="folder of the report and the journal (default: BUNDLE.search)")
    add_sampling_options(p)
    p.add_argument(
        "--cost", choices=("ms", "gflops"), default="ms",
        help="measured milliseconds (ddsm bench --save; the default) or counted GFLOPs",
    )  # fmt: skip
    p.add_argument("--method", choices=METHODS, default="fast", help="default: fast; the others for comparison")
    p.add_argument("--points", type=int, default=8, help="strategies to end with, at most (default 8)")
    p.add_argument("--max-swaps", type=int, metavar="N", help="most changes of variant in a run")
    p.add_argument("--images", type=int, default=64 * PARTS, help="drawn to judge a candidate (default %(default)s)")
    p.add_argument("--holdout", type=int, default=512, help="drawn for every reported number (default %(default)s)")
    p.add_argument("--probes", type=int, default=24, help="candidates to fit the surrogate to (default %(default)s)")
    p.add_argument(
        "--from", dest="start", action="append", default=[], metavar="NAME|FILE",
        help="begin with this strategy, too: of a sampler with other steps, or of another network",
    )  # fmt: skip
    p.add_argument("--population", type=int, default=POPULATION, help="of nsga2 and scalar (default %(default)s)")
    p.add_argument("--generations", type=int, default=GENERATIONS, help="of these (default %(default)s)")
    p.add_argument(
        "--weight", type=float,
        help="of a call's mean cost, added to the metric by scalar (default with --cost gflops: 0.1, as published for "
        "CIFAR-10)",
    )  # fmt: skip
    p.add_argument("--seed", type=int, default=0)
    add_options(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parser().parse_args(argv)
    return guarded(lambda: search(arguments))


def search(a: argparse.Namespace) -> None:
    """Search, judge what was found on other noise, and write strategies, record and report.

    Raises:
        DdsmError: anything that does not fit; what was drawn by then is kept.
    """
    check_options(a)
    for library in LIBRARIES:
        importlib.import_module(library)  # a missing one is said now, not after an hour
    bundle = Bundle.open(a.bundle)
    if len(bundle.variants) < 2:
        raise StrategyError(f"{a.bundle} holds one variant, which serves every call; a search needs two at least")
    options = engine_options(a)
    cost = counted_cost(bundle) if a.cost == "gflops" else measured_cost(bundle, a.backend, options, a.batch_size)
    output = a.output or a.bundle.with_suffix(".search")
    check_folder(output)
    check_writable(bundle)
    output.mkdir(parents=True, exist_ok=True)
    with (
        only_one_process(output),
        Pipeline(bundle, str((cost.target or {}).get("backend", a.backend)), options) as pipe,
    ):
        clear_leftovers(output)
        (output / JOURNAL).touch()
        _Search(a, pipe, cost, output).run()


def check_options(a: argparse.Namespace) -> None:
    """Refuse numbers that no search can be made with.

    Raises:
        StrategyError: any of them.
    """
    choose_batch_size(a.holdout, a.batch_size)
    least = {"images": 2 * PARTS, "holdout": 2, "points": 1, "probes": 0, "population": 2, "generations": 1, "seed": 0}
    for name, value in least.items():
        if getattr(a, name) < value:
            raise StrategyError(f"--{name} must be at least {value}, found {getattr(a, name)}")
    if a.images % PARTS:
        raise StrategyError(f"--images must be a multiple of {PARTS}, for as many seeds; found {a.images}")
    if a.weight is None and a.method == "scalar" and a.cost != "gflops":
        raise StrategyError("--method scalar needs --weight, in units of the metric per millisecond, or --cost gflops")
    if a.weight is not None and not 0 <= a.weight < math.inf:
        raise StrategyError(f"--weight must be a number of at least 0, found {a.weight}")


def check_folder(output: Path) -> None:
    """Refuse a folder that is not a search's.

    Raises:
        OutputError: it holds something else.
    """
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / JOURNAL).is_file())):
        raise OutputError(f"{output} holds something else than a search; choose another --output")


class _Search:
    """One run of the command."""

    def __init__(self, a: argparse.Namespace, pipe: Pipeline, cost: CallCost, output: Path) -> None:
        self.a, self.pipe, self.cost, self.output = a, pipe, cost, output
        self.sampling = Sampling.of(pipe, a)
        self.say: Callable[[str], None] = partial(print, flush=True)
        bundle = pipe.bundle
        calls = self.sampling.sampler.calls
        cheapest_first = sorted(bundle.variants, key=lambda variant: cost.per_call[variant])
        self.space = Space(tuple(cheapest_first), groups_of(calls))
        self.trials = Trials(
            pipe, self.sampling.sampler, self.sampling.metric(a, output), output, batch_size=a.batch_size
        )
        self.judged: dict[Genome, Judgement] = {}

    def run(self) -> None:
        """All of it."""
        started = time.monotonic()
        self.say(f"{self.trials.metric.name}, {self.a.images} images a candidate; cost: {self._cost_line()}")
        start = [self._like(self.pipe.strategy(name)) for name in self.a.start]
        calibration, surrogate = self._search(start)
        names = self._front()
        self.say(f"drawing {self.a.holdout} images of each of {len(names)} strategies from other noise")
        evaluations = evaluate_in_turns(
            self.trials, names, FULL, seed=self.a.seed + HOLDOUT_SEED, images=self.a.holdout, report=self.say
        )
        record = record_of(
            self.trials, self.space, self.cost,
            settings={
                "method": self.a.method, "seed": self.a.seed,
                "images": self.a.images, "holdout_images": self.a.holdout, "holdout_seed": self.a.seed + HOLDOUT_SEED,
                "environment": environment(),
            },
            judged=self.judged, evaluations=evaluations, calibration=calibration, surrogate=surrogate,
            seeds=self._seeds(calibration, evaluations) if calibration else [],
            seconds=time.monotonic() - started,
        )  # fmt: skip
        pictures = {name: self._picture(calls) for name, calls in names.items()}
        self._write(record, pictures)
        self.say(spell_front(record))

    def _search(self, start: Sequence[Genome]) -> tuple[Calibration | None, Surrogate | None]:
        a = self.a
        match a.method:
            case "nsga2":
                evolve = partial(nsga2, population=a.population, generations=a.generations, start=start)
                evolve(self.space, self._assess, seed=a.seed)
            case "scalar":
                weight = (PUBLISHED_WEIGHT if a.weight is None else a.weight) / sum(self.space.groups)
                scalar(
                    self.space, self._assess, weight,
                    seed=a.seed, population=a.population, generations=a.generations, start=start,
                )  # fmt: skip
            case "random":
                random_search(self.space, self._assess, seed=a.seed, count=a.population * a.generations)
            case _:
                plans = {variant: self.sampling.uniform(variant) for variant in self.space.variants}
                calibration = calibrate(
                    self.pipe, plans, self.space,
                    seeds=range(a.seed, a.seed + PARTS), batch_size=a.batch_size, real=self._real(),
                    keep=self.output, report=self.say,
                )  # fmt: skip
                return calibration, fast_search(
                    self.space, self.cost, calibration.tables(), lambda *asked: self._judge(*asked).value,
                    seed=a.seed, probes=a.probes, points=a.points, max_swaps=a.max_swaps, start=start,
                )  # fmt: skip
        for genome in self.space.uniform():
            self._judge(genome, "uniform")
        return None, None

    def _judge(self, genome: Genome, origin: str) -> Judgement:
        if genome not in self.judged:
            calls = self.space.calls(genome)
            self.judged[genome] = self.trials.judge(
                calls, origin, seed=self.a.seed, images=self.a.images, cost=self.cost.of(calls), report=self.say
            )
        return self.judged[genome]

    def _assess(self, calls: Calls, origin: str) -> tuple[float, float]:
        return self.cost.of(calls), self._judge(self.space.genome(calls), origin).value

    def _front(self) -> dict[str, Calls]:
        """The calls of the strategies to end with, by name, cheapest first; the full width is the last one."""
        full = (self.pipe.bundle.full.id,) * sum(self.space.groups)
        values = {genome: judgement.value for genome, judgement in self.judged.items()}
        costs = {genome: self.cost.of(self.space.calls(genome)) for genome in values}
        best = [self.space.calls(genome) for genome in best_within(values, costs, self.a.points, self.a.max_swaps)]
        return front_names(self.sampling.sampler, [calls for calls in best if calls != full], full, self.cost)

    def _seeds(self, calibration: Calibration, evaluations: Mapping[str, Evaluation]) -> list[tuple[int, Calls]]:
        """What each seed alone would have chosen, within the budget of the front's middle."""
        front = [evaluation.calls for evaluation in evaluations.values()]
        budget = self.cost.of(front[(len(front) - 1) // 2])
        chosen = []
        for part in range(PARTS):
            values = {genome: judgement.parts[part] for genome, judgement in self.judged.items()}
            found = chosen_within(budget, self.space, self.cost, calibration.tables(part), values, self.a.max_swaps)
            chosen.append((self.a.seed + part, self.space.calls(found)))
        return chosen

    def _real(self) -> Images | None:
        """Some real images for the calibration, where they were given."""
        if self.a.data is None:
            return None
        spec = self.pipe.bundle.manifest.spec
        images = load_images(self.a.data, channels=spec.channels, image_size=spec.image_size)
        chosen = np.random.default_rng(self.a.seed).permutation(len(images))[: CALIBRATION_IMAGES * PARTS]
        return in_unit_range(images[chosen])

    def _like(self, strategy: Strategy) -> Genome:
        """The candidate that is most like a strategy made for something else: the same variant at the same noise."""
        sampler = self.sampling.sampler
        ids = strategy.resolve(self.pipe.bundle.manifest.variants)
        if strategy.axis == "timestep":  # of a schedule of any length
            entries = np.linspace(0, self.pipe.bundle.manifest.noise_schedule.timesteps - 1, len(ids))
        else:
            entries = self.pipe.sampler(**strategy.sampling()).timesteps
        if len(entries) != len(ids):
            raise StrategyError(
                f"--from: {strategy.sampler} with {strategy.steps} steps makes {len(entries)} calls; the strategy has "
                f"{len(ids)} entries"
            )
        nearest = [int(np.abs(entries - t).argmin()) for t in sampler.timesteps]
        return self.space.genome([ids[index] for index in nearest])

    def _picture(self, calls: Calls) -> bytes:
        images = self.sampling.images(self.trials.plan(calls), seed=self.a.seed + HOLDOUT_SEED, count=PICTURED)
        return png_of(grid(images, columns=4))

    def _cost_line(self) -> str:
        if self.cost.target is None:
            return "counted GFLOPs"
        return "measured milliseconds ({backend} {precision}, batch {batch})".format_map(self.cost.target)

    def _write(self, record: dict[str, Any], pictures: Mapping[str, bytes]) -> None:
        write_atomically(self.output / RECORD, (json.dumps(record, indent=1) + "\n").encode())
        write_report(record, pictures, self.output / REPORT)
        kept = strategies_of(record, self.pipe.bundle, self.sampling.sampler)
        put_into_bundle(self.pipe.bundle, kept)
        self.say(f"{self.output / REPORT} shows the search; in {self.pipe.bundle.path}: {', '.join(kept)}")


if __name__ == "__main__":
    sys.exit(main())
