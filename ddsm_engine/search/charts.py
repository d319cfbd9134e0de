"""The pictures of a search's report: elements of a page, made by matplotlib, whose texts stay texts."""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
"""A search, as it is kept in JSON (``ddsm-search``, version 1), or a part of one."""

Runs = Sequence[Sequence[Any]]
"""[variant's id, number of calls], first executed first."""

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
"""Okabe and Ito (2008): told apart with any colour vision. Shapes and dashes differ as well."""
BLUE, BLACK = COLOURS[0], COLOURS[-1]
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
MOST_NAMES = 12
"""Points of a chart that carry their names."""
MOST_LETTERS = 24
"""Of a name in a chart."""


def strategy_chart(record: Record, runs: Runs, name: str) -> str:
    """One strategy, small."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        _draw_strategy(axes, record, runs, color=BLUE)
        _name_the_axes(axes, record, timesteps=5)

    return _svg(name, (3.3, 1.8), draw, "a strategy, variant over timestep", font=7.5)


def seeds_chart(record: Record) -> str:
    """The strategies of all seeds over each other; lines that coincide are drawn side by side."""
    seeds = record["seeds"]

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for k, seed in enumerate(seeds):
            shift = 0.5 * ((k + 0.5) / len(seeds) - 0.5)
            look = {"color": COLOURS[k % len(COLOURS)], "linestyle": DASHES[k % len(DASHES)]}
            _draw_strategy(axes, record, seed["calls"], shift, label=f"seed {seed['seed']}", **look)
        _name_the_axes(axes, record, timesteps=11)
        figure.legend(loc="outside right upper")

    return _svg("seeds", (7.2, 3.2), draw, "the strategies of the seeds, variant over timestep")


def errors_chart(record: Record, errors: np.ndarray[Any, Any]) -> str:
    """Heat map of ``errors[variant, call]``, of which one is positive at least; the others stay white."""

    def draw(figure: "Figure") -> None:
        from matplotlib.colors import LogNorm

        axes = figure.subplots()
        shown = np.ma.masked_where(~(errors > 0), errors)
        image = axes.imshow(
            shown,
            aspect="auto",
            origin="lower",
            interpolation="none",
            cmap="cividis",
            norm=LogNorm(shown.min(), shown.max()),
            extent=(0, errors.shape[1], -0.5, errors.shape[0] - 0.5),
        )
        _name_the_axes(axes, record, timesteps=11)
        _plain_decades(figure.colorbar(image, label="error, logarithmic", pad=0.02).ax)

    return _svg("errors", (7.2, 2.9), draw, "heat map of the errors, variant over timestep")


def front_chart(record: Record) -> str:
    """Every evaluated strategy by its origin, and the front on hold-out images with its intervals."""
    points, front = record["evaluations"], record["front"]

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        _draw_evaluations(axes, points)
        _draw_front(axes, front)
        axes.set(xlabel=f"cost, {_label(record['cost']['unit'])} per image", ylabel=_label(record["metric"]["name"]))
        values = [point["value"] for point in [*points, *front] if point["value"] is not None]
        values += [point["holdout"][end] for point in front if point["holdout"] for end in ("low", "high")]
        if min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
            axes.set_ylabel(f"{axes.get_ylabel()}, logarithmic")
            _plain_decades(axes)
        axes.legend(loc="best")

    return _svg("front", (7.2, 4.4), draw, "metric over cost: every evaluated strategy, and the front")


def times_chart(points: Sequence[Record]) -> str:
    """Measured over predicted time, with the diagonal."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        predicted, measured = ([point[key] for point in points] for key in ("predicted_ms", "measured_ms"))
        most = 1.08 * max(*predicted, *measured)
        axes.plot([0, most], [0, most], color="#888888", linewidth=1, label="equal")
        axes.plot(predicted, measured, "o", color=BLUE, markersize=5, label="strategies of the front")
        _name_points(axes, [(p["name"], p["predicted_ms"], p["measured_ms"]) for p in points])
        axes.set(xlim=(0, most), ylim=(0, most), aspect="equal")
        axes.set(xlabel="predicted, ms per image", ylabel="measured, ms per image")
        axes.legend(loc="upper left")

    return _svg("times", (4.8, 4.6), draw, "measured over predicted time of the front's strategies")


def _draw_strategy(
    axes: "Axes",
    record: Record,
    runs: Runs,
    shift: float = 0,
    **look: Any,  # noqa: ANN401 - matplotlib's
) -> None:
    level = {variant["id"]: k for k, variant in enumerate(record["variants"])}
    edges = [0, *accumulate(count for _, count in runs)]
    axes.stairs([level[variant] + shift for variant, _ in runs], edges, baseline=None, linewidth=1.8, **look)


def _name_the_axes(axes: "Axes", record: Record, *, timesteps: int) -> None:
    """Calls at equal distances under their timesteps: of a sampler that calls twice at one, both show."""
    every, labels = record["timesteps"], [_label(variant["label"]) for variant in record["variants"]]
    shown = np.unique(np.linspace(0, len(every) - 1, timesteps).round().astype(int))
    axes.set_xticks(shown + 0.5, [f"{every[call]:.0f}" for call in shown])
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlim=(0, len(every)), ylim=(-0.5, len(labels) - 0.5), xlabel="timestep", ylabel="variant")


def _draw_evaluations(axes: "Axes", points: Sequence[Record]) -> None:
    for k, origin in enumerate(dict.fromkeys(point["origin"] for point in points)):
        mine = [point for point in points if point["origin"] == origin]
        axes.plot(
            [point["cost"] for point in mine],
            [point["value"] for point in mine],
            linestyle="none",
            marker=MARKERS[k % len(MARKERS)],
            markersize=4,
            markeredgewidth=0,
            alpha=0.7,
            # Black is the front's.
            color=COLOURS[k % (len(COLOURS) - 1)],
            label=f"{_label(origin)} ({len(mine)})",
        )


def _draw_front(axes: "Axes", front: Sequence[Record]) -> None:
    held = [point for point in front if point["holdout"]]
    rest = [point for point in front if not point["holdout"] and point["value"] is not None]
    if held:
        low, value, high = ([point["holdout"][key] for point in held] for key in ("low", "value", "high"))
        axes.errorbar(
            [point["cost"] for point in held],
            value,
            yerr=[np.subtract(value, low).clip(0), np.subtract(high, value).clip(0)],
            color=BLACK,
            linewidth=0.8,
            marker="o",
            markersize=5,
            capsize=3,
            label="front, hold-out",
        )
    if rest:
        costs, values = [point["cost"] for point in rest], [point["value"] for point in rest]
        axes.plot(costs, values, "o", markerfacecolor="none", color=BLACK, markersize=7, label="front")
    _name_points(axes, [(p["name"], p["cost"], (p["holdout"] or p)["value"]) for p in [*held, *rest]])


def _name_points(axes: "Axes", points: Sequence[tuple[str, float, float]]) -> None:
    if len(points) > MOST_NAMES:
        return
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
    for name, x, y in points:
        axes.annotate(_label(name), (x, y), xytext=(5, 5), textcoords="offset points", fontsize=7, bbox=behind)


def _plain_decades(axes: "Axes") -> None:
    """Plain numbers on a logarithmic axis: powers would be set as mathematics, which is switched off."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 1000 * low else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _svg(
    name: str, inches: tuple[float, float], draw: "Callable[[Figure], None]", words: str, *, font: float = 9
) -> str:
    """Draw, by no settings of the user's, so that the same data give the same element."""
    from matplotlib import style
    from matplotlib.figure import Figure

    settings = {
        "font.size": font,
        "legend.fontsize": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "ddsm-search",
        "text.parse_math": False,  # a dollar in a name is a dollar
    }
    image = io.BytesIO()
    with style.context(["default", settings]), warnings.catch_warnings():
        # Letters that matplotlib's own font lacks: the reader's fonts draw them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure)
        figure.savefig(image, format="svg", metadata={"Date": None})
    return _inline(image.getvalue(), name, words)


def _inline(svg: bytes, name: str, words: str) -> str:
    """Make a file an element: no namespaces, no metadata, no size of its own, names that are unique in the page."""
    root = ElementTree.fromstring(svg)  # noqa: S314 - matplotlib wrote it just now
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for child in [child for child in element if child.tag.endswith("}metadata")]:
            element.remove(child)
        attributes = {key.rpartition("}")[2]: value.replace("\n", " ") for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({key: _renamed(key, value, f"{name}-") for key, value in attributes.items()})
    for size in ("width", "height", "version"):
        del root.attrib[size]
    root.attrib.update({"role": "img", "aria-label": words})
    return ElementTree.tostring(root, encoding="unicode")


def _renamed(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return prefix + value
    if key == "href" and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    return value.replace("url(#", f"url(#{prefix}")


def _label(text: str) -> str:
    """A name that leaves room for the data; XML knows no control characters."""
    short = text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 1]}…"
    return "".join(letter if letter.isprintable() else "?" for letter in short)
