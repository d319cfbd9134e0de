"""Does ``benchmarks.scaling`` time only what is right, keep what is done, and show what it found?"""

import argparse
import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import _report, _resident, scaling
from benchmarks._scaling_report import details, draw, summary
from benchmarks.scaling import BENCHMARK, Case, hold_open, measure, measure_cases, measure_resident, measure_steps
from ddsm_engine.backends import engine_target, open_engine
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import MANIFEST, Bundle
from ddsm_engine.engine_cache import ENGINES, EngineCache, user_cache_folder
from ddsm_engine.errors import BackendError, OutputError
from ddsm_engine.parity import TOLERANCES
from ddsm_engine.spec import UNetSpec
from tests.conftest import Refusal

ORT = ("onnxruntime", EngineOptions(precision="fp32", threads=1))
OPENVINO = ("openvino", EngineOptions(precision="fp32"))


def confused(bundle: Bundle) -> Bundle:
    """The bundle, but its narrowest variant's artefact is that of the next one, for which it vouches."""
    narrow, next_one, *others = bundle.manifest.variants
    wrong = replace(narrow, file=next_one.file, sha256=next_one.sha256, size_bytes=next_one.size_bytes)
    return replace(bundle, manifest=replace(bundle.manifest, variants=(wrong, next_one, *others)))


@pytest.fixture
def two_widths(bundle: Bundle, tmp_path: Path) -> Bundle:
    """A bundle of the narrowest variant and the full one."""
    path = Path(shutil.copytree(bundle.path, tmp_path / "two.bundle"))
    kept = tuple(variant for variant in bundle.manifest.variants if variant.id in ("w008", "w032"))
    (path / MANIFEST).write_text(json.dumps(replace(bundle.manifest, variants=kept).to_json()), encoding="utf-8")
    return Bundle.open(path)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of a whole bundle, which takes seconds, has tests of its own."""
    monkeypatch.setattr(scaling, "check_variants", lambda bundle, engines: None)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """As little of everything as shows that it grows."""
    for name, value in {"BATCHES": (1, 2), "STEPS": (4, 8), "RESIDENT": {1: (8,), 2: (2, 8)}}.items():
        monkeypatch.setattr(scaling, name, value)
    monkeypatch.setattr(scaling, "RESIDENT_BATCHES", (1,))
    monkeypatch.setattr(scaling, "COLD_STARTS", 1)


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """No process is started; returns what would have been asked of each."""
    asked: list[tuple[Any, ...]] = []

    def fake(
        bundle: Path, variants: Sequence[Any], engines: Any, batch: int, folder: Path, *, built: bool
    ) -> dict[str, float]:
        asked.append((engines[0], [v.id for v in variants], batch, built))
        return {"import_s": 0.5, "cold_start_s": 2.0, "peak_bytes": 100e6}

    monkeypatch.setattr(scaling, "hold_open", fake)
    return asked


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*arguments: object, **options: object) -> None:
        pytest.fail("it was timed")

    for name in ("time_in_turns", "hold_open", "in_fresh_process"):
        monkeypatch.setattr(scaling, name, timed)


# --- what is measured -------------------------------------------------------------------------------------------------


def test_every_case_is_compared_timed_and_asked_for_its_memory(
    bundle: Bundle, no_processes: list[tuple[Any, ...]]
) -> None:
    cases = [Case(bundle, bundle.variants[name], batch) for batch in (1, 3) for name in ("w008", "w032")]
    rows = measure_cases(cases, ORT, 3)
    assert [(row["batch"], row["eighths"], row["image_size"]) for row in rows] == [
        (1, 2, 8), (1, 8, 8), (3, 2, 8), (3, 8, 8)
    ]  # fmt: skip
    assert [row["gflops"] for row in rows[:2]] == [2 * bundle.variants[name].macs / 1e9 for name in ("w008", "w032")]
    for row in rows:
        assert 0 < row["relative_l2"] <= TOLERANCES["fp32"].relative_l2
        assert row["timing"]["repeats"] == 3
        assert row["peak_bytes"] == 100e6
    assert no_processes[-1] == ("onnxruntime", ["w032"], 3, False)
    json.dumps(rows)


@pytest.mark.parametrize(
    "take",
    [
        lambda wrong: measure_cases([Case(wrong, v, 1) for v in wrong.manifest.variants], ORT, 3),
        lambda wrong: measure_steps(lambda size: wrong, ORT, 3),
        lambda wrong: measure_resident(lambda size: wrong, ORT),
    ],
    ids=["time", "steps", "resident"],
)
@pytest.mark.usefixtures("untimed")
def test_a_wrong_variant_is_refused_before_it_is_timed(take: Callable[[Bundle], object], bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=r"w008 on onnxruntime differs from the torch reference by .* not timed"):
        take(confused(bundle))


@pytest.mark.usefixtures("untimed")
def test_an_answer_that_is_not_finite_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        precision = "fp32"

        def bind(self, inputs: object, outputs: dict[str, Any]) -> None:
            self.out = outputs["out_sample"]

        def run(self) -> None:
            assert np.isnan(self.out).all(), "what is not written shows"

        def close(self) -> None: ...

    def open_silent(name: str, *rest: Any, **options: Any) -> object:
        return open_engine(name, *rest, **options) if name == "torch" else Silent()

    monkeypatch.setattr(scaling, "open_engine", open_silent)
    with pytest.raises(BackendError, match=r"by inf \(relative L2, at most 5e-06\); it was not timed"):
        measure_cases([Case(bundle, bundle.full, 1)], ORT, 3)


@pytest.mark.usefixtures("short", "unchecked")
def test_steps_are_drawn_by_the_published_strategy(bundle: Bundle) -> None:
    rows = measure_steps(lambda size: bundle, ORT, 3)
    assert [row["steps"] for row in rows] == [4, 8]
    macs = {8 * v.width // bundle.full.width: v.macs for v in bundle.manifest.variants}
    # 4 calls visit 750, 500, 250, 0: half width twice, full width twice.
    assert rows[0]["gflops_per_call"] == pytest.approx(2 * (macs[4] + macs[8]) / 2 / 1e9)
    for row in rows:
        assert 0 < row["engine_ms"] < row["timing"]["median_ms"]


# --- fresh processes --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short", "unchecked")
def test_built_engines_are_made_in_a_copy_and_loaded(two_widths: Bundle) -> None:
    rows = measure_resident(lambda size: two_widths, OPENVINO)
    assert [(row["batch"], row["variants"], row["built"]) for row in rows] == [
        (1, 1, False), (1, 2, False), (1, 1, True), (1, 2, True)
    ]  # fmt: skip
    for row in rows:
        assert 0 < row["import_s"] < row["cold_start_s"] < 120
        assert 20e6 < row["peak_bytes"] < 2e9
    assert not (two_widths.path / ENGINES).exists()
    assert not list(user_cache_folder().glob(f"{ENGINES}/*"))


def test_engines_that_the_user_built_are_not_loaded(two_widths: Bundle, tmp_path: Path) -> None:
    full = two_widths.full
    EngineCache(two_widths, engine_target(*OPENVINO, 1)).store(full, b"no engine, as whoever loads it will see")
    assert hold_open(two_widths.path, [full], OPENVINO, 1, tmp_path / "cache", built=False)["built"] == 0
    with pytest.raises(BackendError, match="OpenVINO cannot open"):
        hold_open(two_widths.path, [full], OPENVINO, 1, user_cache_folder().parent, built=True)


def test_more_variants_take_more_memory(bundle: Bundle, tmp_path: Path) -> None:
    one, seven = (
        hold_open(bundle.path, variants, ORT, 64, tmp_path, built=False)
        for variants in ([bundle.full], list(bundle.manifest.variants))
    )
    assert one["peak_bytes"] < seven["peak_bytes"]
    assert (one["built"], seven["built"]) == (0, 0)


def test_engines_that_were_compiled_do_not_pass_for_built_ones(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"expected 1 built engines of .*, found 0"):
        hold_open(bundle.path, [bundle.full], ORT, 1, tmp_path, built=True)


def test_a_process_that_fails_is_reported_in_one_line(bundle: Bundle, tmp_path: Path, refusal: Refusal) -> None:
    damaged = Path(shutil.copytree(bundle.path, tmp_path / "damaged.bundle"))
    (damaged / bundle.full.file).write_bytes(b"not a network")

    def fail(*arguments: object) -> None:
        hold_open(damaged, [bundle.full], ORT, 1, tmp_path / "cache", built=False)

    line = refusal(replace(BENCHMARK, measure=fail).main, "--output", tmp_path / "result.json")
    assert line.startswith("error: benchmarks._resident onnxruntime --variants w032")
    assert "model.onnx is damaged" in line
    assert "error: " not in line.removeprefix("error: ")


def test_a_process_that_says_nothing_is_reported_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "silent.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(BackendError, match="it ended with 3 and said nothing"):
        scaling.in_fresh_process("silent", cache_folder=tmp_path)


def test_a_process_with_torch_in_it_measures_nothing(bundle: Bundle, refusal: Refusal) -> None:
    line = refusal(_resident.main, bundle.path, "onnxruntime", "--variants", "w008")
    assert line == "error: torch was imported, and the figures would count it"


def test_an_unknown_variant_is_refused(bundle: Bundle, refusal: Refusal) -> None:
    line = refusal(_resident.main, bundle.path, "onnxruntime", "--variants", "w008,w009")
    assert "lacks one of w008,w009; it has w008, w012" in line


# --- a whole result ---------------------------------------------------------------------------------------------------


def arguments(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{"bundle": None, "sizes": [8], "repeats": 1, **changes})


@pytest.fixture
def exported(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The tiny bundle stands for one of every size; returns which ones were asked for."""
    asked = []

    @contextmanager
    def stand_in(folder: Path, eighths: Sequence[int], spec: UNetSpec) -> Iterator[Bundle]:
        asked.append((folder.name, spec.image_size))
        yield bundle

    monkeypatch.setattr(scaling, "cifar10_bundle", stand_in)
    monkeypatch.setattr("ddsm_engine.backends.installed_backends", lambda: ("onnxruntime", "torch"))
    return asked


@pytest.mark.usefixtures("short", "no_processes", "unchecked")
def test_every_part_is_kept_and_not_measured_again(exported: list[tuple[str, int]], tmp_path: Path) -> None:
    stages: list[_report.Record] = []
    record = _report.new_record("scaling", "test")
    measure(arguments(), record, lambda: stages.append(copy.deepcopy(record)))
    questions = ("batch", "size", "steps", "resident")
    assert [[question for question in questions if question in stage] for stage in stages] == [
        list(questions[:count]) for count in (1, 2, 3, 4)
    ]
    assert exported == [("cifar10-32.bundle", 32), ("cifar10-8.bundle", 8)], "one export a size"
    for stage in stages:
        assert "ONNX Runtime fp32" in details(stage), "a partial result can be shown"
    BENCHMARK.save(record, tmp_path / "result.json")
    exported.clear()
    measure(arguments(), _report.load(tmp_path / "result.json", "scaling"), lambda: pytest.fail("measured again"))
    assert exported == []


@pytest.mark.usefixtures("exported")
@pytest.mark.parametrize("changes", [{"repeats": 2}, {"sizes": [8, 16]}])
def test_a_result_of_other_options_is_not_continued(changes: dict[str, object]) -> None:
    record: _report.Record = {question: {"onnxruntime": []} for question in ("batch", "size", "steps", "resident")}
    measure(arguments(), record, lambda: pytest.fail("measured"))
    with pytest.raises(OutputError, match="begun with other options"):
        measure(arguments(**changes), record, lambda: None)


def test_a_bundle_is_no_folder_of_bundles(bundle: Bundle) -> None:
    with pytest.raises(OutputError, match="is itself a bundle"):
        measure(arguments(bundle=bundle.path), {}, lambda: None)


@pytest.mark.parametrize("words", [["--sizes", "32,x"], ["--sizes", ""], ["--repeats", "0"], ["--repeats", "3,4"]])
def test_options_that_are_no_numbers_are_a_usage_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        BENCHMARK.main(words)
    assert exit_.value.code == 2
    assert "expected a whole number" in capsys.readouterr().err


# --- what is shown ----------------------------------------------------------------------------------------------------


def timing(median_ms: float) -> dict[str, float]:
    return {"median_ms": median_ms, "p20_ms": median_ms - 1, "p80_ms": median_ms + 2, "repeats": 5}


def row(size: int, batch: int, k: int, ms: float, gflops: float) -> dict[str, Any]:
    values = {"image_size": size, "batch": batch, "eighths": k, "gflops": gflops, "relative_l2": 1e-6}
    return {**values, "timing": timing(ms), "peak_bytes": 1e8 * batch}


def held(batch: int, variants: int, start_s: float, *, built: bool = False) -> dict[str, Any]:
    values = {"batch": batch, "variants": variants, "built": built, "import_s": 0.25}
    return {**values, "cold_start_s": start_s, "peak_bytes": 2e8 * variants}


def made_up() -> _report.Record:
    compiled = [held(1, 1, 2.0), held(1, 7, 7.0), held(16, 7, 8.0)]
    loaded = [held(b, n, start_s, built=True) for b, n, start_s in ((1, 1, 1.0), (1, 7, 1.5), (16, 7, 1.6))]
    steps = {"steps": 10, "gflops_per_call": 6.5, "timing": timing(400.0), "engine_ms": 390.0}
    return {
        "benchmark": "scaling",
        "machine": "test",
        "environment": {
            "cpu": "Some CPU", "cores": 2, "cpu_features": [], "versions": {"numpy": "2"},
            "date": "2026-01-02T03:04:05+00:00", "command": "scaling.py", "commit": "abc",
        },
        "settings": {"precisions": {"openvino": "bf16", "onnxruntime": "fp32"}},
        "batch": {"openvino": [row(32, b, k, ms, k) for b, k, ms in ((1, 2, 10), (1, 8, 90), (4, 2, 32), (4, 8, 360))]},
        "size": {"onnxruntime": [row(64, 1, 2, 20, 4), row(64, 1, 8, 120, 48)]},
        "steps": {"openvino": [steps], "onnxruntime": [{**steps, "engine_ms": 300.0}]},
        "resident": {
            "openvino": [*compiled, *loaded],
            "onnxruntime": [held(1, 1, 0.5), held(1, 7, 1.25), held(16, 7, 1.5)],
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "| batch | 2/8, ms an image | 8/8, ms an image | 2/8, peak MB | 8/8, peak MB |",
        "| 4 | 8.00 (7.75 to 8.50) | 90.00 (89.75 to 90.50) | 400 | 400 |",
        "| 64x64, 2/8 | 4.000 | 12.00x | 20.00 (19.00 to 22.00) | 6.00x | 100 |",
        "| 10 | 6.500 | 0.40 (0.40 to 0.40) | 40.00 | 2.5 % | 0.40 (0.40 to 0.40) | 40.00 | 25.0 % |",
        "| 1, 7 | 1400 | 7.00 | 1400 | 1.50 | 1400 | 1.25 |",
        "| 16, 7 | 1400 | 8.00 | 1400 | 1.60 | 1400 | 1.50 |",
        "A cold start includes the imports: 0.25 s of OpenVINO bf16, 0.25 s of ONNX Runtime fp32.",
    ],
)
def test_the_tables_show_what_was_measured(line: str) -> None:
    assert line in details(made_up()).splitlines()


def test_the_sentence_is_about_every_variant() -> None:
    sentence = (
        "All 7 variants resident, batch 1, in a fresh process without torch: OpenVINO bf16 1400 MB peak, 7.0 s cold "
        "start (1.5 s with the engines of `ddsm build`); ONNX Runtime fp32 1400 MB peak, 1.2 s cold start."
    )
    assert sentence in details(made_up()).splitlines()
    assert summary(made_up()).startswith(f"{sentence} *")


@pytest.mark.parametrize("without", [(), ("size", "steps", "resident"), ("batch", "size", "steps", "resident")])
def test_the_picture_has_three_panels_whatever_is_missing(without: tuple[str, ...]) -> None:
    record = {name: part for name, part in made_up().items() if name not in without}
    assert _report.png_of(record, draw).startswith(b"\x89PNG")
    figure = Figure()
    draw(record, figure)
    series = 3 if "resident" in record else 0
    # Three widths a backend, and the third panel's cold starts on an axis of their own.
    expected = [3 * len(record.get("batch", {})), 3 * len(record.get("size", {})), series, series]
    assert [len(axes.lines) for axes in figure.axes] == expected
