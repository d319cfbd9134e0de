"""``ddsm evaluate BUNDLE --strategy A --strategy B``: how good are the images, and how fast?"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ddsm_engine.bundle import Bundle
from ddsm_engine.cli import guarded
from ddsm_engine.cost import gflops
from ddsm_engine.errors import MetricError
from ddsm_engine.measure.environment import environment
from ddsm_engine.pipeline import Pipeline, choose_batch_size
from ddsm_engine.quality import Metric, add_options
from ddsm_engine.quality.metric import LEAST_ROWS
from ddsm_engine.search.evaluation import Evaluation, evaluate_in_turns
from ddsm_engine.search.sampling import Sampling, add_sampling_options, engine_options
from ddsm_engine.search.trials import Calls, Trials, run_lengths


def parser() -> argparse.ArgumentParser:
    """The options of ``evaluate``."""
    p = argparse.ArgumentParser(
        prog="ddsm evaluate",
        description="Judge and time strategies side by side: the same noise for all, drawn in turns. Differences are "
        "from the strategy that is named first.",
    )
    p.add_argument("bundle", type=Path)
    p.add_argument(
        "--strategy", action="append", required=True, metavar="NAME|FILE", help="as of ddsm run; several, one by one"
    )
    add_sampling_options(p)
    p.add_argument("--images", type=int, default=512, help="drawn by each strategy (default 512)")
    p.add_argument("--seed", type=int, default=0)
    add_options(p)
    p.add_argument("--json", action="store_true", help="print one JSON object instead")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parser().parse_args(argv)
    return guarded(lambda: evaluate(arguments))


def evaluate(a: argparse.Namespace) -> None:
    """Draw, judge, time and print.

    Raises:
        DdsmError: anything that does not fit.
    """
    choose_batch_size(a.images, a.batch_size)
    if a.images < LEAST_ROWS:
        raise MetricError(f"--images must be at least {LEAST_ROWS}, found {a.images}: one image has no distribution")
    names = list(dict.fromkeys(a.strategy))
    with Pipeline(Bundle.open(a.bundle), a.backend, engine_options(a)) as pipeline:
        strategies = [pipeline.strategy(name) for name in names]
        sampling = Sampling.of(pipeline, a, strategies)
        calls: dict[str, Calls] = {
            name: sampling.plan(strategy).variants for name, strategy in zip(names, strategies, strict=True)
        }
        trials = Trials(pipeline, sampling.sampler, sampling.metric(a), None, batch_size=a.batch_size)
        found = evaluate_in_turns(
            trials, calls, names[0], seed=a.seed, images=a.images, report=partial(print, file=sys.stderr)
        )
        if a.json:
            print(json.dumps(_to_json(trials, found, a), indent=1))
        else:
            print(spell_evaluations(pipeline.bundle, trials.metric, found, a.images))


def spell_evaluations(bundle: Bundle, metric: Metric, found: Mapping[str, Evaluation], images: int) -> str:
    """One table, a row per strategy; differences are from the first."""
    reference = next(iter(found))
    width = max(len("strategy"), *(len(name) for name in found))
    macs = {variant.id: variant.macs for variant in bundle.manifest.variants}
    lines = [
        f"{metric.name}, {images} images of each, from the same noise; less is better; [95 % interval]",
        f"{'strategy':{width}} {'calls':>6} {'swaps':>6} {'GFLOPs':>8} {'s an image':>11} {'speed-up':>9} "
        f"{'metric':>9} {'interval':>19} {'difference':>11} {'interval':>19}",
    ]
    for name, e in found.items():
        swaps = len(run_lengths(e.calls)) - 1
        lines.append(
            f"{name:{width}} {len(e.calls):6} {swaps:6} {gflops(sum(macs[variant] for variant in e.calls)):8.3g} "
            f"{e.ms_per_image.median_ms / 1e3:11.3f} "
            f"{found[reference].ms_per_image.median_ms / e.ms_per_image.median_ms:8.2f}x "
            f"{e.value:9.3f} {f'[{e.interval.low:.3f}, {e.interval.high:.3f}]':>19} "
            + (
                f"{'-':>11} {'-':>19}"
                if name == reference
                else f"{e.loss:+11.3f} {f'[{e.loss_interval.low:+.3f}, {e.loss_interval.high:+.3f}]':>19}"
            )
        )
    return "\n".join(lines)


def _to_json(trials: Trials, found: Mapping[str, Evaluation], a: argparse.Namespace) -> dict[str, object]:
    return {
        "bundle": str(a.bundle),
        "environment": environment(),
        "metric": {"name": trials.metric.name, **trials.metric.identity},
        "images": a.images,
        "seed": a.seed,
        "sampler": trials.sampler.name,
        "steps": trials.sampler.steps,
        "backend": trials.pipeline.backend,
        "precision": trials.pipeline.precision,
        "batch_size": a.batch_size,
        "strategies": {name: asdict(evaluation) for name, evaluation in found.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
