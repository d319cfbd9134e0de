"""Two ways to walk a sampler: its table, and the diffusers scheduler of its class, on the same network and noise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from ddsm_engine.backends.engine import Arrays
from ddsm_engine.noise import INITIAL
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.plan import plan_calls
from ddsm_engine.samplers import Sampler
from ddsm_engine.scheduler import Scheduler
from ddsm_engine.time_table import TimeTable

Array = NDArray[Any]
Network = Callable[[Array, float], Array]
"""(sample as the network reads it, timestep) → its answer."""


def network(schedule: NoiseSchedule, prediction_type: str) -> Network:
    """A denoiser that keeps the sample near unit scale and is not linear, so that a wrong coefficient shows."""
    timesteps = np.arange(schedule.timesteps)

    def answer(x: Array, t: float) -> Array:
        cumprod = np.interp(t, timesteps, schedule.alphas_cumprod)
        share = {"epsilon": np.sqrt(1 - cumprod), "sample": np.sqrt(cumprod), "v_prediction": 0.0}[prediction_type]
        return np.asarray(share * x + 0.1 * np.sin(3 * x + t / 100), x.dtype)

    return answer


def walk_table(sampler: Sampler, start: Array, noises: list[Array], answer: Network) -> list[Array]:
    """The sample after every call, in the precision of ``start``: the definition of a table, written out."""
    slots = [sampler.start * start, *(np.zeros_like(start) for _ in range(sampler.slots - 1))]
    states = []
    for call, t in enumerate(sampler.timesteps):
        output = answer(slots[0], float(t))
        x_0 = sampler.to_x_0[call, 0] * slots[0] + sampler.to_x_0[call, 1] * output
        if sampler.bound is not None:
            x_0 = x_0.copy()
            sampler.bound.apply(x_0)
        terms = np.stack([*slots, output, x_0, noises[call]])
        slots = list(np.tensordot(sampler.update[call], terms, axes=1))
        states.append(slots[0])
    return states


class _GivenEngine:
    """A network as an engine: it knows which timestep each call is for."""

    precision = "fp32"

    def __init__(self, answer: Network, timesteps: Array) -> None:
        self._answer, self._timesteps = answer, iter(timesteps)

    def bind(self, inputs: Arrays, outputs: Arrays) -> None:
        self._x, self._out = inputs["sample"], outputs["out_sample"]

    def run(self) -> None:
        self._out[...] = self._answer(self._x, float(next(self._timesteps)))

    def close(self) -> None: ...


class _GivenNoise:
    def __init__(self, start: Array, noises: list[Array]) -> None:
        self._start, self._noises = start, noises

    def fill(self, out: NDArray[np.float32], stream: int, call: int) -> None:
        out[...] = self._start if stream == INITIAL else self._noises[call]


def walk_scheduler(sampler: Sampler, start: Array, noises: list[Array], answer: Network) -> list[Array]:
    """The sample after every call, by the product's own loop, in float32."""
    plan = plan_calls(["one"] * sampler.calls, sampler, {"one": TimeTable.sinusoidal(1000, 8)})
    scheduler, states = Scheduler(start.shape), []
    scheduler.add("one", _GivenEngine(answer, sampler.timesteps), 8)
    scheduler.run(plan, _GivenNoise(start, noises), lambda call, t, x: states.append(x.copy()))
    return states


def make_scheduler(class_name: str, schedule: NoiseSchedule, prediction_type: str, **fields: Any) -> Any:
    """A diffusers scheduler over exactly the betas of a schedule."""
    return getattr(diffusers, class_name)(
        num_train_timesteps=schedule.timesteps,
        trained_betas=schedule.betas.tolist(),
        prediction_type=prediction_type,
        **fields,
    )


def config_of(scheduler: Any) -> dict[str, Any]:
    """What ``save_config`` would write."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def walk_diffusers(
    scheduler: Any, steps: int, start: Array, noises: list[Array], answer: Network, options: dict[str, Any]
) -> tuple[list[float], list[Array]]:
    """Timesteps, and the sample after every step as the next call's network reads it; the last as it is returned."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x = torch.from_numpy(start) * getattr(scheduler, "init_noise_sigma", 1.0)
    timesteps, states = scheduler.timesteps.tolist(), []
    for call, t in enumerate(scheduler.timesteps):
        output = torch.from_numpy(answer(scheduler.scale_model_input(x, t).numpy(), float(t)))
        noise = torch.from_numpy(noises[call])
        with patch(f"{type(scheduler).__module__}.randn_tensor", lambda *_, noise=noise, **__: noise, create=True):
            x = scheduler.step(output, t, x, **options).prev_sample
        is_last = call == len(timesteps) - 1
        states.append(x.numpy() if is_last else scheduler.scale_model_input(x, scheduler.timesteps[call + 1]).numpy())
    return timesteps, states


class _Double:
    """A numerical library in which single precision is double."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, "float64" if name == "float32" else name)


@contextmanager
def diffusers_in_double(class_name: str) -> Iterator[None]:
    """Let a scheduler's module compute in float64 what it would in float32: then only formulas can differ."""
    module = getattr(diffusers, class_name).__module__
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with patch(f"{module}.torch", _Double(torch)), patch(f"{module}.np", _Double(np)):
            yield
    finally:
        torch.set_default_dtype(default)
