from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from numpy.typing import NDArray

from ddsm_engine.errors import SamplerError
from ddsm_engine.noise_schedule import NoiseSchedule, VarianceType
from ddsm_engine.sampler import Sampler, make_sampler

Array = NDArray[np.float64]
SHAPE = (2, 3, 4, 4)
# diffusers keeps its tables in float32, and at t = 1 its cumulative product cancels; ours are float64.
TOLERANCE = 2e-4


def predicted_noise(x: Array, t: float, alphas_cumprod: Array) -> Array:
    """A denoiser that keeps x near unit scale and is not linear, so that a wrong coefficient shows."""
    return np.asarray(x * np.sqrt(1 - alphas_cumprod[round(t)]) + 0.1 * np.sin(3 * x + t / 100))


def run_table(sampler: Sampler, x: Array, noises: list[Array], eps_of: Callable[[Array, float], Array]) -> list[Array]:
    states = []
    for i, t in enumerate(sampler.timesteps):
        eps = eps_of(x, float(t))
        of_x, of_eps, of_x_0, of_noise = sampler.update[i]
        x_0 = 0.0
        if sampler.clip is not None:
            x_0 = np.clip(sampler.to_x_0[i, 0] * x + sampler.to_x_0[i, 1] * eps, -sampler.clip, sampler.clip)
        x = of_x * x + of_eps * eps + of_x_0 * x_0 + of_noise * noises[i]
        states.append(x)
    return states


def run_diffusers(
    scheduler: DDPMScheduler | DDIMScheduler, steps: int, x: Array, noises: list[Array], eta: float | None,
    eps_of: Callable[[Array, float], Array], monkeypatch: pytest.MonkeyPatch,
) -> tuple[list[float], list[Array]]:  # fmt: skip
    scheduler.set_timesteps(steps)
    module = type(scheduler).__module__
    states, state = [], torch.from_numpy(x)
    for i, t in enumerate(scheduler.timesteps.tolist()):
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *args, i=i, **kwargs: torch.from_numpy(noises[i]))
        eps = torch.from_numpy(eps_of(state.numpy(), t))
        options = {} if eta is None else {"eta": eta}
        state = scheduler.step(eps, t, state, **options).prev_sample
        states.append(state.numpy())
    return scheduler.timesteps.tolist(), states


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(
    ("name", "steps", "eta", "variance"),
    [
        ("ddpm", 200, None, "fixed_large"),
        ("ddpm", 200, None, "fixed_small"),
        ("ddim", 200, 0.0, "fixed_large"),
        ("ddim", 50, 0.0, "fixed_large"),
        ("ddim", 30, 0.5, "fixed_large"),
        ("ddim", 7, 1.0, "fixed_large"),
        ("ddim", 1, 0.0, "fixed_large"),
    ],
)
def test_whole_trajectories_equal_diffusers(
    name: str,
    steps: int,
    eta: float | None,
    variance: VarianceType,
    clip: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedule = NoiseSchedule(1e-4, 0.02, 200, variance)
    common = {"num_train_timesteps": 200, "clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    other = DDPMScheduler(**common, variance_type=variance) if name == "ddpm" else DDIMScheduler(**common)
    rng = np.random.default_rng(steps)
    x, noises = rng.standard_normal(SHAPE), [rng.standard_normal(SHAPE) for _ in range(steps)]

    def eps_of(state: Array, t: float) -> Array:
        return predicted_noise(state, t, schedule.alphas_cumprod)

    ours = make_sampler(name, schedule, steps, eta=eta, clip_sample=clip)
    timesteps, theirs = run_diffusers(other, steps, x, noises, eta, eps_of, monkeypatch)
    assert ours.timesteps.tolist() == timesteps
    for i, (mine, expected) in enumerate(zip(run_table(ours, x, noises, eps_of), theirs, strict=True)):
        assert np.abs(mine - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max()), (i, timesteps[i])


def test_ddpm_without_a_clip_is_the_published_mean() -> None:
    schedule = NoiseSchedule(1e-4, 0.02, 1000)
    table = make_sampler("ddpm", schedule)
    betas, alphas_cumprod = schedule.betas[::-1], schedule.alphas_cumprod[::-1]
    # (x - beta / sqrt(1 - abar) eps) / sqrt(1 - beta): equation 11 of Ho et al., written out without x_0.
    np.testing.assert_allclose(table.update[:, 0], 1 / np.sqrt(1 - betas), rtol=1e-12)
    np.testing.assert_allclose(table.update[:, 1], -betas / np.sqrt(1 - alphas_cumprod) / np.sqrt(1 - betas), rtol=1e-9)
    assert table.update[0, 3] == pytest.approx(0.02**0.5)
    assert table.update[-2, 3] == pytest.approx(0.01095, abs=1e-5)
    assert table.update[-1, 3] == 0, "no noise at t = 0"


def test_the_small_variance_is_the_posterior_s() -> None:
    schedule = NoiseSchedule(1e-4, 0.02, 1000, "fixed_small")
    sigma = make_sampler("ddpm", schedule).update[::-1, 3]
    cumprod = schedule.alphas_cumprod
    expected = schedule.betas[1:] * (1 - cumprod[:-1]) / (1 - cumprod[1:])
    np.testing.assert_allclose(sigma[1:] ** 2, expected, rtol=1e-12)


def test_ddim_visits_the_strided_timesteps_and_ends_clean() -> None:
    table = make_sampler("ddim", NoiseSchedule(1e-4, 0.02, 1000), 50)
    assert table.timesteps.tolist() == list(range(980, -1, -20))
    assert not table.update[:, 3].any(), "eta 0 adds no noise"
    x_0, eps = 0.3, -1.2
    cumprod = NoiseSchedule(1e-4, 0.02, 1000).alphas_cumprod[0]
    last = table.update[-1, 0] * (np.sqrt(cumprod) * x_0 + np.sqrt(1 - cumprod) * eps) + table.update[-1, 1] * eps
    assert last == pytest.approx(x_0), "the last call lands on the predicted clean image"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "ddpm", "steps": 50}, "use --sampler ddim"),
        ({"name": "ddpm", "eta": 0.5}, "takes no eta"),
        ({"name": "ddim", "steps": 0}, "1 to 1000 steps, found 0"),
        ({"name": "ddim", "steps": 1001}, "1 to 1000 steps, found 1001"),
        ({"name": "ddim", "eta": 1.5}, "eta must lie in"),
        ({"name": "ddim", "clip_sample": 0.0}, "must be positive"),
        ({"name": "dpm"}, "unknown sampler 'dpm'"),
    ],
)
def test_what_a_sampler_cannot_do_is_refused(arguments: dict[str, object], message: str) -> None:
    options = {"schedule": NoiseSchedule(1e-4, 0.02, 1000), **arguments}
    with pytest.raises(SamplerError, match=message):
        make_sampler(**options)  # type: ignore[arg-type]
