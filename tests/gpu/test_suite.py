"""``ddsm bench --suite gpu`` without a GPU: its arithmetic, its file, its refusals and its table; no figure is real."""

import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks import _report
from ddsm_engine import bench
from ddsm_engine.backends import open_engine as open_real_engine
from ddsm_engine.backends.device import StagedEngine
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.device_scheduler import EXECUTIONS
from ddsm_engine.errors import BackendError, BundleError, OutputError
from ddsm_engine.measure.gpu import (
    answers,
    ceilings,
    device_timing,
    kernels,
    machine,
    memory,
    peers,
    strategies,
    subnetworks,
    suite,
    torch_gpu,
)
from ddsm_engine.measure.gpu.answers import check_engine, probe
from ddsm_engine.measure.gpu.parts import PARTS
from ddsm_engine.measure.gpu.strategies import Setting, make_plans, speed_up
from ddsm_engine.measure.gpu.swaps import swap_gaps
from ddsm_engine.measure.gpu.targets import verdict_table
from ddsm_engine.measure.gpu.work import Row, Work, read_rows, variant_of
from ddsm_engine.measure.gpu.worker import open_bundles
from ddsm_engine.measure.timing import Timing
from ddsm_engine.parity import TOLERANCES
from tests.conftest import Refusal
from tests.gpu.fake import H100, FakeDevice, FakeEngine

SIZE = 8
"""Of the images of the tests' bundle."""

Images = NDArray[np.float32]


def answer(variant: Variant, sample: Images, features: Images) -> Images:
    """What a network of the tests computes: another function for every width."""
    return np.asarray(np.tanh(sample * variant.width / 32 + features.mean(axis=1)[:, None, None, None]), np.float32)


class Gpu:
    """An invented machine: its device, and what its backends do wrong."""

    def __init__(self) -> None:
        self.refuses: set[str] = set()
        self.opened: list[tuple[str, str, int]] = []
        self.open = 0
        self.wrong: set[str] = set()
        self.scratch: Callable[[Variant], int] = lambda variant: 64 * variant.width

    def open_device(self, backend: str) -> FakeDevice:
        return FakeDevice(refuses=tuple(self.refuses))

    def open_engine(
        self,
        name: str,
        bundle: Bundle,
        variant: Variant,
        batch: int,
        options: EngineOptions,
        device: FakeDevice | None,
    ) -> Any:
        assert options.device == "cuda"
        device = device or FakeDevice()
        if name == "host":
            return SimpleNamespace(close=lambda: None)
        self.opened.append((name, variant.id, batch))
        gpu, spec = self, bundle.spec(variant)
        factor = np.float32(1.2 if name in self.wrong else 1)

        class Engine(FakeEngine):
            def close(self) -> None:
                gpu.open -= 1
                super().close()

        self.open += 1
        with device.current():
            engine = Engine(
                device, lambda sample, features: factor * answer(variant, sample, features),
                (batch, *spec.sample_shape), spec.time_features, scratch_bytes=self.scratch(variant),
                is_capturable=name != "uncapturable",
            )  # fmt: skip
            return StagedEngine(device, engine)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """The machine, with one backend, and a reference that computes what its engines compute."""
    gpu = Gpu()

    def expected(path: Path, checksum: str, identifier: str) -> Images:
        bundle = Bundle.open(path)
        variant = bundle.variants[identifier]
        return answer(variant, *probe(bundle, variant, 2))

    monkeypatch.setattr(subnetworks, "open_engine", gpu.open_engine)
    for module in (strategies, memory):
        monkeypatch.setattr(module, "open_device", gpu.open_device)
    monkeypatch.setattr(answers, "_expected", expected)
    monkeypatch.setattr("ddsm_engine.measure.gpu.work.BACKENDS", ("good",))
    monkeypatch.setattr("ddsm_engine.measure.gpu.work.engine_target", lambda name, options, batch: {})
    monkeypatch.setattr(subnetworks, "SECONDS", 0.0)
    monkeypatch.setattr(device_timing, "SAMPLE_S", 0.0)
    yield gpu
    assert gpu.open == 0, "every engine is closed"


@pytest.fixture
def work(bundle: Bundle, tmp_path: Path) -> Work:
    return Work({SIZE: bundle, 32: bundle}, 60.0, tmp_path / "rows.jsonl")


# --- one part ---------------------------------------------------------------------------------------------------------


def test_a_row_is_measured_once_and_kept_at_once(tmp_path: Path) -> None:
    file, asked = tmp_path / "rows.jsonl", []

    def measure() -> Row:
        asked.append(read_rows(file)[0])
        return {"figure": len(asked)}

    first = Work({}, 60, file)
    for batch in (1, 2, 1):
        first.take({"batch": batch}, measure)
    assert read_rows(file) == ([{"batch": 1, "figure": 1}, {"batch": 2, "figure": 2}], [])
    assert asked == [[], [{"batch": 1, "figure": 1}]], "the first row was on the disk when the second was measured"
    file.write_text(file.read_text() + '{"batch": 3, "fig')
    Work({}, 60, file).take({"batch": 2}, measure)
    assert len(asked) == 2, "a later try does not measure it again"


def test_a_refusal_is_a_row_and_the_part_goes_on(tmp_path: Path) -> None:
    def refuse() -> Row:
        raise BackendError("expected this, found that")

    work = Work({}, 60, tmp_path / "rows.jsonl")
    work.take({"batch": 1}, refuse)
    work.take({"batch": 2}, lambda: {"figure": 1})
    assert work.rows == [{"batch": 1, "error": "expected this, found that"}, {"batch": 2, "figure": 1}]


def test_nothing_is_begun_after_the_share_of_the_time_and_what_was_not_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    Work({}, -1, file).take({"batch": 1}, lambda: pytest.fail("begun"))
    assert read_rows(file) == ([], [{"batch": 1}])


def test_backends_that_cannot_use_the_gpu_say_why(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def target(name: str, options: EngineOptions, batch: int) -> dict[str, str]:
        if name == "good":
            return {}
        raise BackendError(f"{name} finds no GPU")

    monkeypatch.setattr("ddsm_engine.measure.gpu.work.BACKENDS", ("blind", "good"))
    monkeypatch.setattr("ddsm_engine.measure.gpu.work.engine_target", target)
    assert Work({}, 60, tmp_path / "rows.jsonl").backends() == ["good"]
    assert read_rows(tmp_path / "rows.jsonl")[0] == [{"backend": "blind", "error": "blind finds no GPU"}]
    monkeypatch.setattr("ddsm_engine.measure.gpu.work.BACKENDS", ("blind",))
    with pytest.raises(BackendError, match="no backend here runs on the GPU"):
        Work({}, 60, tmp_path / "others.jsonl").backends()


def test_a_missing_bundle_or_width_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"128x128 was given; python -m benchmarks.gpu_bundles"):
        Work({SIZE: bundle}, 60, tmp_path / "rows.jsonl").bundle(128)
    assert variant_of(bundle, 4).width == 16
    with pytest.raises(BundleError, match="no variant of 9/8"):
        variant_of(bundle, 9)


def test_two_bundles_of_one_size_are_refused(bundle_path: Path) -> None:
    assert list(open_bundles([bundle_path])) == [SIZE]
    with pytest.raises(BundleError, match="both for images of 8x8"):
        open_bundles([bundle_path, bundle_path])


# --- what is timed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_ends_of_a_probe_are_those_of_the_references(bundle: Bundle, batch: int) -> None:
    sample, features = probe(bundle, bundle.full, batch)
    (first, last), of_ends = probe(bundle, bundle.full, 2)
    assert len(np.unique(sample.reshape(batch, -1), axis=0)) == batch
    assert (sample[0] == first).all()
    assert (features[0] == of_ends[0]).all()
    if batch > 1:
        assert (sample[-1] == last).all()
        assert (features[-1] == of_ends[1]).all()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_real_engine_answers_as_the_reference_and_another_widths_does_not(bundle: Bundle, batch: int) -> None:
    options = EngineOptions(precision="fp32", threads=1)
    narrow, wide = bundle.manifest.variants[0], bundle.full
    engine = open_real_engine("onnxruntime", bundle, wide, batch, options)
    try:
        assert 0 < check_engine(bundle, wide, engine, batch, "onnxruntime") <= TOLERANCES["fp32"].relative_l2
        with pytest.raises(
            BackendError, match=r"w008 on onnxruntime \(fp32\) differs from the fp32 reference by .*not timed"
        ):
            check_engine(bundle, narrow, engine, batch, "onnxruntime")
    finally:
        engine.close()


def test_an_answer_that_is_not_finite_in_the_middle_of_the_batch_is_refused(gpu: Gpu, bundle: Bundle) -> None:
    found = answer(bundle.full, *probe(bundle, bundle.full, 3))
    answers.check_answer(bundle, bundle.full, found, "fp32", "good")
    found[1, 0, 0, 0] = np.nan
    with pytest.raises(BackendError, match="differs from the fp32 reference"):
        answers.check_answer(bundle, bundle.full, found, "fp32", "good")


def test_every_width_is_timed_at_every_batch_size_those_wanted_most_first(
    gpu: Gpu, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subnetworks, "BATCHES", (1, 3))
    monkeypatch.setattr("ddsm_engine.measure.gpu.work.BACKENDS", ("good", "uncapturable", "host"))
    subnetworks.measure(work, 32)
    assert [(row["batch"], row["eighths"], row["backend"]) for row in work.rows] == [
        (batch, eighths, name)
        for batch in (1, 3)
        for eighths in (8, 2, 4, 6, 3, 5, 7)
        for name in ("good", "uncapturable", "host")
    ]
    ways = {row["backend"]: row.get("execution", row.get("error")) for row in work.rows}
    assert (ways["good"], ways["uncapturable"]) == ("graphs", "launches")
    assert "takes and returns arrays of the host" in str(ways["host"])
    for row in work.rows:
        if row["backend"] != "host":
            assert row["relative_l2"] == 0
            assert "swap_ms" not in row, "zero would not be measured"
            assert row["repeats"] >= 3
            assert row["gflops_per_s"] == pytest.approx(row["batch"] * row["gflops"] / row["median_ms"] * 1e3)


def test_an_engine_that_answers_something_else_is_not_timed(
    gpu: Gpu, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.wrong = {"good"}
    monkeypatch.setattr(subnetworks, "time_launches", lambda *_, **__: pytest.fail("timed"))
    subnetworks.measure(work, 32)
    assert all(re.search(r"on good \(fp32\) differs .* it was not timed", row["error"]) for row in work.rows)
    assert len(work.rows) == 21


def test_a_row_of_launches_is_waited_for_once_and_divided_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    launched: list[int] = []
    clock = iter(range(1000))
    # The clock is asked around one launch, which then takes a second: ten of them are a sample of ten seconds.
    monkeypatch.setattr(device_timing, "SAMPLE_S", 10.0)
    monkeypatch.setattr("ddsm_engine.measure.gpu.device_timing.time.perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(device_timing, "time_in_turns", lambda calls, **_: timed(calls))

    def timed(calls: Any) -> Any:
        before, waited = len(launched), device.synchronizations
        calls[""]()
        assert (len(launched) - before, device.synchronizations - waited) == (10, 1)
        return {"": Timing(50.0, 40.0, 60.0, 7)}

    found = device_timing.time_launches(device, lambda: launched.append(1))
    assert found == Timing(5.0, 4.0, 6.0, 7)


def test_the_floor_is_what_more_kernels_take_and_not_the_launch_of_their_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    timed: list[float] = []

    def timing(device: FakeDevice, launch: Callable[[], None]) -> Any:
        before = len(counted)
        launch()
        count = len(counted) - before
        # 2 ms for any graph and a microsecond for each of its kernels; the second pair is launched one by one.
        timed.append(2 + count / 1000 if len(timed) < 2 else 4 * count / 1000)
        return SimpleNamespace(median_ms=timed[-1])

    device = FakeDevice(kernels={ceilings.NOTHING: lambda device, argument: counted.append(1)})
    monkeypatch.setattr(ceilings, "time_launches", timing)
    found = ceilings.kernel_floor(device)
    assert found["us_in_a_graph"] == pytest.approx(1.0)
    assert found["us_launched"] == pytest.approx(4.0)
    assert found["graph_of_fewer_ms"] == pytest.approx(2.1)


# --- swaps ------------------------------------------------------------------------------------------------------------


def clock_of(durations_us: Sequence[float]) -> NDArray[np.int64]:
    ends = np.cumsum([1000 * duration for duration in durations_us]).astype(np.int64) + 10**18
    return np.stack([np.concatenate([[10**18], ends[:-1]]), ends], axis=1)


def test_a_swap_is_what_a_call_takes_beyond_those_that_follow_their_own() -> None:
    variants = ["a", "a", "a", "b", "b", "a", "a", "b"]
    #     the first counts for nothing ─╮        b's first: 21 + 3      a's: 10 + 5        21 + 1
    clock = clock_of([99, 10, 10, 24, 21, 15, 12, 22])
    found = swap_gaps(variants, [clock])
    assert found is not None
    assert found["swaps"] == 3
    assert found["mean_us"] == pytest.approx((3 + 5 + 1) / 3)
    assert found["p99_us"] == pytest.approx(np.percentile([3, 5, 1], 99))
    assert found["non_swap_p99_us"] == pytest.approx(np.percentile([0, 0, 0, 2], 99))
    assert found["clock_step_ns"] == 1000


def test_repetitions_share_their_medians() -> None:
    variants = ["a", "a", "b", "b"]
    found = swap_gaps(variants, [clock_of([5, 5, 9, 7]), clock_of([5, 5, 8, 7]), clock_of([5, 5, 12, 30])])
    assert found is not None
    assert found["swaps"] == 3
    assert found["mean_us"] == pytest.approx((2 + 1 + 5) / 3), "7 µs is the median of b's calls after their own"


@pytest.mark.parametrize("variants", [["a"], ["a", "a", "a"], ["a", "b", "a", "b"]])
def test_without_a_call_of_each_kind_there_is_nothing_to_compare(variants: list[str]) -> None:
    assert swap_gaps(variants, [clock_of([5.0] * len(variants))]) is None


# --- strategies -------------------------------------------------------------------------------------------------------

SETTING = Setting(size=SIZE, batch=2, calls=10, eighths=(8, 2), seconds=0.0)


def test_r_is_the_part_of_the_promised_speed_up_that_arrives() -> None:
    assert speed_up(10.0, 4.0, 40.0, 10.0) == {"theoretical": 4.0, "realised": 2.5, "r": 0.625}


def test_the_plans_are_uniform_runs_and_the_bundles_strategies_over_timesteps(bundle: Bundle) -> None:
    plans = make_plans(bundle, SETTING)
    assert list(plans) == ["uniform 8/8", "uniform 2/8", "coarse"]
    assert all(len(plan.variants) == 10 for plan in plans.values())
    assert set(plans["uniform 2/8"].variants) == {"w008"}
    assert len(set(plans["coarse"].variants)) > 1
    assert (plans["coarse"].update[:-1, 0, -1] != 0).all(), "noise is drawn as often as by the published sampler"


def test_every_way_is_compared_bit_by_bit_and_timed(gpu: Gpu, work: Work, bundle: Bundle) -> None:
    strategies.measure(work, SETTING)
    assert [row["execution"] for row in work.rows] == list(strategies.WAYS)
    assert set(strategies.WAYS) == set(EXECUTIONS)
    for row in work.rows:
        assert row["bit_exact"] is True
        runs = row["runs"]
        assert list(runs) == ["uniform 8/8", "uniform 2/8", "coarse"]
        for name, plan in make_plans(bundle, SETTING).items():
            run = runs[name]
            macs = sum(bundle.variants[variant].macs for variant in plan.variants)
            assert run["theoretical"] == pytest.approx(10 * bundle.full.macs / macs)
            assert run["realised"] == pytest.approx(runs["uniform 8/8"]["median_ms"] / run["median_ms"])
            assert run["r"] == pytest.approx(run["realised"] / run["theoretical"])
            assert run["isolated_ms"] == pytest.approx(sum(row["isolated_ms"][variant] for variant in plan.variants))
            assert run["over_isolated"] == pytest.approx(run["median_ms"] / run["isolated_ms"])
            assert run["gflops_per_s"] == pytest.approx(2 * 2 * macs / 1e9 / run["median_ms"] * 1e3)
            assert run["repeats"] >= 3
        assert runs["uniform 8/8"]["r"] == 1
        assert runs["uniform 8/8"]["swap"] is None
        assert runs["coarse"]["swap"]["swaps"] >= 3
    assert len(gpu.opened) == len(set(gpu.opened)), "the ways share their engines"
    assert json.loads(json.dumps(work.rows)) == work.rows


def test_a_way_that_the_driver_refuses_is_a_row_with_its_words(gpu: Gpu, work: Work) -> None:
    gpu.refuses = {"loop"}
    strategies.measure(work, SETTING)
    errors = {row["execution"]: row.get("error") for row in work.rows}
    assert errors == {"graphs": None, "chain": None, "launches": None, "loop": "the driver refused a loop (invented)"}


def test_other_bits_than_those_of_plain_launches_are_not_timed(
    gpu: Gpu, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = strategies.Runs._run

    def spoilt(self: strategies.Runs, plan: Any, way: str) -> Any:
        clock, x = run(self, plan, way)
        return clock, x[:-1] + b"?" if way == "chain" and len(set(plan.variants)) > 1 else x

    monkeypatch.setattr(strategies.Runs, "_run", spoilt)
    strategies.measure(work, SETTING)
    rows = {row["execution"]: row for row in work.rows}
    assert rows["chain"]["bit_exact"] is False
    assert rows["chain"]["error"] == "coarse left other bits than plain launches; it was not timed"
    assert "runs" not in rows["chain"]
    assert all(rows[way]["bit_exact"] for way in ("graphs", "loop", "launches"))


def test_a_backend_that_answers_something_else_runs_no_strategy(gpu: Gpu, work: Work) -> None:
    gpu.wrong = {"good"}
    strategies.measure(work, SETTING)
    assert len(work.rows) == 4
    assert all("it was not timed" in row["error"] for row in work.rows)


def test_only_what_was_not_measured_is_run_again(gpu: Gpu, work: Work, bundle: Bundle, tmp_path: Path) -> None:
    strategies.measure(work, SETTING)
    gpu.opened.clear()
    strategies.measure(Work({SIZE: bundle}, 60, tmp_path / "rows.jsonl"), SETTING)
    assert gpu.opened == []


# --- memory and peers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("narrow_bytes", "is_one"), [(64, True), (10_000, False)])
def test_seven_engines_need_the_block_of_the_largest(
    gpu: Gpu, work: Work, monkeypatch: pytest.MonkeyPatch, narrow_bytes: int, is_one: bool
) -> None:
    monkeypatch.setattr(memory, "BATCH", 2)
    gpu.scratch = lambda variant: 8192 if variant.width == 32 else narrow_bytes
    memory.measure(work)
    (row,) = work.rows
    assert row["variants"] == 7
    assert row["is_shared"]
    assert row["activation_bytes_of_the_largest"] == 8192
    assert (row["activation_bytes_of_all"] == 8192) == is_one
    assert row["used_bytes_before"] is None, "nothing is invented where the driver cannot be asked"


def test_pools_of_torch_count_as_activations_and_what_was_there_before_does_not(
    gpu: Gpu, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "BATCH", 2)
    gpu.scratch = lambda variant: 0
    # Before, with the widest, and with each of the other six: a narrower engine once made the pool grow.
    pools = iter([100, 600, 600, 700, 700, 700, 700, 700])
    monkeypatch.setattr(memory, "pooled_bytes", lambda: next(pools))
    memory.measure(work)
    (row,) = work.rows
    assert (row["activation_bytes_of_the_largest"], row["activation_bytes_of_all"]) == (500, 600)
    assert row["is_shared"]


def test_only_pools_of_somebodys_own_are_counted(torch_on_the_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [
        {"segment_pool_id": pool, "total_size": size} for pool, size in (((0, 0), 5), ((0, 7), 20), ((0, 8), 3))
    ]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert torch_gpu.pooled_bytes() == 23


@pytest.fixture
def torch_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What peers and ceilings do, with the CPU in the GPU's place."""
    for module in (torch_gpu, peers, ceilings):
        monkeypatch.setattr(module, "DEVICE", "cpu")
        monkeypatch.setattr(module, "cuda_torch", lambda: torch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_an_eager_peer_answers_draws_by_our_plan_and_is_timed_by_call(
    torch_on_the_cpu: None, work: Work, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "PEERS", (peers.EAGER,))
    monkeypatch.setattr(peers, "WIDTHS", (8, 2))
    monkeypatch.setattr(peers, "CALLS", {1: 4})
    monkeypatch.setattr(peers, "SECONDS", 0.0)
    peers.measure(work)
    assert [(row["peer"], row["batch"], row["eighths"]) for row in work.rows] == [("eager", 1, 8), ("eager", 1, 2)]
    for row in work.rows:
        assert 0 < row["relative_l2"] <= TOLERANCES["bf16"].relative_l2
        assert row["precision"] == "bf16"
        assert row["repeats"] >= 3
        assert row["median_ms"] > 0


def test_a_peers_loop_makes_the_update_of_the_plan(torch_on_the_cpu: None, bundle: Bundle) -> None:
    plan = make_plans(bundle, Setting(size=SIZE, batch=2, calls=3))["uniform 8/8"]
    torch.manual_seed(5)
    found = peers.draw(lambda x, features: 0.5 * x, plan, 2, (3, 8, 8))
    torch.manual_seed(5)
    x = torch.randn(2, 3, 8, 8)
    for of_x, of_eps, _, of_noise in plan.update[:, 0].tolist():
        x = of_x * x + of_eps * (0.5 * x.to(torch.bfloat16)).float()
        x = x + of_noise * torch.randn_like(x) if of_noise else x
    assert torch.equal(found, x)


def test_a_loops_time_is_divided_by_its_calls(bundle: Bundle) -> None:
    plan = make_plans(bundle, SETTING)["uniform 8/8"]
    assert peers.per_call(Timing(50.0, 40.0, 60.0, 3), plan) == Timing(5.0, 4.0, 6.0, 3)


def test_torchs_own_words_become_a_refusal(torch_on_the_cpu: None, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("CUDA error:\nan illegal memory access")

    monkeypatch.setattr(peers, "network_of", fail)
    monkeypatch.setattr(peers, "PEERS", (peers.REDUCED,))
    monkeypatch.setattr(peers, "CALLS", {1: 4})
    peers.measure(work)
    assert [row["error"] for row in work.rows] == 3 * [
        "torch.compile reduce-overhead failed: CUDA error: an illegal memory access"
    ]


@pytest.mark.parametrize("measure", [ceilings.measure_ceilings, peers.measure])
def test_without_a_gpu_torch_is_refused(work: Work, measure: Callable[[Work], None]) -> None:
    with pytest.raises(BackendError, match="torch sees no GPU here"):
        measure(work)


# --- the suite and its file -------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The machine that the suite believes to be on; a test may change it."""
    here = {"cpu": "A processor", "cores": 2, "versions": {"torch": "9.8"}, "commit": "abc", "date": "2026-01-02T03:04"}
    monkeypatch.setattr(machine, "environment", lambda: copy.deepcopy(here))
    monkeypatch.setattr(machine, "clocks", lambda: None)
    monkeypatch.setattr(machine, "_version", lambda name: None)
    monkeypatch.setattr(suite, "find_gpu", lambda: H100)
    return here


def run(bundle_path: Path, output: Path, measure: suite.RunPart, names: Sequence[str] = ()) -> list[str]:
    lines: list[str] = []
    suite.run_suite([bundle_path], output, names, lines.append, measure)
    return lines


def one_row(name: str, file: Path, seconds: float) -> None:
    with file.open("a") as opened:
        opened.write(json.dumps({"of": name}) + "\n")


def test_parts_are_run_in_order_and_written_as_they_end(here: Any, bundle_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    seen: list[str] = []

    def measure(name: str, file: Path, seconds: float) -> None:
        statuses = {} if not output.exists() else {n: p["status"] for n, p in suite.load(output)["parts"].items()}
        assert [n for n, status in statuses.items() if status == "done"] == seen
        seen.append(name)
        one_row(name, file, seconds)

    lines = run(bundle_path, output, measure)
    assert seen == list(PARTS)
    result = suite.load(output)
    assert (result["format"], result["format_version"]) == ("ddsm-gpu-suite", 1)
    assert result["environment"]["gpu"]["name"] == "Invented H100"
    assert result["environment"]["gpu"]["cuda"] == "13.0"
    assert result["environment"]["bundles"] == {"8": Bundle.open(bundle_path).manifest.checksum}
    for name, part in result["parts"].items():
        assert part["rows"] == [{"of": name}]
        assert (part["status"], part["error"], part["left_out"]) == ("done", None, [])
        assert part["seconds"] >= 0
    assert verdict_table(result, [bundle_path], output) in lines[-1]
    assert sorted(tmp_path.iterdir()) == [output], "no leftovers"


def test_a_part_that_is_done_is_not_run_again(here: Any, bundle_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    seen: list[str] = []

    def measure(name: str, file: Path, seconds: float) -> None:
        seen.append(name)
        one_row(name, file, seconds)

    run(bundle_path, output, measure, ["peers"])
    before = suite.load(output)["parts"]["peers"]
    assert "peers: done before" in run(bundle_path, output, measure, ["memory", "peers"])
    assert seen == ["peers", "memory"]
    assert suite.load(output)["parts"]["peers"] == before
    assert suite.load(output)["parts"]["ceilings"]["status"] == "not run"


def test_a_part_that_fails_is_recorded_and_the_others_go_on(here: Any, bundle_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"

    def measure(name: str, file: Path, seconds: float) -> str | None:
        one_row(name, file, seconds)
        return "expected a loop, found none" if name == "peers" else None

    with pytest.raises(BackendError, match="1 of 11 parts failed: peers; run it again for these"):
        run(bundle_path, output, measure)
    statuses = {name: part["status"] for name, part in suite.load(output)["parts"].items()}
    assert statuses == {name: "failed" if name == "peers" else "done" for name in PARTS}
    peers_part = suite.load(output)["parts"]["peers"]
    assert peers_part["error"] == "expected a loop, found none"
    assert peers_part["rows"] == [{"of": "peers"}], "what it had measured is kept"


def test_a_part_goes_on_with_its_rows_and_tries_again_what_was_refused_or_left_out(
    here: Any, bundle_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "gpu.json"
    given: list[Any] = []
    told = [{"n": 1}, {"n": 2, "error": "no"}, {"left_out": {"n": 3}}]

    def measure(name: str, file: Path, seconds: float) -> None:
        given.append(read_rows(file))
        with file.open("a") as opened:
            opened.writelines(json.dumps(line) + "\n" for line in (told if len(given) == 1 else told[:0]))

    (line,) = [line for line in run(bundle_path, output, measure, ["memory"]) if line.startswith("memory: ")]
    assert re.fullmatch(r"memory: done, 2 rows in \d+ s; 1 of them refused; 1 left out as its share .*", line)
    assert suite.load(output)["parts"]["memory"]["left_out"] == [{"n": 3}]
    run(bundle_path, output, measure, ["memory"])
    assert given == [([], []), ([{"n": 1}], [])]


def test_an_interrupt_keeps_the_rows_that_were_measured(here: Any, bundle_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"

    def measure(name: str, file: Path, seconds: float) -> None:
        one_row(name, file, seconds)
        if name == "kernel-floor":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(bundle_path, output, measure)
    found = suite.load(output)["parts"]
    assert [found[name]["status"] for name in ("ceilings", "kernel-floor", "peers")] == ["done", "not run", "not run"]
    assert found["kernel-floor"]["rows"] == [{"of": "kernel-floor"}]


@pytest.mark.parametrize(("key", "value"), [("commit", "abd"), ("cpu", "Another"), ("versions", {"torch": "9.9"})])
def test_a_result_of_another_machine_or_commit_is_not_gone_on_with(
    here: dict[str, Any], bundle_path: Path, tmp_path: Path, key: str, value: Any
) -> None:
    output = tmp_path / "gpu.json"
    run(bundle_path, output, one_row, ["memory"])
    before = output.read_bytes()
    here[key] = value
    with pytest.raises(OutputError, match=f"begun with another {key}; choose another -o"):
        run(bundle_path, output, one_row)
    assert output.read_bytes() == before


def test_time_that_a_part_leaves_is_the_next_ones_and_what_it_takes_more_is_theirs_too(
    here: Any, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, took = [1000.0], {"ceilings": 3, "kernel-floor": 200}
    given: dict[str, float] = {}
    monkeypatch.setattr("ddsm_engine.measure.gpu.suite.time.monotonic", lambda: now[0])

    def measure(name: str, file: Path, seconds: float) -> None:
        given[name] = seconds
        now[0] += took.get(name, 0)

    lines = run(bundle_path, tmp_path / "gpu.json", measure)
    shares = [part.seconds for part in PARTS.values()]
    assert given["ceilings"] == shares[0]
    assert given["kernel-floor"] == sum(shares[:2]) - 3
    assert "strategies-b1" not in given
    assert "strategies-b1: not run, the parts before it took its time; the same command goes on" in lines
    assert given["strategies-b256"] == sum(shares[:4]) - 203
    assert suite.load(tmp_path / "gpu.json")["parts"]["strategies-b1"]["status"] == "not run"


def test_a_result_of_another_gpu_is_not_gone_on_with(
    here: Any, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "gpu.json"
    run(bundle_path, output, one_row, ["memory"])
    here["date"] = "2026-02-03T04:05"
    run(bundle_path, output, one_row, ["memory"])  # another day is no other machine
    monkeypatch.setattr(suite, "find_gpu", lambda: type(H100)("Another", "9.0", "580.65.06", (13, 0), 80 << 30))
    with pytest.raises(OutputError, match="begun with another gpu"):
        run(bundle_path, output, one_row)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not JSON", "is no result of the GPU suite"),
        ('{"format": "another"}', "is no result of the GPU suite in format version 1"),
        ('{"format": "ddsm-gpu-suite", "format_version": 2}', "in format version 1"),
        ('{"format": "ddsm-gpu-suite", "format_version": 1, "parts": {}}', "does not hold the parts"),
    ],
)
def test_what_is_no_result_is_not_written_over(
    here: Any, bundle_path: Path, tmp_path: Path, content: str, message: str
) -> None:
    output = tmp_path / "gpu.json"
    output.write_text(content)
    with pytest.raises(OutputError, match=message):
        run(bundle_path, output, one_row)
    assert output.read_text() == content


@pytest.mark.parametrize(
    ("key", "value"), [("rows", 5), ("rows", [5]), ("left_out", None), ("status", "perhaps"), ("seconds", "3")]
)
def test_a_damaged_part_is_refused_in_a_line(
    here: Any, bundle_path: Path, tmp_path: Path, key: str, value: Any
) -> None:
    output = tmp_path / "gpu.json"
    run(bundle_path, output, one_row, ["memory"])
    result = suite.load(output)
    result["parts"]["peers"][key] = value
    output.write_text(json.dumps(result))
    with pytest.raises(OutputError, match="is damaged: peers is no part"):
        run(bundle_path, output, one_row)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    here: Any, bundle_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not a folder"):
        run(bundle_path, tmp_path / "file" / "gpu.json", lambda name, file, seconds: pytest.fail("measured"))


def test_the_shares_are_ten_minutes_at_most_and_the_readme_says_them() -> None:
    assert sum(part.seconds for part in PARTS.values()) + suite.GRACE_S <= 600
    readme = _report.README.read_text(encoding="utf-8")
    shares = re.findall(r"^\| (`[^|]*) \|[^|]*\| ([\d, ]+) \|$", readme, re.MULTILINE)
    said: dict[str, float] = {}
    for names, seconds in shares:
        first, *others = re.findall(r"`([^`]+)`", names)
        full = [first, *(first.rpartition("-")[0] + other for other in others)]
        said |= dict(zip(full, map(float, seconds.split(", ")), strict=True))
    assert said == {name: part.seconds for name, part in PARTS.items()}


# --- a part in its own process ----------------------------------------------------------------------------------------


def test_a_real_process_that_refuses_is_a_failed_part_of_one_line(bundle_path: Path, tmp_path: Path) -> None:
    said = suite._in_its_own_process([bundle_path])("ceilings", tmp_path / "rows.jsonl", 60)
    assert said == "torch sees no GPU here; install a build of it for CUDA"


def test_a_part_that_does_not_end_is_stopped(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "GRACE_S", 0.01)
    said = suite._in_its_own_process([bundle_path])("ceilings", tmp_path / "rows.jsonl", 0.01)
    assert said == "stopped after 0 s: what it had begun did not end"


# --- the command ------------------------------------------------------------------------------------------------------


def test_without_a_gpu_the_targets_are_printed_as_not_run_and_nothing_is_written(
    bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "gpu.json"
    assert bench.main([str(bundle_path), "--suite", "gpu", "-o", str(output)]) == 1
    said = capsys.readouterr()
    assert said.out == verdict_table(None, [bundle_path], output) + "\n"
    assert re.fullmatch(r"error: .*GPU.*\n", said.err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "gpu"], "needs -o FILE.json"),
        (
            ["--suite", "gpu", "-o", "x.json", "--part", "swaps"],
            "unknown part 'swaps'; expected ceilings, kernel-floor",
        ),
        (["--suite", "gpu", "-o", "x.json", "--batch-size", "2", "--save"], "leave out --batch-size, --save"),
        (["-o", "x.json"], "belong to --suite gpu"),
        (["--part", "peers"], "belong to --suite gpu"),
        (["another.bundle"], "belong to --suite gpu"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    bundle_path: Path, refusal: Refusal, arguments: list[str], message: str
) -> None:
    assert message in refusal(bench.main, bundle_path, *arguments)


def test_the_command_passes_the_parts_on(
    here: Any, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "_in_its_own_process", lambda paths: one_row)
    output = tmp_path / "gpu.json"
    assert bench.main([str(bundle_path), "--suite", "gpu", "-o", str(output), "--part", "peers", "memory"]) == 0
    assert f"written: {output}" in capsys.readouterr().out
    assert [name for name, part in suite.load(output)["parts"].items() if part["rows"]] == ["peers", "memory"]


# --- our own kernels --------------------------------------------------------------------------------------------------


def test_the_update_is_timed_behind_a_network_that_does_nothing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "open_device", lambda backend: FakeDevice())
    row = kernels.update_alone(bundle, 3)
    assert row["median_ms"] == pytest.approx(1e-3), "the invented clock's microsecond a call"
    values = 3 * np.prod(bundle.manifest.spec.sample_shape)
    assert row["bytes"] == 16 * values
    assert row["gb_per_s"] == pytest.approx(16 * values / 1e-3 / 1e6)


def test_a_profile_names_the_dearest_kernels_first() -> None:
    events = [SimpleNamespace(key=f"k{us}", count=2, self_device_time_total=us) for us in (0.0, 3.0, 9.0, 1.0)]

    @contextmanager
    def profile(activities: Sequence[str]) -> Iterator[Any]:
        assert activities == ["gpu"]
        yield SimpleNamespace(key_averages=lambda: events)

    ran: list[int] = []
    torch = SimpleNamespace(
        profiler=SimpleNamespace(profile=profile, ProfilerActivity=SimpleNamespace(CUDA="gpu")),
    )
    rows = kernels.profiled(torch, SimpleNamespace(run=lambda: ran.append(1)))  # type: ignore[arg-type]
    assert [(row["name"], row["launches"], row["us"]) for row in rows] == [
        ("k9.0", 2, 9),
        ("k3.0", 2, 3),
        ("k1.0", 2, 1),
    ]
    assert ran == [1]


def test_a_fused_norm_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = pytest.importorskip("ddsm_kernels.group_norm_silu", reason="needs Triton")
    monkeypatch.setattr(kernels, "cuda_torch", lambda: torch)
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(kernels, "time_events", lambda call: Timing(0.5, 0.5, 0.5, 1))
    right = fused.group_norm_silu_reference
    monkeypatch.setattr(fused, "group_norm_silu", right)
    row = kernels.fused_norm((2, 32, 8, 8))
    assert row["bytes"] == 2 * 2 * 32 * 64 * 2
    assert row["gb_per_s"] == pytest.approx(row["bytes"] / 0.5 / 1e6)
    monkeypatch.setattr(fused, "group_norm_silu", lambda x, groups, *rest: right(x, groups // 2, *rest))
    with pytest.raises(BackendError, match="fused norm differs from torch's"):
        kernels.fused_norm((2, 32, 8, 8))
