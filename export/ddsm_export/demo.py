"""``ddsm demo``: the shipped supernet, cut, exported, run and measured, in about two minutes."""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from fractions import Fraction
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_engine.cli import guarded
from ddsm_engine.cost import gflops, theoretical_speedup
from ddsm_engine.files import atomic_path, refuse_existing
from ddsm_engine.images import grid, save_png
from ddsm_engine.measure.environment import environment
from ddsm_engine.measure.latency import LatencyRow, measure_latency
from ddsm_engine.measure.peak import matmul_peak_gflops
from ddsm_engine.pipeline import Pipeline, Result
from ddsm_engine.plan import Plan
from ddsm_engine.strategy import Strategy
from ddsm_engine.trace import Trace

SUPERNET = "fashion_mnist.safetensors"
TRACE = "trace.json"
STEPS = 50
CLIP = 1.0
"""The shipped supernet was trained briefly; unclipped, errors at the noisy end drive samples to black or white."""

ROUNDS = 2
BATCH = 8

COARSE = ((0, Fraction(8, 8)), (266, Fraction(6, 8)), (470, Fraction(4, 8)))
"""First timestep and width of each run: the published CIFAR-10 strategy without its noise block, 3 runs, 2 swaps."""

DEFAULT = "searched-46"
"""The strategy of the demo: one of those that ``ddsm search`` found for the shipped supernet, at DDIM 50. The number is
its percentage of the full width's time where it was searched."""

FULL = "full"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = argparse.ArgumentParser(
        prog="ddsm demo", description="Cut, export, run and measure the supernet that comes with this package."
    )
    p.add_argument("-o", "--output", type=Path, default=Path("demo"), help="folder to write (default: demo)")
    p.add_argument("--force", action="store_true", help="replace the folder")
    arguments = p.parse_args(argv)
    return guarded(lambda: demo(arguments.output, force=arguments.force))


def demo(output: Path, *, force: bool) -> None:
    """Write the bundle, image grids, a trace and a picture, and print the honest table.

    Raises:
        OutputError: the folder exists.
    """
    refuse_existing(output, force=force, marker=TRACE)
    from ddsm_export.bundling import ExportOptions, export_bundle
    from ddsm_export.supernet import load_supernet

    with as_file(files("ddsm_export") / "data") as data:
        supernet = load_supernet(data / SUPERNET)
        strategies = {file.stem: Strategy.load(file) for file in sorted((data / "strategies").glob("*.yaml"))}
    strategies["coarse"] = Strategy.coarse(COARSE, supernet.spec.timesteps)
    started = time.monotonic()
    with atomic_path(output, replace=force) as folder:
        folder.mkdir()
        bundle = folder / "fashion-mnist.bundle"
        print("cutting and exporting the widths", flush=True)
        export_bundle(supernet, bundle, ExportOptions(), strategies=strategies, report=_say)
        print(
            f"\ndrawing {ROUNDS * BATCH} images with DDIM {STEPS} (x_0 clipped): full width, a coarse and a searched "
            "strategy in turns",
            flush=True,
        )
        with Pipeline.from_bundle(bundle) as pipeline:
            results = _draw_in_turns(pipeline)
            plans = {name: pipeline.plan(name, "ddim", STEPS) for name in results if name != FULL}
            variants = pipeline.bundle.manifest.variants
            rows = measure_latency(pipeline.bundle, variants, pipeline.backend, BATCH, pipeline.options, repeats=9)
        trace: dict[str, Any] = {"environment": environment(), "plan": str(plans[DEFAULT])}
        for name, rounds in results.items():
            images = np.concatenate([result.images for result in rounds])
            save_png(grid(images, columns=8), folder / f"{name}.png")
            trace[name] = [result.trace.to_json() for result in rounds]
        (folder / TRACE).write_text(json.dumps(trace, indent=1) + "\n", encoding="utf-8")
        draw_picture(plans[DEFAULT], rows, folder / "latency.png")
    _print_table(rows, results[FULL][0].trace)
    peak = matmul_peak_gflops(results[FULL][0].trace.precision)
    for name, plan in plans.items():
        _print_strategy(name, plan, rows, results, peak)
    print(_spell_search(strategies[DEFAULT]))
    where = output / "fashion-mnist.bundle"
    print(
        f"\n{output}/ holds full.png, coarse.png, {DEFAULT}.png, latency.png, trace.json and the bundle "
        f"({time.monotonic() - started:.0f} s);\nlook inside with: ddsm inspect {where}\n\n"
        f"With a supernet of your own:\n"
        f"  ddsm-export ckpt.pt -o my.bundle        # flagfile.txt beside it, or --groups --image-size …\n"
        f"  ddsm inspect my.bundle\n"
        f"  python -m ddsm_engine.run --bundle my.bundle --strategy search.txt -o images.png"
    )


def _say(line: str) -> None:
    print(f"  {line}", flush=True)


def _draw_in_turns(pipeline: Pipeline) -> dict[str, list[Result]]:
    """Full width, strategies, full width, strategies: a machine whose speed drifts treats all alike."""
    strategies = {FULL: "uniform:8/8", "coarse": "coarse", DEFAULT: DEFAULT}
    results: dict[str, list[Result]] = {name: [] for name in strategies}
    for variant in pipeline.bundle.variants:
        pipeline(f"uniform:{variant}", "ddim", 2, num_images=BATCH, batch_size=BATCH, clip_sample=CLIP)  # warm up
    for seed in range(ROUNDS):
        for name, strategy in strategies.items():
            results[name].append(
                pipeline(strategy, "ddim", STEPS, num_images=BATCH, batch_size=BATCH, seed=seed, clip_sample=CLIP)
            )
    return results


def _print_table(rows: Sequence[LatencyRow], trace: Trace) -> None:
    print(f"\n{trace.backend} {trace.precision}, batch {trace.batch_size}; ms are per image and call, median")
    print(f"{'width':>10} {'GFLOPs':>8} {'ms':>8} {'expected':>9} {'measured':>9}")
    for row in rows:
        label = f"{_eighths(row, rows):g}/8"
        print(
            f"{label:>10} {gflops(row.variant.macs):8.3f} {row.ms_per_image:8.2f} {row.expected_speedup:8.2f}x "
            f"{row.measured_speedup:8.2f}x"
        )


def _print_strategy(
    name: str, plan: Plan, rows: Sequence[LatencyRow], results: Mapping[str, Sequence[Result]], peak: float
) -> None:
    macs = {row.variant.id: row.variant.macs for row in rows}
    full_row = max(rows, key=lambda row: row.variant.macs)
    theoretical = theoretical_speedup(full_row.variant.macs, [macs[v] for v in plan.variants])
    seconds = {each: sum(r.trace.latency_ms for r in rounds) / 1e3 for each, rounds in results.items()}
    images = sum(len(result.images) for result in results[FULL])
    realised = seconds[FULL] / seconds[name]
    print(f"\n{name}: {plan}")
    print(
        f"  expected {theoretical:.2f}x, measured {realised:.2f}x, R = {realised / theoretical:.2f} "
        f"(full width at {100 * full_row.gflops_per_s / peak:.0f} % of this machine's {peak:.0f} GFLOP/s)\n"
        f"  images per second: {images / seconds[FULL]:.2f} full width, {images / seconds[name]:.2f} strategy"
    )


def _spell_search(strategy: Strategy) -> str:
    """What the search said of a strategy's images, which a demo's few cannot show."""
    metric, loss = strategy.provenance["metric"], strategy.provenance["loss"]
    return (
        f"  {metric['name']}, {metric['images']} images: {metric['value']:.1f} [{metric['low']:.1f}, "
        f"{metric['high']:.1f}], {loss['value']:+.1f} [{loss['low']:+.1f}, {loss['high']:+.1f}] against the full width"
    )


def _eighths(row: LatencyRow, rows: Sequence[LatencyRow]) -> float:
    """A variant's width in eighths of the widest."""
    return 8 * row.variant.width / max(other.variant.width for other in rows)


def draw_picture(plan: Plan, rows: Sequence[LatencyRow], path: Path) -> None:
    """Width over timestep, and measured milliseconds beside GFLOPs per width."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    eighths = {row.variant.id: _eighths(row, rows) for row in rows}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.step(plan.timesteps, [eighths[v] for v in plan.variants], where="mid", color="#31688e", linewidth=2)
    left.set(xlabel="timestep t (sampling runs from right to left)", ylabel="width, eighths", ylim=(0, 8.5))
    left.set_title("the strategy: which width serves which timestep")
    positions = np.arange(len(rows))
    right.bar(positions - 0.2, [gflops(r.variant.macs) for r in rows], 0.4, color="#b5b5b5", label="GFLOPs (true)")
    right.set(ylabel="GFLOPs per image and call", xlabel="width", title="what is promised, and what it takes")
    right.set_xticks(positions, [f"{width:g}/8" for width in eighths.values()])
    milliseconds = right.twinx()
    spread = [
        [(r.timing.median_ms - r.timing.p20_ms) / r.batch for r in rows],
        [(r.timing.p80_ms - r.timing.median_ms) / r.batch for r in rows],
    ]
    milliseconds.bar(
        positions + 0.2, [r.ms_per_image for r in rows], 0.4, yerr=spread, color="#31688e", label="ms (median, p20-p80)"
    )
    milliseconds.set_ylabel("ms per image and call")
    # Both axes end at the full width's value: bars of one height mean that the time fell as far as the arithmetic.
    right.set_ylim(0, gflops(rows[-1].variant.macs) * 1.15)
    milliseconds.set_ylim(0, rows[-1].ms_per_image * 1.15)
    handles = [*right.get_legend_handles_labels()[0], *milliseconds.get_legend_handles_labels()[0]]
    right.legend(handles=handles, loc="upper left", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
