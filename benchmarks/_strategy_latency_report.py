"""The tables, the sentences and the picture of ``strategy_latency``."""

from typing import TYPE_CHECKING, Final

import numpy as np

from benchmarks._report import Record, machine_line, percent, table, times

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL: Final = "full width"
SEARCHED: Final = "published strategy"

BOUND: Final = 0.05
"""How far a run should at most be from the sum of its isolated calls; a figure to look at, which fails nothing."""

HEAD: Final = [
    "run", "calls run", "s per image", "images/s", "MFU", "theoretical", "realised", "R (20 % to 80 % of turns)",
    "predicted, s per image", "measured / predicted", "outside the engines, µs a call", "share",
]  # fmt: skip


def details(record: Record) -> str:
    """A table per backend and batch size, as Markdown without a heading."""
    parts = []
    for found in record["targets"]:
        peers = [[name, *_pace(peer), *["-"] * 7] for name, peer in found["peers"].items()]
        parts += [
            f"{_name(found)}: {_calls(record)}, in turns of {record['chunk']}; a run of fewer calls made an even part "
            "of them and is scaled up",
            table(HEAD, [[name, *_cells(run)] for name, run in found["runs"].items()] + peers),
            f"{_bound_line(found)} {_torch_line(found)}",
        ]
    return "\n\n".join([*parts, _published_line(record), machine_line(record)])


def summary(record: Record) -> str:
    """A row per backend and batch size, and what was published."""
    lines = []
    for found in record["targets"]:
        full, own = found["runs"][FULL], found["runs"][SEARCHED]
        ms_a_call = (f"{1e3 * run['s_per_image'] / record['calls']:.1f}" for run in (full, own))
        lines.append([
            _name(found), *ms_a_call, times(own["theoretical"]), times(own["realised"]), _r(own), percent(full["mfu"]),
        ])  # fmt: skip
    published = record["published"]
    theoretical = published["full_gflops_conv_linear"] / published["strategy_gflops_conv_linear"]
    lines.append([
        f"published, {published['device']}", f"{published['full_s']:.2f}", f"{published['strategy_s']:.2f}",
        f"{times(theoretical)} (conv+linear)", times(published["full_s"] / published["strategy_s"]),
        f"{published['r']:.2f}", "-",
    ])  # fmt: skip
    head = [
        "engines", "full width, ms a call and image", "strategy, ms a call and image", "theoretical", "realised",
        "R (20 % to 80 % of turns)", "MFU of the full width",
    ]  # fmt: skip
    return "\n\n".join([
        _headline(record), table(head, lines),
        f"Ours: {_calls(record)}.", _published_line(record), machine_line(record),
    ])  # fmt: skip


def draw(record: Record, figure: "Figure") -> None:
    """Per run what was promised and what arrived on every backend at every batch size, R above."""
    axes, targets = figure.subplots(), record["targets"]
    names = [name for name in targets[0]["runs"] if name != FULL]
    width = 0.84 / (len(targets) + 1)
    promised = [targets[0]["runs"][name]["theoretical"] for name in names]
    axes.bar(range(len(names)), promised, width, color="0.75", label="theoretical (true MACs)")
    for number, found in enumerate(targets, start=1):
        runs = [found["runs"][name] for name in names]
        places = [place + number * width for place in range(len(names))]
        axes.bar(places, [run["realised"] for run in runs], width, label=_name(found))
        for place, run in zip(places, runs, strict=True):
            axes.text(
                place, 1.03 * run["realised"], f"R {run['r']:.2f}", ha="center", va="bottom", rotation=90, fontsize=7
            )
    axes.set_xticks([place + len(targets) * width / 2 for place in range(len(names))], names, fontsize=8)
    lowest = min(found["runs"][name]["realised"] for found in targets for name in names)
    axes.set(yscale="log", ylim=(0.9 * min(1, lowest), 1.6 * max(promised)), ylabel="speed-up over the full width")
    ticks = [tick for tick in (1, 2, 4, 8, 16) if tick <= 1.6 * max(promised)]
    axes.yaxis.set_ticks(ticks, [f"{tick}x" for tick in ticks])
    axes.yaxis.set_ticks([], minor=True)
    axes.set_title(_calls(record), fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _pace(run: Record) -> list[str]:
    return [str(run["calls"]), f"{run['s_per_image']:.2f}", f"{run['images_per_s']:.3f}", percent(run["mfu"])]


def _cells(run: Record) -> list[str]:
    return [
        *_pace(run), times(run["theoretical"]), times(run["realised"]), _r(run),
        f"{run['predicted_s_per_image']:.2f}", f"{run['measured_over_predicted']:.3f}",
        f"{run['host_us_per_call']:.0f}", f"{100 * run['host_share']:.1f} %",
    ]  # fmt: skip


def _bound_line(found: Record) -> str:
    ratios = {name: run["measured_over_predicted"] for name, run in found["runs"].items()}
    within = sum(abs(ratio - 1) <= BOUND for ratio in ratios.values())
    worst = max(ratios, key=lambda name: abs(ratios[name] - 1))
    return (
        f"{within} of {len(ratios)} runs are within {100 * BOUND:.0f} % of the sum of their isolated calls; farthest: "
        f"{worst}, {ratios[worst]:.3f}."
    )


def _torch_line(found: Record) -> str:
    peer = found["peers"][found["best_peer"]]
    return (
        f"R over the full width in torch: {found['r_over_torch']:.2f} with the published strategy "
        f"({found['best_peer']}, {peer['s_per_image']:.2f} s per image)."
    )


def _r(run: Record) -> str:
    """R, and the middle 60 % of what single turns say."""
    return f"{run['r']:.2f} ({' to '.join(f'{of_turn:.2f}' for of_turn in np.quantile(run['r_of_turns'], [0.2, 0.8]))})"


def _headline(record: Record) -> str:
    """The fastest engines at the smallest batch."""
    batch = min(found["batch"] for found in record["targets"])
    at_batch = [found for found in record["targets"] if found["batch"] == batch]
    found = min(at_batch, key=lambda each: each["runs"][SEARCHED]["s_per_image"])
    full, own = found["runs"][FULL], found["runs"][SEARCHED]
    return (
        f"**{_name(found)}: {full['s_per_image']:.2f} s per image at full width, {own['s_per_image']:.2f} s with the "
        f"published strategy.** Theoretical {times(own['theoretical'])}, realised {times(own['realised'])}: "
        f"R = {_r(own)}, with the full width at {percent(full['mfu'])} MFU of this machine's own "
        f"{found['peak_gflops']:.0f} GFLOP/s."
    )


def _published_line(record: Record) -> str:
    published = record["published"]
    return (
        f"Published: {published['full_s']} s → {published['strategy_s']} s per image of 1000 calls on an "
        f"{published['device']}, R = {published['r']} ({published['source']})."
    )


def _calls(record: Record) -> str:
    """Which run it was, honestly."""
    calls, timesteps = record["calls"], record["timesteps"]
    if calls == timesteps:
        return f"all {calls} calls of DDPM, as published"
    return f"{calls} calls, an even part of the published {timesteps} (DDIM, η = 1)"


def _name(found: Record) -> str:
    return f"{found['backend']} {found['precision']}, batch {found['batch']}"
