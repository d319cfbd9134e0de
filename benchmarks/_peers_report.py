"""The tables, the sentence and the picture of ``peers``."""

from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from benchmarks._report import Record, in_short, machine_line, table
from benchmarks.cifar10 import CIFAR10
from ddsm_engine.cost import theoretical_speedup
from ddsm_export.cost import count_cost

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS: Final = "ddsm-engine"
PUBLISHED: Final = "torch, sliced at run time, fp32"
BATCH_1, BEST = "batch 1", "its best batch"


def details(record: Record) -> str:
    """The sentence, a table for batch 1 and one for everybody's best batch, as Markdown without a heading."""
    parts = [*headline(record)]
    for title in (BATCH_1, BEST):
        if measured := rows(record, title):
            parts += [f"Each at {title}:", _table(record, measured)]
    left_out: dict[str, list[str]] = {}
    for name, own in record["contenders"].items():
        if own["not_run"]:
            left_out.setdefault(own["not_run"], []).append(name)
    parts += [f"Not run: {reason} ({'; '.join(names)})." for reason, names in left_out.items()]
    return "\n\n".join([*parts, method(record), machine_line(record)])


def summary(record: Record) -> str:
    """The sentence."""
    return in_short(record, *headline(record))


def rows(record: Record, title: str) -> dict[str, Record]:
    """What was measured of whom, at batch 1 or at each one's best; empty while ours is not there."""
    found = {}
    for name, own in record["contenders"].items():
        batch = str(own.get("best") if title == BEST else 1)
        if "images_per_s" in own["batches"].get(batch, {}):
            found[name] = {**own["batches"][batch], "batch": batch}
    return found if OURS in found else {}


def headline(record: Record) -> list[str]:
    """Ours against the fastest peer and against the published loop, and Net R; nothing while no peer is there."""
    clauses = []
    sides = {title: measured for title in (BATCH_1, BEST) if len(measured := rows(record, title)) > 1}
    if not sides:
        return []
    promised = theoretical(record)
    for title, measured in sides.items():
        peers = [name for name in measured if name != OURS]
        fastest = max(peers, key=lambda name: float(measured[name]["images_per_s"]))
        alike = "; their runs overlap" if overlap(measured[OURS], measured[fastest]) else ""
        clause = (
            f"{'at' if title == BATCH_1 else 'each at'} {title} {_speed(measured[OURS])}, {ratio(measured, fastest)} "
            f"the fastest peer ({_label(record, fastest)}{alike})"
        )
        if PUBLISHED in measured:
            clause += f", {ratio(measured, PUBLISHED)} the loop as published in fp32"
        best = min(peers, key=lambda name: float(measured[name]["full_s_per_image"]))
        clauses.append(f"{clause}, Net R {net_r(measured, best, promised):.2f} (full width: {_label(record, best)})")
    really = f"{record['settings']['calls']} of which were run, and scaled"
    return [f"**With the published strategy over {record['timesteps']} calls, {really}: {'; '.join(clauses)}.**"]


def overlap(one: Record, other: Record) -> bool:
    """Whether the middle 60 % of two contenders' runs do: then neither is faster."""
    (low, high), (other_low, other_high) = (
        [each["images_per_s"] * each["run"]["median_ms"] / each["run"][bound] for bound in ("p80_ms", "p20_ms")]
        for each in (one, other)
    )
    return bool(low <= other_high and other_low <= high)


def theoretical(record: Record) -> float:
    """The speed-up that the strategy's arithmetic promises on the CIFAR-10 network."""
    macs = {
        width: count_cost(CIFAR10, int(Fraction(label) * CIFAR10.base_channels)).macs
        for width, label in record["widths"].items()
    }
    calls = [macs[width] for width, count in record["mix"].items() for _ in range(count)]
    return theoretical_speedup(macs[record["full"]], calls)


def net_r(measured: Mapping[str, Record], best: str, promised: float) -> float:
    """R over the best that others make of the full width: their seconds / ours with the strategy / theoretical.

    ``full_s_per_image`` is what the full width takes over as many calls.
    """
    return float(measured[best]["full_s_per_image"] / measured[OURS]["s_per_image"] / promised)


def ratio(measured: Mapping[str, Record], name: str) -> str:
    """Images per second of ours as a multiple of somebody's."""
    return f"{measured[OURS]['images_per_s'] / measured[name]['images_per_s']:.2f}x"


def method(record: Record) -> str:
    """How to read the tables."""
    calls = record["settings"]["calls"]
    few = sorted({own["calls"] for found in record["contenders"].values() for own in found["batches"].values()
                  if own.get("calls", calls) != calls})  # fmt: skip
    slow = f" ({', '.join(map(str, few))} for those too slow for the budget)" if few else ""
    mix = ", ".join(f"{record['widths'][width]} × {count}" for width, count in record["mix"].items())
    return (
        f"Milliseconds are the median of one sampling step (network, update, noise), per image. Images per second are "
        f"those of {calls} evenly strided calls of the strategy really run, swaps included{slow}, scaled to its "
        f"{record['timesteps']} calls ({mix}); diffusers has only the full width and runs that. {record['groups']} "
        f"groups, random weights."
    )


def _table(record: Record, measured: Mapping[str, Record]) -> str:
    head = ["contender", "batch", *(f"{label}, ms" for label in record["widths"].values())]
    lines = []
    for name, own in measured.items():
        steps = [f"{own['steps'][w]['median_ms']:.1f}" if w in own["steps"] else "-" for w in record["widths"]]
        lines.append(
            [
                _label(record, name), own["batch"], *steps, _figure(own["images_per_s"]), f"{own['s_per_image']:.1f}",
                f"{own['full_s_per_image']:.1f}", ratio(measured, name),
            ]
        )  # fmt: skip
    return table([*head, "images/s", "s per image", "full width, s per image", "ours is"], lines)


def draw(record: Record, figure: "Figure") -> None:
    """Images per second as horizontal bars, batch 1 on the left, everybody's best batch on the right."""
    panels = {title: measured for title in (BATCH_1, BEST) if (measured := rows(record, title))}
    axes = figure.subplots(1, max(1, len(panels)), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (title, measured) in zip(axes, panels.items(), strict=False):
        names = [name for name, own in record["contenders"].items() if not own["not_run"]]
        speeds = [measured[name]["images_per_s"] if name in measured else 0.0 for name in names]
        bars = axis.barh(
            [_label(record, name) for name in names],
            speeds,
            color=["#c0392b" if n == OURS else "#9aa5b1" for n in names],
        )
        texts = [
            f" {_figure(speed)}" + (f" (batch {measured[name]['batch']})" if title == BEST else "") if speed else " -"
            for name, speed in zip(names, speeds, strict=True)
        ]
        axis.bar_label(bars, texts, fontsize=8)
        axis.set_title(f"{title}, {record['timesteps']} calls", fontsize=10)
        axis.set_xlabel("images per second")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.35)
    if panels:
        axes[0].invert_yaxis()


def _label(record: Record, name: str) -> str:
    precision = record["contenders"][name]["precision"]
    return name if name.endswith(precision) else f"{name}, {precision}"


def _speed(own: Record) -> str:
    return f"{_figure(own['images_per_s'])} images/s"


def _figure(value: float) -> str:
    return f"{value:.3g}"
