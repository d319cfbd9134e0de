"""The table of ``ddsm bench --suite gpu``: every figure from invented rows, and the bundles that it is measured on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import _report, gpu_bundles
from benchmarks.cifar10 import CIFAR10
from ddsm_engine.errors import OutputError
from ddsm_engine.measure.gpu import parts
from ddsm_engine.measure.gpu.parts import PARTS
from ddsm_engine.measure.gpu.targets import TARGETS, Result, verdict_table
from ddsm_engine.measure.gpu.work import Row


def strategy_row(ms: dict[str, float], **more: Any) -> Row:
    swap = {"swaps": 560, "mean_us": 0.5, "p99_us": 1.5, "non_swap_p99_us": 1.0, "clock_step_ns": 32}
    theoretical = {"published": 2.0, "stand-in-61": 2.5, "stand-in-76": 4.0}
    runs = {}
    for name, each in ms.items():
        promised, arrived = theoretical.get(name, 1.0), ms["uniform 8/8"] / each
        runs[name] = {
            "median_ms": each, "calls": 200, "theoretical": promised, "realised": arrived, "r": arrived / promised,
            "over_isolated": 1.01, "gflops_per_s": 3e5, "swap": swap,
        }  # fmt: skip
    base = {"backend": "tensorrt", "precision": "bf16", "execution": "loop", "bit_exact": True, "runs": runs}
    return base | more


@pytest.fixture
def result() -> Result:
    """An invented result in which everything is reached."""
    b1 = {"uniform 8/8": 80.0, "uniform 4/8": 60.0, "uniform 2/8": 50.0, "published": 60.0}
    slower = {name: 1.1 * ms for name, ms in b1.items()}
    b256 = {"uniform 8/8": 1000.0, "published": 525.0}
    rows = {
        "ceilings": [{"ceiling": "copy"}, {"ceiling": "matrix product", "precision": "bf16", "gflops_per_s": 6e5}],
        "strategies-b1": [strategy_row(slower, execution="graphs"), strategy_row(b1), {"backend": "x", "error": "no"}],
        "strategies-b256": [strategy_row(b256)],
        "strategies-64-b256": [strategy_row({"uniform 8/8": 100.0, "stand-in-61": 45.0, "stand-in-76": 28.0})],
        # Per call: ours take 0.4, 0.3 and 0.25 ms.
        "peers": [
            {"peer": peer, "batch": batch, "eighths": eighths, "median_ms": ms}
            for peer, ms in (("eager", 2.0), ("torch.compile reduce-overhead", 0.7))
            for batch in (1, 256)
            for eighths in (8, 4, 2)
        ],
        "memory": [{
            "backend": "tensorrt", "variants": 7, "is_shared": True, "activation_bytes_of_the_largest": 3 << 20,
            "activation_bytes_of_all": 3 << 20,
        }],
        "subnetworks-32": [
            {"batch": batch, "eighths": 8, "gflops_per_s": rate, "backend": "tensorrt", "precision": "bf16",
             "execution": "graphs"} for batch, rate in ((256, 3e5), (256, 2e5), (64, 9e5))
        ],
    }  # fmt: skip
    environment = {
        "gpu": {"name": "Invented H100", "compute_capability": "9.0", "driver": "580", "cuda": "13.0",
                "memory_bytes": 80 << 30},
        "versions": {"ddsm-engine": "1", "torch": "9.8"}, "date": "2026-01-02T03:04", "commit": "abc",
    }  # fmt: skip
    return {"environment": environment, "parts": {name: {"rows": rows.get(name, [])} for name in PARTS}}


def lines_of(result: Result | None) -> list[list[str]]:
    table = verdict_table(result, [Path("a.bundle"), Path("b.bundle")], Path("gpu.json"))
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:] if line.startswith("|")]


def test_what_was_reached_is_said_with_its_figures(result: Result) -> None:
    assert [cells[2:] for cells in lines_of(result)] == [
        ["5.00x at 8/8, 6.67x at 4/8, 8.00x at 2/8", "reached"],
        ["1.75x at 8/8, 2.33x at 4/8, 2.80x at 2/8", "reached"],
        [
            "0.95 (1.90x of 2.00x; tensorrt bf16, loop; the full width at 50 % of the bf16 peak; Net R 0.13 against "
            "torch.compile reduce-overhead)",
            "reached",
        ],
        ["0.89 (2.22x of 2.50x; tensorrt bf16, loop; the full width at 50 % of the bf16 peak)", "reached"],
        ["0.89 (3.57x of 4.00x; tensorrt bf16, loop; the full width at 50 % of the bf16 peak)", "reached"],
        ["50 % of 600 TFLOP/s (tensorrt bf16, graphs)", "reached"],
        [
            "p99 1.50 µs, mean 0.50 µs (560 swaps; p99 without a swap 1.00 µs; clock steps of 32 ns; tensorrt bf16, "
            "loop)",
            "reached",
        ],
        [
            "p99 1.50 µs, mean 0.50 µs (560 swaps; p99 without a swap 1.00 µs; clock steps of 32 ns; tensorrt bf16, "
            "graphs)",
            "reached",
        ],
        ["1.010 at batch 1, 1.010 at batch 256", "reached"],
        ["3 MiB for 7, 3 MiB for the largest (tensorrt)", "reached"],
        ["4 of 4 backends and ways", "reached"],
    ]
    assert verdict_table(result, [], Path("x")).endswith(
        "Invented H100 (compute capability 9.0, 80 GiB), driver 580, CUDA 13.0; torch 9.8; 2026-01-02, commit abc."
    )


def of_run(part: str, name: str, key: str, value: Any) -> Callable[[Result], None]:
    def change(result: Result) -> None:
        for row in result["parts"][part]["rows"]:
            if "runs" in row:
                row["runs"][name][key] = value

    return change


def of_rows(part: str, key: str, value: Any) -> Callable[[Result], None]:
    def change(result: Result) -> None:
        for row in result["parts"][part]["rows"]:
            row[key] = value

    return change


def p99(us: float, way: str) -> Callable[[Result], None]:
    def change(result: Result) -> None:
        for row in result["parts"]["strategies-b1"]["rows"]:
            if row.get("execution") == way:
                row["runs"]["published"]["swap"]["p99_us"] = us

    return change


B1, B256, B64 = "strategies-b1", "strategies-b256", "strategies-64-b256"


@pytest.mark.parametrize(
    ("number", "enough", "too_little"),
    [
        (0, of_run(B1, "uniform 2/8", "median_ms", 99.9), of_run(B1, "uniform 2/8", "median_ms", 101.0)),
        (1, of_run(B1, "uniform 4/8", "median_ms", 93.3), of_run(B1, "uniform 4/8", "median_ms", 93.4)),
        (2, of_run(B256, "published", "r", 0.9), of_run(B256, "published", "r", 0.899)),
        (3, of_run(B64, "stand-in-61", "r", 0.85), of_run(B64, "stand-in-61", "r", 0.849)),
        (4, of_run(B64, "stand-in-76", "r", 0.85), of_run(B64, "stand-in-76", "r", 0.849)),
        (5, of_rows("subnetworks-32", "gflops_per_s", 2.7e5), of_rows("subnetworks-32", "gflops_per_s", 2.69e5)),
        (6, p99(2.0, "loop"), p99(2.01, "loop")),
        (7, p99(10.0, "graphs"), p99(10.1, "graphs")),
        (8, of_run(B256, "published", "over_isolated", 1.02), of_run(B1, "published", "over_isolated", 1.03)),
        (9, of_rows("memory", "variants", 7), of_rows("memory", "activation_bytes_of_all", 4 << 20)),
        (10, of_rows(B256, "bit_exact", True), of_rows(B256, "bit_exact", False)),
    ],
)
def test_a_figure_is_enough_up_to_what_is_required(
    result: Result, number: int, enough: Callable[[Result], None], too_little: Callable[[Result], None]
) -> None:
    enough(result)
    assert lines_of(result)[number][-1] == "reached"
    too_little(result)
    assert lines_of(result)[number][-1] == "missed"


@pytest.mark.parametrize("number", range(len(TARGETS)))
def test_what_was_not_run_says_so_with_the_command(result: Result, number: int) -> None:
    target = TARGETS[number]
    for name in target.parts:
        result["parts"][name]["rows"] = [{"error": "no"}]
    expected = ["not run", f"`ddsm bench a.bundle b.bundle --suite gpu -o gpu.json --part {' '.join(target.parts)}`"]
    assert lines_of(result)[number] == lines_of(None)[number] == [target.what, target.required, *expected]
    assert set(target.parts) <= set(PARTS)


def test_other_bits_are_missed_even_though_the_row_is_a_refusal(result: Result) -> None:
    result["parts"]["strategies-b1"]["rows"][0] |= {"bit_exact": False, "error": "other bits"}
    assert lines_of(result)[10][2:] == ["3 of 4 backends and ways", "missed"]


def test_rows_that_the_suite_did_not_write_are_refused_in_a_line(result: Result) -> None:
    del result["parts"]["strategies-b1"]["rows"][1]["runs"]["uniform 8/8"]["calls"]
    with pytest.raises(OutputError, match=r"rows of strategies-b1, peers are not what the GPU suite writes .*'calls'"):
        lines_of(result)


def test_plain_launches_are_no_replay_of_themselves(result: Result) -> None:
    for name in ("strategies-b1", "strategies-b256", "strategies-64-b256"):
        of_rows(name, "execution", "launches")(result)
    assert lines_of(result)[10][2] == "not run"


# --- bundles and READMEs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [parts.STAND_INS.calls, 1000])
@pytest.mark.parametrize(("name", "saving"), gpu_bundles.SAVINGS.items())
def test_a_stand_in_saves_what_the_paper_reports_in_the_calls_that_are_made(
    name: str, saving: float, calls: int
) -> None:
    strategy = gpu_bundles.strategies_of(64)[name]
    assert strategy.provenance["kind"] == "stand-in"
    assert strategy.swaps >= 12
    spec = replace(CIFAR10, image_size=64)
    macs = {k: gpu_bundles.macs_of(spec, k) for k in (2, 4, 8)}
    made = strategy.choices[:: 1000 // calls]
    found = 1 - sum(macs[int(8 * choice)] for choice in made) / len(made) / macs[8]
    assert found == pytest.approx(saving, abs=0.02 if calls < 1000 else 0.003)


def test_a_bundle_is_made_for_every_size_with_the_strategies_that_the_targets_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}

    def export(supernet: Any, path: Path, options: Any, *, strategies: Any, report: Any) -> None:
        made[path.name] = (supernet.spec.image_size, list(options.widths), options.precision, list(strategies))

    monkeypatch.setattr(gpu_bundles, "export_bundle", export)
    monkeypatch.setattr(gpu_bundles, "random_supernet", lambda spec, schedule: SimpleNamespace(spec=spec))
    assert gpu_bundles.main(["-o", str(tmp_path)]) == 0
    assert made == {
        "cifar10-32.bundle": (32, [32, 48, 64, 80, 96, 112, 128], "fp16", ["published"]),
        "cifar10-64.bundle": (64, [32, 64, 128], "fp16", ["stand-in-61", "stand-in-76"]),
        "cifar10-128.bundle": (128, [32, 64, 128], "fp16", []),
    }


def test_a_stale_table_in_a_readme_is_found(result: Result) -> None:
    now, stale = gpu_bundles.blocks(None)[_report.README], gpu_bundles.blocks(result)[_report.README]
    assert now != stale
    text = _report.with_block(
        f"<!-- begin {gpu_bundles.NAME} --><!-- end {gpu_bundles.NAME} -->", gpu_bundles.NAME, stale
    )
    assert _report.block_of(text, gpu_bundles.NAME) == stale
