"""The tables, the sentences and the picture of ``search``. A part that is not measured yet is said to be."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from benchmarks._report import Record, machine_line, percent, spread, table, times
from ddsm_engine.search.report import PUBLISHED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNIFORM: Final = "uniform"
METHODS: Final = {
    "fast": "fast search",
    "gflops": "fast search by GFLOPs",
    "nsga2": "NSGA-II",
    "random": "random search",
    UNIFORM: "uniform width",
}
RIVALS: Final = ("nsga2", "random", UNIFORM)

MOST_EVALUATIONS: Final = 1_000_000
"""Of the fast search."""
NEAR: Final = 0.05
"""Of a prediction that is called right."""
SPEED_UP: Final = 1.8
"""Of the default strategy, at least."""
MOST_LOSS: Final = 0.1
"""Of the default strategy, as a share of what the narrowest width loses."""

BETTER, ALIKE, WORSE, SAME, NONE = "better", "alike", "worse", "the same", "no rival"

WIDTH_HEAD: Final = ["width", "GFLOPs a call", "ms a call", "of the full width's GFLOPs", "of its ms"]
SPENT_HEAD: Final = [
    "search", "candidates", "images each", "image evaluations", "of the published protocol", "drawing, h"
]  # fmt: skip
STRATEGY_HEAD: Final = [
    "strategy", "variant × calls", "predicted, ms", "measured, ms (p20 to p80)", "measured / predicted",
    "the same, relative to the full width", "speed-up", "metric", "loss to the full width",
]  # fmt: skip
PAIR_HEAD: Final = [
    "at most, ms", "measured, ms", "metric", "rival", "measured, ms", "metric", "difference", "the fast search is"
]  # fmt: skip
MARKERS: Final = "os^Dv"
MOST_RUNS: Final = 6
"""Runs of a strategy that the table spells out."""


# --- words and tables -------------------------------------------------------------------------------------------------


def details(record: Record) -> str:
    """All tables with what is to be known about them, as Markdown without a heading."""
    parts = [_caption(record)]
    searches = record["searches"]
    if searches:
        parts.append(table(SPENT_HEAD, [_spent_line(part, found) for part, found in searches.items()]))
    parts += [not_run(name, part) for part, name in METHODS.items() if part not in (*searches, UNIFORM)]
    if "comparison" in record:
        parts += [
            evaluations_sentence(record),
            rivals_sentence(record, RIVALS),
            _pair_table(record, RIVALS),
            cost_sentence(record),
            table(WIDTH_HEAD, [_width_line(record, width) for width in record["settings"]["widths"]]),
            _pair_table(record, ("gflops",)),
            prediction_sentence(record),
            table(STRATEGY_HEAD, [_strategy_line(record, name) for name in _shown(record)]),
        ]
        late = [METHODS[part] for part in searches if part not in record["comparison"]["of"]]
        if late:
            parts.append(f"Searched, but not compared yet: {', '.join(late)}; {_command('comparison')}.")
    else:
        parts.append(not_run("The comparison on hold-out images", "comparison"))
    parts.append(default_sentence(record) if "default" in record else not_run("The default strategy", "default"))
    return "\n\n".join([*(part for part in parts if part), machine_line(record)])


def not_run(name: str, part: str) -> str:
    """What is missing, and the command that measures it."""
    return f"{name[0].upper()}{name[1:]}: not run yet; {_command(part)}."


def verdict(pair: Record) -> str:
    """What the interval of a difference, own less rival, says of the own one: less is better."""
    if pair["rival"] is None:
        return NONE
    if pair["own"] == pair["rival"]:
        return SAME
    if pair["difference"]["low"] > 0:
        return WORSE
    return BETTER if pair["difference"]["high"] < 0 else ALIKE


def evaluations_sentence(record: Record) -> str:
    """What did the fast search cost?"""
    count = record["searches"]["fast"]["image_evaluations"]
    bound = "no more than" if count <= MOST_EVALUATIONS else "more than"
    return (
        f"**The fast search took {count:,} image evaluations of a network, {bound} {MOST_EVALUATIONS:,}; the published "
        f"protocol takes {PUBLISHED:,}, {PUBLISHED / count:,.0f} times as many.**"
    )


def rivals_sentence(record: Record, methods: Sequence[str]) -> str:
    """Is the fast search worse than these methods anywhere? Nothing where none was compared."""
    found = {method: Counter(verdict(pair) for pair in _pairs(record, (method,))) for method in methods}
    said = [f"{METHODS[method]}: {_tally(counts)}" for method, counts in found.items() if counts]
    if not said:
        return ""
    worse = sum(counts[WORSE] for counts in found.values())
    answer = "is worse nowhere" if worse == 0 else f"is worse {worse} of {sum(c.total() for c in found.values())} times"
    return (
        f"**At equal cost the fast search {answer}.** Against {'; '.join(said)}. One in forty of these intervals "
        f"lies above 0 by chance alone."
    )


def cost_sentence(record: Record) -> str:
    """Do milliseconds choose better than GFLOPs? Nothing where nothing was searched by GFLOPs."""
    counts = Counter(verdict(pair) for pair in _pairs(record, ("gflops",)))
    if not counts:
        return ""
    widths = record["settings"]["widths"]
    by_gflops, by_ms = ([w["id"] for w in sorted(widths, key=lambda w: float(w[unit]))] for unit in ("gflops", "ms"))
    order = "the same order" if by_gflops == by_ms else "another order"
    narrow, full = widths[0], widths[-1]
    return (
        f"**Searched by milliseconds instead of GFLOPs, strategies of equal time are: {_tally(counts)}.** By "
        f"milliseconds the widths stand in {order}; {narrow['label']} takes "
        f"{100 * narrow['gflops'] / full['gflops']:.1f} % of the full width's GFLOPs and "
        f"{100 * narrow['ms'] / full['ms']:.1f} % of its milliseconds."
    )


def prediction_sentence(record: Record) -> str:
    """Do runs take what the table of calls and swaps predicts? Of all that was drawn."""
    compared = record["comparison"]
    full = compared["reference"]
    plain = {name: _off(entry) for name, entry in compared["strategies"].items()}
    relative = {name: ratio / plain[full] for name, ratio in plain.items() if name != full}
    said = []
    for ratios in (plain, relative):
        farthest = max(ratios, key=lambda name: abs(ratios[name] - 1))
        near = sum(abs(ratio - 1) <= NEAR for ratio in ratios.values())
        said.append(f"{near} of {len(ratios)} (farthest: {_name(record, farthest)}, {ratios[farthest]:.3f})")
    return (
        f"**Within {percent(NEAR)} of the predicted time are {said[0]}; relative to the full width, which took turns "
        f"with them, {said[1]}.**"
    )


def default_sentence(record: Record) -> str:
    """Is the default strategy faster at hardly any loss, or what is the trade?"""
    judged = record["default"]
    own, narrow, full = (judged["strategies"][judged[name]] for name in ("own", "narrow", "reference"))
    speed_up, gap = full["measured"]["median_ms"] / own["measured"]["median_ms"], narrow["loss"]["value"]
    fast = speed_up >= SPEED_UP
    near = own["loss"]["high"] <= MOST_LOSS * gap
    share = f", at most {100 * own['loss']['high'] / gap:.1f} % of that" if gap > 0 else ""
    aims = [f"{times(SPEED_UP)} is {_met(fast)}", f"{percent(MOST_LOSS)} of the gap is {_met(near)}"]
    promised = full["predicted_ms"] / own["predicted_ms"]
    return (
        f"**The default strategy ({_runs(own['calls'])}: of the fast search's points {_why(promised)}) is "
        f"{times(speed_up)} as fast as the full width, measured.** On {judged['images']:,} hold-out images of the same "
        f"noise it loses {_with_interval(own['loss'], '+')} in {judged['metric']['name']}, where "
        f"{_name(record, judged['narrow'])} throughout loses {_with_interval(narrow['loss'], '+')}{share}. The aim of "
        f"{', that of '.join(aims)}."
    )


def _why(promised: float) -> str:
    """Why it is this one; the threshold is that of what is promised, as no measured time may choose."""
    least = times(SPEED_UP)
    return f"that promise {least} the best" if promised >= SPEED_UP else f"the fastest, as none promises {least}"


def _met(aim: bool) -> str:  # noqa: FBT001 - a word for it
    return "met" if aim else "missed"


def _caption(record: Record) -> str:
    settings = record["settings"]
    target = settings["target"]
    metrics = list(dict.fromkeys(found["metric"] for found in record["searches"].values()))
    metric = f"; {', '.join(metrics)}, less is better" if metrics else ""
    return (
        f"{settings['sampler']}, {settings['steps']} steps, x_0 clipped to ±{settings['clip_sample']:g}; "
        f"{target['backend']} {target['precision']}, batch {settings['batch_size']}{metric}; intervals of 95 % in "
        f"brackets. Times are per image. Hours of drawing are those of the candidates by the latency table, for what "
        f"one search has drawn the next one takes over:"
    )


def _spent_line(part: str, found: Record) -> list[str]:
    count = found["image_evaluations"]
    return [
        METHODS[part], str(found["candidates"]), str(found["images"]), f"{count:,}",
        f"{100 * count / PUBLISHED:.2g} %", f"{found['drawing_s'] / 3600:.1f}",
    ]  # fmt: skip


def _width_line(record: Record, width: Record) -> list[str]:
    full = record["settings"]["widths"][-1]
    return [
        width["label"], f"{width['gflops']:.3f}", f"{width['ms']:.2f}",
        f"{100 * width['gflops'] / full['gflops']:.1f} %", f"{100 * width['ms'] / full['ms']:.1f} %",
    ]  # fmt: skip


def _shown(record: Record) -> list[str]:
    """The fast search's points and the uniform widths, by predicted time."""
    fast, drawn = record["searches"]["fast"], record["comparison"]["strategies"]
    names = dict.fromkeys(point["name"] for point in [*fast["points"], *fast[UNIFORM]])
    return sorted(names, key=lambda name: float(drawn[name]["predicted_ms"]))


def _strategy_line(record: Record, name: str) -> list[str]:
    compared = record["comparison"]
    entry, full = compared["strategies"][name], compared["strategies"][compared["reference"]]
    is_full = entry is full
    return [
        _name(record, name), _runs(entry["calls"]), f"{entry['predicted_ms']:.1f}", spread(entry["measured"]),
        f"{_off(entry):.3f}", "-" if is_full else f"{_off(entry) / _off(full):.3f}",
        times(full["measured"]["median_ms"] / entry["measured"]["median_ms"]),
        _with_interval(entry["holdout"]), "-" if is_full else _with_interval(entry["loss"], "+"),
    ]  # fmt: skip


def _pair_table(record: Record, methods: Sequence[str]) -> str:
    drawn = record["comparison"]["strategies"]

    def cells(name: str | None) -> list[str]:
        if name is None:
            return ["-", "-"]
        return [f"{drawn[name]['measured']['median_ms']:.1f}", f"{drawn[name]['holdout']['value']:.3f}"]

    lines = [
        [
            f"{pair['budget_ms']:.1f}", *cells(pair["own"]), METHODS[pair["method"]], *cells(pair["rival"]),
            "-" if pair["difference"] is None else _with_interval(pair["difference"], "+"), verdict(pair),
        ]
        for pair in _pairs(record, methods)
    ]  # fmt: skip
    return table(PAIR_HEAD, lines) if lines else ""


def _pairs(record: Record, methods: Sequence[str]) -> list[Record]:
    return [pair for method in methods for pair in record["comparison"]["pairs"] if pair["method"] == method]


def _tally(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[word]} {word}" for word in (BETTER, ALIKE, SAME, WORSE, NONE) if counts[word])


def _off(entry: Record) -> float:
    """Measured over predicted time."""
    return float(entry["measured"]["median_ms"] / entry["predicted_ms"])


def _name(record: Record, name: str) -> str:
    """A strategy as a table has it: by its width, or by who found it and its share of the full width's time."""
    searches, labels = record["searches"], {width["id"]: width["label"] for width in record["settings"]["widths"]}
    uniform = {point["name"]: point for point in searches["fast"][UNIFORM]}
    if name in uniform:
        return f"uniform {labels[uniform[name]['calls'][0][0]]}"
    full = max(float(point["ms"]) for point in uniform.values())
    method, point = next(
        (part, each) for part, found in searches.items() for each in found["points"] if each["name"] == name
    )
    return f"{METHODS[method]}, {percent(point['ms'] / full)}"


def _runs(runs: Sequence[Sequence[str | int]]) -> str:
    if len(runs) > MOST_RUNS:
        return f"{len(runs)} runs"
    return ", ".join(f"{variant} × {count}" for variant, count in runs)


def _with_interval(found: Record, sign: str = "") -> str:
    value, low, high = (f"{found[name]:{sign}.3f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _command(part: str) -> str:
    return f"`python -m benchmarks.search --bundle FOLDER --parts {part}`"


# --- the picture ------------------------------------------------------------------------------------------------------


def draw(record: Record, figure: "Figure") -> None:
    """The metric on hold-out images over measured time: a line per method, the uniform widths as points.

    Later lines are thinner and their marks smaller, so that points which several methods found show all of them.
    """
    axes = figure.subplots()
    compared = record.get("comparison", {"strategies": {}, "metric": {"name": "metric"}})
    for number, (method, label) in enumerate(METHODS.items()):
        entries = sorted((compared["strategies"][name] for name in _drawn_by(record, method)), key=_measured)
        if not entries:
            continue
        x, colour = [_measured(entry) for entry in entries], f"C{number}"
        held = [entry["holdout"] for entry in entries]
        (line,) = axes.plot(x, [each["value"] for each in held], MARKERS[number], color=colour, label=label)
        line.set(linestyle="none" if method == UNIFORM else "-", linewidth=3 - number / 2, markersize=9 - 1.5 * number)
        axes.vlines(x, [each["low"] for each in held], [each["high"] for each in held], color=colour, alpha=0.5)
    axes.set(xlabel="measured ms an image", ylabel=compared["metric"]["name"])
    if axes.lines:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small", frameon=False)


def _drawn_by(record: Record, method: str) -> list[str]:
    """The strategies that a method was compared by; every uniform width."""
    if "comparison" not in record:
        return []
    if method == UNIFORM:
        return [point["name"] for point in record["searches"]["fast"][UNIFORM]]
    pairs = [pair for pair in record["comparison"]["pairs"] if method in ("fast", pair["method"])]
    side = "own" if method == "fast" else "rival"
    return list(dict.fromkeys(pair[side] for pair in pairs if pair[side] is not None))


def _measured(entry: Record) -> float:
    return float(entry["measured"]["median_ms"])
