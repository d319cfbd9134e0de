"""Does ``benchmarks.samplers`` compute R, KID and RMS, time only what is right, keep what is done, and show it?"""

import argparse
import copy
import gzip
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks import _report, samplers
from benchmarks._kid import Features, Kid, RealImages, kid, learn_real_images, mmd2
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
from ddsm_engine.errors import BackendError, BundleError, DataError, OutputError
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.pipeline import Batch, Pipeline
from ddsm_engine.samplers import NAMES
from tests.conftest import Refusal

ORT = "onnxruntime"
SCHEDULE = NoiseSchedule(1e-4, 0.02, 1000)

# --- KID --------------------------------------------------------------------------------------------------------------


def normals(seed: int, rows: int, shift: float = 0.0) -> Features:
    return np.random.default_rng(seed).standard_normal((rows, 5)) + shift


def spelt_out(x: Features, y: Features) -> float:
    """The estimate as a sum over pairs, one by one."""

    def kernel(a: Features, b: Features) -> float:
        return float((sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3)

    def within(rows: Features) -> float:
        different = [kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        return sum(different) / len(different)

    across = [kernel(a, b) for a in x for b in y]
    return within(x) + within(y) - 2 * sum(across) / len(across)


@pytest.mark.parametrize(("rows", "others"), [(2, 2), (7, 7), (4, 11)])
def test_the_discrepancy_is_the_sum_over_pairs(rows: int, others: int) -> None:
    x, y = normals(1, rows), normals(2, others, 0.5)
    assert mmd2(x, y) == pytest.approx(spelt_out(x, y), rel=1e-12)


def test_kid_is_the_mean_over_blocks_with_the_error_of_their_spread() -> None:
    x, y = normals(1, 48), normals(2, 64, 0.5)
    each = [spelt_out(x[6 * k : 6 * k + 6], y[8 * k : 8 * k + 8]) for k in range(8)]
    spread = (sum((one - sum(each) / 8) ** 2 for one in each) / 7) ** 0.5
    found = kid(x, y)
    assert found.mean == pytest.approx(sum(each) / 8)
    assert found.standard_error == pytest.approx(spread / 8**0.5)


def test_kid_is_zero_for_one_distribution_and_grows_with_a_shift() -> None:
    alike, near, far = (kid(normals(1, 800), normals(2, 4000, shift)) for shift in (0.0, 0.3, 0.9))
    assert abs(alike.mean) < 3 * alike.standard_error < near.mean < far.mean


def test_kid_has_no_bias() -> None:
    """However few the rows: the biased estimate would be near 1 here."""
    each = [kid(normals(seed, 16), normals(1000 + seed, 16)).mean for seed in range(300)]
    assert abs(np.mean(each)) < 4 * np.std(each) / len(each) ** 0.5 < 0.5


# --- the classifier ---------------------------------------------------------------------------------------------------


def idx(magic: int, *sizes: int) -> bytes:
    return struct.pack(f">{1 + len(sizes)}I", magic, *sizes)


def write_garments(folder: Path, *, per_class: int = 120, shuffle_test: bool = False, suffix: str = ".gz") -> None:
    """Stand-ins for Fashion-MNIST: a class is two bright rows, wherever its number says."""
    random = np.random.default_rng(0)
    for part, count in (("train", per_class), ("t10k", per_class // 4)):
        labels = random.permutation(np.repeat(np.arange(10, dtype=np.uint8), count))
        pixels = random.integers(0, 60, (len(labels), 28, 28), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[2 * label + 3 : 2 * label + 5] += 180
        if part == "t10k" and shuffle_test:
            labels = random.permutation(labels)
        pack = gzip.compress if suffix else bytes
        images = idx(0x803, len(labels), 28, 28) + pixels.tobytes()
        (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(pack(images))
        (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(0x801, len(labels)) + labels.tobytes()))


def test_the_classifier_learns_the_same_every_time(tmp_path: Path) -> None:
    write_garments(tmp_path, suffix="")
    state = torch.random.get_rng_state()
    one, other = learn_real_images(tmp_path, 32), learn_real_images(tmp_path, 32)
    assert torch.equal(torch.random.get_rng_state(), state), "the process' own random numbers are left alone"
    assert one.accuracy == other.accuracy >= 0.85
    assert (one.features == other.features).all()
    assert one.features.shape == (300, 128)
    assert abs(one.floor().mean) < 4 * one.floor().standard_error


def test_images_are_compared_as_training_saw_them(tmp_path: Path) -> None:
    write_garments(tmp_path)
    real = learn_real_images(tmp_path, 32)
    with gzip.open(tmp_path / "t10k-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read()[16:], np.uint8).reshape(-1, 1, 28, 28)
    padded = np.full((len(pixels), 1, 32, 32), -1, np.float32)
    padded[:, :, 2:30, 2:30] = pixels / np.float32(127.5) - 1
    same, noise = real.kid_of(padded), real.kid_of(np.random.default_rng(0).uniform(-1, 1, padded.shape).astype("f4"))
    # Without bias, equal sets are a little nearer to each other than two draws of one distribution are.
    assert same.mean < 0.1 * noise.mean


def spoil_labels(folder: Path) -> None:
    write_garments(folder, shuffle_test=True)


def lose_a_file(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte.gz").unlink()


def cut_labels(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(0x801, 3) + bytes(3)))


def swap_labels_for_images(folder: Path) -> None:
    images = (folder / "t10k-images-idx3-ubyte.gz").read_bytes()
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(images)


def damage_labels(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(50_000))[:-40])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_labels, r"names \d\.\d|names \d\d\.\d"),
        (lose_a_file, "holds no train-labels-idx1-ubyte"),
        (cut_labels, "holds 3 labels, expected one for each of 20 images"),
        (swap_labels_for_images, "is not an IDX file of labels below 10"),
        (damage_labels, "could not be read as labels"),
    ],
)
def test_data_that_cannot_be_learnt_are_refused(spoil: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    write_garments(tmp_path, per_class=8)
    spoil(tmp_path)
    with pytest.raises(DataError, match=words):
        learn_real_images(tmp_path, 32)


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


def pixels_as_features(accuracy: float = 0.9) -> RealImages:
    """Features are the pixels themselves, and the real images are bright noise."""
    real = np.random.default_rng(0).uniform(0.5, 1, (160, 3 * 8 * 8))
    return RealImages(nn.Sequential(nn.Flatten(), nn.Identity()), accuracy, real)


@pytest.mark.usefixtures("_quick")
def test_quality_is_kept_run_by_run_and_not_measured_again(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measured(record: _report.Record, calls: list[int], save: Callable[[], None], data: Path | None) -> None:
        measure_quality(bundle, ORT, calls, 16, data, record, save)

    monkeypatch.setattr(samplers, "learn_real_images", lambda folder, size: pixels_as_features())
    stages: list[_report.Record] = []
    record = _report.new_record("samplers", "test")
    measured(record, [12], lambda: stages.append(copy.deepcopy(record)), tmp_path)
    assert len(stages) == 16
    rows = {(row["sampler"], row["strategy"]): row for row in record["quality"]["rows"]}
    assert list(rows) == [(name, strategy) for name in NAMES for strategy in (FULL, STEP_AWARE)]
    assert rows["unipc", FULL]["rms"] == 0, "the converged run itself"
    assert 0 < rows["dpm++3m", FULL]["rms"] == record["quality"]["converged"]["rms"]
    assert rows["unipc", STEP_AWARE]["rms"] > 0
    assert rows["ddpm", FULL]["rms"] is None
    for row in rows.values():
        assert row["kid"]["mean"] > 3 * row["kid"]["standard_error"] > 0
    resumed = json.loads(json.dumps(stages[3]))
    measured(resumed, [12], lambda: None, tmp_path)
    assert resumed["quality"] == record["quality"], "a resumed measurement ends with the same figures"
    measured(resumed, [12], lambda: pytest.fail("measured again"), tmp_path)
    monkeypatch.setattr(samplers, "learn_real_images", lambda folder, size: pixels_as_features(0.95))
    with pytest.raises(OutputError, match=r"begun with a classifier that names 90.00% .* this one 95.00%"):
        measured(resumed, [4], lambda: pytest.fail("measured"), tmp_path)
    with pytest.raises(OutputError, match="begun with another data"):
        measured(resumed, [4], lambda: pytest.fail("measured"), None)


@pytest.mark.usefixtures("_quick")
def test_without_real_images_there_is_no_kid(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "CONVERGED_IMAGES", 2)
    record = _report.new_record("samplers", "test")
    measure_quality(bundle, ORT, [2], 256, None, record, lambda: None)
    assert record["quality"]["settings"]["images"] == 2, "no more than are compared with the solution"
    assert {row["kid"] for row in record["quality"]["rows"]} == {None}
    assert "KID was not measured" in details(record)
    assert _report.png_of(record, draw).startswith(b"\x89PNG")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parts", "speed"], "expected --parts latency or quality"),
        (["--calls", "10,x"], "expected --calls from 2 to 1000"),
        (["--calls", "1001"], "expected --calls from 2 to 1000"),
        (["--repeats", "0"], "expected --repeats of at least 1, found 0"),
        (["--images", "0"], "expected --images of at least 1, found 0"),
        (["--images", "15", "--data", "folder"], "expected --images of at least 16 for 8 blocks, found 15"),
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
    chosen = {"bundle": tmp_path, "data": None, "parts": "quality,latency", "calls": "20,10,20", "backend": ORT}
    measure(argparse.Namespace(**chosen, repeats=1, images=1), {}, lambda: None)
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


def drawn(sampler: str, wanted: int, strategy: str, far: float | None, kid: Kid | None) -> _report.Record:
    found = None if kid is None else {"mean": kid.mean, "standard_error": kid.standard_error}
    return {"sampler": sampler, "wanted": wanted, "strategy": strategy, "calls": wanted, "rms": far, "kid": found}


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
            "settings": {"images": 256},
            "converged": {"by": "unipc, 200 steps", "check": "dpm++3m, 200 steps", "rms": 0.0123, "images": 64},
            "classifier": {"accuracy": 0.876, "floor": {"mean": 0.01, "standard_error": 0.02}},
            "rows": [
                drawn("ddpm", 20, FULL, None, Kid(5.0, 0.3)), drawn("ddpm", 20, STEP_AWARE, None, Kid(5.5, 0.3)),
                drawn("heun", 20, FULL, 0.1, Kid(4.0, 0.1)), drawn("heun", 20, STEP_AWARE, 0.2, Kid(4.5, 0.2)),
                drawn("heun", 50, FULL, 0.05, Kid(4.0, 0.1)),
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
    assert "real test images and the other: 0.01 ± 0.02; the classifier whose features it takes names 87.6 % of" in text


def test_the_summary_answers_whether_a_strategy_is_still_faster() -> None:
    sentence, *rows = summary(made_up()).splitlines()
    assert sentence == (
        "**With each of 2 samplers, at 19 to 50 calls, the strategy is faster than the full width: 1.60x to 2.00x "
        "realised of 2.00x promised, R = 0.80 to 1.00, with the full width at 40 to 89 % MFU.** The strategy changes "
        "KID by +0.50, in 1 of 2 runs by less than two standard errors."
    )
    assert "| ddpm | 1.00 | 0.80 | 1.00 | 0.50 | 5.00 ± 0.30 | 5.50 ± 0.30 |" in rows
    assert "| heun | 0.90 | - | 0.90 | 0.50 | 4.00 ± 0.10 | 4.50 ± 0.20 |" in rows


def test_a_strategy_that_is_slower_is_not_called_faster() -> None:
    assert "With 1 of 2 samplers," in summary(made_up(own_s=0.95))


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
