"""What a search leaves: a record for the report, strategies for the bundle, a table for the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

from ddsm_engine.bundle import Bundle
from ddsm_engine.cost import gflops
from ddsm_engine.errors import OutputError, StrategyError
from ddsm_engine.files import refuse_existing
from ddsm_engine.samplers import Sampler
from ddsm_engine.search.calibration import Calibration
from ddsm_engine.search.cost import CallCost
from ddsm_engine.search.evaluation import Evaluation
from ddsm_engine.search.report import FULL
from ddsm_engine.search.space import Genome, Space
from ddsm_engine.search.surrogate import Surrogate
from ddsm_engine.search.trials import Calls, Judgement, Trials, run_lengths
from ddsm_engine.strategy import Choice, Strategy

FORMAT, FORMAT_VERSION = "ddsm-search", 1


def front_names(sampler: Sampler, best: Sequence[Calls], full: Calls, cost: CallCost) -> dict[str, Calls]:
    """Names such as ``ddim50-57``: sampler, steps, and the percentage of the full width's cost. The full width is last.

    Of two that cost nearly the same the better one stays, which is the later.
    """
    names = {_name(sampler, cost.of(calls) / cost.of(full)): calls for calls in best}
    names.pop(_name(sampler, 1.0), None)  # the full width's own
    return {**names, FULL: full}


def _name(sampler: Sampler, share: float) -> str:
    """Of a strategy in a bundle, beside those of other samplers and of the same one told otherwise."""
    told = "".join("-own" if key == "config" else f"-{key[:4]}{value:g}" for key, value in sampler.options.items())
    return f"{sampler.name}{sampler.steps}{told}-{100 * share:02.0f}".replace(":", "-").replace("+", "p")


def record_of(
    trials: Trials,
    space: Space,
    cost: CallCost,
    *,
    settings: Mapping[str, Any],
    judged: Mapping[Genome, Judgement],
    evaluations: Mapping[str, Evaluation],
    calibration: Calibration | None,
    surrogate: Surrogate | None,
    seeds: Sequence[tuple[int, Calls]],
    seconds: float,
) -> dict[str, Any]:
    """The whole search as JSON values; costs and milliseconds are those of a run, per image.

    Args:
        trials: What drew and judged.
        space: What could be chosen.
        cost: What was minimised beside the metric.
        settings: ``method``, ``seed``, ``images``, ``holdout_images``, ``holdout_seed`` and
            ``environment``.
        judged: Candidates and what the images of the search say of them.
        evaluations: The front by name and what other images say of it, the full width last.
        calibration: Errors of single calls, where they were measured.
        surrogate: What was fitted to them.
        seeds: What each seed would have chosen.
        seconds: That this run of the search took.
    """
    bundle, sampler = trials.pipeline.bundle, trials.sampler
    values = {space.calls(genome): judgement.value for genome, judgement in judged.items()}
    holdout = settings["holdout_images"] * sampler.calls * len(evaluations)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "bundle": bundle.path.name,
        "manifest": bundle.manifest.checksum,
        "environment": settings["environment"],
        "method": settings["method"],
        "seed": settings["seed"],
        "sampler": sampler.name,
        "steps": sampler.steps,
        "options": dict(sampler.options),
        "timesteps": sampler.timesteps.tolist(),
        "groups": list(space.groups),
        "variants": [
            {"id": v, "label": bundle.label(bundle.variants[v]), "gflops": gflops(bundle.variants[v].macs)}
            for v in space.variants
        ],
        "cost": {
            "unit": cost.unit,
            "per_call": dict(cost.per_call),
            "swap": dict(cost.swap),
            "batch": trials.batch_size,
            "target": None if cost.target is None else dict(cost.target),
        },
        "metric": {
            "name": trials.metric.name,
            "images": settings["images"],
            "seed": settings["seed"],
            "holdout_images": settings["holdout_images"],
            "holdout_seed": settings["holdout_seed"],
        },
        "error_table": None if calibration is None else calibration.tables()[0].tolist(),
        "surrogate": None if surrogate is None else {
            "r2": surrogate.r2, "rank_correlation": surrogate.rank_correlation, "probes": surrogate.candidates
        },
        "evaluations": [
            {"calls": run_lengths(calls), "origin": trials.origin(calls), "cost": cost.of(calls), "value": value}
            for calls, value in values.items()
        ],
        "front": [
            _front_entry(name, found, cost, values.get(found.calls), bundle) for name, found in evaluations.items()
        ],
        "seeds": [{"seed": seed, "calls": run_lengths(calls)} for seed, calls in seeds],
        "spent": ({} if calibration is None else {"calibration": calibration.evaluations})
        | trials.evaluations
        | {"holdout": holdout},
        "seconds": seconds,
    }  # fmt: skip


def _front_entry(name: str, found: Evaluation, cost: CallCost, value: float | None, bundle: Bundle) -> dict[str, Any]:
    return {
        "name": name,
        "calls": run_lengths(found.calls),
        "cost": cost.of(found.calls),
        "value": value,
        "holdout": {"value": found.value, **asdict(found.interval)},
        "loss": {"value": found.loss, **asdict(found.loss_interval)},
        "predicted_ms": cost.of(found.calls) if cost.unit == "ms" else None,
        "measured_ms": found.ms_per_image.median_ms,
        "gflops": gflops(sum(bundle.variants[variant].macs for variant in found.calls)),
    }


def strategies_of(record: Mapping[str, Any], bundle: Bundle, sampler: Sampler) -> dict[str, Strategy]:
    """The front's strategies by name; each says what it scored and how it was found."""
    found = {}
    for entry in record["front"]:
        choices = [_choice(bundle, variant) for variant, count in entry["calls"] for _ in range(count)]
        provenance = {
            "kind": "search",
            "bundle": record["manifest"],
            "method": record["method"],
            "seed": record["seed"],
            "metric": {
                "name": record["metric"]["name"],
                "images": record["metric"]["holdout_images"],
                "seed": record["metric"]["holdout_seed"],
                **entry["holdout"],
            },
            "loss": entry["loss"],
            "cost": {
                "unit": record["cost"]["unit"],
                "value": entry["cost"],
                "full_width": record["front"][-1]["cost"],
                "cpu": record["environment"]["cpu"],
            },
        }
        name = _name(sampler, 1.0) if entry["name"] == FULL else entry["name"]
        found[name] = Strategy(tuple(choices), "call", sampler.name, sampler.steps, provenance, sampler.options)
    return found


def _choice(bundle: Bundle, variant: str) -> Choice:
    mult = bundle.variants[variant].width_mult
    return variant if mult is None else Fraction(mult).limit_denominator(1 << 12)


def check_writable(bundle: Bundle) -> None:
    """Refuse, before hours of searching, a bundle that no strategy could be put into.

    Raises:
        OutputError: it is read-only, or its ``strategies`` lead elsewhere.
    """
    folder = bundle.path / "strategies"
    bundle.refuse_outside(folder)
    refuse_existing(folder / "new.yaml", force=True)


def put_into_bundle(bundle: Bundle, found: Mapping[str, Strategy]) -> None:
    """Replace the strategies that an earlier search for the same sampler, told the same, left; others stay.

    Raises:
        OutputError: a name that the bundle's export gave to another one, or as ``check_writable``.
    """
    check_writable(bundle)
    folder = bundle.path / "strategies"
    exported = bundle.exported_strategies
    for name in found:
        if name in exported:
            raise OutputError(f"{bundle.path} was exported with a strategy of the name {name}; it is kept")
    own = [(strategy.sampler, strategy.steps, strategy.options) for strategy in found.values()]
    old = {
        name: file for name, file in bundle.strategies().items()
        if name not in exported and name not in found and _is_searched(file, own)
    }  # fmt: skip
    for name, strategy in found.items():
        strategy.save(folder / f"{name}.yaml")
    for file in old.values():
        file.unlink()


def _is_searched(file: Path, own: Sequence[tuple[str | None, int | None, Mapping[str, Any]]]) -> bool:
    try:
        strategy = Strategy.load(file)
    except StrategyError:
        return False  # somebody's own
    return strategy.provenance.get("kind") == "search" and (strategy.sampler, strategy.steps, strategy.options) in own


def spell_front(record: Mapping[str, Any]) -> str:
    """The front in a table: numbers of images that the search has not seen."""
    metric, front = record["metric"], record["front"]
    full = front[-1]
    width = max(len(entry["name"]) for entry in front)
    lines = [
        f"{metric['name']}, {metric['holdout_images']} images of each that the search has not seen; less is better; "
        f"[95 % interval]",
        f"{'strategy':{width}} {'swaps':>6} {'GFLOPs':>8} {'predicted ms':>13} {'measured ms':>12} {'speed-up':>9} "
        f"{'metric':>9} {'interval':>19} {'loss':>8} {'interval':>19}",
    ]
    for entry in front:
        predicted = "-" if entry["predicted_ms"] is None else f"{entry['predicted_ms']:.1f}"
        held, loss = entry["holdout"], entry["loss"]
        is_full = entry is full
        lines.append(
            f"{entry['name']:{width}} {len(entry['calls']) - 1:6} {entry['gflops']:8.3g} {predicted:>13} "
            f"{entry['measured_ms']:12.1f} {full['measured_ms'] / entry['measured_ms']:8.2f}x {held['value']:9.3f} "
            f"{_spell_interval(held):>19} {'-' if is_full else format(loss['value'], '+.3f'):>8} "
            f"{'-' if is_full else _spell_interval(loss):>19}"
        )
    spent = sum(count for stage, count in record["spent"].items() if stage != "holdout")
    return "\n".join([
        *lines, f"the search evaluated networks on {spent:,} images, this table on {record['spent']['holdout']:,}"
    ])  # fmt: skip


def _spell_interval(found: Mapping[str, float]) -> str:
    return f"[{found['low']:.3f}, {found['high']:.3f}]"
