import json
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ddsm_engine.backends import BACKENDS, open_engine
from ddsm_engine.backends.engine import Arrays, Engine, EngineOptions
from ddsm_engine.backends.onnxruntime import OnnxRuntimeEngine
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import BackendError, SamplerError
from ddsm_engine.noise import INITIAL, SeededNoise
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.pipeline import Pipeline
from ddsm_engine.plan import Plan, compile_plan, plan_calls
from ddsm_engine.samplers import make_sampler
from ddsm_engine.scheduler import Scheduler
from ddsm_engine.strategy import Strategy
from ddsm_engine.time_table import TimeTable
from tests.conftest import CONFIG, STATE, TINY
from tests.engine.test_strategy import PUBLISHED
from tests.oracle.dynamic_unet import TABLE, dynamic_unet
from tests.oracle.sampling import PublishedSchedule, damped, ddim_states, ddpm_states
from tests.tolerances import TRAJECTORY

SCHEDULE = NoiseSchedule(1e-4, 0.02, 1000)
SHAPE = (2, *TINY.sample_shape)
TABLES = {"w016": TimeTable.sinusoidal(1000, TINY.time_features)}
Array = NDArray[np.float32]
ROWS = {row.tobytes(): t for t, row in enumerate(STATE[TABLE].numpy())}


class DampedEngine:
    """An engine whose output keeps trajectories at unit scale; see ``tests.oracle.sampling.damped``."""

    precision = "fp32"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def bind(self, inputs: Arrays, outputs: Arrays) -> None:
        self.inputs, self.out = inputs, outputs["out_sample"]
        self.engine.bind(inputs, outputs)

    def run(self) -> None:
        self.engine.run()
        t = ROWS[self.inputs["time_features"][0].tobytes()]
        self.out *= np.float32(0.1)
        self.out += self.inputs["sample"] * np.float32(np.sqrt(1 - SCHEDULE.alphas_cumprod[t]))

    def close(self) -> None:
        self.engine.close()


class GivenNoise:
    def __init__(self, x_T: Array, noises: list[Array]) -> None:
        self.x_T, self.noises = x_T, noises

    def fill(self, out: Array, stream: int, call: int) -> None:
        out[...] = self.x_T if stream == INITIAL else self.noises[call]


def random_run(steps: int) -> tuple[Array, list[Array]]:
    rng = np.random.default_rng(steps)
    return rng.standard_normal(SHAPE, dtype=np.float32), list(rng.standard_normal((steps, *SHAPE), dtype=np.float32))


def dynamic_eps(strategy: Strategy) -> Any:
    """The supernet as published: the width is looked up at the timestep in every call."""

    def eps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        choice = strategy.choices[int(t[0])]
        assert isinstance(choice, Fraction)
        return dynamic_unet(CONFIG, STATE, x, t, float(choice))

    return damped(eps, PublishedSchedule())


def states_of(backend: str, bundle: Bundle, plan: Plan, x_T: Array, noises: list[Array]) -> list[Array]:
    scheduler = Scheduler(SHAPE)
    for variant in set(plan.variants):
        opened = open_engine(
            backend, bundle, bundle.variants[variant], len(x_T), EngineOptions(precision="fp32", threads=1)
        )
        scheduler.add(variant, DampedEngine(opened), TINY.time_features)
    states: list[Array] = []
    scheduler.run(plan, GivenNoise(x_T, noises), lambda call, t, x: states.append(x.copy()))
    scheduler.close()
    return states


def worst(found: list[Array], expected: list[torch.Tensor]) -> float:
    assert len(found) == len(expected)
    pairs = zip(found, (state.numpy() for state in expected), strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


@pytest.fixture(scope="module")
def thousand_steps() -> tuple[Array, list[Array], list[torch.Tensor]]:
    x_T, noises = random_run(1000)
    strategy = Strategy.load(PUBLISHED)
    tensors = [torch.from_numpy(noise) for noise in noises]
    with torch.inference_mode():
        states = ddpm_states(dynamic_eps(strategy), torch.from_numpy(x_T), tensors, PublishedSchedule())
    assert 0.8 < float(states[-1].std()) < 1.2, "the damped denoiser keeps the scale, so differences stay visible"
    return x_T, noises, states


@pytest.mark.parametrize("backend", BACKENDS)
def test_1000_steps_of_the_published_strategy_follow_the_published_loop(
    backend: str, bundle: Bundle, thousand_steps: tuple[Array, list[Array], list[torch.Tensor]]
) -> None:
    x_T, noises, expected = thousand_steps
    plan = compile_plan(
        Strategy.load(PUBLISHED), make_sampler("ddpm", SCHEDULE), bundle.manifest.variants, bundle.time_tables()
    )
    assert worst(states_of(backend, bundle, plan, x_T, noises), expected) <= TRAJECTORY


@pytest.mark.parametrize("wrong", ["reversed", "one entry late"])
def test_a_strategy_read_wrongly_leaves_the_published_loop(
    wrong: str, bundle: Bundle, thousand_steps: tuple[Array, list[Array], list[torch.Tensor]]
) -> None:
    x_T, noises, expected = thousand_steps
    choices = Strategy.load(PUBLISHED).choices
    misread = Strategy(choices[::-1] if wrong == "reversed" else (choices[0], *choices[:-1]))
    plan = compile_plan(misread, make_sampler("ddpm", SCHEDULE), bundle.manifest.variants, bundle.time_tables())
    assert worst(states_of("torch", bundle, plan, x_T, noises), expected) > 10 * TRAJECTORY


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("backend", BACKENDS)
def test_100_ddim_steps_follow_an_independent_loop(backend: str, eta: float, bundle: Bundle) -> None:
    x_T, noises = random_run(100)
    strategy = Strategy.load(PUBLISHED)
    with torch.inference_mode():
        expected = ddim_states(
            dynamic_eps(strategy), torch.from_numpy(x_T), [torch.from_numpy(n) for n in noises],
            list(range(990, -1, -10)), PublishedSchedule(), eta,
        )  # fmt: skip
    plan = compile_plan(
        strategy, make_sampler("ddim", SCHEDULE, 100, eta=eta), bundle.manifest.variants, bundle.time_tables()
    )
    assert worst(states_of(backend, bundle, plan, x_T, noises), expected) <= TRAJECTORY


@pytest.fixture(scope="module")
def pipe(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(bundle.path, backend="onnxruntime") as pipeline:
        yield pipeline


def test_a_pipeline_returns_clipped_images_the_state_and_a_trace(pipe: Pipeline) -> None:
    result = pipe("coarse", "ddim", 10, num_images=3, batch_size=2, seed=5)
    assert result.images.shape == (3, *TINY.sample_shape)
    assert result.images.dtype == np.float32
    assert np.array_equal(result.images, np.clip(result.x_final, -1, 1))
    assert np.abs(result.x_final).max() > 1, "random weights leave the range, so the clip is visible"
    trace = result.trace
    assert (trace.images, trace.batch_size, trace.backend, trace.precision) == (3, 2, "onnxruntime", "fp32")
    assert [(s.batch, s.variant, s.calls) for s in trace.segments] == [
        (batch, variant, calls) for batch in (0, 1) for variant, calls in (("w016", 5), ("w024", 2), ("w032", 3))
    ]
    assert sum(s.latency_ms for s in trace.segments) <= trace.latency_ms
    assert 0 < trace.engine_ms <= trace.latency_ms
    assert all(s.swap_ms > 0 for s in trace.segments if s.first_call)


def test_a_uniform_strategy_is_that_sub_network_alone(pipe: Pipeline) -> None:
    alone = pipe("uniform:3/8", "ddim", 4, num_images=2, seed=1)
    by_id = pipe(Strategy(("w012",) * 1000), "ddim", 4, num_images=2, seed=1)
    assert np.array_equal(alone.x_final, by_id.x_final)
    assert not np.array_equal(alone.x_final, pipe("uniform:4/8", "ddim", 4, num_images=2, seed=1).x_final)


def test_an_image_does_not_depend_on_how_many_are_drawn_with_it(pipe: Pipeline) -> None:
    many = pipe("coarse", "ddim", 5, num_images=7, batch_size=3, seed=9, eta=0.5)
    few = pipe("coarse", "ddim", 5, num_images=4, batch_size=3, seed=9, eta=0.5)
    assert np.array_equal(many.x_final[:4], few.x_final), "the padded last batch gives the same bits"
    assert not np.array_equal(many.x_final[0], many.x_final[1])
    other = pipe("coarse", "ddim", 5, num_images=4, batch_size=3, seed=10, eta=0.5)
    assert not np.array_equal(other.x_final, few.x_final)


def test_whole_numbers_may_be_numpy_s(pipe: Pipeline) -> None:
    numbers: Any = {"steps": np.int64(2), "num_images": np.int32(3), "batch_size": np.uint8(2), "seed": np.uint32(5)}
    found = pipe("coarse", "ddim", **numbers)
    assert np.array_equal(found.x_final, pipe("coarse", "ddim", 2, num_images=3, batch_size=2, seed=5).x_final)
    json.dumps(found.trace.to_json())


def test_a_run_is_replayed_from_its_noise(pipe: Pipeline) -> None:
    drawn = pipe("coarse", "ddim", 5, num_images=3, batch_size=2, seed=4, eta=1.0)
    x_T = np.empty((3, *TINY.sample_shape), np.float32)
    SeededNoise(4).fill(x_T, INITIAL, 0)

    def noise(call: int) -> Array:
        out = np.empty_like(x_T)
        SeededNoise(4).fill(out, 1, call)
        return out

    replayed = pipe("coarse", "ddim", 5, num_images=3, batch_size=2, seed=99, eta=1.0, x_T=x_T, noise=noise)
    assert np.array_equal(drawn.x_final, replayed.x_final)


def test_the_callback_sees_every_unclipped_state(pipe: Pipeline) -> None:
    seen: list[tuple[int, float, Array]] = []
    result = pipe(
        "coarse", "ddim", 4, num_images=2, callback=lambda call, t, x: seen.append((call, t, x.copy()))
    )  # fmt: skip
    assert [(call, t) for call, t, _ in seen] == [(0, 750.0), (1, 500.0), (2, 250.0), (3, 0.0)]
    assert np.array_equal(seen[-1][2], result.x_final)


def test_clipping_changes_the_run_and_bounds_the_last_state(pipe: Pipeline) -> None:
    clipped = pipe("coarse", "ddim", 4, num_images=2, clip_sample=1.0)
    assert np.abs(clipped.x_final).max() <= 1 + 1e-6


class BrokenEngine:
    precision = "fp32"

    def __init__(self, at: int, value: float | None) -> None:
        self.at, self.value, self.calls = at, value, 0

    def bind(self, inputs: Arrays, outputs: Arrays) -> None:
        self.out = outputs["out_sample"]

    def run(self) -> None:
        if self.value is None:
            return  # writes nothing, as an empty captured graph does
        self.out.fill(self.value if self.calls == self.at else 0.1)
        self.calls += 1

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("value", "call"), [(float("nan"), 2), (float("inf"), 2), (None, 0)], ids=["nan", "inf", "writes nothing"]
)
def test_a_value_that_is_not_finite_stops_the_run_with_its_call_and_variant(value: float | None, call: int) -> None:
    sampler = make_sampler("ddim", SCHEDULE, 5)
    scheduler = Scheduler(SHAPE)
    scheduler.add("w016", BrokenEngine(2, value), TINY.time_features)
    with pytest.raises(BackendError, match=rf"call {call} \(timestep .*\) of variant w016"):
        scheduler.run(plan_calls(["w016"] * 5, sampler, TABLES), SeededNoise(0))


def test_a_call_allocates_no_array() -> None:
    """Everything that a run needs is allocated by its first call."""
    shape = (64, *TINY.sample_shape)
    scheduler = Scheduler(shape)
    scheduler.add("w016", BrokenEngine(10**9, 0.1), TINY.time_features)
    plan = plan_calls(["w016"] * 1000, make_sampler("ddpm", SCHEDULE), TABLES)
    grown = np.zeros(1000, np.int64)
    before = 0

    def watch(call: int, t: float, x: Array) -> None:
        nonlocal before
        grown[call] = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        scheduler.run(plan, SeededNoise(0), watch)
    finally:
        tracemalloc.stop()
    assert grown[0] > x_bytes(shape), "the buffers of the noise are made at the start, and are seen"
    # Under the size of any batch: views, and the bounded buffer through which numpy casts words to floats.
    assert grown[1:].max() < x_bytes(shape)


def x_bytes(shape: tuple[int, ...]) -> int:
    return 4 * int(np.prod(shape))


def test_two_threads_on_one_pipeline_are_refused(pipe: Pipeline) -> None:
    refusals: list[str] = []

    def intrude(call: int, t: float, x: Array) -> None:
        def other() -> None:
            try:
                pipe("coarse", "ddim", 1)
            except BackendError as error:
                refusals.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    pipe("coarse", "ddim", 1, callback=intrude)
    assert len(refusals) == 1
    assert "one Pipeline per thread" in refusals[0]


def test_a_run_within_a_run_is_refused_as_such(pipe: Pipeline) -> None:
    def nested(call: int, t: float, x: Array) -> None:
        with pytest.raises(
            BackendError, match=r"in the middle of another run: .* callback or `batches` is not finished"
        ):
            pipe("coarse", "ddim", 1)

    pipe("coarse", "ddim", 1, callback=nested)
    for _ in pipe.batches(pipe.plan("coarse", "ddim", 1), num_images=2, batch_size=1):
        with pytest.raises(BackendError, match="in the middle of another run"):
            pipe("coarse", "ddim", 1)


CLOSED = "^the pipeline was closed while it ran"


@pytest.mark.parametrize("backend", BACKENDS)
def test_closing_within_a_run_ends_it_at_its_next_call(bundle: Bundle, backend: str) -> None:
    own = Pipeline.from_bundle(bundle.path, backend=backend, threads=1)
    called: list[int] = []

    def close_early(call: int, t: float, x: Array) -> None:
        called.append(call)
        if call == 1:
            own.close()

    expected = own("coarse", "ddim", 4, seed=3).x_final
    with pytest.raises(BackendError, match=CLOSED):
        own("coarse", "ddim", 4, callback=close_early)
    assert called == [0, 1]
    assert np.array_equal(own("coarse", "ddim", 4, seed=3).x_final, expected), "the next run opens the engines again"
    own.close()


def test_closing_between_two_batches_ends_the_run(bundle: Bundle) -> None:
    own = Pipeline.from_bundle(bundle.path, backend="onnxruntime", threads=1)
    batches = own.batches(own.plan("coarse", "ddim", 2), num_images=3, batch_size=1)
    next(batches)
    own.close()
    with pytest.raises(BackendError, match=CLOSED):
        next(batches)
    assert own("coarse", "ddim", 2).images.shape == (1, *TINY.sample_shape)
    own.close()


def test_closing_from_another_thread_lets_the_call_finish(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Pipeline.from_bundle(bundle.path, backend="onnxruntime", threads=1)
    closed: list[OnnxRuntimeEngine] = []
    run, close = OnnxRuntimeEngine.run, OnnxRuntimeEngine.close

    def run_while_closing(engine: OnnxRuntimeEngine) -> None:
        thread = threading.Thread(target=own.close)
        thread.start()
        thread.join()
        assert closed == []
        run(engine)

    def note(engine: OnnxRuntimeEngine) -> None:
        closed.append(engine)
        close(engine)

    monkeypatch.setattr(OnnxRuntimeEngine, "run", run_while_closing)
    monkeypatch.setattr(OnnxRuntimeEngine, "close", note)
    with pytest.raises(BackendError, match=CLOSED):
        own("uniform:4/8", "ddim", 2)
    assert len(closed) == 1, "closed as the run ended"


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_pipeline_per_thread_draws_what_it_draws_alone(bundle: Bundle, backend: str) -> None:
    def draw(seed: int) -> bytes:
        with Pipeline.from_bundle(bundle.path, backend=backend, precision="fp32", threads=1) as own:
            return own("coarse", "ddim", 20, num_images=2, seed=seed, clip_sample=1.0).x_final.tobytes()

    alone = [draw(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(draw, range(4))) == alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x_T": np.zeros((1, 3, 8, 8), np.float32)}, r"x_T must have the shape \(2, 3, 8, 8\)"),
        ({"noise": lambda call: np.zeros((2, 3, 4, 4), np.float32), "eta": 1.0}, r"noise\(0\) must have the shape"),
        ({"num_images": 0}, "at least one image"),
        ({"num_images": 3.0}, r"at least one image and a batch of one, found 3\.0"),
        ({"batch_size": 2.0}, r"at least one image and a batch of one, found 2 and 2\.0"),
        ({"seed": -1}, "a seed is"),
        ({"seed": 1.5}, "a seed is"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        pipe("coarse", "ddim", 2, **{"num_images": 2, **arguments})
    pipe("coarse", "ddim", 1)  # and the pipeline still works
