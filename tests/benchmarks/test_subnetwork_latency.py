from pathlib import Path

import numpy as np
import pytest

from benchmarks import _report, subnetwork_latency
from benchmarks.subnetwork_latency import (
    BENCHMARK,
    check_answers,
    details,
    draw,
    measure_target,
    precise_targets,
    reference_answers,
)
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import BackendError
from tests.conftest import Refusal


@pytest.fixture(autouse=True)
def _quick_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak has a test of its own and takes seconds."""
    monkeypatch.setattr(subnetwork_latency, "matmul_peak_gflops", lambda precision: 100.0)


def test_every_backend_is_timed_in_fp32_and_in_its_own_precision() -> None:
    found = [(target["backend"], target["precision"], target["batch"]) for target in precise_targets([1, 3])]
    assert {("openvino", "fp32", 1), ("openvino", "fp32", 3), ("onnxruntime", "fp32", 1)} <= set(found)
    assert len(found) == len(set(found))
    assert not any(backend == "torch" for backend, _, _ in found)


def test_the_figures_of_a_target_fit_together(bundle: Bundle) -> None:
    target = next(t for t in precise_targets([2]) if (t["backend"], t["precision"]) == ("onnxruntime", "fp32"))
    found = measure_target(bundle, target, reference_answers(bundle, 2), repeats=3)
    assert [row["width_mult"] for row in found["rows"]] == [k / 8 for k in range(2, 9)]
    full = found["rows"][-1]
    for row in found["rows"]:
        assert row["ms_per_image"] == pytest.approx(row["median_ms"] / 2)
        assert row["gflops_per_s"] == pytest.approx(row["gflops"] * 2 / row["median_ms"] * 1e3)
        assert row["mfu"] == pytest.approx(row["gflops_per_s"] / 100)
        assert row["theoretical"] == pytest.approx(full["gflops"] / row["gflops"])
        assert row["measured"] == pytest.approx(full["median_ms"] / row["median_ms"])
        assert row["repeats"] == 3
        assert 0 < row["relative_l2"] <= row["tolerance"]


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_wrong_answer_is_not_timed(backend: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subnetwork_latency, "measure_latency", lambda *a, **k: pytest.fail("it was timed"))
    target = next(t for t in precise_targets([2]) if (t["backend"], t["precision"]) == (backend, "fp32"))
    expected = dict(reference_answers(bundle, 2))
    expected["w012"] = expected["w012"] * np.float32(1.0001)
    with pytest.raises(BackendError, match=rf"w012 on {backend} \(fp32, batch 2\) .* by 1\.0e-04 .* at most 5e-06"):
        measure_target(bundle, target, expected, repeats=3)


def test_another_variants_answer_is_refused(bundle: Bundle) -> None:
    expected = dict(reference_answers(bundle, 1))
    expected["w016"], expected["w020"] = expected["w020"], expected["w016"]
    with pytest.raises(BackendError, match="w016 on onnxruntime"):
        check_answers(bundle, "onnxruntime", 1, EngineOptions(precision="fp32"), expected)


@pytest.mark.parametrize("wrong", [("--repeats", "0"), ("--batch-size", "0"), ("--batch-size", "1;2")])
def test_an_option_out_of_range_is_refused_before_anything_is_exported(
    wrong: tuple[str, str], refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(subnetwork_latency, "cifar10_bundle", lambda folder: pytest.fail("it was exported"))
    assert wrong[0] in refusal(BENCHMARK.main, *wrong, "--output", tmp_path / "r.json")


def synthetic() -> _report.Record:
    def row(width: str, mult: float, gflops: float, batch: int, ms: float, full: tuple[float, float]) -> _report.Record:
        return {
            "variant": "v", "width": width, "width_mult": mult, "gflops": gflops, "gflops_conv_linear": gflops,
            "relative_l2": 1.5e-6, "tolerance": 5e-6, "median_ms": ms, "p20_ms": ms - 1, "p80_ms": ms + 2, "repeats": 9,
            "ms_per_image": ms / batch, "gflops_per_s": gflops * batch / ms * 1e3, "mfu": gflops * batch / ms * 10,
            "theoretical": full[0] / gflops, "measured": full[1] / ms,
        }  # fmt: skip

    def target(backend: str, batch: int, narrow_ms: float, full_ms: float) -> _report.Record:
        named = {"backend": backend, "precision": "fp32", "batch": batch}
        rows = [row("8 (2/8)", 0.25, 1, batch, narrow_ms, (8, full_ms))]
        rows.append(row("32 (8/8)", 1.0, 8, batch, full_ms, (8, full_ms)))
        return {"target": named, "peak_gflops": 100.0, "rows": rows}

    return {
        "benchmark": "subnetwork_latency",
        "machine": "test-2c",
        "environment": {
            "cpu": "Some CPU", "cores": 2, "cpu_features": ["avx2"], "versions": {"openvino": "1.0"},
            "date": "2026-01-02T03:04:05+00:00", "command": "c", "commit": "abc",
        },
        "targets": [
            target("slow", 1, 40, 200), target("openvino", 16, 640, 2560),
            target("openvino", 4, 100, 500), target("openvino", 1, 25, 100),
        ],
    }  # fmt: skip


def test_the_table_names_its_target_and_how_right_it_was() -> None:
    text = details(synthetic())
    assert (
        "openvino fp32, batch 16: medians of 9 calls in turns, MFU of 100 GFLOP/s; at most 1.5e-06 from the torch "
        "reference (allowed 5e-06)"
    ) in text
    assert "| 8 (2/8) | 1.000 | 640.00 (639.00 to 642.00) | 40.00 | 25.0 | 25 % | 8.00x | 4.00x |" in text


def test_the_picture_is_drawn() -> None:
    assert _report.png_of(synthetic(), draw).startswith(b"\x89PNG")
