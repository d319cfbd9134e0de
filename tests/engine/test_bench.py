"""``ddsm bench``: what is timed, what is printed and what is kept. No test looks at how fast this machine is."""

import errno
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
import torch

from ddsm_engine import bench, verify
from ddsm_engine.backends import engine_target
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.latency import LatencyRow
from ddsm_engine.measure.latency_table import check_writable, latency_file, load_latency
from ddsm_engine.measure.timing import Timing
from tests.conftest import Refusal

Capture = pytest.CaptureFixture[str]
Measured = list[tuple[str, int, str, int]]

GOLDEN = """\
BUNDLE on A processor, 2 cores

onnxruntime 9.8.7, fp32, batch 2, threads: 1
variant       width    GFLOPs  ms a call           (p20–p80)  a swap ms an image   GFLOP/s     MFU  expected  measured
w008        8 (2/8)     0.002       0.50         (0.45–0.60)   +0.06        0.25       8.5  17.0 %    15.31x     8.00x
w012       12 (3/8)     0.005       0.75         (0.68–0.90)   +0.09        0.38      12.5  25.0 %     6.94x     5.33x
w016       16 (4/8)     0.008       1.00         (0.90–1.20)   +0.12        0.50      16.5  33.0 %     3.94x     4.00x
w020       20 (5/8)     0.013       1.25         (1.12–1.50)   +0.16        0.62      20.5  41.0 %     2.54x     3.20x
w024       24 (6/8)     0.018       1.50         (1.35–1.80)   +0.19        0.75      24.5  49.0 %     1.77x     2.67x
w028       28 (7/8)     0.025       1.75         (1.57–2.10)   +0.22        0.88      28.5  57.0 %     1.30x     2.29x
w032       32 (8/8)     0.033       4.00         (3.60–4.80)   +0.50        2.00      16.3  32.5 %     1.00x     1.00x
MFU is the share of this machine's measured matrix-product peak, 50.0 GFLOP/s in fp32; medians of 7 calls in turns
a swap: milliseconds more after another variant's call
"""


@pytest.fixture
def path(bundle_path: Path, tmp_path: Path) -> Path:
    """A bundle that a test may write to; with nothing timed for real, the manifest is all that is read."""
    folder = tmp_path / "x.bundle"
    folder.mkdir()
    (folder / "manifest.json").write_bytes((bundle_path / "manifest.json").read_bytes())
    return folder


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    """A sixteenth of a millisecond per channel and call, the full width twice that; what was asked for is returned."""
    asked: Measured = []

    def measure(
        bundle: Bundle, variants: Sequence[Variant], backend: str, batch: int, options: EngineOptions, *, repeats: int
    ) -> list[LatencyRow]:
        asked.append((backend, batch, options.precision, options.threads))
        ms = {v: v.width / 16 * (2 if v == bundle.full else 1) for v in variants}
        return [
            LatencyRow(
                v, batch, Timing(ms[v], 0.9 * ms[v], 1.2 * ms[v], repeats, ms[v] / 8), bundle.full.macs / v.macs,
                ms[bundle.full] / ms[v],
            )
            for v in variants
        ]  # fmt: skip

    def peak(precision: str, threads: int, device: str) -> float:
        asked.append(("peak", 0, precision, threads))
        return 50.0

    monkeypatch.setattr(bench, "measure_latency", measure)
    monkeypatch.setattr(bench, "matmul_peak_gflops", peak)
    monkeypatch.setattr(bench, "environment", lambda: {"cpu": "A processor", "cores": 2})
    return asked


def test_the_printed_table(path: Path, measured: Measured, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "9.8.7-nightly")
    arguments = ["--backend", "onnxruntime", "--batch-size", "2", "--threads", "1", "--repeats", "7"]
    assert bench.main([str(path), *arguments]) == 0
    assert capsys.readouterr().out == GOLDEN.replace("BUNDLE", str(path))
    assert not (path / "latency").exists(), "nothing is kept unasked"


def test_every_backend_but_the_reference_is_timed_and_the_peak_is_measured_once(path: Path, measured: Measured) -> None:
    assert bench.main([str(path), "--threads", "2", "--precision", "fp32"]) == 0
    assert measured == [
        ("openvino", 1, "fp32", 2),
        ("peak", 0, "fp32", 2),
        ("openvino", 16, "fp32", 2),
        ("onnxruntime", 1, "fp32", 2),
        ("onnxruntime", 16, "fp32", 2),
        ("native", 1, "fp32", 2),
        ("native", 16, "fp32", 2),
    ]


def test_each_precision_has_its_own_peak_and_its_own_file(
    path: Path, measured: Measured, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddsm_engine.backends.openvino.resolve_precision", lambda options: "bf16")
    assert bench.main([str(path), "--batch-size", "3", "--save"]) == 0
    assert [entry[2] for entry in measured if entry[0] == "peak"] == ["bf16", "fp32"]
    assert sorted(file.name[:-18] for file in (path / "latency").iterdir()) == [
        "native-fp32-b3",
        "onnxruntime-fp32-b3",
        "openvino-bf16-b3",
    ]


def test_a_backend_without_the_precision_is_left_out_with_a_word(
    path: Path, measured: Measured, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddsm_engine.backends.openvino.resolve_precision", lambda options: "bf16")
    assert bench.main([str(path), "--batch-size", "1", "--precision", "bf16"]) == 0
    assert [entry[0] for entry in measured] == ["openvino", "peak"]
    assert capsys.readouterr().err.startswith("leaving out onnxruntime: ONNX Runtime has no bf16")


def test_our_kernels_are_left_out_where_the_compiler_does_not_work(
    path: Path, measured: Measured, capsys: Capture, broken_compiler: None
) -> None:
    options = [str(path), "--batch-size", "1", "--precision", "fp32"]
    assert bench.main(options) == 0
    assert [entry[0] for entry in measured] == ["openvino", "peak", "onnxruntime"]
    assert "leaving out native: the native backend has no kernels: false cannot compile" in capsys.readouterr().err


@pytest.mark.parametrize(("asked", "timed"), [("auto", "openvino"), ("torch", "torch")])
def test_one_backend_is_timed_where_one_is_asked_for(path: Path, measured: Measured, asked: str, timed: str) -> None:
    assert bench.main([str(path), "--backend", asked, "--batch-size", "4"]) == 0
    assert [entry[:2] for entry in measured] == [(timed, 4), ("peak", 0)]


@pytest.mark.parametrize("save", [False, True])
def test_json_is_one_object_with_every_figure(path: Path, measured: Measured, capsys: Capture, save: bool) -> None:
    arguments = ["--backend", "onnxruntime", "--batch-size", "8,2,8", "--json", *(["--save"] if save else [])]
    assert bench.main([str(path), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["environment"] == {"cpu": "A processor", "cores": 2}
    assert [table["target"]["batch"] for table in report["tables"]] == [8, 2]
    bundle = Bundle.open(path)
    for table in report["tables"]:
        kept = latency_file(bundle, table["target"])
        assert table["file"] == (str(kept) if save else None)
        assert kept.exists() == save
        assert [row["variant"] for row in table["rows"]] == list(bundle.variants)
        for row, variant in zip(table["rows"], bundle.manifest.variants, strict=True):
            assert row["gflops"] == 2 * variant.macs / 1e9
            assert row["ms_per_image"] == row["median_ms"] / table["target"]["batch"]
            assert row["gflops_per_s"] == pytest.approx(row["gflops"] / row["ms_per_image"] * 1000)
            assert row["mfu"] == row["gflops_per_s"] / table["peak_gflops"]
            assert [row[name] / row["median_ms"] for name in ("p20_ms", "p80_ms")] == pytest.approx([0.9, 1.2])
            assert row["measured_speedup"] == (1 if variant == bundle.full else 64 / variant.width)


def test_what_was_saved_is_found_again_for_the_same_options(path: Path, measured: Measured, capsys: Capture) -> None:
    command = [str(path), "--backend", "onnxruntime", "--batch-size", "1,2", "--threads", "1", "--save"]
    assert bench.main([*command, "--repeats", "4"]) == 0
    assert bench.main([*command, "--repeats", "5"]) == 0
    bundle, options = Bundle.open(path), EngineOptions(threads=1)
    table = load_latency(bundle, engine_target("onnxruntime", options, 2))
    assert table.environment == {"cpu": "A processor", "cores": 2}
    assert table.peak_gflops == 50
    assert list(table.timings) == list(bundle.variants)
    assert table.timings["w016"] == Timing(1.0, 0.9, 1.2, 5, 0.125), "the second measurement replaced the first"
    kept = sorted(str(file) for file in (path / "latency").iterdir())
    assert len(kept) == 2, "no leftovers"
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("kept in")] == 2 * [
        f"kept in {file}" for file in kept
    ]


def test_saved_tables_are_no_foreign_files_to_verify(
    bundle_path: Path, path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bundle, "verify", lambda self: None)
    before = verify.check_files(Bundle.open(path))
    assert bench.main([str(path), "--backend", "torch", "--save"]) == 0
    assert verify.check_files(Bundle.open(path)) == before == []


def test_a_full_disk_keeps_the_table_that_was_there(
    path: Path, measured: Measured, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [str(path), "--backend", "torch", "--batch-size", "1", "--save"]
    assert bench.main(command) == 0
    (kept,) = (path / "latency").iterdir()
    before = kept.read_bytes()

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert "what was there is kept: No space left on device" in refusal(bench.main, *command, "--repeats", "2")
    assert list((path / "latency").iterdir()) == [kept]
    assert kept.read_bytes() == before


def lead_elsewhere(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder / "latency").symlink_to(folder.parent / "elsewhere")


OBSTACLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a read-only bundle": (lambda folder: None, "not a folder that you may write to"),
    "a file in its place": (lambda folder: (folder / "latency").write_text(""), "not a folder that you may write to"),
    "a link that leaves": (lead_elsewhere, "leaves the bundle"),
}


@pytest.mark.parametrize("kind", OBSTACLES)
def test_what_cannot_be_kept_is_refused_before_anything_is_timed(
    path: Path, measured: Measured, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    hinder, message = OBSTACLES[kind]
    hinder(path)
    if kind == "a read-only bundle":
        monkeypatch.setattr(os, "access", lambda *_: False)
    before = sorted(path.parent.rglob("*"))
    assert message in refusal(bench.main, path, "--backend", "torch", "--save")
    assert sorted(path.parent.rglob("*")) == before
    assert measured == []


def test_a_folder_that_is_a_link_to_itself_is_refused_in_one_line(
    path: Path, measured: Measured, refusal: Refusal
) -> None:
    (path / "latency").symlink_to("latency")
    assert "latency" in refusal(bench.main, path, "--backend", "torch", "--save")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "at least 1, separated by commas, found --batch-size 0"),
        (["--batch-size", "1,eight"], "found --batch-size 1,eight"),
        (["--batch-size", ""], "found --batch-size"),
        (["--batch-size", "9" * 5000], "found --batch-size 999"),
        (["--repeats", "0"], "at least one repeat, found --repeats 0"),
        (["--threads", "-1"], "expected 0 to 1024 threads, found -1"),
        (["--threads", str(1 << 40)], "expected 0 to 1024 threads"),
        (["--backend", "torch", "--precision", "bf16"], "the torch backend is the fp32 reference"),
        (["--backend", "onnxruntime", "--precision", "bf16"], "ONNX Runtime has no bf16"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    path: Path, measured: Measured, refusal: Refusal, arguments: list[str], message: str
) -> None:
    assert message in refusal(bench.main, path, *arguments)
    assert measured == []


@pytest.mark.parametrize("installed", [(), ("torch",)])
def test_nothing_to_time_is_refused(
    path: Path, measured: Measured, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...]
) -> None:
    monkeypatch.setattr("ddsm_engine.backends.installed_backends", lambda: installed)
    assert "no backend here computes in auto" in refusal(bench.main, path)


@pytest.mark.parametrize(
    ("backend", "version"),
    [("openvino", openvino.__version__), ("onnxruntime", onnxruntime.__version__), ("torch", str(torch.__version__))],
)
def test_a_target_names_everything_that_a_time_depends_on(bundle: Bundle, backend: str, version: str) -> None:
    options = EngineOptions(precision="fp32", threads=1)
    target = engine_target(backend, options, 2)
    assert (target["backend"], target["version"], target["precision"]) == (backend, version, "fp32")
    assert (target["threads"], target["batch"]) == (1, 2)
    assert target["device"]
    assert json.loads(json.dumps(dict(target))) == target
    others = [
        engine_target(backend, options, 3),
        engine_target(backend, EngineOptions(precision="fp32", threads=2), 2),
        {**target, "version": "0"},
        {**target, "device": "another"},
        {**target, "cores": 999},
    ]
    assert len({latency_file(bundle, other) for other in [target, *others]}) == 6


def test_a_backend_that_is_not_installed_has_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddsm_engine.backends.is_installed", lambda name: name == "onnxruntime")
    with pytest.raises(BackendError, match="torch is not installed"):
        engine_target("torch", EngineOptions(), 1)


def test_a_real_measurement_passes_through_the_whole_command(
    bundle_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "matmul_peak_gflops", lambda *_: 50.0)  # takes seconds, tested elsewhere
    arguments = ["--backend", "onnxruntime", "--batch-size", "1", "--threads", "1", "--repeats", "1", "--json"]
    assert bench.main([str(bundle_path), *arguments]) == 0
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    # What a swap takes is a difference of two timings, of either sign where it costs nothing.
    swaps = [row.pop("swap_ms") for row in table["rows"]]
    figures = [value for row in table["rows"] for value in row.values() if not isinstance(value, str)]
    assert len(table["rows"]) == 7
    assert np.isfinite([*figures, *swaps]).all()
    assert min(figures) > 0
    assert table["rows"][-1]["measured_speedup"] == 1
    check_writable(Bundle.open(bundle_path), table["target"])
    assert not (bundle_path / "latency").exists(), "asking whether it could be written writes nothing"
