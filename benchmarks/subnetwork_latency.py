"""How long does each sub-network take, and how much of its GFLOPs becomes time?

    python -m benchmarks.subnetwork_latency --bundle cifar10.bundle

Every backend, in its own choice of precision and in fp32, at every batch size: all seven widths are compared with the
torch reference and then timed in turns.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks._report import Benchmark, Record, machine_line, percent, spread, table, times
from benchmarks.cifar10 import cifar10_bundle, say
from ddsm_engine.backends import REFERENCE, open_engine
from ddsm_engine.backends.engine import EngineOptions, Precision
from ddsm_engine.bench import choose_targets
from ddsm_engine.bundle import Bundle, Parity, Variant
from ddsm_engine.cli import batch_sizes
from ddsm_engine.cost import gflops
from ddsm_engine.engine_cache import Target
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.latency import LatencyRow, measure_latency
from ddsm_engine.measure.peak import matmul_peak_gflops
from ddsm_engine.parity import answer, compare, effective_precision, make_probes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Answers = Mapping[str, NDArray[np.float32]]
"""By variant, float32 [B, C, H, W]."""


def options(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--bundle", type=Path, help="folder to reuse, or to leave it in (default: temporary)")
    p.add_argument("--batch-size", default="1,16", metavar="N,…", help="images per call (default 1,16)")
    p.add_argument("--repeats", type=int, default=30, help="timed calls of each variant, at most (default 30)")


def measure(arguments: argparse.Namespace, record: Record, save: Callable[[], None]) -> None:
    """Measure every target.

    Raises:
        BackendError: an option out of range, or a variant that answers wrongly.
    """
    if arguments.repeats < 1:
        raise BackendError(f"a timing takes at least one repeat, found --repeats {arguments.repeats}")
    targets = precise_targets(batch_sizes(arguments.batch_size))
    record["targets"] = []
    expected: dict[int, Answers] = {}
    with cifar10_bundle(arguments.bundle) as bundle:
        for target in targets:
            say("{backend} {precision}, batch {batch}".format_map(target))
            batch = int(target["batch"])
            if batch not in expected:
                expected[batch] = reference_answers(bundle, batch)
            record["targets"].append(measure_target(bundle, target, expected[batch], arguments.repeats))
            save()


def precise_targets(batches: Sequence[int]) -> list[Target]:
    """Every backend but the reference in the precision it chooses, and in fp32 where that is another."""
    targets = choose_targets(None, batches, EngineOptions())
    exact = choose_targets(None, batches, EngineOptions(precision="fp32"))
    return [*targets, *(target for target in exact if target not in targets)]


def measure_target(bundle: Bundle, target: Target, expected: Answers, repeats: int) -> Record:
    """Compare every variant with the reference, then time them all, and the machine's peak right before.

    Args:
        bundle: What to measure.
        target: Backend, precision and batch size.
        expected: See ``reference_answers``.
        repeats: Timed calls of each variant, at most.

    Raises:
        BackendError: a variant that answers wrongly; nothing of this target was timed.
    """
    backend, batch = str(target["backend"]), int(target["batch"])
    opened = EngineOptions(precision=cast("Precision", target["precision"]))
    parities = check_answers(bundle, backend, batch, opened, expected)
    peak_gflops = matmul_peak_gflops(str(target["precision"]))
    rows = measure_latency(bundle, bundle.manifest.variants, backend, batch, opened, repeats=repeats)
    label = bundle.manifest.spec.label
    return {
        "target": dict(target),
        "peak_gflops": peak_gflops,
        "rows": [_row_to_json(row, label(row.variant.width), peak_gflops, parities[row.variant.id]) for row in rows],
    }


def _row_to_json(row: LatencyRow, width: str, peak_gflops: float, parity: Parity) -> Record:
    return {
        "variant": row.variant.id,
        "width": width,
        "width_mult": row.variant.width_mult,
        "gflops": gflops(row.variant.macs),
        "gflops_conv_linear": gflops(row.variant.conv_linear_macs),
        "relative_l2": parity.relative_l2,
        "tolerance": parity.tolerance,
        **asdict(row.timing),
        "ms_per_image": row.ms_per_image,
        "gflops_per_s": row.gflops_per_s,
        "mfu": row.gflops_per_s / peak_gflops,
        "theoretical": row.expected_speedup,
        "measured": row.measured_speedup,
    }


# --- the answer first -------------------------------------------------------------------------------------------------


def reference_answers(bundle: Bundle, batch: int) -> Answers:
    """What the torch reference answers to the random inputs of this batch size."""
    exact = EngineOptions(precision="fp32")
    return {v.id: _answer(bundle, v, REFERENCE, batch, exact) for v in bundle.manifest.variants}


def check_answers(
    bundle: Bundle, backend: str, batch: int, options: EngineOptions, expected: Answers
) -> dict[str, Parity]:
    """Let every variant answer the same inputs; how far each is from the reference.

    Raises:
        BackendError: a difference beyond the precision's tolerance.
    """
    parities = {}
    for variant in bundle.manifest.variants:
        precision = effective_precision(variant.precision, options.precision)
        found = _answer(bundle, variant, backend, batch, options)
        parity = compare([found], [expected[variant.id]], precision=precision, backend=backend)
        if parity.relative_l2 > parity.tolerance:
            raise BackendError(
                f"{variant.id} on {backend} ({precision}, batch {batch}) differs from the torch reference by "
                f"{parity.relative_l2:.1e} (relative L2), expected at most {parity.tolerance:.0e}; nothing was timed: "
                f"ddsm verify {bundle.path} looks further"
            )
        parities[variant.id] = parity
    return parities


def _answer(bundle: Bundle, variant: Variant, backend: str, batch: int, options: EngineOptions) -> NDArray[np.float32]:
    probes = make_probes(bundle.spec(variant), bundle.time_table(variant), [batch])
    (found,) = answer(partial(open_engine, backend, bundle, variant, options=options), probes)
    return found


# --- what people read -------------------------------------------------------------------------------------------------


HEAD: Final = [
    "width", "GFLOPs", "ms a call (p20 to p80)", "ms an image", "GFLOP/s", "MFU", "theoretical", "measured",
]  # fmt: skip


def details(record: Record) -> str:
    """A table per target, as Markdown without a heading."""
    parts = []
    for found in record["targets"]:
        rows = found["rows"]
        worst = max(row["relative_l2"] for row in rows)
        parts += [
            f"{_name(found)}: medians of {rows[0]['repeats']} calls in turns, MFU of {found['peak_gflops']:.0f} "
            f"GFLOP/s; at most {worst:.1e} from the torch reference (allowed {rows[0]['tolerance']:.0e})",
            table(HEAD, [_cells(row) for row in rows]),
        ]
    return "\n\n".join([*parts, machine_line(record)])


def _cells(row: Mapping[str, float]) -> list[str]:
    return [
        str(row["width"]), f"{row['gflops']:.3f}",
        spread(row), f"{row['ms_per_image']:.2f}",
        f"{row['gflops_per_s']:.1f}", percent(row["mfu"]), times(row["theoretical"]), times(row["measured"]),
    ]  # fmt: skip


def draw(record: Record, figure: "Figure") -> None:
    """Left: does the promised speed-up arrive? Right: is time proportional to GFLOPs?"""
    left, right = figure.subplots(1, 2)
    for marker, found in zip("osD^vPX*" * len(record["targets"]), record["targets"], strict=False):
        rows, style = found["rows"], {"marker": marker, "markersize": 4, "linewidth": 1, "label": _name(found)}
        left.plot([row["theoretical"] for row in rows], [row["measured"] for row in rows], **style)
        right.plot([row["gflops"] for row in rows], [row["ms_per_image"] for row in rows], **style)
    rows = record["targets"][0]["rows"]
    for row in rows:
        label = {"textcoords": "offset points", "xytext": (5, -10), "fontsize": 8}
        left.annotate(f"{8 * row['width_mult']:g}/8", (row["theoretical"], row["measured"]), **label)
    most = max(row["theoretical"] for row in rows)
    left.plot([1, most], [1, most], color="0.6", linestyle="--", linewidth=1, zorder=0)
    left.set(xscale="log", yscale="log", xlim=(0.9, 1.25 * most))
    left.set(xlabel="theoretical speed-up (true MACs)", ylabel="measured speed-up")
    ticks = [tick for tick in (1, 2, 4, 8, 16, 32) if tick <= 1.2 * most]
    for axis in (left.xaxis, left.yaxis):
        axis.set_ticks(ticks, [f"{tick}x" for tick in ticks])
        axis.set_ticks([], minor=True)
    left.set_title("all of the GFLOPs become time on the dashed line", fontsize=10)
    right.set(xlabel="true GFLOPs per image", ylabel="ms an image", xlim=(0, None), ylim=(0, None))
    right.set_title("time over arithmetic", fontsize=10)
    right.legend(frameon=False, fontsize=8)


def _engines(found: Record) -> tuple[str, str]:
    return found["target"]["backend"], found["target"]["precision"]


def _name(found: Record) -> str:
    return "{backend} {precision}, batch {batch}".format_map(found["target"])


BENCHMARK: Final = Benchmark(
    name="subnetwork_latency",
    doc=__doc__ or "",
    options=options,
    measure=measure,
    details=details,
    draw=draw,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
