import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import BackendError, BundleError, OutputError
from ddsm_engine.measure.environment import environment
from ddsm_engine.measure.latency import measure_latency
from ddsm_engine.measure.latency_table import LatencyTable, latency_file, load_latency, save_latency
from ddsm_engine.measure.peak import matmul_peak_gflops
from ddsm_engine.measure.timing import Timing, time_in_turns


class Clock:
    """Time that passes only when a contender says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ns = 0
        monkeypatch.setattr(time, "perf_counter_ns", lambda: self.ns)
        monkeypatch.setattr(time, "perf_counter", lambda: self.ns / 1e9)


def test_contenders_take_turns_and_the_warm_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(monkeypatch), []

    def contender(name: str, durations: list[int]) -> object:
        left = iter(durations)

        def call() -> None:
            order.append(name)
            clock.ns += next(left) * 1_000_000

        return call

    calls = {"a": contender("a", [999, 1, 2, 3, 4, 5]), "b": contender("b", [999, 10, 10, 10, 10, 100])}
    timings = time_in_turns(calls, repeats=5, warmup=1)  # type: ignore[arg-type]
    assert "".join(order) == "ab" + "ab" * 5
    assert (timings["a"].median_ms, timings["a"].repeats) == (3.0, 5)
    assert timings["a"].p20_ms == pytest.approx(1.8)
    assert timings["b"].median_ms == 10.0, "one slow call does not move the median"


def test_a_call_that_settles_the_caches_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    order: list[str] = []

    def contender(name: str) -> object:
        def call() -> None:
            follows_itself = bool(order) and order[-1] == name
            order.append(name)
            clock.ns += (1 if follows_itself else 50) * 1_000_000

        return call

    calls = {"a": contender("a"), "b": contender("b")}
    timings = time_in_turns(calls, repeats=4, warmup=0, settle=1)  # type: ignore[arg-type]
    rounds = ["".join(order[first : first + 4]) for first in range(0, 16, 4)]
    assert set(rounds) == {"aabb", "bbaa"}, "either follows the other"
    assert [timing.median_ms for timing in timings.values()] == [1.0, 1.0]
    assert [timing.repeats for timing in timings.values()] == [4, 4]


def test_what_the_first_call_of_a_turn_takes_beyond_the_last_is_the_price_of_a_swap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    last = [""]

    def contender(name: str, after_another: int) -> object:
        def call() -> None:
            clock.ns += (10 if last[0] == name else after_another) * 1_000_000
            last[0] = name

        return call

    calls = {"a": contender("a", 13), "b": contender("b", 9), "c": contender("c", 10)}
    timings = time_in_turns(calls, repeats=4, warmup=2, settle=2)  # type: ignore[arg-type]
    assert [timing.swap_ms for timing in timings.values()] == [3.0, -1.0, 0.0]
    assert time_in_turns(calls, repeats=3)["a"].swap_ms == 0, "a turn of one call says nothing of swaps"  # type: ignore[arg-type]


def test_a_budget_ends_the_rounds_but_never_before_the_third(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def slow() -> None:
        clock.ns += 10_000_000_000

    assert time_in_turns({"slow": slow}, repeats=30, warmup=0, budget_s=1.0)["slow"].repeats == 3


def test_the_latency_table_compares_every_variant_with_the_full_width(bundle: Bundle) -> None:
    variants = [bundle.variants["w008"], bundle.variants["w032"]]
    options = EngineOptions(precision="fp32", threads=1)
    rows = measure_latency(bundle, variants, "onnxruntime", 2, options, repeats=3)
    assert [row.variant.id for row in rows] == ["w008", "w032"]
    narrow, full = rows
    assert full.expected_speedup == full.measured_speedup == 1.0
    assert narrow.expected_speedup == variants[1].macs / variants[0].macs > 5
    assert narrow.measured_speedup == full.timing.median_ms / narrow.timing.median_ms
    assert narrow.ms_per_image == narrow.timing.median_ms / 2
    assert narrow.gflops_per_s == pytest.approx(2 * variants[0].macs / narrow.ms_per_image / 1e6)


def test_a_variant_with_broken_output_is_not_timed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddsm_engine.backends.onnxruntime import OnnxRuntimeEngine

    monkeypatch.setattr(OnnxRuntimeEngine, "run", lambda self: None)
    with pytest.raises(BackendError, match="it was not timed"):
        measure_latency(bundle, [bundle.full], "onnxruntime", 1, EngineOptions(threads=1))


def test_the_peak_is_a_rate_that_a_computer_can_have() -> None:
    assert 0.5 < matmul_peak_gflops("fp32", threads=1) < 1e5


def test_the_environment_names_what_a_reader_needs() -> None:
    found = environment()
    assert {"cpu", "cores", "versions", "date", "command", "commit"} <= set(found)
    assert "openvino" in found["versions"]


# --- tables that stay with their bundle -------------------------------------------------------------------------------

TARGET: dict[str, str | int] = {"backend": "onnxruntime", "version": "1", "precision": "fp32", "threads": 2, "batch": 4}
Table = dict[str, Any]


@pytest.fixture
def kept(bundle_path: Path, tmp_path: Path) -> tuple[Bundle, Path]:
    """A bundle (its manifest, nothing else is read) with one table, whose file is returned."""
    shutil.copy(bundle_path / "manifest.json", tmp_path)
    bundle = Bundle.open(tmp_path)
    return bundle, save_latency(bundle, example(bundle))


def example(bundle: Bundle) -> LatencyTable:
    timings = {
        variant: Timing(0.1 + index, index + 1 / 30, index + 0.2, 9, 0.3 - index)
        for index, variant in enumerate(bundle.variants)
    }
    return LatencyTable(TARGET, {"cpu": "A processor", "commit": None}, 51.7, timings)


def test_a_table_is_read_as_it_was_measured(kept: tuple[Bundle, Path]) -> None:
    bundle, file = kept
    assert file.parent == bundle.path / "latency"
    assert re.fullmatch(r"onnxruntime-fp32-b4-[0-9a-f]{12}\.json", file.name)
    assert load_latency(bundle, TARGET) == example(bundle)
    data = json.loads(file.read_bytes())
    assert list(data) == [
        "format", "format_version", "manifest", "target", "environment", "peak_gflops", "rows", "checksum",
    ]  # fmt: skip
    assert (data["format"], data["format_version"], data["manifest"]) == ("ddsm-latency", 2, bundle.manifest.checksum)
    assert data["rows"][0] == {
        "variant": "w008",
        "median_ms": 0.1,
        "p20_ms": 1 / 30,
        "p80_ms": 0.2,
        "repeats": 9,
        "swap_ms": 0.3,
    }


def test_a_target_that_was_not_measured_is_answered_with_the_command_that_does(kept: tuple[Bundle, Path]) -> None:
    bundle, _ = kept
    with pytest.raises(BundleError) as refused:
        load_latency(bundle, TARGET | {"batch": 5})
    command = f"ddsm bench {bundle.path} --backend onnxruntime --precision fp32 --batch-size 5 --threads 2 --save"
    assert str(refused.value).endswith(command)


def reseal(file: Path, change: Callable[[Table], object]) -> None:
    """Change a table as somebody would who knows how it is sealed."""
    data = json.loads(file.read_bytes())
    change(data)
    data.pop("checksum", None)
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    file.write_text(json.dumps(data | {"checksum": hashlib.sha256(canonical.encode()).hexdigest()}))


def row(**changes: object) -> Callable[[Table], object]:
    return lambda data: data["rows"][2].update(changes)


def without(name: str) -> Callable[[Table], object]:
    return lambda data: data.pop(name)


RESEALED: dict[str, tuple[Callable[[Table], object], str]] = {
    "another manifest": (lambda data: data.update(manifest="0" * 64), "measured on another bundle"),
    "another target": (lambda data: data["target"].update(version="2"), "measured for another target"),
    "another format": (lambda data: data.update(format="ddsm-bundle"), "expected an object of the format"),
    "a newer format": (lambda data: data.update(format_version=3), "expected format_version 2, found 3"),
    "no manifest": (without("manifest"), "'manifest' is missing"),
    "no rows": (without("rows"), "'rows' is missing"),
    "rows that are none": (lambda data: data.update(rows={}), "rows a list"),
    "an environment that is none": (lambda data: data.update(environment=[]), "environment must be an object"),
    "a variant too few": (lambda data: data["rows"].pop(3), "expected one row of each of w008, w012"),
    "a variant twice": (lambda data: data["rows"].append(data["rows"][0]), "expected one row of each"),
    "another variant": (row(variant="w064"), "found 'w008', 'w012', 'w064'"),
    "a list for a variant": (row(variant=["w016"]), "expected one row of each"),
    "a row that is a number": (lambda data: data["rows"].insert(0, 3), "no latency table to use"),
    "no median": (lambda data: data["rows"][0].pop("median_ms"), "'median_ms' is missing"),
    "a median of nothing": (row(median_ms=0), "median_ms must be a positive number, found 0"),
    "a negative spread": (row(p20_ms=-0.5), "p20_ms must be a positive number, found -0.5"),
    "a time beyond counting": (row(p80_ms=10**400), "p80_ms must be a positive number"),
    "a time in words": (row(median_ms="3"), "median_ms must be a positive number, found '3'"),
    "a time that is true": (row(median_ms=True), "median_ms must be a positive number, found True"),
    "no price of a swap": (lambda data: data["rows"][0].pop("swap_ms"), "'swap_ms' is missing"),
    "a swap in words": (row(swap_ms="1"), "swap_ms must be a number, found '1'"),
    "no peak": (lambda data: data.update(peak_gflops=None), "peak_gflops must be a positive number"),
    "half a repeat": (row(repeats=0.5), "repeats must be a whole number"),
    "no repeat": (row(repeats=0), "repeats must be a whole number"),
}


@pytest.mark.parametrize("kind", RESEALED)
def test_a_table_that_says_what_cannot_be_is_refused(kept: tuple[Bundle, Path], kind: str) -> None:
    bundle, file = kept
    change, message = RESEALED[kind]
    reseal(file, change)
    with pytest.raises(BundleError, match=re.escape(message)) as refused:
        load_latency(bundle, TARGET)
    assert "ddsm bench" in str(refused.value)


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def lead_out(file: Path) -> None:
    elsewhere = file.parents[2] / "elsewhere.json"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "one digit": (lambda file: file.write_text(file.read_text().replace("51.7", "51.8")), "it is damaged"),
    "no number": (lambda file: file.write_text(file.read_text().replace("51.7", "NaN")), "NaN is no JSON number"),
    "no checksum": (lambda file: file.write_text('{"format": "ddsm-latency", "format_version": 2}'), "'checksum' is"),
    "a list": (lambda file: file.write_text("[1, 2]"), "expected an object of the format"),
    "cut short": (lambda file: os.truncate(file, 300), "no latency table to use"),
    "empty": (lambda file: os.truncate(file, 0), "no latency table to use"),
    "bytes": (lambda file: file.write_bytes(b"\xff\xfe\x00"), "no latency table to use"),
    "too large": (lambda file: file.write_bytes(b" " * ((1 << 20) + 1)), "expected at most 1048576 bytes"),
    "too deep": (lambda file: file.write_text("[" * 100_000), "nested too deeply"),
    "a pipe": (make_pipe, "a pipe or a device"),
    "a link that leaves": (lead_out, "a link that leaves the bundle"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_table_is_refused(kept: tuple[Bundle, Path], kind: str) -> None:
    bundle, file = kept
    damage, message = DAMAGED[kind]
    damage(file)
    with pytest.raises(BundleError, match=re.escape(message)):
        load_latency(bundle, TARGET)


def test_a_table_that_took_another_s_name_is_refused(kept: tuple[Bundle, Path]) -> None:
    bundle, file = kept
    file.rename(latency_file(bundle, TARGET | {"batch": 5}))
    with pytest.raises(BundleError, match="measured for another target"):
        load_latency(bundle, TARGET | {"batch": 5})


def test_a_folder_that_cannot_be_made_is_refused(bundle_path: Path, tmp_path: Path) -> None:
    shutil.copy(bundle_path / "manifest.json", tmp_path)
    (tmp_path / "latency").symlink_to("latency")
    bundle = Bundle.open(tmp_path)
    with pytest.raises(OutputError, match="cannot be written"):
        save_latency(bundle, example(bundle))
