"""What a GPU must reach, what was reached, and the table that says so; a figure that was not run says how to run it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ddsm_engine.device_scheduler import GRAPHS, LAUNCHES
from ddsm_engine.errors import OutputError
from ddsm_engine.measure.gpu.peers import EAGER, REDUCED, WIDTHS
from ddsm_engine.measure.gpu.strategies import FULL, ONE_LAUNCH, uniform
from ddsm_engine.measure.gpu.work import Row

Result = dict[str, Any]

PUBLISHED: Final = "published"
STAND_INS: Final = ("stand-in-61", "stand-in-76")
"""Strategies of the bundles that ``benchmarks.gpu_bundles`` makes."""

B1, B256, AT_64 = STRATEGY_PARTS = ("strategies-b1", "strategies-b256", "strategies-64-b256")


@dataclass(frozen=True, slots=True)
class Reached:
    """A figure, as people read it, and whether it is enough."""

    text: str
    is_enough: bool


@dataclass(frozen=True, slots=True)
class Target:
    """One line of the table.

    Attributes:
        what: Is measured.
        required: Of it.
        parts: That measure it.
        look: Finds it in a result; None where it is not there.
    """

    what: str
    required: str
    parts: tuple[str, ...]
    look: Callable[[Result], Reached | None]


def verdict_table(result: Result | None, bundles: Sequence[Path], output: Path) -> str:
    """Every target with what was reached, as Markdown.

    Args:
        result: Of the suite; None: nothing was run.
        bundles: For the commands that would run what was not.
        output: Likewise.

    Raises:
        OutputError: a row that the suite did not write.
    """
    lines = [f"| {' | '.join(cells)} |" for cells in (HEAD, ["---"] * len(HEAD))]
    for target in TARGETS:
        found = _look(target, result) if result else None
        if found:
            cells = [target.what, target.required, found.text, "reached" if found.is_enough else "missed"]
        else:
            cells = [target.what, target.required, "not run", f"`{command(target.parts, bundles, output)}`"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", machine_line(result) if result else "No result: nothing here was run on a GPU."])


def _look(target: Target, result: Result) -> Reached | None:
    try:
        return target.look(result)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise OutputError(
            f"the rows of {', '.join(target.parts)} are not what the GPU suite writes ({type(error).__name__}: "
            f"{error}); measure them again"
        ) from error


HEAD: Final = ["target", "must reach", "measured", "verdict, or the command that would run it"]


def command(parts: Sequence[str], bundles: Sequence[Path], output: Path) -> str:
    """What measures these parts."""
    return f"ddsm bench {' '.join(map(str, bundles))} --suite gpu -o {output} --part {' '.join(parts)}"


def machine_line(result: Result) -> str:
    """GPU, driver, libraries, date and commit."""
    here, gpu = result["environment"], result["environment"]["gpu"]
    versions = ", ".join(f"{name} {found}" for name, found in here["versions"].items() if name != "ddsm-engine")
    return (
        f"{gpu['name']} (compute capability {gpu['compute_capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB), "
        f"driver {gpu['driver']}, CUDA {gpu['cuda']}; {versions}; {here['date'][:10]}, commit {here['commit']}."
    )


# --- where the figures are --------------------------------------------------------------------------------------------


def rows_of(result: Result, part: str) -> list[Row]:
    """The rows of a part that were not refused."""
    return [row for row in result["parts"].get(part, {}).get("rows", []) if "error" not in row]


def fastest(result: Result, part: str, name: str, ways: Sequence[str] = ()) -> Row | None:
    """The row whose run of this name is fastest, of all backends, among these ways to run it (none: all)."""
    rows = [
        row for row in rows_of(result, part) if name in row.get("runs", {}) and (not ways or row["execution"] in ways)
    ]
    return min(rows, key=lambda row: float(row["runs"][name]["median_ms"]), default=None)


def peer_ms(result: Result, peer: str, batch: int, eighths: int) -> float | None:
    """A peer's milliseconds per call."""
    for row in rows_of(result, "peers"):
        if (row.get("peer"), row.get("batch"), row.get("eighths")) == (peer, batch, eighths):
            return float(row["median_ms"])
    return None


def peak_gflops(result: Result, precision: str) -> float | None:
    """The measured rate of a large matrix product."""
    for row in rows_of(result, "ceilings"):
        if row.get("precision") == precision:
            return float(row["gflops_per_s"])
    return None


def spell(row: Row) -> str:
    """Which engines, and how they were run."""
    return f"{row['backend']} {row['precision']}, {row['execution']}"


# --- what is looked for -----------------------------------------------------------------------------------------------


def against(peer: str, least: float) -> Callable[[Result], Reached | None]:
    """Our uniform runs at batch 1 beside a peer's loop; the smallest ratio of the widths counts."""

    def look(result: Result) -> Reached | None:
        ratios: dict[int, float] = {}
        for eighths in WIDTHS:
            row = fastest(result, B1, uniform(eighths))
            theirs = peer_ms(result, peer, 1, eighths)
            if row is None or theirs is None:
                return None
            own = row["runs"][uniform(eighths)]
            ratios[eighths] = theirs / (own["median_ms"] / own["calls"])
        text = ", ".join(f"{ratio:.2f}x at {eighths}/8" for eighths, ratio in ratios.items())
        return Reached(text, min(ratios.values()) >= least)

    return look


def realised(part: str, name: str, least: float) -> Callable[[Result], Reached | None]:
    """R of a strategy on the engines that are fastest with it, beside the full width's share of the bf16 peak."""

    def look(result: Result) -> Reached | None:
        row = fastest(result, part, name)
        if row is None:
            return None
        own, full = row["runs"][name], row["runs"][FULL]
        words = [f"{own['r']:.2f} ({own['realised']:.2f}x of {own['theoretical']:.2f}x; {spell(row)}"]
        if peak := peak_gflops(result, "bf16"):
            words.append(f"; the full width at {100 * full['gflops_per_s'] / peak:.0f} % of the bf16 peak")
        if part == B256 and (best := best_peer(result, 256)):
            net = best[1] / (own["median_ms"] / own["calls"]) / own["theoretical"]
            words.append(f"; Net R {net:.2f} against {best[0]}")
        return Reached("".join([*words, ")"]), own["r"] >= least)

    return look


def best_peer(result: Result, batch: int) -> tuple[str, float] | None:
    """The peer that is fastest at full width, and its milliseconds per call."""
    rows = [row for row in rows_of(result, "peers") if (row.get("batch"), row.get("eighths")) == (batch, 8)]
    best = min(rows, key=lambda row: float(row["median_ms"]), default=None)
    return (best["peer"], float(best["median_ms"])) if best else None


def share_of_peak(result: Result) -> Reached | None:
    """GFLOP/s of the fastest 8/8 at batch 256, by those of a bf16 matrix product."""
    rows = [row for row in rows_of(result, "subnetworks-32") if (row.get("batch"), row.get("eighths")) == (256, 8)]
    peak = peak_gflops(result, "bf16")
    if not rows or not peak:
        return None
    row = max(rows, key=lambda each: float(each["gflops_per_s"]))
    share = row["gflops_per_s"] / peak
    return Reached(f"{100 * share:.0f} % of {peak / 1e3:.0f} TFLOP/s ({spell(row)})", share >= LEAST_SHARE)


def swap_gap(ways: Sequence[str], most_us: float) -> Callable[[Result], Reached | None]:
    """The 99th percentile at batch 1, published strategy, of the fastest such run."""

    def look(result: Result) -> Reached | None:
        row = fastest(result, B1, PUBLISHED, ways)
        swap = row["runs"][PUBLISHED]["swap"] if row else None
        if row is None or swap is None:
            return None
        text = (
            f"p99 {swap['p99_us']:.2f} µs, mean {swap['mean_us']:.2f} µs ({swap['swaps']} swaps; p99 without a swap "
            f"{swap['non_swap_p99_us']:.2f} µs; clock steps of {swap['clock_step_ns']} ns; {spell(row)})"
        )
        return Reached(text, swap["p99_us"] <= most_us)

    return look


def over_isolated(result: Result) -> Reached | None:
    """The published strategy's runs beside the sum of their calls, at both batch sizes; the larger ratio counts."""
    found = {batch: fastest(result, part, PUBLISHED) for batch, part in ((1, B1), (256, B256))}
    ratios = {batch: row["runs"][PUBLISHED]["over_isolated"] for batch, row in found.items() if row}
    if len(ratios) < len(found):
        return None
    text = ", ".join(f"{ratio:.3f} at batch {batch}" for batch, ratio in ratios.items())
    return Reached(text, max(ratios.values()) <= MOST_OVER_ISOLATED)


def shared_memory(result: Result) -> Reached | None:
    """Bytes of the block that seven engines share beside what the largest alone asks for, on every backend with one."""
    rows = [row for row in rows_of(result, "memory") if row.get("is_shared")]
    words = [
        f"{row['activation_bytes_of_all'] / 2**20:.0f} MiB for {row['variants']}, "
        f"{row['activation_bytes_of_the_largest'] / 2**20:.0f} MiB for the largest ({row['backend']})"
        for row in rows
    ]
    is_one = all(row["activation_bytes_of_all"] == row["activation_bytes_of_the_largest"] for row in rows)
    return Reached("; ".join(words), is_one) if rows else None


def bit_exact(result: Result) -> Reached | None:
    """Every run that was not plain launches, on every backend."""
    exact = [
        row["bit_exact"]
        for part in STRATEGY_PARTS
        for row in result["parts"].get(part, {}).get("rows", [])
        if "bit_exact" in row and row["execution"] != LAUNCHES
    ]
    return Reached(f"{sum(exact)} of {len(exact)} backends and ways", all(exact)) if exact else None


LEAST_SHARE: Final = 0.45
MOST_OVER_ISOLATED: Final = 1.02


def _targets() -> Iterator[Target]:
    yield Target("batch 1, 32x32: against torch eager", "≥ 4x", (B1, "peers"), against(EAGER, 4.0))
    yield Target(f"batch 1, 32x32: against {REDUCED}", "≥ 1.5x", (B1, "peers"), against(REDUCED, 1.5))
    parts = (B256, "peers", "ceilings")
    yield Target(
        "batch 256, 32x32: R of the published CIFAR-10 strategy (published: 0.81)", "≥ 0.90", parts,
        realised(B256, PUBLISHED, 0.9),
    )  # fmt: skip
    for name, published in zip(STAND_INS, ("0.78", "0.35"), strict=True):
        yield Target(
            f"batch 256, 64x64: R of a stand-in that saves {name[-2:]} % (published: {published})", "≥ 0.85",
            (AT_64, "ceilings"), realised(AT_64, name, 0.85),
        )  # fmt: skip
    yield Target(
        "batch 256, 32x32: 8/8 by the measured bf16 matrix product", "≥ 45 %", ("ceilings", "subnetworks-32"),
        share_of_peak,
    )  # fmt: skip
    yield Target("a swap over a call without one, inside one launch", "p99 ≤ 2 µs", (B1,), swap_gap(ONE_LAUNCH, 2.0))
    yield Target("a swap over a call without one, a launch a call", "p99 ≤ 10 µs", (B1,), swap_gap((GRAPHS,), 10.0))
    yield Target("a run over the sum of its isolated calls", "≤ 1.02", (B1, B256), over_isolated)
    yield Target("activation memory of seven engines", "that of the largest", ("memory",), shared_memory)
    yield Target("graphs against plain launches", "bit-exact", STRATEGY_PARTS, bit_exact)


TARGETS: Final = tuple(_targets())
"""On one H200 or A100, in one run."""
