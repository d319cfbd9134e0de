"""Is the fast search as good as the published one, and do milliseconds choose better than GFLOPs?

    python -m benchmarks.search --bundle bundles
    python -m benchmarks.search --update-readme benchmarks/results/FILE.json

Strategies for the supernet that comes with the package are searched fast by milliseconds, fast by GFLOPs, by NSGA-II as
published, and at random. What each finds is drawn once more, all in turns and from noise that none of them has seen.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from benchmarks._report import Benchmark, Record
from benchmarks._search_report import SPEED_UP, UNIFORM, details, draw
from benchmarks.cifar10 import say
from benchmarks.samplers import fashion_mnist_bundle
from ddsm_engine.backends import BACKENDS
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bench import bench
from ddsm_engine.bench import parser as bench_parser
from ddsm_engine.bundle import MANIFEST, Bundle, checksum_of
from ddsm_engine.cost import gflops
from ddsm_engine.engine_cache import Target
from ddsm_engine.errors import BackendError, BundleError, OutputError
from ddsm_engine.files import atomic_path, clear_leftovers, write_atomically
from ddsm_engine.pipeline import DEFAULT_BATCH, Pipeline
from ddsm_engine.quality import paired_interval
from ddsm_engine.quality.metric import LEAST_ROWS
from ddsm_engine.search import command
from ddsm_engine.search.command import HOLDOUT_SEED, RECORD, REPORT
from ddsm_engine.search.cost import CallCost, measured_cost
from ddsm_engine.search.evaluation import Evaluation, evaluate_in_turns
from ddsm_engine.search.evolution import POPULATION
from ddsm_engine.search.sampling import Sampling
from ddsm_engine.search.trials import PARTS as SEEDS
from ddsm_engine.search.trials import Calls, Trials, run_lengths
from ddsm_export.demo import CLIP

SEARCHES: Final = ("fast", "gflops", "nsga2", "random")
PARTS: Final = (*SEARCHES, "comparison", "default")

LEAST_IMAGES: Final = 2 * SEEDS
"""Of a candidate: two of every seed."""

DEFAULT_IMAGES: Final = 5000
"""Hold-out images of the default strategy, of the full width and of the narrowest one."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all parts have in common.

    Attributes:
        arguments: The command's options.
        bundle: A copy of the bundle, which the searches put their strategies into.
        cost: Milliseconds, by this machine's table.
        folder: Where everything that is drawn is kept.
    """

    arguments: argparse.Namespace
    bundle: Bundle
    cost: CallCost
    folder: Path

    @property
    def target(self) -> Target:
        """What the table was measured for, and all runs are."""
        return self.cost.target or {}

    @property
    def output(self) -> Path:
        """The folder of all searches, so that a candidate that several of them ask for is drawn once."""
        return self.folder / "trials"

    def options(self, part: str = "fast") -> argparse.Namespace:
        """The options of ``ddsm search`` for a part."""
        a = self.arguments
        words: list[object] = [
            self.bundle.path, "-o", self.output, "--sampler", a.sampler, "--steps", a.steps,
            "--clip-sample", a.clip_sample, "--batch-size", a.batch_size, "--backend", self.target["backend"],
            # The search's own hold-out images decide nothing, and all parts are compared on others.
            "--holdout", max(LEAST_ROWS, a.batch_size),
        ]  # fmt: skip
        match part:
            case "fast":
                words += ["--images", a.images]
            case "gflops":
                words += ["--images", a.images, "--cost", "gflops"]
            case _:
                population = population_of(a.candidates)
                words += ["--images", a.candidate_images, "--method", part, "--population", population]
                words += ["--generations", a.candidates // population]
        return command.parser().parse_args([str(word) for word in words])

    def judge(
        self,
        strategies: Mapping[str, Calls],
        reference: str,
        pairs: Sequence[Record],
        *,
        images: int,
    ) -> Record:
        """Draw all of them in turns, and say what other noise says of each and of every pair.

        Args:
            strategies: By name, see ``spelled``.
            reference: What losses are against.
            pairs: Names under ``own`` and ``rival``; a ``difference`` is added to those whose two names differ.
            images: Of each.
        """
        # A strategy that joins later is drawn beside all others: times of another hour would not compare.
        turns = checksum_of({"strategies": sorted(strategies)})
        options = self.options()
        with Pipeline(self.bundle, options.backend, EngineOptions()) as pipe:
            sampling = Sampling.of(pipe, options)
            metric = sampling.metric(options, self.output)
            trials = Trials(
                pipe,
                sampling.sampler,
                metric,
                self.folder / f"turns-{turns[:12]}",
                batch_size=self.arguments.batch_size,
            )
            found = evaluate_in_turns(trials, strategies, reference, seed=HOLDOUT_SEED, images=images, report=say)
            rows = {name: trials.draw(calls, seed=HOLDOUT_SEED, images=images) for name, calls in strategies.items()}
        judged = []
        for pair in pairs:
            own, rival = pair["own"], pair["rival"]
            difference = None
            if rival not in (None, own):
                value = found[own].value - found[rival].value
                difference = {"value": value, **asdict(paired_interval(metric, rows[own], rows[rival]))}
            judged.append(pair | {"difference": difference})
        return {
            "images": images,
            "seed": HOLDOUT_SEED,
            "metric": {"name": metric.name, **metric.identity},
            "reference": reference,
            "strategies": {name: self._entry(evaluation) for name, evaluation in found.items()},
            "pairs": judged,
        }

    def _entry(self, found: Evaluation) -> Record:
        macs = sum(self.bundle.variants[variant].macs for variant in found.calls)
        return {
            "calls": run_lengths(found.calls),
            "gflops": gflops(macs),
            "predicted_ms": self.cost.of(found.calls),
            "measured": asdict(found.ms_per_image),
            "holdout": {"value": found.value, **asdict(found.interval)},
            "loss": {"value": found.loss, **asdict(found.loss_interval)},
        }


def options(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument(
        "--bundle", type=Path, metavar="FOLDER", help="holds the bundle and everything that is drawn, to go on with"
    )
    p.add_argument("--parts", default=",".join(PARTS), metavar="NAME,…", help="some of %(default)s (the default)")
    p.add_argument("--sampler", default="ddim", metavar="NAME", help="default: %(default)s")
    p.add_argument("--steps", type=int, default=50, help="of the sampler (default: %(default)s)")
    p.add_argument("--clip-sample", type=float, default=CLIP, metavar="BOUND", help="default: %(default)s")
    p.add_argument("--images", type=int, default=64 * SEEDS, help="of the fast searches' candidates (%(default)s)")
    p.add_argument("--candidates", type=int, default=500, help="of NSGA-II and of random search (%(default)s)")
    p.add_argument("--candidate-images", type=int, default=52 * SEEDS, help="of each of these (%(default)s)")
    p.add_argument("--holdout", type=int, default=512, help="images that strategies are compared on (%(default)s)")
    p.add_argument("--backend", default="auto", choices=("auto", *BACKENDS), help="default: auto, as for a run")
    p.add_argument("--batch-size", type=int, default=DEFAULT_BATCH, help="images at a time (default: %(default)s)")


def measure(arguments: argparse.Namespace, record: Record, save: Callable[[], None]) -> None:
    """Measure the parts that the result does not hold yet.

    Raises:
        OutputError: the result was begun with other options, or a part needs one that is missing.
        BackendError: an option out of range.
        BundleError: the folder holds another bundle.
        DdsmError: whatever ends a search.
    """
    parts = check_options(arguments, record)
    folder = arguments.bundle / "search"
    bundle = copied(fashion_mnist_bundle(arguments.bundle / "fashion-mnist.bundle"), folder / "fashion-mnist.bundle")
    setting = Setting(arguments, bundle, cost_here(bundle, arguments.backend, arguments.batch_size), folder)
    begin(record, settings_of(setting))
    for part in parts:
        say(f"part {part}")
        match part:
            case "comparison":
                if "comparison" not in record or record["comparison"]["of"] != list(record["searches"]):
                    record["comparison"] = compare(setting, record)
                    save()
            case "default":
                if "default" not in record:
                    record["default"] = judge_default(setting, record)
                    save()
            case _:
                if part not in record["searches"]:
                    record["searches"][part] = run_search(setting, part)
                    save()


def check_options(arguments: argparse.Namespace, record: Record) -> list[str]:
    """The parts that are asked for, in the order of ``PARTS``.

    Raises:
        BackendError: an option out of range.
        OutputError: no folder for bundles, one that is itself a bundle, or a part that needs another one first.
    """
    a = arguments
    asked = a.parts.split(",")
    if not set(asked) <= set(PARTS):
        raise BackendError(f"expected --parts of {', '.join(PARTS)}, separated by commas, found {a.parts[:60]}")
    for name in ("images", "candidate_images"):
        if getattr(a, name) < LEAST_IMAGES or getattr(a, name) % SEEDS:
            raise BackendError(
                f"expected --{name.replace('_', '-')} of a multiple of {SEEDS}, at least {LEAST_IMAGES}, for as many "
                f"seeds, found {getattr(a, name)}"
            )
    for name, least in {"steps": 1, "candidates": 2, "holdout": LEAST_ROWS, "batch_size": 1}.items():
        if getattr(a, name) < least:
            raise BackendError(f"expected --{name.replace('_', '-')} of at least {least}, found {getattr(a, name)}")
    if a.candidates % population_of(a.candidates):
        raise BackendError(f"expected --candidates of a multiple of {POPULATION}, a generation, found {a.candidates}")
    if a.bundle is None:
        raise OutputError("hours of drawing are kept in a folder; name one: --bundle FOLDER")
    if (a.bundle / MANIFEST).is_file():
        raise OutputError(f"{a.bundle} is itself a bundle; name a folder that holds one, or will")
    needs_fast = sorted({"comparison", "default"}.intersection(asked))
    if needs_fast and "fast" not in [*asked, *record.get("searches", {})]:
        raise OutputError(f"{needs_fast[0]} is of what the fast search finds; add it: --parts fast,{a.parts}")
    return [part for part in PARTS if part in asked]


def population_of(candidates: int) -> int:
    """Of a generation: as published, where there are so many."""
    return min(POPULATION, candidates)


def copied(bundle: Bundle, path: Path) -> Bundle:
    """A copy of the bundle, made if it is not there: a search replaces the strategies of an earlier one.

    Raises:
        BundleError: it is a copy of another bundle.
    """
    if not (path / MANIFEST).is_file():
        clear_leftovers(path.parent, path.name)
        with atomic_path(path) as temporary:
            shutil.copytree(bundle.path, temporary)
    own = Bundle.open(path)
    if own.manifest.checksum != bundle.manifest.checksum:
        raise BundleError(f"{path} is no copy of {bundle.path}, which was exported again; remove it")
    return own


def cost_here(bundle: Bundle, backend: str, batch: int) -> CallCost:
    """Milliseconds of this machine, which is measured first where no table is kept that can be used."""
    try:
        return measured_cost(bundle, backend, EngineOptions(), batch)
    except BundleError as error:
        say(f"measuring every width, as {error}")
    only = [] if backend == "auto" else ["--backend", backend]
    bench(bench_parser().parse_args([str(bundle.path), *only, "--batch-size", str(batch), "--save"]))
    return measured_cost(bundle, backend, EngineOptions(), batch)


def settings_of(setting: Setting) -> Record:
    """Everything that the figures depend on, the latency table included."""
    a, bundle, cost = setting.arguments, setting.bundle, setting.cost
    names = ("sampler", "steps", "clip_sample", "batch_size", "images", "candidates", "candidate_images", "holdout")
    return {name: getattr(a, name) for name in names} | {
        "target": dict(setting.target),
        "manifest": bundle.manifest.checksum,
        "widths": [
            {
                "id": variant.id, "label": bundle.label(variant), "gflops": gflops(variant.macs),
                "ms": cost.per_call[variant.id], "swap_ms": cost.swap[variant.id],
            }
            for variant in bundle.manifest.variants
        ],
    }  # fmt: skip


def begin(record: Record, settings: Record) -> None:
    """Begin a result, or see that it was begun alike.

    Raises:
        OutputError: it was begun with other options, or by another latency table.
    """
    begun = record.setdefault("settings", settings)
    record.setdefault("searches", {})
    if begun != settings:
        differing = [name for name in settings if begun.get(name) != settings[name]]
        raise OutputError(f"the result was begun with another {', '.join(differing)}; choose another --output")


# --- the searches -----------------------------------------------------------------------------------------------------


def run_search(setting: Setting, part: str) -> Record:
    """Search, or go on with a search, and read what it left; its record and its report stay under the part's name."""
    command.search(setting.options(part))
    for name in (RECORD, REPORT):
        write_atomically(setting.folder / f"{part}-{name}", (setting.output / name).read_bytes())
    return search_of(part, json.loads((setting.output / RECORD).read_bytes()), setting.cost)


def search_of(part: str, found: Record, cost: CallCost) -> Record:
    """What is kept of a search.

    ``points`` are the candidates that no other beats in cost (that of the search) and metric, cheapest first: for the
    fast search of those that it ended with, for the others of all that they judged: none offers less than it knew.
    """
    judged = found["evaluations"]
    # Random search judges the uniform widths besides; they are a method of their own here.
    own = [candidate for candidate in judged if part != "random" or candidate["origin"] != "uniform"]
    images = found["metric"]["images"]
    spent = {stage: count for stage, count in found["spent"].items() if stage != "holdout"}
    return {
        "candidates": len(judged),
        "images": images,
        "metric": found["metric"]["name"],
        "spent": spent,
        "image_evaluations": sum(spent.values()),
        "drawing_s": sum(cost.of(calls_of(candidate["calls"])) for candidate in judged) * images / 1e3,
        "surrogate": found["surrogate"],
        "points": [point_of(each, cost) for each in undominated(found["front"] if part == "fast" else own)],
        UNIFORM: sorted(
            (point_of(each, cost) for each in judged if len(each["calls"]) == 1), key=lambda point: float(point["ms"])
        ),
    }


def undominated(candidates: Sequence[Record]) -> list[Record]:
    """Those that no other beats in ``cost`` and ``value``, cheapest first."""
    kept: list[Record] = []
    for candidate in sorted(candidates, key=lambda each: (each["cost"], each["value"])):
        if not kept or candidate["value"] < kept[-1]["value"]:
            kept.append(candidate)
    return kept


def point_of(candidate: Record, cost: CallCost) -> Record:
    """A candidate by name, with its milliseconds and with what the search's images say of it."""
    calls = calls_of(candidate["calls"])
    return {"name": spelled(calls), "calls": candidate["calls"], "ms": cost.of(calls), "value": candidate["value"]}


def calls_of(runs: Sequence[Sequence[str | int]]) -> Calls:
    """From runs such as ``[["w064", 12], ["w032", 38]]`` to the variant of every call."""
    return tuple(str(variant) for variant, count in runs for _ in range(int(count)))


def spelled(calls: Calls) -> str:
    """The name of a strategy, whoever found it: ``w064×12 w032×38``."""
    return " ".join(f"{variant}×{count}" for variant, count in run_lengths(calls))


# --- the comparison ---------------------------------------------------------------------------------------------------


def compare(setting: Setting, record: Record) -> Record:
    """Draw what every search offers for the budgets of the fast one's front, and compare."""
    searches, full = record["searches"], full_width(setting)
    pairs = pairs_of(searches, setting.cost.of(full))
    offered = {
        point["name"]: calls_of(point["calls"])
        for found in searches.values()
        for point in [*found["points"], *found[UNIFORM]]
    }
    uniform = [point["name"] for point in searches["fast"][UNIFORM]]
    named = [*uniform, *(pair[side] for side in ("own", "rival") for pair in pairs if pair[side] is not None)]
    strategies = {name: offered[name] for name in dict.fromkeys(named)}
    return {
        "of": list(searches),
        **setting.judge(strategies, spelled(full), pairs, images=setting.arguments.holdout),
    }


def pairs_of(searches: Mapping[str, Record], full_ms: float) -> list[Record]:
    """For every budget, what the fast search offers and what each other method does.

    The budgets are the predicted milliseconds of the fast search's points and of the full width. Every method offers
    the point that its own images call the best of those that take no longer: hold-out images have no part in it. Two
    strategies that meet for several budgets are compared once, for the least of these.

    Args:
        searches: By part, the fast one among them.
        full_ms: Predicted for the full width.
    """
    own = searches["fast"]["points"]
    rivals = {part: found["points"] for part, found in searches.items() if part != "fast"}
    rivals[UNIFORM] = searches["fast"][UNIFORM]
    budgets: dict[tuple[str, str | None, str | None], float] = {}
    for method, points in rivals.items():
        for budget in [*(point["ms"] for point in own), full_ms]:
            budgets.setdefault((method, offer(own, budget), offer(points, budget)), budget)
    return [
        {"budget_ms": budget, "method": method, "own": found, "rival": rival}
        for (method, found, rival), budget in budgets.items()
    ]


def offer(points: Sequence[Record], budget_ms: float) -> str | None:
    """The name of the best point within a budget; None where even the cheapest takes longer."""
    within = [point for point in points if point["ms"] <= budget_ms * (1 + 1e-9)]
    best = min(within, key=lambda point: (point["value"], point["ms"]), default=None)
    return None if best is None else str(best["name"])


def judge_default(setting: Setting, record: Record) -> Record:
    """Draw the default strategy beside the full width and the cheapest uniform width."""
    fast, full = record["searches"]["fast"], full_width(setting)
    own, narrow = default_of(fast["points"], setting.cost.of(full)), fast[UNIFORM][0]
    strategies = {spelled(full): full} | {point["name"]: calls_of(point["calls"]) for point in (own, narrow)}
    found = setting.judge(strategies, spelled(full), [], images=DEFAULT_IMAGES)
    return {"own": own["name"], "narrow": narrow["name"], **found}


def default_of(points: Sequence[Record], full_ms: float) -> Record:
    """The best, by the search's own images, of the points that promise ``SPEED_UP``; if none does, the fastest."""
    promising = [point for point in points if full_ms >= SPEED_UP * point["ms"]]
    return min(promising, key=lambda point: float(point["value"]), default=points[0])


def full_width(setting: Setting) -> Calls:
    """The full width throughout."""
    with Pipeline(setting.bundle, setting.options().backend, EngineOptions()) as pipe:
        calls = Sampling.of(pipe, setting.options()).sampler.calls
    return (setting.bundle.full.id,) * calls


BENCHMARK: Final = Benchmark(
    name="search",
    doc=__doc__ or "",
    options=options,
    measure=measure,
    details=details,
    draw=draw,
    resumes=True,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
