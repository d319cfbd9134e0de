import time

import pytest

from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.environment import environment
from ddsm_engine.measure.latency import measure_latency
from ddsm_engine.measure.peak import matmul_peak_gflops
from ddsm_engine.measure.timing import time_in_turns


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
