"""What a search found and what it cost, as one HTML page that needs no other file, no script and no network."""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from ddsm_engine.files import write_atomically
from ddsm_engine.search.charts import (
    Record,
    Runs,
    errors_chart,
    front_chart,
    seeds_chart,
    strategy_chart,
    times_chart,
)

FULL = "full width"
PUBLISHED = 500 * 4096 * 1000
"""Image evaluations of the published search: candidates, images of each, calls (DDSM's code)."""

METHODS = {
    "fast": "fast search",
    "nsga2": "NSGA-II, two objectives",
    "scalar": "NSGA-II, one objective",
    "random": "random search",
}
MOST_RUNS = 6
"""Runs of a strategy that the table spells out."""

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 64rem;
  padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .3rem; }
p, figcaption { max-width: 44rem; } p { margin: .3rem 0 .8rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; }
dt { color: #555; } dd { margin: 0; }
.wide { overflow-x: auto; } .wide > svg { min-width: 26rem; max-width: 52rem; } .narrow > svg { max-width: 32rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #ccc; text-align: right; vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, td.words, th.words { text-align: left; } td { white-space: nowrap; }
td.words { min-width: 10rem; white-space: normal; }
tr.total td { border-top: 2px solid #555; font-weight: 600; }
.panels { display: flex; flex-wrap: wrap; gap: 1rem; } .panels figure { flex: 1 1 15rem; max-width: 26rem; }
figure { margin: 0; break-inside: avoid; } figcaption { font-size: .85rem; color: #333; }
svg { width: 100%; height: auto; display: block; } svg text { font-family: system-ui, sans-serif !important; }
img { width: 100%; height: auto; image-rendering: pixelated; display: block; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
@media print {
  body { max-width: none; font-size: 10pt; padding: 0; } h2 { break-after: avoid; } tr { break-inside: avoid; }
  p { break-after: avoid; } .wide { overflow: visible; } .wide > svg { min-width: 0; break-inside: avoid; }
  table { font-size: 7pt; } th, td { padding-right: .4rem; } td.words { min-width: 5rem; }
}
"""


def write_report(record: Record, pictures: Mapping[str, bytes], path: Path) -> None:
    """Write the page, whole or not at all; the same record and pictures give the same bytes.

    Args:
        record: The search. Parts that are None or empty are said to be missing.
        pictures: PNG files by name of a strategy of the front.
        path: The page.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OutputError: the disk is full.
    """
    write_atomically(path, page(record, pictures).encode())


def page(record: Record, pictures: Mapping[str, bytes]) -> str:
    """The page as text."""
    title = escape(f"Search of {record['bundle']}")
    parts = [
        _section("The front", _front_table(record)),
        _section("Strategies", _strategies(record)),
        _section("Error of each variant at each call", _errors(record)),
        _section("Cost and quality", _front(record)),
        _section("Predicted and measured time", _times(record)),
        _section("Images", _pictures(record, pictures)),
        _section("Strategies of the seeds", _seeds(record)),
        _section("What the search cost", _spent(record)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{_facts(record)}\n"
        f"{''.join(parts)}</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>\n"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>\n"


def _facts(record: Record) -> str:
    cost, metric, machine = record["cost"], record["metric"], record["environment"]
    calls, groups = len(record["timesteps"]), len(record["groups"])
    said = {"eta": "eta {:g}", "clip_sample": "x_0 clipped to ±{:g}", "config": "a config of its own"}
    told = "".join(f", {said[option].format(value)}" for option, value in record["options"].items())
    known = (("cpu", "{}"), ("cores", "{} cores"), ("date", "{}"), ("commit", "commit {}"))
    facts = {
        "bundle": f"{record['bundle']} (manifest {record['manifest'][:16]})",
        "sampler": f"{record['sampler']}, {_many(record['steps'], 'step')}, {_many(calls, 'call')}{told}",
        "search": f"{METHODS.get(record['method'], record['method'])}, seed {record['seed']}: one of "
        f"{_many(len(record['variants']), 'variant')} for each of {_many(groups, 'group')} of calls",
        "metric": f"{metric['name']} of {metric['images']:,} images (seed {metric['seed']}), for the front of "
        f"{metric['holdout_images']:,} hold-out images as well (seed {metric['holdout_seed']}); lower is better",
        "cost": f"{cost['unit']} per image, batch {cost['batch']}",
        "target": ", ".join(f"{key} {value}" for key, value in (cost["target"] or {}).items())
        or "none: the cost was counted, not timed",
        "machine": ", ".join(words.format(machine[key]) for key, words in known if machine.get(key)) or "not recorded",
    }
    return "<dl>\n" + "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>\n" for key, value in facts.items()) + "</dl>"


def _front_table(record: Record) -> str:
    if not record["front"]:
        return _paragraph("The search has chosen no strategy yet.")
    unit, metric = record["cost"]["unit"], record["metric"]["name"]
    full = next((point for point in record["front"] if point["name"] == FULL), None)
    head = ["strategy", "variant × calls, noisy end first", f"cost, {unit}", "predicted, ms", "measured, ms", "GFLOPs"]
    head += ["speed-up", f"{metric}, 95 % interval", f"loss against the {FULL}, 95 % interval"]
    rows = [
        [
            point["name"],
            _runs(record, point["calls"]),
            _number(point["cost"]),
            _number(point["predicted_ms"]),
            _number(point["measured_ms"]),
            _number(point["gflops"]),
            _speedup(point, full),
            _interval(point["holdout"]),
            _interval(None if point is full else point["loss"], sign="+"),
        ]
        for point in record["front"]
    ]
    return _paragraph(
        f"Times and GFLOPs are per image for the whole run. The speed-up is over the {FULL}. {metric} and loss are of "
        f"hold-out images, which the search did not see. –: none."
    ) + _table(head, rows, words=(1,))


def _speedup(point: Record, full: Record | None) -> str:
    if full is None:
        return "–"
    for key, source in (("measured_ms", ""), ("predicted_ms", ", predicted"), ("gflops", ", GFLOPs")):
        if point[key] and full[key]:
            return f"{full[key] / point[key]:.2f}x{source}"
    return "–"


def _strategies(record: Record) -> str:
    if not record["front"]:
        return _paragraph("There is none to draw yet.")
    panels = []
    for k, point in enumerate(record["front"]):
        svg = strategy_chart(record, point["calls"], f"strategy{k}")
        panels.append(_figure(svg, f"{point['name']}: {_number(point['cost'])} {record['cost']['unit']} per image"))
    said = "Which variant serves which timestep. Sampling begins with noise, at the left; every call is drawn as wide."
    return _paragraph(said) + _panels(panels)


def _errors(record: Record) -> str:
    rows, fit = record["error_table"], record["surrogate"]
    if not rows:
        return _paragraph("No errors of single variants were measured; only the fast search does that.")
    errors = np.repeat(np.array(rows, dtype=float), record["groups"], axis=0).T
    if not np.any(errors > 0):
        return _paragraph("No variant errs at any call.")
    said = "How far from the full width is a variant that serves a call? White: not at all."
    if fit:
        said += (
            f" Sums of these over the calls were compared with the metric of {fit['probes']:,} probed strategies: "
            f"R² = {fit['r2']:.2f}, rank correlation {fit['rank_correlation']:.2f}."
        )
    return _paragraph(said) + _wide(errors_chart(record, errors))


def _front(record: Record) -> str:
    metric, front = record["metric"], record["front"]
    if not record["evaluations"] and all(point["holdout"] is None and point["value"] is None for point in front):
        return _paragraph("No strategy has been evaluated yet.")
    said = f"Every strategy that was evaluated with {metric['images']:,} images, by what proposed it."
    if any(point["holdout"] for point in front):
        said += f" Black: the front with {metric['holdout_images']:,} hold-out images, and 95 % intervals."
        if metric["holdout_images"] != metric["images"]:
            said += " Some metrics, FID among them, depend on the number of images: compare black with black."
    else:
        said += " The front was not evaluated with hold-out images."
    return _paragraph(said) + _wide(front_chart(record))


def _times(record: Record) -> str:
    timed = [point for point in record["front"] if point["predicted_ms"] and point["measured_ms"]]
    if not timed:
        return _paragraph("No strategy of the front has both a predicted and a measured time.")
    ratios = {point["name"]: point["predicted_ms"] / point["measured_ms"] for point in timed}
    said = f"Predictions add up the times of calls and swaps. They are {_off(ratios)}."
    if FULL in ratios and len(ratios) > 1:
        # The table is older than the runs, but the full width took turns with them.
        relative = {name: ratio / ratios[FULL] for name, ratio in ratios.items() if name != FULL}
        said += f" Speed-ups over the full width, measured in the same minutes, are {_off(relative)}."
    return _paragraph(said) + _wide(times_chart(timed), narrow=True)


def _off(ratios: Mapping[str, float]) -> str:
    """How far predictions are from what was measured."""
    off = {name: 100 * abs(ratio - 1) for name, ratio in ratios.items()}
    worst, mean = max(off, key=lambda name: off[name]), sum(off.values()) / len(off)
    return f"{mean:.1f} % off the measured ones on average, {off[worst]:.1f} % at most ({worst})"


def _pictures(record: Record, pictures: Mapping[str, bytes]) -> str:
    names = [point["name"] for point in record["front"] if point["name"] in pictures]
    names += [name for name in pictures if name not in names]
    if not names:
        return _paragraph("No images were drawn.")
    coded = {name: base64.b64encode(pictures[name]).decode() for name in names}
    return _panels(
        _figure(f'<img alt="images of {escape(name)}" src="data:image/png;base64,{data}">', name)
        for name, data in coded.items()
    )


def _seeds(record: Record) -> str:
    if not record["seeds"]:
        return _paragraph("No other seeds were searched with.")
    said = "What the search chooses with one seed and with another; lines that coincide are drawn side by side."
    return _paragraph(said) + _wide(seeds_chart(record))


def _spent(record: Record) -> str:
    spent = record["spent"]
    if not spent:
        return _paragraph("What the search cost was not recorded.")
    total = sum(spent.values())
    rows = [[stage, f"{count:,}"] for stage, count in spent.items()]
    rows += [["together", f"{total:,}"], ["published protocol", f"{PUBLISHED:,}"]]
    beside = f", {_number(PUBLISHED / total)} times as much" if total else ""
    return _paragraph(
        f"{_duration(record['seconds'])} in all. An image evaluation is one call of a network for one image. The "
        f"published protocol draws 4,096 images with 1,000 calls for each of 500 strategies{beside}."
    ) + _table(["stage", "image evaluations"], rows, total=len(spent))


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>\n"


def _panels(figures: Iterable[str]) -> str:
    return f'<div class="panels">\n{"".join(figures)}</div>'


def _wide(content: str, *, narrow: bool = False) -> str:
    """What a phone scrolls instead of shrinking."""
    return f'<div class="wide{" narrow" if narrow else ""}">{content}</div>'


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[int] = (), total: int | None = None
) -> str:
    """A table; the columns ``words`` hold text, and the row ``total`` a sum."""
    kind = [' class="words"' if column in words else "" for column in range(len(head))]
    lines = ["".join(f"<th{k}>{escape(text)}</th>" for k, text in zip(kind, head, strict=True))]
    lines += ["".join(f"<td{k}>{escape(text)}</td>" for k, text in zip(kind, row, strict=True)) for row in rows]
    opening = ['<tr class="total">' if number - 1 == total else "<tr>" for number in range(len(lines))]
    body = "\n".join(f"{tag}{line}</tr>" for tag, line in zip(opening, lines, strict=True))
    return _wide(f"<table>\n{body}\n</table>")


def _runs(record: Record, runs: Runs) -> str:
    if len(runs) > MOST_RUNS:
        return f"{len(runs)} runs"
    label = {variant["id"]: variant["label"] for variant in record["variants"]}
    return ", ".join(f"{label[variant]}\u00a0×\u00a0{count}" for variant, count in runs)


def _number(value: float | None) -> str:
    """Three significant digits, no power of ten between 0.001 and any size."""
    if value is None:
        return "–"
    if not math.isfinite(value) or 0 < abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.{_decimals(value, 3)}f}"


def _decimals(value: float, digits: int) -> int:
    return max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value and math.isfinite(value) else 0


def _interval(found: Mapping[str, float] | None, *, sign: str = "") -> str:
    """Value and interval, to a tenth of the interval's width."""
    if found is None:
        return "–"
    decimals = min(_decimals(found["high"] - found["low"] or found["value"], 2), 9)
    value, low, high = (f"{found[key]:{sign},.{decimals}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
