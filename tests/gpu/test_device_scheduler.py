"""The run without the host computes what the reference interpreter computes, whichever way it is put on the stream."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ddsm_engine.backends.device import StagedEngine
from ddsm_engine.device_scheduler import CHAIN_CALLS, EXECUTIONS, DeviceScheduler, tables_of, takes
from ddsm_engine.errors import BackendError
from ddsm_engine.noise import SeededNoise
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.plan import Plan, plan_calls
from ddsm_engine.samplers import make_sampler
from ddsm_engine.scheduler import Scheduler
from ddsm_engine.time_table import TimeTable
from ddsm_kernels import update
from tests.gpu.fake import A100, FakeDevice, FakeEngine, update_kernel

SHAPE = (3, 2, 5, 3)  # 30 elements: the last quad of every image is not full
FEATURES = {"narrow": 4, "wide": 4, "expert": 6}
TABLES = {variant: TimeTable.sinusoidal(1000, features) for variant, features in FEATURES.items()}
SCHEDULE = NoiseSchedule(1e-4, 0.02, 1000)
Array = NDArray[np.float32]


def network(variant: str) -> Callable[[Array, Array], Array]:
    """A smooth function of the sample and of every time feature, another one for each variant."""
    rng = np.random.default_rng(sum(variant.encode()))
    of_sample = rng.standard_normal((30, 30)).astype(np.float32) / 8
    of_time = rng.standard_normal((FEATURES[variant], 30)).astype(np.float32)

    def answer(sample: Array, features: Array) -> Array:
        with np.errstate(invalid="ignore"):  # of a state that an earlier call spoilt
            return np.tanh(sample.reshape(len(sample), -1) @ of_sample + features @ of_time).reshape(sample.shape)

    return answer


def engine(device: FakeDevice, variant: str, **settings: Any) -> FakeEngine:
    return FakeEngine(device, network(variant), SHAPE, FEATURES[variant], **settings)


def make_plan(sampler: Any = "ddpm", steps: int = 12, **options: Any) -> Plan:
    table = make_sampler(sampler, SCHEDULE, steps, **options)
    pattern = ("wide", "narrow", "narrow", "expert", "narrow")
    return plan_calls([pattern[call % len(pattern)] for call in range(table.calls)], table, TABLES)


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    device = FakeDevice()
    yield device
    device.close()


def scheduler_on(device: FakeDevice, **settings: Any) -> DeviceScheduler:
    scheduler = DeviceScheduler(device, SHAPE)
    for variant in FEATURES:
        scheduler.add(variant, engine(device, variant, **settings), FEATURES[variant])
    return scheduler


def expected(plan: Plan, noise: SeededNoise) -> Array:
    """The reference interpreter's result, over the same networks."""
    reference, device = Scheduler(SHAPE), FakeDevice()
    for variant in FEATURES:
        reference.add(variant, StagedEngine(device, engine(device, variant)), FEATURES[variant])
    reference.run(plan, noise)
    return reference.x.copy()


SAMPLERS: tuple[tuple[Any, dict[str, Any]], ...] = (
    ("ddpm", {}),
    ("ddpm", {"clip_sample": 0.5}),
    ("ddim", {}),
    ("ddim", {"eta": 0.7, "clip_sample": 1.0}),
    ("heun", {}),
    ("dpm++3m", {}),
    ("dpm++2s", {"clip_sample": 1.0}),
    ("unipc", {"clip_sample": 0.8}),
    ("euler:karras", {}),
)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(("sampler", "options"), SAMPLERS)
def test_every_way_computes_the_reference_interpreters_bits(
    device: FakeDevice, execution: str, sampler: Any, options: dict[str, Any]
) -> None:
    plan, noise = make_plan(sampler, **options), SeededNoise(2**63 + 5, first_image=7)
    scheduler = scheduler_on(device)
    clock = scheduler.run(plan, noise, execution=execution)
    assert scheduler.execution == execution
    assert scheduler.x.tobytes() == expected(plan, noise).tobytes()
    assert clock.shape == (len(plan.variants), 2)
    assert (np.diff(clock.reshape(-1)) >= 0).all()


def test_another_seed_strategy_or_order_of_networks_is_another_result(device: FakeDevice) -> None:
    scheduler, noise = scheduler_on(device), SeededNoise(1)
    plan = make_plan()
    results = set()
    others = replace(plan, variants=(*plan.variants[1:], plan.variants[0]), time_features=plan.time_features)
    narrow = plan_calls(["narrow"] * len(plan.variants), make_sampler("ddpm", SCHEDULE, 12), TABLES)
    for asked, source in ((plan, noise), (plan, SeededNoise(2)), (narrow, noise), (plan, noise.starting_at(3))):
        scheduler.run(asked, source)
        results.add(scheduler.x.tobytes())
    assert len(results) == 4
    assert others.variants != plan.variants


def test_a_loop_is_one_launch_and_serves_every_strategy_over_its_variants(device: FakeDevice) -> None:
    scheduler = scheduler_on(device)
    first, second = make_plan("ddim", 10), make_plan("ddpm", 15)
    scheduler.run(first, SeededNoise(1))
    before = device.launches
    for plan in (first, second, first):
        scheduler.run(plan, SeededNoise(1))
        assert scheduler.execution == "loop"
        assert scheduler.x.tobytes() == expected(plan, SeededNoise(1)).tobytes()
    assert device.launches - before == 3


def test_graphs_are_one_launch_a_call_and_the_start(device: FakeDevice) -> None:
    scheduler, plan = scheduler_on(device), make_plan()
    scheduler.run(plan, SeededNoise(0), execution="graphs")
    before = device.launches
    scheduler.run(plan, SeededNoise(0), execution="graphs")
    assert device.launches - before == len(plan.variants) + 1


def test_nothing_waits_inside_a_run(device: FakeDevice) -> None:
    scheduler = scheduler_on(device)
    for execution in EXECUTIONS:
        counted = []
        for steps in (5, 50):
            plan = make_plan("ddim", steps)
            scheduler.run(plan, SeededNoise(0), execution=execution)
            before = device.synchronizations
            scheduler.run(plan, SeededNoise(0), execution=execution)
            counted.append(device.synchronizations - before)
        assert counted[0] == counted[1], execution


# --- which way --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refused", "steps", "taken"),
    [
        ((), 12, "loop"),
        (("loop",), 12, "chain"),
        (("loop",), CHAIN_CALLS + 1, "graphs"),
        (("capture",), 12, "launches"),
        (("instantiate",), 12, "launches"),
        (("record",), 12, "launches"),
    ],
)
def test_what_the_driver_refuses_is_said_once_and_done_the_next_best_way(
    caplog: pytest.LogCaptureFixture, refused: tuple[str, ...], steps: int, taken: str
) -> None:
    device = FakeDevice(refuses=refused)
    scheduler, plan = scheduler_on(device), make_plan("ddim", steps)
    with caplog.at_level(logging.WARNING):
        scheduler.run(plan, SeededNoise(3))
        said = len(caplog.records)
        scheduler.run(plan, SeededNoise(3))
    assert scheduler.execution == taken
    assert scheduler.x.tobytes() == expected(plan, SeededNoise(3)).tobytes()
    assert len(caplog.records) == said == {"loop": 0, "chain": 1, "graphs": 1, "launches": 3}[taken]


def test_a_driver_before_cuda_12_8_is_not_asked_for_a_loop(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = scheduler_on(FakeDevice(A100))
    scheduler.run(make_plan(), SeededNoise(0))
    assert scheduler.execution == "chain"
    assert not caplog.records


def test_a_driver_that_cannot_steer_a_loop_is_given_a_kernel_that_does_not(caplog: pytest.LogCaptureFixture) -> None:
    scheduler, plan = scheduler_on(FakeDevice(refuses=["compile with a loop"])), make_plan()
    scheduler.run(plan, SeededNoise(3))
    assert scheduler.execution == "chain"
    assert scheduler.x.tobytes() == expected(plan, SeededNoise(3)).tobytes()
    assert "knows no cudaGraphSetConditional" in caplog.text
    with pytest.raises(BackendError, match="cannot be put on this GPU as one launch"):
        scheduler.run(plan, SeededNoise(3), execution="loop")


def test_engines_that_cannot_be_captured_are_launched_one_by_one(device: FakeDevice) -> None:
    scheduler, plan = scheduler_on(device, is_capturable=False), make_plan()
    scheduler.run(plan, SeededNoise(3))
    assert scheduler.execution == "launches"
    assert scheduler.x.tobytes() == expected(plan, SeededNoise(3)).tobytes()


def test_a_way_that_was_asked_for_by_name_is_refused_rather_than_replaced() -> None:
    scheduler = scheduler_on(FakeDevice(refuses=["loop"]))
    with pytest.raises(BackendError, match="refused a loop"):
        scheduler.run(make_plan(), SeededNoise(0), execution="loop")
    with pytest.raises(BackendError, match="expected loop, chain, graphs, launches"):
        scheduler.run(make_plan(), SeededNoise(0), execution="eager")


def test_dynamic_thresholding_needs_the_host() -> None:
    config = {"_class_name": "DDIMScheduler", "thresholding": True}
    assert not takes(make_plan(config))
    assert takes(make_plan(clip_sample=1.0))


# --- engines that go wrong --------------------------------------------------------------------------------------------


def test_an_engine_that_writes_nothing_is_found_before_the_run(device: FakeDevice) -> None:
    scheduler = scheduler_on(device)
    silent = engine(device, "narrow")
    silent.enqueue = lambda: None  # type: ignore[method-assign]
    scheduler.add("narrow", silent, FEATURES["narrow"])
    with pytest.raises(BackendError, match="engine of narrow wrote nothing"):
        scheduler.run(make_plan(), SeededNoise(0))


def test_a_graph_that_computes_something_else_is_not_used(device: FakeDevice, caplog: pytest.LogCaptureFixture) -> None:
    calls = iter(range(10**6))
    honest = network("wide")

    def drifting(sample: Array, features: Array) -> Array:
        return honest(sample, features) + np.float32(next(calls))

    scheduler = scheduler_on(device)
    scheduler.add("wide", FakeEngine(device, drifting, SHAPE, FEATURES["wide"]), FEATURES["wide"])
    scheduler.run(make_plan("ddim", 3), SeededNoise(0))
    assert scheduler.execution == "launches"
    assert "does not compute what its engine computes" in caplog.text


def test_a_value_that_is_not_finite_names_the_call_that_left_it(device: FakeDevice) -> None:
    scheduler, plan = scheduler_on(device), make_plan("ddim", 10)
    honest = network("expert")

    def breaks(sample: Array, features: Array) -> Array:
        return honest(sample, features) * (np.float32(1) if not sample.any() else np.float32(np.inf))

    scheduler.add("expert", FakeEngine(device, breaks, SHAPE, FEATURES["expert"]), FEATURES["expert"])
    with pytest.raises(BackendError, match=r"call 3 \(timestep \d+\) of variant expert"):
        scheduler.run(plan, SeededNoise(0))
    healthy = plan_calls(["wide"] * 10, make_sampler("ddim", SCHEDULE, 10), TABLES)
    scheduler.run(healthy, SeededNoise(0))
    assert scheduler.x.tobytes() == expected(healthy, SeededNoise(0)).tobytes(), "the next run is not spoilt"


def test_an_interrupt_ends_a_loop_after_the_current_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def interrupted(device: FakeDevice, argument: int) -> None:
        update_kernel(device, argument)
        (run,) = device.view(argument, (1,), update.RUN)
        progress = int(device.view(int(run["progress"]), (1,), np.int32)[0])
        if run["is_loop"]:
            seen.append(progress)
            if progress == 4:  # the host writes it while the run goes on
                device.view(int(run["stop"]), (1,), np.int32)[0] = 1

    scheduler = scheduler_on(FakeDevice(kernels={update.KERNEL: interrupted}))
    with pytest.raises(BackendError, match="ended after 5 of 12 calls"):
        scheduler.run(make_plan(), SeededNoise(0))
    assert seen == [0, 1, 2, 3, 4, 5]


def test_ctrl_c_while_waiting_stops_the_run(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, plan = scheduler_on(device), make_plan()
    done = iter([False, False])
    monkeypatch.setattr(device, "is_done", lambda: next(done, True))

    def press(calls: int) -> None:
        assert calls == len(plan.variants)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scheduler.run(plan, SeededNoise(0), on_progress=press)
    scheduler.run(plan, SeededNoise(0))
    assert scheduler.x.tobytes() == expected(plan, SeededNoise(0)).tobytes()


# --- memory -----------------------------------------------------------------------------------------------------------


def test_all_engines_share_the_largest_scratch_and_follow_it_when_it_moves(device: FakeDevice) -> None:
    scheduler, plan = DeviceScheduler(device, SHAPE), make_plan()
    for variant, size in (("wide", 1 << 16), ("narrow", 1 << 12), ("expert", 1 << 14)):
        scheduler.add(variant, engine(device, variant, scratch_bytes=size), FEATURES[variant])
    before = device.allocated_bytes
    scheduler.run(plan, SeededNoise(0))
    assert device.scratch.size_bytes == 1 << 16
    assert device.allocated_bytes - before < 1.5 * (1 << 16), "one scratch and the tables"
    scheduler.add("narrow", engine(device, "narrow", scratch_bytes=1 << 20), FEATURES["narrow"])
    scheduler.run(plan, SeededNoise(0))
    assert scheduler.x.tobytes() == expected(plan, SeededNoise(0)).tobytes()


def test_everything_is_given_back(device: FakeDevice) -> None:
    scheduler = scheduler_on(device)
    for plan in (make_plan(), make_plan("unipc", 9)):
        for execution in EXECUTIONS:
            scheduler.run(plan, SeededNoise(0), execution=execution)
    scheduler.close()
    assert device.allocated == 1, "the flags, which last as long as the device"


@pytest.mark.parametrize(("room", "refuses"), [(400, []), (1 << 16, ["shared"])], ids=["memory", "pinned memory"])
def test_one_that_cannot_be_made_keeps_nothing(room: int, refuses: list[str]) -> None:
    device = FakeDevice(replace(A100, memory_bytes=room), refuses)
    with pytest.raises(BackendError, match="out of GPU memory"):
        DeviceScheduler(device, SHAPE)
    assert device.allocated == 0


def test_graphs_of_before_are_released_where_an_engine_is_added_whatever_is_current(device: FakeDevice) -> None:
    scheduler, plan = scheduler_on(device), make_plan()
    scheduler.run(plan, SeededNoise(0))
    graphs = [graph for graph, _ in scheduler._graphs.runs.values()]
    scheduler.add("narrow", engine(device, "narrow"), FEATURES["narrow"])  # a graph is only closed on its device
    assert graphs
    assert not any(graph.is_open for graph in graphs)  # type: ignore[attr-defined]


def test_out_of_memory_is_a_refusal_and_leaks_nothing() -> None:
    device = FakeDevice(replace(A100, memory_bytes=1 << 16))
    scheduler = scheduler_on(device)
    held = device.allocated_bytes
    with pytest.raises(BackendError, match="out of GPU memory"):
        scheduler.run(make_plan("ddpm", 1000), SeededNoise(0))
    assert device.allocated_bytes - held < 1 << 10
    scheduler.run(make_plan("ddim", 5), SeededNoise(0))


def test_a_staged_use_in_between_does_not_disturb_a_run(device: FakeDevice) -> None:
    plan, scheduler = make_plan(), DeviceScheduler(device, SHAPE)
    shared = {variant: engine(device, variant) for variant in FEATURES}
    reference = Scheduler(SHAPE)
    for variant, one in shared.items():
        scheduler.add(variant, one, FEATURES[variant])
        reference.add(variant, StagedEngine(device, one), FEATURES[variant])
    for _ in range(2):
        reference.run(plan, SeededNoise(4))
        for execution in EXECUTIONS:
            scheduler.run(plan, SeededNoise(4), execution=execution)
            assert scheduler.x.tobytes() == reference.x.tobytes()


def test_the_tables_say_where_each_calls_features_are() -> None:
    plan = make_plan("ddim", 7)
    tables = tables_of(plan, [0] * 7)
    for call, row in enumerate(tables["rows"][1:]):
        begin, count = int(row["feature_offset"]), int(row["features"])
        assert np.array_equal(tables["feature_rows"][begin : begin + count], plan.time_features[call])
