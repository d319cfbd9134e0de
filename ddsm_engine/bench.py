"""``ddsm bench BUNDLE``: how long does each variant take here, and how near to this machine's best is it?"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ddsm_engine.backends import (
    CHOICES,
    DEVICES,
    REFERENCE,
    artefact_backends,
    choose_backend,
    device_of,
    engine_target,
    prepare,
    reads,
)
from ddsm_engine.backends.engine import PRECISIONS, EngineOptions
from ddsm_engine.bundle import Bundle
from ddsm_engine.cli import batch_sizes, guarded
from ddsm_engine.cost import gflops
from ddsm_engine.engine_cache import Target
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.environment import environment
from ddsm_engine.measure.latency import LatencyRow, measure_latency
from ddsm_engine.measure.latency_table import LatencyTable, check_writable, save_latency
from ddsm_engine.measure.peak import matmul_peak_gflops
from ddsm_engine.pipeline import DEFAULT_BATCH


def parser() -> argparse.ArgumentParser:
    """The options of ``bench``."""
    p = argparse.ArgumentParser(
        prog="ddsm bench",
        description="Time every variant, in turns, and compare it with its cost and with this machine's peak.",
    )
    p.add_argument("bundle", type=Path, nargs="+", help="one; the suite takes one for each image size")
    p.add_argument("--backend", choices=CHOICES, help=f"default: every one installed for the CPU but {REFERENCE}")
    p.add_argument("--device", choices=DEVICES, default="auto", help="where they run (default: auto)")
    p.add_argument(
        "--batch-size", default=f"1,{DEFAULT_BATCH}", metavar="N,…", help=f"images per call (default 1,{DEFAULT_BATCH})"
    )
    p.add_argument("--precision", choices=PRECISIONS, default="auto")
    p.add_argument("--threads", type=int, default=0, help="threads per engine (default: the backend's choice)")
    p.add_argument("--repeats", type=int, default=30, help="timed calls of each variant, at most (default 30)")
    p.add_argument("--save", action="store_true", help="keep the tables in the bundle, where a search finds them")
    p.add_argument("--json", action="store_true", help="print one JSON object instead")
    suite = p.add_argument_group("the suite", "measures in parts, and goes on where it was stopped")
    suite.add_argument("--suite", choices=("gpu",), help="every backend for the GPU, its peers and its ceilings")
    suite.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="what the suite has measured")
    suite.add_argument("--part", nargs="+", default=[], metavar="NAME", help="only these parts of it")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parser().parse_args(argv)
    return guarded(lambda: bench_suite(arguments) if arguments.suite else bench(arguments))


def bench_suite(arguments: argparse.Namespace) -> None:
    """Measure everything that a GPU is judged by; see ``ddsm_engine.measure.gpu``.

    Raises:
        BackendError: no GPU, parts that failed, or options that the suite does not take.
        BundleError, OutputError: see ``run_suite``.
    """
    from ddsm_engine.measure.gpu.parts import PARTS
    from ddsm_engine.measure.gpu.suite import run_suite

    defaults = vars(parser().parse_args(["BUNDLE"]))
    own = {"bundle", "suite", "output", "part"}
    if given := [name for name, value in vars(arguments).items() if name not in own and value != defaults[name]]:
        words = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise BackendError(f"--suite gpu measures every backend in settings of its own; leave out {words}")
    if arguments.output is None:
        raise BackendError("--suite gpu needs -o FILE.json, where every part is written as it ends")
    if unknown := [name for name in arguments.part if name not in PARTS]:
        raise BackendError(f"unknown part {unknown[0][:60]!r}; expected {', '.join(PARTS)}")
    run_suite(arguments.bundle, arguments.output, arguments.part, partial(print, flush=True))


def bench(arguments: argparse.Namespace) -> None:
    """Time every variant for every target; a table is printed, and kept where asked to, as soon as it is measured.

    Raises:
        BackendError: nothing installed that could run, or a variant that fails.
        BundleError: no bundle, or a damaged one.
        OutputError: the tables are to be kept, and cannot be.
    """
    say: Callable[[str], None] = (lambda line: None) if arguments.json else partial(print, flush=True)
    if arguments.output is not None or arguments.part or len(arguments.bundle) > 1:
        raise BackendError("several bundles, -o and --part belong to --suite gpu; leave them out, or add it")
    if arguments.repeats < 1:
        raise BackendError(f"a timing takes at least one repeat, found --repeats {arguments.repeats}")
    bundle = Bundle.open(arguments.bundle[0])
    device = device_of(arguments.backend or REFERENCE, arguments.device)
    options = EngineOptions(device=device, precision=arguments.precision, threads=arguments.threads)
    targets = choose_targets(arguments.backend, batch_sizes(arguments.batch_size), options)
    if not arguments.backend:
        targets = [target for target in targets if reads(str(target["backend"]), bundle)]
    if arguments.save:
        for target in targets:
            check_writable(bundle, target)
    here = environment()
    say(f"{bundle.path} on {here['cpu']}, {here['cores']} cores")
    peaks: dict[str, float] = {}
    measured: list[dict[str, Any]] = []
    for target in targets:
        backend, precision, batch = str(target["backend"]), str(target["precision"]), int(target["batch"])
        rows = measure_latency(bundle, bundle.manifest.variants, backend, batch, options, repeats=arguments.repeats)
        if precision not in peaks:
            computed = bundle.full.precision if precision == "auto" else precision
            peaks[precision] = matmul_peak_gflops(computed, options.threads, options.device)
        table = LatencyTable(target, here, peaks[precision], {row.variant.id: row.timing for row in rows})
        say(spell_table(bundle, table, rows))
        file = save_latency(bundle, table) if arguments.save else None
        if file:
            say(f"kept in {file}")
        measured.append(_table_to_json(table, rows) | {"file": str(file) if file else None})
    if arguments.json:
        print(json.dumps({"bundle": str(bundle.path), "environment": here, "tables": measured}, indent=1))


# --- what is timed ----------------------------------------------------------------------------------------------------


def choose_targets(backend: str | None, batches: Sequence[int], options: EngineOptions) -> list[Target]:
    """What is timed: every batch size on the backend asked for, or on every one installed here but the reference.

    A backend that was not asked for by name and has not the precision, or a compiler that works, is left out, which one
    line on stderr says.

    Raises:
        BackendError: a backend or a precision that is not here.
    """
    if backend:
        name = choose_backend(backend, options.device)
        return [engine_target(name, options, batch) for batch in batches]
    targets: list[Target] = []
    for name in artefact_backends(options.device):
        try:
            prepare(name)
            targets += [engine_target(name, options, batch) for batch in batches]
        except BackendError as error:
            print(f"leaving out {name}: {error}", file=sys.stderr)
    if not targets:
        raise BackendError(f"no backend here computes in {options.precision}; `ddsm doctor` says what is missing")
    return targets


# --- what is printed --------------------------------------------------------------------------------------------------

HEADER = (
    f"{'variant':8} {'width':>10} {'GFLOPs':>9} {'ms a call':>10} {'(p20–p80)':>19} {'a swap':>7} {'ms an image':>11} "
    f"{'GFLOP/s':>9} {'MFU':>7} {'expected':>9} {'measured':>9}"
)


def spell_table(bundle: Bundle, table: LatencyTable, rows: Sequence[LatencyRow]) -> str:
    """One target's table: what each variant takes, and what it should take by its true GFLOPs."""
    target = table.target
    version, threads = str(target["version"]).partition("-")[0], target["threads"] or "the backend's choice"
    lines = [
        f"\n{target['backend']} {version}, {target['precision']}, batch {target['batch']}, threads: {threads}",
        HEADER,
    ]
    for row in rows:
        spread = f"({row.timing.p20_ms:.2f}–{row.timing.p80_ms:.2f})"
        lines.append(
            f"{row.variant.id:8} {bundle.label(row.variant):>10} {gflops(row.variant.macs):9.3f} "
            f"{row.timing.median_ms:10.2f} {spread:>19} {row.timing.swap_ms:+7.2f} {row.ms_per_image:11.2f} "
            f"{row.gflops_per_s:9.1f} {100 * row.gflops_per_s / table.peak_gflops:5.1f} % {row.expected_speedup:8.2f}x "
            f"{row.measured_speedup:8.2f}x"
        )
    fewer = "; this backend multiplies less than is counted (Winograd)" if target["backend"] == "native" else ""
    lines.append(
        f"MFU is the share of this machine's measured matrix-product peak, {table.peak_gflops:.1f} GFLOP/s in "
        f"{target['precision']}{fewer}; medians of {rows[0].timing.repeats} calls in turns\n"
        "a swap: milliseconds more after another variant's call"
    )
    return "\n".join(lines)


def _table_to_json(table: LatencyTable, rows: Sequence[LatencyRow]) -> dict[str, Any]:
    return {
        "target": dict(table.target),
        "peak_gflops": table.peak_gflops,
        "rows": [
            {
                "variant": row.variant.id,
                "width": row.variant.width,
                "gflops": gflops(row.variant.macs),
                **asdict(row.timing),
                "ms_per_image": row.ms_per_image,
                "gflops_per_s": row.gflops_per_s,
                "mfu": row.gflops_per_s / table.peak_gflops,
                "expected_speedup": row.expected_speedup,
                "measured_speedup": row.measured_speedup,
            }
            for row in rows
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
