"""The tables and sentences of ``cifar10_cpu``."""

from collections.abc import Mapping

from benchmarks._report import Record, machine_line, table
from ddsm_engine.cost import gflops

SHORT = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime", "torch dynamic": "torch dynamic"}


def details(record: Record) -> str:
    """Everything the result holds, as Markdown without a heading."""
    return "\n\n".join([full_table(record), *_contenders(record), *_sentences(record)])


def summary(record: Record) -> str:
    """The compact block of the READMEs."""
    return "\n\n".join([compact_table(record), *_sentences(record)])


def full_table(record: Record) -> str:
    """Width, both counts, and per contender milliseconds per step with 20th and 80th percentile and the speed-up."""
    rows: Mapping[str, Record] = record["rows"]
    names = list(dict.fromkeys(name for row in rows.values() for name in row["timings"]))
    head = ["width", "GFLOPs, true", "GFLOPs, conv+linear", "expected"]
    for name in names:
        head += [f"{_long(name)}, ms (p20 to p80)", "measured"]
    lines = []
    for label, row in rows.items():
        cells = [label, _g(row["macs"]), _g(row["conv_linear_macs"]), _times(_expected(rows, row))]
        for name in names:
            timing = row["timings"].get(name)
            cells.append("-" if timing is None else _spread(timing))
            cells.append(_times(_measured(rows, row, name)))
        lines.append(cells)
    return table(head, lines)


def compact_table(record: Record) -> str:
    """Width, true GFLOPs, expected speed-up, then both static backends with theirs, and the dynamic peer."""
    rows: Mapping[str, Record] = record["rows"]
    auto = next(row["auto"] for row in rows.values())
    static, peers = (auto, "onnxruntime fp32"), ("torch dynamic fp32", "torch dynamic bf16")
    head = ["width", "GFLOPs", "expected"]
    for name in static:
        head += [f"{_long(name)}, ms", "measured"]
    head += [f"{_long(name)}, ms" for name in peers]
    lines = []
    for label, row in rows.items():
        cells = [label, _g(row["macs"]), _times(_expected(rows, row))]
        for name in static:
            cells += [_median(row, name), _times(_measured(rows, row, name))]
        lines.append([*cells, *(_median(row, name) for name in peers)])
    return table(head, lines)


def _contenders(record: Record) -> list[str]:
    strategy = record.get("strategy")
    if strategy is None:
        return []
    head = ["contender", "calls run", "full width, s per image", "strategy, s per image", "theoretical", "realised"]
    lines = [
        [
            _long(name), str(c["calls"]), f"{c['full_s']:.2f}", f"{c['strategy_s']:.2f}", _times(c["theoretical"]),
            _times(c["realised"]), f"{c['r']:.2f}", f"{100 * c['mfu']:.0f} %",
        ]
        for name, c in strategy["contenders"].items()
    ]  # fmt: skip
    return [
        table([*head, "R", "MFU of the full width"], lines),
        f"Seconds are for {strategy['calls']} calls; a row with fewer calls ran an even part of them and is scaled up.",
    ]


def _sentences(record: Record) -> list[str]:
    found = [_method_line(record)]
    if record.get("strategy"):
        found.append(_strategy_line(record["strategy"], record["published"]))
    if record.get("memory"):
        found.append(_memory_line(record["memory"]))
    return [*found, machine_line(record)]


def _method_line(record: Record) -> str:
    return (
        "Milliseconds are the median of one sampling step (network and update) at batch 1, all contenders of a row "
        f"taken in turns; GFLOPs are true ones (attention included); {record['settings']['groups']} groups, random "
        "weights."
    )


def _strategy_line(strategy: Record, published: Record) -> str:
    ours, peer = strategy["contenders"][strategy["ours"]], strategy["contenders"][strategy["best_peer"]]
    scaled = "" if peer["calls"] == strategy["calls"] else f", scaled from {peer['calls']} calls"
    label = f"{strategy['calls']} DDPM steps"
    if strategy["sampler"] != "ddpm":
        label = f"{strategy['calls']} evenly strided DDIM calls (η = 1; not the published run of 1000)"
    return (
        f"**{label}, batch 1, {_long(strategy['ours'])}: {ours['full_s']:.1f} s per image at full width, "
        f"{ours['strategy_s']:.1f} s with the published strategy.** Theoretical {_times(ours['theoretical'])}, "
        f"realised {_times(ours['realised'])}: R = {ours['r']:.2f}, with the full width at {100 * ours['mfu']:.0f} % "
        f"MFU of this machine's own {strategy['peak_gflops'][strategy['peak_of_ours']]:.0f} GFLOP/s; Net R = "
        f"{strategy['net_r']:.2f} (best peer at full width: {_long(strategy['best_peer'])}, {peer['full_s']:.1f} s"
        f"{scaled}). Published: {published['full_s']} s → {published['strategy_s']} s per image on an "
        f"{published['device']}, R = {published['r']} ({published['source']})."
    )


def _memory_line(memory: Mapping[str, Record]) -> str:
    parts = [
        f"{_long(name)} {m['peak_rss_bytes'] / 1e6:.0f} MB peak, {m['open_s']:.1f} s cold start"
        for name, m in memory.items()
    ]
    count = next(iter(memory.values()))["variants"]
    return f"All {count} variants resident: {'; '.join(parts)} (a fresh process each, without torch)."


def _expected(rows: Mapping[str, Record], row: Record) -> float | None:
    return rows["8/8"]["macs"] / row["macs"] if "8/8" in rows else None


def _measured(rows: Mapping[str, Record], row: Record, name: str) -> float | None:
    full = rows.get("8/8", {}).get("timings", {}).get(name)
    own = row["timings"].get(name)
    return full["median_ms"] / own["median_ms"] if full and own else None


def _long(contender: str) -> str:
    library, _, precision = contender.rpartition(" ")
    return f"{SHORT.get(library, library)} {precision}"


def _g(macs: float) -> str:
    return f"{gflops(macs):.3f}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _median(row: Record, name: str) -> str:
    return f"{row['timings'][name]['median_ms']:.1f}" if name in row["timings"] else "-"


def _spread(timing: Record) -> str:
    return f"{timing['median_ms']:.2f} ({timing['p20_ms']:.2f} to {timing['p80_ms']:.2f})"
