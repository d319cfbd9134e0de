"""What ``benchmarks.scaling`` found: tables, one sentence, a picture. A part that is not measured yet is left out."""

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from benchmarks._report import Record, in_short, machine_line, spread, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES: Final = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime", "native": "our kernels"}
STYLES: Final = {"openvino": "-", "onnxruntime": "--", "native": "-."}
COLOURS: Final = {2: "tab:green", 4: "tab:orange", 8: "tab:blue"}
"""By eighths of the full width."""


def details(record: Record) -> str:
    """Every table, as Markdown without a heading."""
    tables = {"batch": _batch_table, "size": _size_table}
    parts = [
        f"{_name(record, backend)}, {caption}:\n\n{tables[question](rows)}"
        for question, caption in (("batch", "32x32, batch by batch"), ("size", "batch 1, image size by image size"))
        for backend, rows in record.get(question, {}).items()
    ]
    if "steps" in record:
        parts.append(f"DDIM with the published strategy, 32x32, batch 1:\n\n{_steps_table(record)}")
    if "resident" in record:
        parts.append(f"Resident variants, 32x32:\n\n{_resident_table(record)}\n\n{_import_line(record)}")
    return "\n\n".join([*parts, *_resident_sentence(record), machine_line(record)])


def summary(record: Record) -> str:
    """What holding every variant open takes."""
    return in_short(record, *_resident_sentence(record))


def _resident_sentence(record: Record) -> list[str]:
    """One sentence; none while it is not measured."""
    found = []
    count = 0
    for backend, rows in record.get("resident", {}).items():
        count = max(row["variants"] for row in rows)
        own = {row["built"]: row for row in rows if (row["batch"], row["variants"]) == (1, count)}
        loaded = f" ({own[True]['cold_start_s']:.1f} s with the engines of `ddsm build`)" if True in own else ""
        found.append(
            f"{_name(record, backend)} {_mb(own[False])} MB peak, {own[False]['cold_start_s']:.1f} s cold start{loaded}"
        )
    sentence = f"All {count} variants resident, batch 1, in a fresh process without torch: {'; '.join(found)}."
    return [sentence] if found else []


def _batch_table(rows: Sequence[Record]) -> str:
    """A line per batch: milliseconds an image and peak memory of every width."""
    widths = list(dict.fromkeys(row["eighths"] for row in rows))
    head = ["batch", *(f"{k}/8, ms an image" for k in widths), *(f"{k}/8, peak MB" for k in widths)]
    lines = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        own = [row for row in rows if row["batch"] == batch]
        lines.append([str(batch), *(spread(row["timing"], batch) for row in own), *(_mb(row) for row in own)])
    return table(head, lines)


def _size_table(rows: Sequence[Record]) -> str:
    """A line per image size and width: what its GFLOPs promise against the full width, and what is kept of it."""
    head = ["image size, width", "GFLOPs, true", "expected", "ms an image (p20 to p80)", "measured", "peak MB"]
    full = {row["image_size"]: row for row in rows if row["eighths"] == 8}
    lines = []
    for row in rows:
        whole = full[row["image_size"]]
        lines.append([
            f"{row['image_size']}x{row['image_size']}, {row['eighths']}/8", f"{row['gflops']:.3f}",
            f"{whole['gflops'] / row['gflops']:.2f}x", spread(row["timing"], 1),
            f"{whole['timing']['median_ms'] / row['timing']['median_ms']:.2f}x", _mb(row),
        ])  # fmt: skip
    return table(head, lines)


def _steps_table(record: Record) -> str:
    """A line per number of steps: seconds an image, milliseconds a call and the host's share on every backend."""
    backends: Mapping[str, list[Record]] = record["steps"]
    head = ["steps", "GFLOPs a call"]
    for backend in backends:
        name = _name(record, backend)
        head += [f"{name}, s an image (p20 to p80)", "ms a call", "host share"]
    lines = []
    for of_steps in zip(*backends.values(), strict=True):
        line = [str(of_steps[0]["steps"]), f"{of_steps[0]['gflops_per_call']:.3f}"]
        for row in of_steps:
            took = row["timing"]["median_ms"]
            host_share = 1 - row["engine_ms"] / took
            line += [spread(row["timing"], 1e3), f"{took / row['steps']:.2f}", f"{100 * host_share:.1f} %"]
        lines.append(line)
    return table(head, lines)


def _resident_table(record: Record) -> str:
    """A line per batch and number of variants: peak memory and cold start on every backend, compiled or loaded."""
    series = _resident_series(record)
    head = ["batch, variants open", *(f"{name}, {what}" for name in series for what in ("peak MB", "cold start, s"))]
    lines = []
    for of_count in zip(*series.values(), strict=True):
        line = [f"{of_count[0]['batch']}, {of_count[0]['variants']}"]
        for row in of_count:
            line += [_mb(row), f"{row['cold_start_s']:.2f}"]
        lines.append(line)
    return table(head, lines)


def _import_line(record: Record) -> str:
    parts = [
        f"{statistics.median(row['import_s'] for row in rows):.2f} s of {_name(record, backend)}"
        for backend, rows in record["resident"].items()
    ]
    return f"A cold start includes the imports: {', '.join(parts)}."


def _resident_series(record: Record) -> dict[str, list[Record]]:
    """Rows by backend, those of built engines apart."""
    return {
        f"{_name(record, backend)}{', built' if built else ''}": [row for row in rows if row["built"] == built]
        for backend, rows in record.get("resident", {}).items()
        for built in sorted({row["built"] for row in rows})
    }


def _name(record: Record, backend: str) -> str:
    return f"{NAMES.get(backend, backend)} {record['settings']['precisions'][backend]}"


def _mb(row: Record) -> str:
    return f"{row['peak_bytes'] / 1e6:.0f}"


# --- the picture ------------------------------------------------------------------------------------------------------


def draw(record: Record, figure: "Figure") -> None:
    """Three panels: time over batch, time over image size, memory and cold start over resident variants."""
    figure.set_size_inches(13, 4.2)
    by_batch, by_size, by_variants = figure.subplots(1, 3)
    _draw_time(by_batch, record, "batch", "batch", "batch, 32x32")
    _draw_time(by_size, record, "size", "image_size", "image size, batch 1")
    _draw_resident(by_variants, record)
    lines, names = by_batch.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower left", ncols=6, fontsize="x-small", handlelength=4)


def _draw_time(axes: "Axes", record: Record, question: str, key: str, label: str) -> None:
    ticks = set()
    for backend, rows in record.get(question, {}).items():
        for k, colour in COLOURS.items():
            own = [row for row in rows if row["eighths"] == k]
            x, y = [row[key] for row in own], [row["timing"]["median_ms"] / row["batch"] for row in own]
            name = f"{NAMES.get(backend, backend)} {k}/8"
            axes.plot(x, y, STYLES.get(backend, ":"), color=colour, marker="o", markersize=3, label=name)
            ticks.update(x)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
    axes.set_xlabel(label)
    axes.set_ylabel("ms an image")


def _draw_resident(axes: "Axes", record: Record) -> None:
    seconds = axes.twinx()
    for number, (name, rows) in enumerate(_resident_series(record).items()):
        colour = f"C{number}"
        own = [row for row in rows if row["batch"] == 1]
        x = [row["variants"] for row in own]
        axes.plot(x, [row["peak_bytes"] / 1e6 for row in own], "-", color=colour, marker="o", markersize=3, label=name)
        seconds.plot(x, [row["cold_start_s"] for row in own], ":", color=colour, marker="s", markersize=3)
    axes.set_xlabel("variants open, batch 1")
    axes.set_ylabel("peak MB (solid)")
    seconds.set_ylabel("cold start, s (dotted)")
    axes.set_ylim(bottom=0)
    seconds.set_ylim(bottom=0)
    if record.get("resident"):
        axes.legend(fontsize="x-small")
