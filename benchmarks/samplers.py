"""Does a strategy still save time under the faster samplers, and what does it cost in quality?

    python -m benchmarks.samplers --bundle bundles
    python -m benchmarks.samplers --update-readme benchmarks/results/FILE.json

Every sampler at several numbers of network calls, with a strategy and at full width. Time is that of the CIFAR-10
network with the published strategy; quality that of the supernet that comes with the package, with the demo's.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks._comparison import PAUSE_S, TOLERANCES, refuse_unlike
from benchmarks._report import Benchmark, Record
from benchmarks._samplers_report import FULL, STEP_AWARE, details, draw, summary
from benchmarks._torch_walks import draw_batch
from benchmarks.cifar10 import CIFAR10, SEED, STRATEGY, cifar10_bundle, say
from benchmarks.strategy_latency import Tally, pace, speed_up
from ddsm_engine.backends import BACKENDS, REFERENCE, engine_target
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import MANIFEST, WEIGHTS, Bundle, Parity
from ddsm_engine.errors import BackendError, BundleError, OutputError
from ddsm_engine.measure.peak import matmul_peak_gflops
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.parity import distance
from ddsm_engine.pipeline import Batch, Pipeline
from ddsm_engine.plan import Plan
from ddsm_engine.quality import Images, Metric, bootstrap, choose_metric
from ddsm_engine.samplers import NAMES, make_sampler
from ddsm_engine.strategy import Strategy
from ddsm_export.bundling import ExportOptions, export_bundle
from ddsm_export.demo import CLIP, COARSE, SUPERNET
from ddsm_export.supernet import load_supernet

PARTS: Final = ("latency", "quality")

FULL_WIDTH: Final = "uniform:8/8"

CHECKED_CALLS: Final = 5
"""Of the short runs that are compared with the torch reference before anything is timed."""

LATENCY_BATCH: Final = 1
QUALITY_BATCH: Final = 16

LEAST_IMAGES: Final = 2
"""That a distance between distributions can be estimated from."""

CONVERGED: Final = ("unipc", 200)
"""Sampler and steps of the run whose images stand for the solution of the full width's ODE."""

CONVERGED_IMAGES: Final = 32
"""Of a run, its first ones, that are compared with that solution: 32,768 pixels of the demo's size."""

CONVERGED_CHECK: Final = ("dpm++3m", 200)
"""Another solver of the same ODE: how far the two are apart bounds what a distance to either can show."""


def options(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument(
        "--bundle", type=Path, metavar="FOLDER", help="holds a bundle per network, kept (default: temporary)"
    )
    p.add_argument("--parts", default=",".join(PARTS), metavar="NAME,…", help="latency, quality or both (the default)")
    p.add_argument(
        "--calls", default="10,20,50,100", metavar="N,…", help="of the network, at most (default: %(default)s)"
    )
    p.add_argument("--backend", default="auto", choices=("auto", *BACKENDS), help="default: auto, as for a run")
    p.add_argument("--repeats", type=int, default=3, help="timed runs of each, of which the median counts (default: 3)")
    p.add_argument("--images", type=int, default=256, help="drawn for each KID (default: 256)")


def measure(arguments: argparse.Namespace, record: Record, save: Callable[[], None]) -> None:
    """Measure what the result does not hold yet.

    Raises:
        OutputError: the result was begun with other options, or the folder is itself a bundle.
        BackendError: an option out of range, or an engine that does not compute what the reference does.
        BundleError: a folder that holds the bundle of another network.
    """
    parts, calls = check_options(arguments)
    with ExitStack() as stack:
        folder = arguments.bundle or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ddsm-samplers-")))
        if "latency" in parts:
            bundle = stack.enter_context(cifar10_bundle(folder / f"cifar10-{CIFAR10.image_size}.bundle"))
            measure_latency(bundle, arguments.backend, calls, arguments.repeats, record, save)
        if "quality" in parts:
            bundle = fashion_mnist_bundle(folder / "fashion-mnist.bundle")
            measure_quality(bundle, arguments.backend, calls, arguments.images, record, save)


def check_options(arguments: argparse.Namespace) -> tuple[list[str], list[int]]:
    """The parts and the numbers of calls, ascending.

    Raises:
        BackendError: an option out of range.
        OutputError: the folder for bundles is itself one.
    """
    parts = arguments.parts.split(",")
    if not set(parts) <= set(PARTS):
        raise BackendError(f"expected --parts {' or '.join(PARTS)}, or both with a comma, found {arguments.parts[:60]}")
    words = arguments.calls.split(",")
    calls = sorted({int(word) if word.isascii() and word.isdigit() else 0 for word in words})
    if not 2 <= calls[0] <= calls[-1] <= CIFAR10.timesteps:
        raise BackendError(
            f"expected --calls from 2 to {CIFAR10.timesteps}, separated by commas, found {arguments.calls[:60]}"
        )
    if arguments.repeats < 1:
        raise BackendError(f"expected --repeats of at least 1, found {arguments.repeats}")
    if arguments.images < LEAST_IMAGES:
        raise BackendError(f"expected --images of at least {LEAST_IMAGES}, found {arguments.images}")
    if arguments.bundle and (arguments.bundle / MANIFEST).is_file():
        raise OutputError(f"{arguments.bundle} is itself a bundle; name a folder that holds one for every network")
    return parts, calls


def rows_of(record: Record, part: str, settings: Record) -> list[Record]:
    """The rows of a part that the result holds, to add others to.

    Raises:
        OutputError: they were measured with other options.
    """
    begun = record.setdefault(part, {"settings": settings, "rows": []})
    if begun["settings"] != settings:
        differing = [name for name in settings if begun["settings"].get(name) != settings[name]]
        raise OutputError(f"the {part} part was begun with another {', '.join(differing)}; choose another --output")
    rows: list[Record] = begun["rows"]
    return rows


def most_steps(sampler: str, schedule: NoiseSchedule, calls: int) -> int:
    """The steps of a sampler whose calls come closest to this number and do not exceed it."""
    return next(steps for steps in range(calls, 0, -1) if make_sampler(sampler, schedule, steps).calls <= calls)


def clipped_plan(pipe: Pipeline, strategy: Strategy | str | Path, sampler: str, calls: int) -> tuple[int, Plan]:
    """Steps and plan of a run.

    Predicted clean images are clipped: random weights stay finite, and the demo's supernet, which was trained briefly,
    draws garments.
    """
    steps = most_steps(sampler, pipe.bundle.manifest.noise_schedule, calls)
    return steps, pipe.plan(strategy, sampler, steps, clip_sample=CLIP)


def settled_backend(bundle: Bundle, backend: str, batch: int) -> str:
    """The backend of all runs: for ``auto`` the one that the full width is fastest on, where that was measured."""
    with Pipeline.from_bundle(bundle.path, backend=backend) as pipe:
        return pipe.settle_backend(pipe.plan(FULL_WIDTH), batch)


# --- latency ----------------------------------------------------------------------------------------------------------


def measure_latency(
    bundle: Bundle, backend: str, calls: Sequence[int], repeats: int, record: Record, save: Callable[[], None]
) -> None:
    """Time every sampler at every number of calls that the result lacks, the full width and the strategy in turns.

    Raises:
        OutputError: the result was begun with other options.
        BackendError: an engine that does not compute what the reference does; nothing was timed.
    """
    chosen = settled_backend(bundle, backend, LATENCY_BATCH)
    precision = engine_target(chosen, EngineOptions(), LATENCY_BATCH)["precision"]
    rows = rows_of(record, "latency", {"backend": chosen, "precision": precision, "repeats": repeats})
    done = {(row["sampler"], row["wanted"]) for row in rows}
    missing = [(sampler, wanted) for wanted in calls for sampler in NAMES if (sampler, wanted) not in done]
    if not missing:
        return
    with Pipeline(bundle, chosen, EngineOptions()) as pipe:
        strategies = {FULL: pipe.strategy(FULL_WIDTH), STEP_AWARE: pipe.strategy(STRATEGY)}
        differences = check_samplers(pipe, strategies, list(dict.fromkeys(sampler for sampler, _ in missing)))
        for sampler, wanted in missing:
            say(f"latency, {sampler}, {wanted} calls")
            planned = {name: clipped_plan(pipe, own, sampler, wanted) for name, own in strategies.items()}
            plans = {name: plan for name, (_, plan) in planned.items()}
            runs = speed_of(bundle, plans, take_turns(pipe, plans, repeats), matmul_peak_gflops(pipe.precision))
            rows.append({
                "sampler": sampler,
                "wanted": wanted,
                "steps": planned[FULL][0],
                "calls": len(plans[FULL].variants),
                "swaps": len(plans[STEP_AWARE].segments) - 1,
                "relative_l2": differences[sampler],
                "runs": runs,
            })  # fmt: skip
            save()


def check_samplers(pipe: Pipeline, strategies: Mapping[str, Strategy], samplers: Sequence[str]) -> dict[str, float]:
    """Let a short run of every sampler, with every strategy, end where it ends on the torch reference.

    Returns:
        The largest relative L2 between the final states, by sampler.

    Raises:
        BackendError: a difference beyond ``TOLERANCES``.
    """
    worst = dict.fromkeys(samplers, 0.0)
    with Pipeline(pipe.bundle, REFERENCE, EngineOptions(precision="fp32")) as reference:
        for sampler in samplers:
            for name, strategy in strategies.items():
                _, plan = clipped_plan(pipe, strategy, sampler, CHECKED_CALLS)
                found, expected = (draw_batch(each, plan, LATENCY_BATCH).x_final for each in (pipe, reference))
                relative_l2, max_abs = distance(found, expected)
                parity = Parity(
                    relative_l2=relative_l2,
                    max_abs=max_abs,
                    tolerance=TOLERANCES[pipe.precision],
                    backend=pipe.backend,
                )
                refuse_unlike(f"{sampler}, {name}", parity)
                worst[sampler] = max(worst[sampler], relative_l2)
    return worst


def take_turns(pipe: Pipeline, plans: Mapping[str, Plan], repeats: int) -> dict[str, list[Batch]]:
    """Run one plan after the other, and again; before that each once in two calls of each of its variants."""
    timesteps = pipe.bundle.manifest.spec.timesteps
    for variant in dict.fromkeys(variant for plan in plans.values() for variant in plan.variants):
        warmup = pipe.plan(Strategy.uniform(variant, timesteps), "ddim", 2, clip_sample=CLIP)
        draw_batch(pipe, warmup, LATENCY_BATCH)
    drawn: dict[str, list[Batch]] = {name: [] for name in plans}
    for _ in range(repeats):
        for name, plan in plans.items():
            time.sleep(PAUSE_S)
            drawn[name].append(draw_batch(pipe, plan, LATENCY_BATCH))
    return drawn


def speed_of(
    bundle: Bundle, plans: Mapping[str, Plan], drawn: Mapping[str, Sequence[Batch]], peak_gflops: float
) -> Record:
    """What the medians say of every run, see ``pace`` and ``speed_up``.

    Beside that ``peak_gflops``, ``host_ms_per_call`` (time outside the engines) and ``each_s``, all its repeats.
    """
    tallies = {name: Tally() for name in plans}
    for name, batches in drawn.items():
        seconds = statistics.median(batch.latency_ms for batch in batches) / 1e3
        engine_s = statistics.median(batch.engine_ms for batch in batches) / 1e3
        tallies[name].add(bundle, plans[name], seconds, engine_s)
    return {
        name: pace(own, own.calls, LATENCY_BATCH, peak_gflops)
        | speed_up(own, tallies[FULL])
        | {
            "peak_gflops": peak_gflops,
            "host_ms_per_call": statistics.median(each.latency_ms - each.engine_ms for each in drawn[name]) / own.calls,
            "each_s": [batch.latency_ms / 1e3 for batch in drawn[name]],
        }
        for name, own in tallies.items()
    }


# --- quality ----------------------------------------------------------------------------------------------------------


def fashion_mnist_bundle(path: Path) -> Bundle:
    """The bundle of the supernet that comes with the package, exported first if it is not there.

    Raises:
        BundleError: the folder holds another bundle, or one that lacks a width.
    """
    with as_file(files("ddsm_export") / "data" / SUPERNET) as file:
        supernet = load_supernet(file)
    if not (path / MANIFEST).is_file():
        say(f"exporting all widths of {SUPERNET} to {path}")
        export_bundle(supernet, path, ExportOptions(), report=say)
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    widths = {variant.width for variant in manifest.variants}
    if manifest.provenance.get("supernet") != supernet.provenance or not set(supernet.spec.widths()) <= widths:
        raise BundleError(f"{path} is a bundle of another supernet or lacks a width; name another --bundle folder")
    return bundle


def measure_quality(
    bundle: Bundle,
    backend: str,
    calls: Sequence[int],
    images: int,
    record: Record,
    save: Callable[[], None],
) -> None:
    """Draw images by every sampler at every number of calls, with and without a strategy, where the result lacks them.

    All runs begin with the same noise. The converged images are drawn again when a measurement is resumed.

    Raises:
        OutputError: the result was begun with other options, or with another classifier.
    """
    spec, metric = bundle.manifest.spec, kernel_distance(bundle)
    chosen = settled_backend(bundle, backend, QUALITY_BATCH)
    settings = {
        "backend": chosen,
        "images": images,
        "metric": {"name": metric.name, **metric.identity},
        "weights": weights_of(bundle),
    }
    rows = rows_of(record, "quality", settings)
    done = {(row["sampler"], row["wanted"], row["strategy"]) for row in rows}
    strategies: dict[str, Strategy | str] = {FULL: FULL_WIDTH, STEP_AWARE: Strategy.coarse(COARSE, spec.timesteps)}
    missing = [
        key for wanted in calls for sampler in NAMES for key in ((sampler, wanted, name) for name in strategies)
        if key not in done
    ]  # fmt: skip
    if not missing:
        return
    with Pipeline(bundle, chosen, EngineOptions(precision="fp32")) as pipe:
        converged = draw_converged(pipe, min(images, CONVERGED_IMAGES), record["quality"])
        for sampler, wanted, name in missing:
            say(f"quality, {sampler}, {wanted} calls, {name}")
            steps, plan = clipped_plan(pipe, strategies[name], sampler, wanted)
            found = draw_images(pipe, plan, images)
            rows.append({
                "sampler": sampler,
                "wanted": wanted,
                "strategy": name,
                "steps": steps,
                "calls": len(plan.variants),
                "rms": rms(found[: len(converged)], converged) if is_deterministic(plan) else None,
                "kid": kid(metric, np.clip(found, -1, 1)),
            })  # fmt: skip
            save()


def kernel_distance(bundle: Bundle) -> Metric:
    """To the images that the supernet was trained on, by the classifier that comes with the package.

    Raises:
        MetricError: the bundle is of a supernet of other images.
    """
    return choose_metric(bundle, kind="kernel", data=None, features=None, inception=None, instead=None)


def kid(metric: Metric, images: Images) -> Record:
    """The kernel distance of images and its standard error, from resamples of them."""
    rows = metric.describe(images)
    return {"mean": metric.distance(rows), "standard_error": float(bootstrap(metric, rows).std(ddof=1))}


def weights_of(bundle: Bundle) -> str:
    """The SHA-256 of the supernet's weights, as the manifest has it."""
    return next(info.sha256 for info in bundle.manifest.files if info.path == WEIGHTS)


def draw_converged(pipe: Pipeline, images: int, part: Record) -> Images:
    """The images that the full width's ODE ends in, and in the record how far those of another solver are from them."""
    (sampler, steps), (other, other_steps) = CONVERGED, CONVERGED_CHECK
    say(f"quality, {sampler}, {steps} steps")
    converged = draw_images(pipe, pipe.plan(FULL_WIDTH, sampler, steps, clip_sample=CLIP), images)
    if "converged" not in part:
        say(f"quality, {other}, {other_steps} steps")
        check = draw_images(pipe, pipe.plan(FULL_WIDTH, other, other_steps, clip_sample=CLIP), images)
        part["converged"] = {
            "by": f"{sampler}, {steps} steps",
            "check": f"{other}, {other_steps} steps",
            "images": images,
            "rms": rms(check, converged),
        }  # fmt: skip
    return converged


def draw_images(pipe: Pipeline, plan: Plan, images: int) -> Images:
    """Final states [N, C, H, W], not clipped; image i begins with the same noise in every run."""
    size = min(images, QUALITY_BATCH)
    return np.concatenate([
        batch.x_final for batch in pipe.batches(plan, num_images=images, batch_size=size, seed=SEED)
    ])  # fmt: skip


def is_deterministic(plan: Plan) -> bool:
    """Whether no call adds fresh noise, so that the run solves the ODE."""
    return not plan.update[..., -1].any()


def rms(found: Images, expected: Images) -> float:
    """Root mean square difference of a pixel, where black is -1 and white 1."""
    difference = found.astype(np.float64) - expected
    return float(np.sqrt(np.mean(difference**2)))


BENCHMARK: Final = Benchmark(
    name="samplers",
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
