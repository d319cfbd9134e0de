"""Does ``benchmarks.samplers`` compute R, KID and RMS, time only what is right, keep what is done, and show it?"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import _report, samplers
from benchmarks._samplers_report import FULL, STEP_AWARE, details, draw, summary
from benchmarks.samplers import (
    BENCHMARK,
    fashion_mnist_bundle,
    is_deterministic,
    measure,
    measure_latency,
    measure_quality,
    most_steps,
    rms,
    speed_of,
)
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import BackendError, BundleError, MetricError, OutputError
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.pipeline import Batch, Pipeline
from ddsm_engine.quality import Metric, choose_metric
from ddsm_engine.quality.shipped import DATA_SHA256
from ddsm_engine.samplers import NAMES
from tests.conftest import Refusal

ORT = "onnxruntime"
SCHEDULE = NoiseSchedule(1e-4, 0.02, 1000)

# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", NAMES)
@pytest.mark.parametrize("calls", [2, 10, 101])
def test_no_run_makes_more_calls_than_were_asked_for(sampler: str, calls: int) -> None:
    # Heun makes two calls in every step but the last one.
    expected = (calls + 1) // 2 if sampler == "heun" else calls
    assert most_steps(sampler, SCHEDULE, calls) == expected


def test_only_ddpm_has_no_solution_to_be_far_from(bundle: Bundle) -> None:
    with Pipeline.from_bundle(bundle.path, backend=ORT) as pipe:
        drawn = [name for name in NAMES if not is_deterministic(pipe.plan("uniform:8/8", name, 10, clip_sample=1.0))]
    assert drawn == ["ddpm"]


def test_rms_is_the_distance_of_a_pixel() -> None:
    zeros = np.zeros((2, 1, 2, 2), np.float32)
    other = zeros.copy()
    other[0, 0] = [[3, 0], [0, 0]]
    other[1, 0] = [[0, 0], [4, 0]]
    assert rms(other, zeros) == pytest.approx((25 / 8) ** 0.5)
    assert rms(other, other) == 0


def test_r_is_made_of_medians(bundle: Bundle) -> None:
    with Pipeline.from_bundle(bundle.path, backend=ORT) as pipe:
        plans = {FULL: pipe.plan("uniform:8/8", "ddim", 4), STEP_AWARE: pipe.plan("uniform:4/8", "ddim", 4)}

    def took(*ms: float) -> list[Batch]:
        return [Batch(0, np.zeros((1, 3, 8, 8), np.float32), (), each, each - 2) for each in ms]

    found = speed_of(bundle, plans, {FULL: took(1000, 800, 90_000), STEP_AWARE: took(100, 500, 400)}, 10.0)
    promised = bundle.full.macs / bundle.variants["w016"].macs
    assert found[FULL]["s_per_image"] == 1.0
    assert found[STEP_AWARE]["s_per_image"] == 0.4
    assert found[STEP_AWARE]["theoretical"] == pytest.approx(promised)
    assert found[STEP_AWARE]["realised"] == pytest.approx(2.5)
    assert found[STEP_AWARE]["r"] == pytest.approx(2.5 / promised)
    assert found[FULL]["mfu"] == pytest.approx(4 * 2 * bundle.full.macs / 1e9 / 1.0 / 10.0)
    assert found[STEP_AWARE]["host_ms_per_call"] == pytest.approx(0.5)
    assert found[STEP_AWARE]["each_s"] == [0.1, 0.5, 0.4]


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak has a test of its own and takes seconds, and the solution needs not be converged."""
    monkeypatch.setattr(samplers, "matmul_peak_gflops", lambda precision: 100.0)
    monkeypatch.setattr(samplers, "PAUSE_S", 0.0)
    monkeypatch.setattr(samplers, "CONVERGED", ("unipc", 12))
    monkeypatch.setattr(samplers, "CONVERGED_CHECK", ("dpm++3m", 12))


@pytest.mark.usefixtures("_quick")
def test_latency_is_kept_run_by_run_and_not_measured_again(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[_report.Record] = []
    record: _report.Record = _report.new_record("samplers", "test")
    measure_latency(bundle, ORT, [4], 1, record, lambda: stages.append(copy.deepcopy(record)))
    assert [len(stage["latency"]["rows"]) for stage in stages] == list(range(1, 9))
    rows = record["latency"]["rows"]
    assert [row["sampler"] for row in rows] == list(NAMES)
    assert [row["calls"] for row in rows] == [3 if name == "heun" else 4 for name in NAMES]
    for row in rows:
        own = row["runs"][STEP_AWARE]
        assert own["r"] == pytest.approx(own["realised"] / own["theoretical"])
        assert 1 < own["theoretical"] < 4
        assert row["swaps"] >= 1
        assert 0 < row["relative_l2"] <= 2e-5
    for stage in stages:
        assert f"| {stage['latency']['rows'][-1]['sampler']} |" in details(stage), "a partial result can be shown"
    resumed = json.loads(json.dumps(stages[4]))
    turns: list[list[str]] = []
    take_turns = samplers.take_turns

    def counted(pipe: Pipeline, plans: Any, repeats: int) -> Any:
        turns.append([plan.sampler for plan in plans.values()])
        return take_turns(pipe, plans, repeats)

    monkeypatch.setattr(samplers, "take_turns", counted)
    measure_latency(bundle, ORT, [4], 1, resumed, lambda: None)
    assert turns == [[name, name] for name in list(NAMES)[5:]]
    measure_latency(bundle, ORT, [4], 1, resumed, lambda: pytest.fail("measured again"))
    with pytest.raises(OutputError, match="the latency part was begun with another repeats"):
        measure_latency(bundle, ORT, [4], 2, resumed, lambda: pytest.fail("measured"))


@pytest.mark.usefixtures("_quick")
def test_a_wrong_network_is_refused_before_it_is_timed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    *others, narrower, full = bundle.manifest.variants
    wrong = replace(full, file=narrower.file, sha256=narrower.sha256, size_bytes=narrower.size_bytes)
    manifest = replace(bundle.manifest, variants=(*others, narrower, wrong))
    monkeypatch.setattr(samplers, "settled_backend", lambda *arguments: ORT)
    monkeypatch.setattr(samplers, "take_turns", lambda *arguments: pytest.fail("it was timed"))
    with pytest.raises(BackendError, match=r"ddpm, full width on onnxruntime differs from the torch .* not timed"):
        measure_latency(replace(bundle, manifest=manifest), ORT, [4], 1, {}, lambda: None)


def pixels_as_features(bundle: Bundle, folder: Path, images: int = 160) -> Metric:
    """Features are the pixels themselves, and the real images are bright noise."""
    real = np.random.default_rng(0).integers(192, 256, (images, 8, 8, 3), np.uint8)
    np.savez(folder / f"{images}.npz", images=real)
    data = folder / f"{images}.npz"
    return choose_metric(bundle, kind="kernel", data=data, features=None, inception=None, instead=None)


def test_kid_is_that_of_the_classifier_that_comes_with_the_package(bundle: Bundle) -> None:
    known = {"supernet": {"data": {"sha256": DATA_SHA256}}}
    grey = replace(bundle.manifest.spec, channels=1, image_size=32)
    garments = replace(bundle, manifest=replace(bundle.manifest, spec=grey, provenance=known))
    assert samplers.kernel_distance(garments).name == "kernel distance on classifier features"
    with pytest.raises(MetricError, match="no real images to compare with"):
        samplers.kernel_distance(bundle)


def test_kid_has_the_error_that_other_images_would_make(bundle: Bundle, tmp_path: Path) -> None:
    metric = pixels_as_features(bundle, tmp_path)
    random = np.random.default_rng(0)
    images = [random.uniform(-1, 1, (40, 3, 8, 8)).astype(np.float32) for _ in range(60)]
    found = [samplers.kid(metric, each) for each in images]
    assert [each["mean"] for each in found] == [metric(each) for each in images]
    spread = np.std([each["mean"] for each in found], ddof=1)
    assert np.mean([each["standard_error"] for each in found]) == pytest.approx(spread, rel=0.3)


@pytest.mark.usefixtures("_quick")
def test_quality_is_kept_run_by_run_and_not_measured_again(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measured(record: _report.Record, calls: list[int], save: Callable[[], None]) -> None:
        measure_quality(bundle, ORT, calls, 16, record, save)

    monkeypatch.setattr(samplers, "kernel_distance", lambda bundle: pixels_as_features(bundle, tmp_path))
    stages: list[_report.Record] = []
    record = _report.new_record("samplers", "test")
    measured(record, [12], lambda: stages.append(copy.deepcopy(record)))
    assert len(stages) == 16
    rows = {(row["sampler"], row["strategy"]): row for row in record["quality"]["rows"]}
    assert list(rows) == [(name, strategy) for name in NAMES for strategy in (FULL, STEP_AWARE)]
    assert rows["unipc", FULL]["rms"] == 0, "the converged run itself"
    assert 0 < rows["dpm++3m", FULL]["rms"] == record["quality"]["converged"]["rms"]
    assert rows["unipc", STEP_AWARE]["rms"] > 0
    assert rows["ddpm", FULL]["rms"] is None
    for row in rows.values():
        assert row["kid"]["mean"] > 3 * row["kid"]["standard_error"] > 0
    assert "KID is the kernel distance on pixels" in details(record)
    assert _report.png_of(record, draw).startswith(b"\x89PNG")
    resumed = json.loads(json.dumps(stages[3]))
    measured(resumed, [12], lambda: None)
    assert resumed["quality"] == record["quality"], "a resumed measurement ends with the same figures"
    measured(resumed, [12], lambda: pytest.fail("measured again"))
    monkeypatch.setattr(samplers, "kernel_distance", lambda bundle: pixels_as_features(bundle, tmp_path, 80))
    with pytest.raises(OutputError, match="the quality part was begun with another metric"):
        measured(resumed, [4], lambda: pytest.fail("measured"))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parts", "speed"], "expected --parts latency or quality"),
        (["--calls", "10,x"], "expected --calls from 2 to 1000"),
        (["--calls", "1001"], "expected --calls from 2 to 1000"),
        (["--repeats", "0"], "expected --repeats of at least 1, found 0"),
        (["--images", "1"], "expected --images of at least 2, found 1"),
    ],
)
def test_an_option_out_of_range_is_refused_before_anything_is_exported(
    words: list[str], said: str, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("cifar10_bundle", "fashion_mnist_bundle"):
        monkeypatch.setattr(samplers, name, lambda *arguments: pytest.fail("it was exported"))
    assert said in refusal(BENCHMARK.main, *words, "--output", tmp_path / "r.json")


def test_a_bundle_is_no_folder_of_bundles(bundle: Bundle, refusal: Refusal, tmp_path: Path) -> None:
    line = refusal(BENCHMARK.main, "--bundle", bundle.path, "--output", tmp_path / "r.json")
    assert "is itself a bundle" in line


def test_the_bundle_of_another_supernet_is_refused(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="is a bundle of another supernet or lacks a width"):
        fashion_mnist_bundle(bundle.path)


def test_each_part_has_its_own_network(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, object]] = []

    @contextmanager
    def stand_in(folder: Path) -> Iterator[Bundle]:
        asked.append(("export", folder.name))
        yield bundle

    monkeypatch.setattr(samplers, "cifar10_bundle", stand_in)
    monkeypatch.setattr(samplers, "fashion_mnist_bundle", lambda path: asked.append(("export", path.name)))
    monkeypatch.setattr(samplers, "measure_latency", lambda *given: asked.append(("latency", given[2])))
    monkeypatch.setattr(samplers, "measure_quality", lambda *given: asked.append(("quality", given[2])))
    chosen = {"bundle": tmp_path, "parts": "quality,latency", "calls": "20,10,20", "backend": ORT}
    measure(argparse.Namespace(**chosen, repeats=1, images=2), {}, lambda: None)
    assert asked == [
        ("export", "cifar10-32.bundle"), ("latency", [10, 20]),
        ("export", "fashion-mnist.bundle"), ("quality", [10, 20]),
    ]  # fmt: skip


# --- what is shown ----------------------------------------------------------------------------------------------------


def timed(sampler: str, wanted: int, calls: int, full_s: float, own_s: float) -> _report.Record:
    def run(seconds: float, theoretical: float) -> _report.Record:
        realised = full_s / seconds
        return {
            "s_per_image": seconds, "theoretical": theoretical, "realised": realised, "r": realised / theoretical,
            "mfu": 0.8 / seconds, "host_ms_per_call": 0.25,
        }  # fmt: skip

    runs = {FULL: run(full_s, 1.0), STEP_AWARE: run(own_s, 2.0)}
    return {"sampler": sampler, "wanted": wanted, "calls": calls, "steps": wanted, "swaps": 3, "runs": runs}


def drawn(sampler: str, wanted: int, strategy: str, far: float | None, mean: float, error: float) -> _report.Record:
    kid = {"mean": mean, "standard_error": error}
    return {"sampler": sampler, "wanted": wanted, "strategy": strategy, "calls": wanted, "rms": far, "kid": kid}


def made_up(own_s: float = 0.5) -> _report.Record:
    return {
        "benchmark": "samplers",
        "machine": "test",
        "environment": {
            "cpu": "Some CPU", "cores": 2, "cpu_features": [], "versions": {"numpy": "2"},
            "date": "2026-01-02T03:04:05+00:00", "command": "samplers.py", "commit": "abc",
        },
        "latency": {
            "settings": {"backend": "openvino", "precision": "fp32", "repeats": 3},
            "rows": [
                timed("ddpm", 20, 20, 1.0, 0.5), timed("heun", 20, 19, 0.9, own_s), timed("ddpm", 50, 50, 2.0, 1.25)
            ],
        },
        "quality": {
            "settings": {"images": 256, "metric": {"name": "kernel distance on classifier features"}},
            "converged": {"by": "unipc, 200 steps", "check": "dpm++3m, 200 steps", "rms": 0.0123, "images": 64},
            "rows": [
                drawn("ddpm", 20, FULL, None, 5.0, 0.3), drawn("ddpm", 20, STEP_AWARE, None, 5.5, 0.3),
                drawn("heun", 20, FULL, 0.1, 4.0, 0.1), drawn("heun", 20, STEP_AWARE, 0.2, 4.5, 0.2),
                drawn("heun", 50, FULL, 0.05, 4.0, 0.1),
            ],
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "| ddpm | 20 | 20 | 1.00 | 0.50 | 2.00x | 2.00x | 1.00 | 80 % | 3 | 0.25 | 0.25 |",
        "| ddpm | 50 | 50 | 2.00 | 1.25 | 2.00x | 1.60x | 0.80 | 40 % | 3 | 0.25 | 0.25 |",
        "| heun | 19 | 20 | 0.90 | 0.50 | 2.00x | 1.80x | 0.90 | 89 % | 3 | 0.25 | 0.25 |",
        "| ddpm | 20 | - | - | 5.00 ± 0.30 | 5.50 ± 0.30 |",
        "| heun | 20 | 0.1000 | 0.2000 | 4.00 ± 0.10 | 4.50 ± 0.20 |",
        "| heun | 50 | 0.0500 | - | 4.00 ± 0.10 | - |",
    ],
)
def test_the_tables_show_what_was_measured(line: str) -> None:
    assert line in details(made_up()).splitlines()


def test_the_tables_say_what_they_are_measured_by() -> None:
    text = details(made_up())
    assert "(unipc, 200 steps; dpm++3m, 200 steps ends 0.0123 from it), over 64 images" in text
    assert (
        "KID is the kernel distance on classifier features, without bias: of images as good as real ones it is 0"
        in text
    )


def test_a_result_with_a_classifier_of_its_own_says_what_that_knew() -> None:
    record = made_up()
    record["quality"] |= {"classifier": {"accuracy": 0.876, "floor": {"mean": 0.01, "standard_error": 0.02}}}
    text = details(record)
    assert "real test images and the other: 0.01 ± 0.02; the classifier whose features it takes names 87.6 % of" in text
    assert "KID is the" not in text
    assert _report.png_of(record, draw).startswith(b"\x89PNG")


def test_the_summary_answers_whether_a_strategy_is_still_faster() -> None:
    assert summary(made_up()).startswith(
        "**The CIFAR-10 network with the published strategy: with each of 2 samplers, at 19 to 50 calls, the strategy "
        "is faster than the full width: 1.60x to 2.00x "
        "realised of 2.00x promised, R = 0.80 to 1.00, with the full width at 40 to 89 % MFU.** Another network, the "
        "supernet that comes with the package, shows what its own coarse strategy costs: KID changes by +0.50, and is "
        "worse in 2 of 2 runs, in 1 by less than two standard errors of runs that share no noise (these do). *"
    )


def test_a_strategy_that_is_slower_is_not_called_faster() -> None:
    assert "with 1 of 2 samplers," in summary(made_up(own_s=0.95))


@pytest.mark.parametrize(("part", "lines"), [(None, [2, 4]), ("latency", [2, 4]), ("quality", [0, 0])])
def test_the_picture_has_two_panels_whatever_is_missing(part: str | None, lines: list[int]) -> None:
    record = {name: value for name, value in made_up().items() if name != part}
    assert _report.png_of(record, draw).startswith(b"\x89PNG")
    figure = Figure()
    draw(record, figure)
    # One dotted line each: what the solution is known to, and KID of real images.
    assert [len(axes.lines) - bool(axes.lines) for axes in figure.axes] == lines
    assert summary(record)


def test_a_result_without_a_part_shows_the_other() -> None:
    record = made_up()
    assert "KID" not in details({name: value for name, value in record.items() if name != "quality"})
    assert "MFU" not in details({name: value for name, value in record.items() if name != "latency"})
