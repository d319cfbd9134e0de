"""The tables, the sentences and the picture of ``samplers``. A part that is not measured yet is left out."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from benchmarks._report import Record, in_short, machine_line, percent, table, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FULL: Final = "full width"
STEP_AWARE: Final = "strategy"

LATENCY_HEAD: Final = [
    "sampler", "calls", "steps", "full width, s per image", "strategy, s per image", "theoretical", "realised", "R",
    "MFU of the full width", "swaps", "host, ms a call: full width", "strategy",
]  # fmt: skip
QUALITY_HEAD: Final = [
    "sampler", "calls", "RMS, full width", "RMS, strategy", "KID, full width", "KID, strategy"
]  # fmt: skip


# --- words and tables -------------------------------------------------------------------------------------------------


def details(record: Record) -> str:
    """Both tables with what is to be known about them, as Markdown without a heading."""
    parts = []
    if latency_rows(record):
        settings = record["latency"]["settings"]
        parts += [
            f"Latency, {settings['backend']} {settings['precision']}, batch 1: medians of {settings['repeats']} runs "
            "in turns; calls as made, the most that do not exceed the number asked for:",
            table(LATENCY_HEAD, [_latency_line(row) for row in latency_rows(record)]),
            latency_sentence(record),
        ]
    if quality_rows(record):
        parts += [_quality_caption(record), table(QUALITY_HEAD, _quality_lines(record)), *_quality_notes(record)]
    return "\n\n".join([*parts, machine_line(record)])


def summary(record: Record) -> str:
    """The answer in two sentences."""
    return in_short(record, *(sentence(record) for sentence in (latency_sentence, kid_sentence) if sentence(record)))


def latency_sentence(record: Record) -> str:
    """Is a strategy still faster? Over all samplers and numbers of calls; nothing where nothing was timed."""
    rows = latency_rows(record)
    if not rows:
        return ""
    samplers = dict.fromkeys(row["sampler"] for row in rows)
    slower = {row["sampler"] for row in rows if row["runs"][STEP_AWARE]["realised"] <= 1}
    who = f"{len(samplers) - len(slower)} of {len(samplers)}" if slower else f"each of {len(samplers)}"
    runs = [row["runs"] for row in rows]
    realised, theoretical = ([run[STEP_AWARE][name] for run in runs] for name in ("realised", "theoretical"))
    return (
        f"**The CIFAR-10 network with the published strategy: with {who} samplers, at "
        f"{_span([row['calls'] for row in rows], '{}')} calls, the strategy is faster than the full width: "
        f"{_span(realised, '{:.2f}x')} realised of {_span(theoretical, '{:.2f}x')} promised, "
        f"R = {_span([run[STEP_AWARE]['r'] for run in runs], '{:.2f}')}, with the full width at "
        f"{_span([100 * run[FULL]['mfu'] for run in runs], '{:.0f}')} % MFU.**"
    )


def kid_sentence(record: Record) -> str:
    """What does it cost in KID? Nothing where nothing was drawn both ways."""
    pairs = paired(record)
    if not pairs:
        return ""
    alike = sum(abs(own["kid"]["mean"] - full["kid"]["mean"]) <= 2 * _joint_error(full, own) for full, own in pairs)
    changes = [(own["kid"]["mean"] - full["kid"]["mean"]) for full, own in pairs]
    return (
        f"Another network, the supernet that comes with the package, shows what its own coarse strategy costs: KID "
        f"changes by {_span(changes, '{:+.2f}')}, and is worse in {sum(change > 0 for change in changes)} of "
        f"{len(pairs)} runs, in {alike} by less than two standard errors of runs that share no noise (these do)."
    )


def latency_rows(record: Record) -> list[Record]:
    """By sampler, then by calls."""
    return _sorted(record.get("latency", {}).get("rows", []))


def quality_rows(record: Record) -> list[Record]:
    """By sampler, then by calls."""
    return _sorted(record.get("quality", {}).get("rows", []))


def paired(record: Record) -> list[tuple[Record, Record]]:
    """Rows of quality, at full width and with the strategy, of what was drawn both ways."""
    by_key = {(row["sampler"], row["wanted"], row["strategy"]): row for row in quality_rows(record)}
    return [
        (row, by_key[sampler, wanted, STEP_AWARE])
        for (sampler, wanted, strategy), row in by_key.items()
        if strategy == FULL and (sampler, wanted, STEP_AWARE) in by_key
    ]


def _sorted(rows: Sequence[Record]) -> list[Record]:
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    return sorted(rows, key=lambda row: (samplers.index(row["sampler"]), row["wanted"]))


def _latency_line(row: Record) -> list[str]:
    full, own = row["runs"][FULL], row["runs"][STEP_AWARE]
    return [
        row["sampler"], str(row["calls"]), str(row["steps"]), f"{full['s_per_image']:.2f}", f"{own['s_per_image']:.2f}",
        times(own["theoretical"]), times(own["realised"]), f"{own['r']:.2f}", percent(full["mfu"]), str(row["swaps"]),
        f"{full['host_ms_per_call']:.2f}", f"{own['host_ms_per_call']:.2f}",
    ]  # fmt: skip


def _quality_caption(record: Record) -> str:
    settings, converged = record["quality"]["settings"], record["quality"]["converged"]
    return (
        f"Quality, {settings['images']} images of the supernet that comes with the package, all runs from the same "
        f"noise. RMS is a pixel's distance (black -1, white 1) from the full width's converged solution "
        f"({converged['by']}; {converged['check']} ends {converged['rms']:.4f} from it), over {converged['images']} "
        f"images. A sampler that draws noise has none; ddim, which clips the predicted clean image but keeps the noise "
        f"as the network said it, tends to something else. ± is a standard error:"
    )


def _quality_lines(record: Record) -> list[list[str]]:
    lines = []
    for row in quality_rows(record):
        key = row["sampler"], row["wanted"]
        both = {each["strategy"]: each for each in quality_rows(record) if (each["sampler"], each["wanted"]) == key}
        line = [row["sampler"], str(row["calls"])]
        line += [_rms(both.get(name)) for name in (FULL, STEP_AWARE)]
        line += [_kid(both.get(name)) for name in (FULL, STEP_AWARE)]
        if line not in lines:
            lines.append(line)
    return lines


def _quality_notes(record: Record) -> list[str]:
    classifier = record["quality"].get("classifier")
    if classifier is None:
        name = record["quality"]["settings"]["metric"]["name"]
        return [f"KID is the {name}, without bias: of images as good as real ones it is 0. {kid_sentence(record)}"]
    # A result of the time when the benchmark trained a classifier of its own.
    return [
        f"KID of one half of the real test images and the other: {_kid({'kid': classifier['floor']})}; the classifier "
        f"whose features it takes names {100 * classifier['accuracy']:.1f} % of them rightly. {kid_sentence(record)}"
    ]


def _rms(row: Record | None) -> str:
    return "-" if row is None or row["rms"] is None else f"{row['rms']:.4f}"


def _kid(row: Record | None) -> str:
    if row is None:
        return "-"
    return f"{row['kid']['mean']:.2f} ± {row['kid']['standard_error']:.2f}"


def _joint_error(one: Record, other: Record) -> float:
    return math.hypot(one["kid"]["standard_error"], other["kid"]["standard_error"])


def _span(values: Sequence[float], spelling: str) -> str:
    """The smallest and the largest, once where they are spelt alike."""
    return " to ".join(dict.fromkeys(spelling.format(value) for value in (min(values), max(values))))


# --- the picture ------------------------------------------------------------------------------------------------------


def draw(record: Record, figure: "Figure") -> None:
    """Two panels over the number of calls: distance from the converged solution, and KID."""
    figure.set_size_inches(11, 4.6)
    left, right = figure.subplots(1, 2)
    _draw_lines(left, record, lambda row: row["rms"])
    _draw_lines(right, record, lambda row: row["kid"]["mean"])
    left.set(yscale="log", ylabel="RMS to the full width's converged solution")
    right.set(ylabel="KID")
    if left.lines:
        left.axhline(record["quality"]["converged"]["rms"], color="0.6", linestyle=":")
    if right.lines:
        classifier = record["quality"].get("classifier")
        right.axhline(classifier["floor"]["mean"] if classifier else 0, color="0.6", linestyle=":")
    calls = sorted({row["wanted"] for row in quality_rows(record)})
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(calls, [str(each) for each in calls])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("calls (solid: full width, dashed: strategy)")
    lines, names = right.get_legend_handles_labels()
    lines, names = (lines, names) if lines else left.get_legend_handles_labels()
    if lines:
        figure.legend(lines, names, loc="outside right upper", fontsize="small", frameon=False)


def _draw_lines(axes: "Axes", record: Record, value: Callable[[Record], float | None]) -> None:
    """A line per sampler and strategy; nothing of those without a value."""
    rows = quality_rows(record)
    for number, sampler in enumerate(dict.fromkeys(row["sampler"] for row in rows)):
        for strategy, style in ((FULL, "-"), (STEP_AWARE, "--")):
            own = [row for row in rows if (row["sampler"], row["strategy"]) == (sampler, strategy)]
            points = [(row["calls"], y) for row in own if (y := value(row)) is not None]
            if points:
                label = sampler if strategy == FULL else None
                axes.plot(*zip(*points, strict=True), style, color=f"C{number}", marker="o", markersize=3, label=label)
