"""A pipeline on a device, over the same networks as the reference on the CPU: same images, and nothing left behind."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import ddsm_engine.backends
from ddsm_engine import run
from ddsm_engine.backends import open_engine, open_engines
from ddsm_engine.backends.device import StagedEngine
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.backends.torch import cut_network
from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.device_scheduler import DeviceScheduler
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.latency import measure_latency
from ddsm_engine.noise import SeededNoise
from ddsm_engine.pipeline import Pipeline
from ddsm_engine.plan import Plan
from tests.conftest import Refusal
from tests.gpu.fake import FakeDevice, FakeEngine

CUDA = EngineOptions(device="cuda")


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeDevice]]:
    """Every device that is opened; engines on them compute the bundle's networks in torch."""
    opened: list[FakeDevice] = []

    def open_device() -> FakeDevice:
        opened.append(FakeDevice())
        return opened[-1]

    def device_engine(
        name: str, bundle: Bundle, variant: Variant, batch: int, options: EngineOptions, device: FakeDevice
    ) -> FakeEngine:
        network = cut_network(bundle, variant)

        def answer(sample: Any, features: Any) -> Any:
            with torch.inference_mode():
                return network(torch.from_numpy(sample), torch.from_numpy(features)).numpy()

        spec = bundle.spec(variant)
        return FakeEngine(device, answer, (batch, *spec.sample_shape), spec.time_features, scratch_bytes=4096)

    monkeypatch.setattr(ddsm_engine.backends, "_cuda", lambda backend: SimpleNamespace(open_device=open_device))
    monkeypatch.setattr(ddsm_engine.backends, "_device_engine", device_engine)
    yield opened
    for device in opened:
        assert device.allocated == 0, "a closed pipeline gives everything back"


@pytest.fixture
def on_device(bundle_path: Path, devices: list[FakeDevice]) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(bundle_path, backend="torch", device="cuda") as pipe:
        yield pipe


@pytest.fixture(scope="module")
def on_cpu(bundle_path: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(bundle_path, backend="torch") as pipe:
        yield pipe


@pytest.mark.parametrize(("sampler", "steps", "clip"), [("ddim", 20, None), ("ddpm", 10, 1.0), ("heun", 5, None)])
def test_the_images_are_those_of_the_reference_bit_by_bit(
    on_device: Pipeline, on_cpu: Pipeline, sampler: str, steps: int, clip: float | None
) -> None:
    drawn = [
        pipe("coarse", sampler, steps, num_images=5, batch_size=2, seed=3, clip_sample=clip)
        for pipe in (on_device, on_cpu)
    ]
    assert drawn[0].x_final.tobytes() == drawn[1].x_final.tobytes()
    assert (drawn[0].trace.execution, drawn[1].trace.execution) == ("loop", "host")
    assert [(s.variant, s.calls) for s in drawn[0].trace.segments] == [
        (s.variant, s.calls) for s in drawn[1].trace.segments
    ]


def test_what_needs_the_host_between_the_calls_gets_it(on_device: Pipeline, on_cpu: Pipeline) -> None:
    shape = (2, *on_cpu.bundle.manifest.spec.sample_shape)
    fresh = np.random.default_rng(0).standard_normal((12, *shape)).astype(np.float32)
    seen: list[int] = []
    reasons: list[dict[str, Any]] = [
        {"callback": lambda call, t, x: seen.append(call)},
        {"x_T": fresh[0]},
        {"noise": lambda call: fresh[call]},
        {"sampler": {"_class_name": "DDIMScheduler", "thresholding": True}},
    ]
    for reason in reasons:
        arguments = {"sampler": "ddpm", **reason, "steps": 10, "num_images": 2, "batch_size": 2}
        ours, reference = on_device("coarse", **arguments), on_cpu("coarse", **arguments)
        assert ours.trace.execution == "host"
        assert ours.x_final.tobytes() == reference.x_final.tobytes()
    assert seen == [*range(10), *range(10)]


def test_the_state_of_one_call_can_be_asked_for(on_device: Pipeline, on_cpu: Pipeline) -> None:
    plan = on_cpu.plan("coarse", "ddim", 10)
    x = np.random.default_rng(1).standard_normal((3, *on_cpu.bundle.manifest.spec.sample_shape)).astype(np.float32)
    answers = [pipe.answer(plan, 4, x, batch_size=2) for pipe in (on_device, on_cpu)]
    assert answers[0].tobytes() == answers[1].tobytes()


def test_one_pipeline_has_one_stream_and_one_scratch(on_device: Pipeline, devices: list[FakeDevice]) -> None:
    on_device("coarse", "ddim", 5, num_images=2, batch_size=2)
    on_device("uniform:8/8", "ddim", 5, num_images=3, batch_size=3)
    assert len(devices) == 1
    assert devices[0].scratch.size_bytes == 4096


def test_engines_opened_together_share_a_stream_that_closes_with_the_last(
    bundle: Bundle, devices: list[FakeDevice]
) -> None:
    engines = open_engines("torch", bundle, [*bundle.variants.values()][:2], 1, CUDA)
    first, second = engines.values()
    assert isinstance(first, StagedEngine)
    assert isinstance(second, StagedEngine)
    assert first.device is second.device
    spec = bundle.manifest.spec
    sample, features = np.ones((1, *spec.sample_shape), np.float32), np.ones((1, spec.time_features), np.float32)
    for engine in (first, second):
        output = np.zeros_like(sample)
        engine.bind({"sample": sample, "time_features": features}, {"out_sample": output})
        engine.run()
        assert output.any()
    first.close()
    assert devices[0].allocated > 0
    second.close()


def test_an_engine_that_does_not_open_closes_what_was_opened_with_it(
    bundle: Bundle, devices: list[FakeDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest: Callable[..., FakeEngine] = ddsm_engine.backends._device_engine  # type: ignore[assignment]
    opened: list[FakeEngine] = []

    def second_fails(*arguments: Any) -> FakeEngine:
        if opened:
            raise BackendError("out of GPU memory (invented)")
        opened.append(honest(*arguments))
        return opened[-1]

    monkeypatch.setattr(ddsm_engine.backends, "_device_engine", second_fails)
    with pytest.raises(BackendError, match="out of GPU memory"):
        open_engines("torch", bundle, [*bundle.variants.values()][:2], 1, CUDA)
    assert not opened[0].is_open


@pytest.mark.parametrize("refused", ["what a run needs", "the second engine's arrays"])
def test_after_a_refusal_the_next_call_runs_as_if_there_had_been_none(
    on_device: Pipeline,
    on_cpu: Pipeline,
    devices: list[FakeDevice],
    monkeypatch: pytest.MonkeyPatch,
    refused: str,
) -> None:
    owner, method, turn = (FakeDevice, "shared", 1) if refused == "what a run needs" else (StagedEngine, "bind", 2)
    honest, turns = getattr(owner, method), iter(range(1, 1000))

    def refuse_once(*arguments: Any) -> Any:
        if next(turns) == turn:
            raise BackendError("out of GPU memory (invented)")
        return honest(*arguments)

    opened: list[FakeEngine] = []
    engine: Callable[..., FakeEngine] = ddsm_engine.backends._device_engine  # type: ignore[assignment]

    def counted(*arguments: Any) -> FakeEngine:
        opened.append(engine(*arguments))
        return opened[-1]

    monkeypatch.setattr(owner, method, refuse_once)
    monkeypatch.setattr(ddsm_engine.backends, "_device_engine", counted)
    with pytest.raises(BackendError, match="out of GPU memory"):
        on_device("coarse", "ddim", 5, seed=3)
    assert len(devices) == 1
    for _ in range(2):
        drawn, reference = (pipe("coarse", "ddim", 5, seed=3) for pipe in (on_device, on_cpu))
        assert drawn.trace.execution == "loop"
        assert drawn.x_final.tobytes() == reference.x_final.tobytes()
    used = len({segment.variant for segment in drawn.trace.segments})
    assert sum(engine.is_open for engine in opened) == used > 1, "what was opened before the refusal is closed"


def test_the_command_says_how_it_ran_and_the_trace_too(
    bundle_path: Path, devices: list[FakeDevice], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--strategy",
        "coarse",
        "--bundle",
        bundle_path,
        "--sampler",
        "ddim",
        "--steps",
        "5",
        "--num-images",
        "3",
    ]
    arguments += [
        "--backend",
        "torch",
        "--device",
        "cuda",
        "-o",
        tmp_path / "x.png",
        "--trace",
        tmp_path / "trace.json",
    ]
    assert run.main([str(argument) for argument in arguments]) == 0
    assert "torch fp32 as loop, batch 3" in capsys.readouterr().out
    assert json.loads((tmp_path / "trace.json").read_bytes())["execution"] == "loop"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("backend", ["auto", "torch", "onnxruntime", "torch-compile"])
def test_a_gpu_that_is_not_there_is_one_line(bundle_path: Path, refusal: Refusal, tmp_path: Path, backend: str) -> None:
    arguments = ["--strategy", "coarse", "--bundle", bundle_path, "--backend", backend, "--device", "cuda"]
    assert "needs an NVIDIA GPU" in refusal(run.main, *arguments, "-o", tmp_path / "x.png")
    assert not any(tmp_path.iterdir())


def test_an_engine_opened_alone_closes_its_stream(bundle: Bundle, devices: list[FakeDevice]) -> None:
    open_engine("torch", bundle, bundle.full, 1, CUDA).close()
    assert len(devices) == 1


def test_the_calls_of_a_latency_table_are_timed_in_one_run(
    bundle: Bundle, devices: list[FakeDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    took_us = {variant.id: 100 + 10 * number for number, variant in enumerate(bundle.manifest.variants)}
    swap_us = 7
    plans: list[Plan] = []

    class Clocked(DeviceScheduler):
        """Lets calls take what they should, and a call after another variant's longer."""

        def run(self, plan: Plan, noise: SeededNoise, **options: Any) -> NDArray[np.int64]:
            super().run(plan, noise, **options)
            assert np.isfinite(self.x).all()
            plans.append(plan)
            before = ("", *plan.variants[:-1])
            us = [took_us[v] + swap_us * (v != b) for v, b in zip(plan.variants, before, strict=True)]
            ends = 1000 * np.cumsum([5, *us])
            return np.stack([ends[:-1], ends[1:]], axis=1)

    monkeypatch.setattr("ddsm_engine.measure.latency.DeviceScheduler", Clocked)
    rows = measure_latency(bundle, bundle.manifest.variants, "torch", 2, CUDA, repeats=9)
    for row in rows:
        assert row.timing.median_ms == pytest.approx(took_us[row.variant.id] / 1e3)
        assert row.timing.swap_ms == pytest.approx(swap_us / 1e3)
        assert row.timing.repeats == 9
    (plan,) = plans
    assert plan.variants[::2] == plan.variants[1::2], "turns of two"
    assert plan.variants[:14] != plan.variants[14:28], "shuffled"
