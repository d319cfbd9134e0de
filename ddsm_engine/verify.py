"""``ddsm verify``: does a bundle still hold what was exported, and does this machine compute it?"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

from ddsm_engine.backends import (
    CHOICES,
    DEVICES,
    INSTALL,
    REFERENCE,
    choose_backend,
    device_of,
    installed_backends,
    prepare,
    reads,
)
from ddsm_engine.backends.engine import PRECISIONS, EngineOptions, Precision
from ddsm_engine.backends.tensorrt import LIBRARIES
from ddsm_engine.bundle import MANIFEST, WEIGHTS, Bundle
from ddsm_engine.cli import batch_sizes, guarded
from ddsm_engine.engine_cache import ENGINES, ForeignEngineError, Target, engines_of, sealed_target
from ddsm_engine.errors import BackendError, DdsmError, StrategyError
from ddsm_engine.parity import (
    BATCHES,
    TOLERANCES,
    Engines,
    Trajectory,
    TrajectoryParity,
    VariantParity,
    compare_variants,
)
from ddsm_engine.pipeline import Pipeline, choose_batch_size
from ddsm_engine.plan import compile_plan
from ddsm_engine.samplers import make_sampler
from ddsm_engine.strategy import Strategy
from ddsm_engine.untrusted import words

LOCAL_FOLDERS = (ENGINES, "latency")
"""Caches and measurements of single machines: whatever writes them seals them, the manifest knows none of them."""

DDIM_STEPS = 50

MOST_NAMES = 20
"""Of files that nothing vouches for; the JSON object has them all."""


def parser() -> argparse.ArgumentParser:
    """The options of ``verify``."""
    p = argparse.ArgumentParser(
        prog="ddsm verify",
        description="Check every hash of a bundle, and every variant on every backend installed here with its weights.",
    )
    p.add_argument("bundle", type=Path)
    p.add_argument("--backend", choices=CHOICES[1:], help="only this one (default: every one installed for the CPU)")
    p.add_argument("--device", choices=DEVICES, default="auto", help="where --backend runs (default: auto)")
    p.add_argument("--precision", choices=PRECISIONS[1:], help="only this one (default: every one offered here)")
    p.add_argument(
        "--batch-size", metavar="N,…",
        help=f"images per call, each is tried (default: {','.join(map(str, BATCHES))}; of tensorrt what was built)",
    )  # fmt: skip
    p.add_argument("--threads", type=int, default=0, help="threads per engine (default: the backend's choice)")
    p.add_argument("--json", action="store_true", help="print one JSON object instead; null stands for infinite")
    run = p.add_argument_group("a whole run", "with the same noise as the reference's; reported, not judged")
    run.add_argument("--trajectory", action="store_true", help="compare a whole run, too")
    run.add_argument(
        "--strategy", help="a file, the name of one in the bundle, uniform:4/8 or uniform:ID (default: full width)"
    )
    run.add_argument("--sampler", metavar="NAME|FILE.json", default="ddim", help="as of ddsm run (default: ddim)")
    run.add_argument("--steps", type=int, help=f"default: {DDIM_STEPS} of ddim, every timestep of ddpm")
    run.add_argument("--num-images", type=int, default=4)
    run.add_argument("--seed", type=int, default=0)
    run.add_argument(
        "--clip-sample", type=float, nargs="?", const=1.0, metavar="BOUND",
        help="clip the predicted clean image to ± BOUND (1 if not given)",
    )  # fmt: skip
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parser().parse_args(argv)
    return guarded(lambda: verify(arguments))


def verify(arguments: argparse.Namespace) -> None:
    """Check the files, compare every variant, and a whole run where asked to.

    Raises:
        BundleError: a file that is not what the manifest vouches for.
        StrategyError: a strategy that the bundle cannot run.
        BackendError: a damaged engine, a variant beyond its tolerance, or nothing installed that could run one.
    """
    say: Callable[[str], None] = (lambda line: None) if arguments.json else partial(print, flush=True)
    bundle = Bundle.open(arguments.bundle)
    unvouched = check_files(bundle)
    say(f"{bundle.path}: every file that the manifest vouches for is whole, every strategy fits")
    if unvouched:
        say(f"not vouched for: {words(unvouched, MOST_NAMES)}")
    own, foreign = check_engines(bundle)
    if own or foreign:
        say(f"engines: {len(own)} whole, {foreign} sealed by another user or machine and never loaded")
    reference, candidates = choose_engines(arguments)
    if not arguments.backend:
        candidates = [engines for engines in candidates if reads(engines[0], bundle)]
    batches = choose_batches(arguments, own)
    trajectory = plan_trajectory(bundle, arguments, batches) if arguments.trajectory else None

    compared = compare_variants(bundle, reference, candidates, batches or BATCHES)
    rows = _table(compared, say, VARIANT_HEADER, _variant_line)
    _explain(reference, rows, say)
    beyond = [row for row in rows if row.excess > 1]
    runs: list[TrajectoryParity] = []
    if trajectory is not None and not beyond:
        say(f"whole run: {trajectory.plan}; {trajectory.num_images} images, seed {trajectory.seed}")
        runs = _table(trajectory.compare(reference, candidates), say, TRAJECTORY_HEADER, _trajectory_line)
        say("not judged: a call's difference compounds in the calls after it, and how much depends on the weights")
    if arguments.json:
        report = {
            "bundle": str(bundle.path),
            "not_vouched_for": unvouched,
            "engines": {"own": len(own), "foreign": foreign},
            "reference": _spell(reference),
            "variants": [asdict(row) for row in rows],
            "tolerances": {name: asdict(tolerance) for name, tolerance in TOLERANCES.items()},
            "trajectories": [asdict(run) for run in runs],
        }
        print(json.dumps(json.loads(json.dumps(report), parse_constant=lambda _: None), indent=1))
    if beyond:
        worst = max(beyond, key=lambda row: row.excess)
        raise BackendError(
            f"{worst.variant} on {worst.parity.backend} differs from {_spell(reference)} by "
            f"{worst.parity.relative_l2:.1e} (relative L2), the worst of {len(beyond)} beyond tolerance among "
            f"{len(rows)} rows; {worst.precision} must stay within {worst.parity.tolerance:.0e}. Export the bundle "
            f"again; if only one backend or precision is beyond, run with another"
        )


# --- what is checked --------------------------------------------------------------------------------------------------


def check_files(bundle: Bundle) -> list[str]:
    """Hash every file that the manifest vouches for, and try every strategy on the bundle.

    Returns:
        Files that nothing vouches for: neither in the manifest nor a strategy, and not in ``LOCAL_FOLDERS``.

    Raises:
        BundleError: a file that is missing or damaged, or that leaves the bundle.
        StrategyError: a strategy that cannot be read, or that this bundle cannot run.
    """
    bundle.verify()
    manifest, strategies = bundle.manifest, bundle.strategies()
    for name in strategies:
        _check_strategy(bundle, bundle.strategy_file(name))
    known = {MANIFEST, *(variant.file for variant in manifest.variants), *(info.path for info in manifest.files)}
    vouched = {bundle.path / relative for relative in known} | {*strategies.values()}
    present = (file for file in bundle.path.rglob("*") if file.is_symlink() or not file.is_dir())
    others = sorted(file.relative_to(bundle.path) for file in present if file not in vouched)
    return [str(file) for file in others if file.parts[0] not in LOCAL_FOLDERS]


def _check_strategy(bundle: Bundle, file: Path) -> None:
    strategy, manifest = Strategy.load(file), bundle.manifest
    try:
        # One over calls names its sampler; one over timesteps fits every sampler or none.
        sampler = make_sampler(strategy.sampler or "ddim", manifest.noise_schedule, strategy.steps or 1)
        compile_plan(strategy, sampler, manifest.variants, bundle.time_tables())
    except DdsmError as error:
        raise StrategyError(f"{file}: {error}") from error


def check_engines(bundle: Bundle) -> tuple[list[Target], int]:
    """Check every engine that was kept for a bundle.

    Returns:
        What those are for that are whole and this user's, and how many are somebody else's.

    Raises:
        BackendError: a damaged one.
    """
    own: list[Target] = []
    foreign = 0
    for folder in engines_of(bundle):
        try:
            own.append(sealed_target(folder))
        except ForeignEngineError:
            foreign += 1
    return own, foreign


def choose_engines(arguments: argparse.Namespace) -> tuple[Engines, list[Engines]]:
    """The reference, and what is compared with it: every backend and precision that is here, or the ones asked for.

    Without torch the first of them is the reference of the others.

    Raises:
        BackendError: a backend or a precision that is not here.
    """
    installed = installed_backends()
    device = device_of(arguments.backend or REFERENCE, arguments.device)
    wanted = (choose_backend(arguments.backend, device),) if arguments.backend else installed
    backends = [name for name in wanted if name != REFERENCE or device != "cpu"]
    if not arguments.backend:
        backends = [name for name in backends if _is_usable(name)]
    if not backends:
        raise BackendError(f"no backend is installed that runs the bundle's artefacts: {INSTALL['onnxruntime']}")
    engines: list[Engines] = [
        (name, EngineOptions(device=device, precision=precision, threads=arguments.threads))
        for name in backends
        for precision in (
            offered_precisions(name) if device == "cpu" else [arguments.precision or _precision_on_gpu(name)]
        )
        if arguments.precision in (None, precision)
    ]
    if not engines:
        raise BackendError(f"{' and '.join(backends)} cannot compute in {arguments.precision} here; --precision fp32")
    if REFERENCE in installed:
        return (REFERENCE, EngineOptions(precision="fp32", threads=arguments.threads)), engines
    if arguments.trajectory:
        raise BackendError(f"--trajectory compares with a run of {WEIGHTS} in torch: {INSTALL[REFERENCE]}")
    return engines[0], engines[1:]


def _is_usable(backend: str) -> bool:
    """Whether it can be prepared; one line on stderr says why not."""
    try:
        prepare(backend)
    except BackendError as error:
        print(f"leaving out {backend}: {error}", file=sys.stderr)
        return False
    return True


def offered_precisions(backend: str) -> tuple[Precision, ...]:
    """What a backend computes in on this machine."""
    if backend == "openvino":
        from ddsm_engine.backends.openvino import resolve_precision

        if resolve_precision(EngineOptions(precision="auto")) == "bf16":
            return "fp32", "bf16"
    return ("fp32",)


def _precision_on_gpu(backend: str) -> Precision:
    """What reads artefacts computes in what they hold; torch is asked for what the reference computes in."""
    return "fp32" if backend in ("torch", "torch-compile") else "auto"


def choose_batches(arguments: argparse.Namespace, built: Iterable[Target]) -> tuple[int, ...]:
    """The batch sizes that were asked for, or else all that a backend has engines for which builds none when it runs.

    Args:
        arguments: The options.
        built: What this user's engines are for.

    Raises:
        BackendError: not positive whole numbers.
    """
    if arguments.batch_size is not None:
        return batch_sizes(arguments.batch_size)
    if arguments.backend not in LIBRARIES:
        return ()
    return tuple(sorted({int(target["batch"]) for target in built if target["backend"] == arguments.backend}))


def plan_trajectory(bundle: Bundle, arguments: argparse.Namespace, batches: Sequence[int] = ()) -> Trajectory:
    """The run that is asked for, in batches of the size that fits its images best, if there is a choice.

    Raises:
        DdsmError: a strategy, sampler or number of images that does not fit.
    """
    a = arguments
    size = choose_batch_size(a.num_images, None)
    size = min((batch for batch in batches if batch >= size), default=max(batches, default=size))
    steps = DDIM_STEPS if a.steps is None and a.sampler == "ddim" else a.steps
    strategy = a.strategy or Strategy.uniform(bundle.full.id, bundle.manifest.spec.timesteps)
    with Pipeline(bundle, REFERENCE, EngineOptions()) as pipe:
        plan = pipe.plan(strategy, a.sampler, steps, clip_sample=a.clip_sample)
    return Trajectory(bundle, plan, a.num_images, size, a.seed)


# --- what is printed --------------------------------------------------------------------------------------------------

VARIANT_HEADER = f"{'variant':8} {'backend':>12} {'precision':>9} {'relative L2':>11} {'max abs':>8} {'tolerance':>9}"
TRAJECTORY_HEADER = (
    f"{'backend':>12} {'precision':>9} {'worst PSNR':>10} {'mean PSNR':>9} {'max abs':>8} {'relative L2':>11} "
    f"{'seconds':>8} {'reference':>9}"
)

Row = TypeVar("Row", VariantParity, TrajectoryParity)


def _table(rows: Iterable[Row], say: Callable[[str], None], header: str, spell: Callable[[Row], str]) -> list[Row]:
    """Say each row when it is there: a wide network takes seconds for one."""
    kept: list[Row] = []
    for row in rows:
        if not kept:
            say(header)
        say(spell(row))
        kept.append(row)
    return kept


def _variant_line(row: VariantParity) -> str:
    p = row.parity
    return (
        f"{row.variant:8} {p.backend:>12} {row.precision:>9} {p.relative_l2:11.1e} {p.max_abs:8.1e} {p.tolerance:9.0e} "
        f"{'BEYOND' if row.excess > 1 else 'ok'}"
    )


def _trajectory_line(run: TrajectoryParity) -> str:
    return (
        f"{run.backend:>12} {run.precision:>9} {run.psnr_worst_db:7.1f} dB {run.psnr_mean_db:6.1f} dB "
        f"{run.max_abs:8.1e} {run.relative_l2:11.1e} {run.seconds:8.2f} {run.reference_seconds:9.2f}"
    )


def _explain(reference: Engines, rows: Sequence[VariantParity], say: Callable[[str], None]) -> None:
    """What the figures are relative to, and what each precision is allowed."""
    if not rows:
        say(f"every variant runs on {_spell(reference)}; there is nothing else here to compare it with")
    else:
        say(f"relative L2 is that to {_spell(reference)}; tolerance by precision:")
        for precision, tolerance in TOLERANCES.items():
            absent = "" if any(row.precision == precision for row in rows) else "; no such row here"
            say(f"  {precision} {tolerance.relative_l2:.0e}  {tolerance.reason}{absent}")
    if reference[0] != REFERENCE:
        say(f"not compared with {WEIGHTS}, which needs torch: {INSTALL[REFERENCE]}")


def _spell(reference: Engines) -> str:
    source = f" from {WEIGHTS}" if reference[0] == REFERENCE else ""
    return f"{reference[0]} {reference[1].precision}{source}"


if __name__ == "__main__":
    sys.exit(main())
