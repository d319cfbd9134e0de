"""Samplers as tables of calls: the numerics of a run as data, computed once in float64.

A call evaluates the network once and then updates the state,

    x_0 = clip(to_x_0[0] * x + to_x_0[1] * eps)          (only where ``clip`` is set)
    x   = update[0] * x + update[1] * eps + update[2] * x_0 + update[3] * noise

Without a clip x_0 is linear in x and eps, so its part is folded into the first two coefficients: one fused update,
which also avoids the published form's cancellation (at the noisy end x_0 is 157 times a difference of near equals).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.errors import SamplerError
from ddsm_engine.noise_schedule import NoiseSchedule

SAMPLERS = ("ddpm", "ddim")


@dataclass(frozen=True, slots=True, eq=False)
class Sampler:
    """A table with one row per call, first executed call first.

    Attributes:
        name: ``ddpm`` or ``ddim``.
        timesteps: [calls], float64, the training timestep whose features the network reads.
        to_x_0: [calls, 2], float64, coefficients of x and eps in the predicted clean image.
        update: [calls, 4], float64, coefficients of x, eps, clipped x_0 and fresh noise.
        clip: Bound of the predicted clean image, or None: not clipped, as DDSM was published.
    """

    name: str
    timesteps: NDArray[np.float64]
    to_x_0: NDArray[np.float64]
    update: NDArray[np.float64]
    clip: float | None

    @property
    def calls(self) -> int:
        """Number of calls."""
        return len(self.timesteps)


def make_sampler(
    name: str,
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    eta: float | None = None,
    clip_sample: float | None = None,
) -> Sampler:
    """Build the table of a named sampler.

    Args:
        name: ``ddpm`` or ``ddim``.
        schedule: The noise schedule of the supernet.
        steps: Number of steps; None means all of the schedule's timesteps.
        eta: DDIM's share of fresh noise, 0 (none, the default) to 1; DDPM has none of it.
        clip_sample: Clip the predicted clean image to ± this. DDSM was published without; diffusers' default is 1.

    Raises:
        SamplerError: an unknown name, or an option the sampler does not have.
    """
    if clip_sample is not None and not clip_sample > 0:
        raise SamplerError(f"clip_sample must be positive, found {clip_sample}")
    if name == "ddpm":
        if steps not in (None, schedule.timesteps):
            raise SamplerError(
                f"ddpm runs all {schedule.timesteps} timesteps, found steps={steps}; for fewer use --sampler ddim "
                f"(with --eta 1 for DDPM's noise)"
            )
        if eta is not None:
            raise SamplerError("ddpm takes no eta; use --sampler ddim --eta")
        return ddpm(schedule, clip_sample=clip_sample)
    if name == "ddim":
        return ddim(schedule, schedule.timesteps if steps is None else steps, eta=eta or 0.0, clip_sample=clip_sample)
    raise SamplerError(f"unknown sampler {name!r}; expected one of {', '.join(SAMPLERS)}")


def ddpm(schedule: NoiseSchedule, *, clip_sample: float | None = None) -> Sampler:
    """Ancestral sampling (Ho et al. 2020, algorithm 2) over every timestep, as DDSM's release runs it."""
    betas, alphas_cumprod = schedule.betas, schedule.alphas_cumprod
    previous = np.append(1.0, alphas_cumprod[:-1])
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    large = schedule.variance_type == "fixed_large"
    sigma = np.sqrt(np.append(posterior_variance[1], (betas if large else posterior_variance)[1:]))
    sigma[0] = 0.0  # the last call adds no noise
    # Posterior mean, equation 7: coefficients of the predicted clean image and of the state.
    of_x_0 = betas * np.sqrt(previous) / (1 - alphas_cumprod)
    of_x = (1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod)
    t = np.arange(schedule.timesteps)[::-1]
    return _table("ddpm", t, alphas_cumprod[t], of_x[t], np.zeros(len(t)), of_x_0[t], sigma[t], clip_sample)


def ddim(schedule: NoiseSchedule, steps: int, *, eta: float = 0.0, clip_sample: float | None = None) -> Sampler:
    """DDIM (Song et al. 2021, equation 12) on an even grid that ends at timestep 0 (diffusers' ``leading`` spacing).

    Raises:
        SamplerError: more steps than timesteps, or an eta outside [0, 1].
    """
    if not 1 <= steps <= schedule.timesteps:
        raise SamplerError(f"ddim takes 1 to {schedule.timesteps} steps, found {steps}")
    if not 0.0 <= eta <= 1.0:
        raise SamplerError(f"eta must lie in [0, 1], found {eta}")
    stride = schedule.timesteps // steps
    timesteps = np.arange(steps)[::-1] * stride
    alphas_cumprod = schedule.alphas_cumprod
    here = alphas_cumprod[timesteps]
    next_cumprod = np.where(timesteps >= stride, alphas_cumprod[timesteps - stride], 1.0)
    sigma = eta * np.sqrt((1 - next_cumprod) / (1 - here) * (1 - here / next_cumprod))
    of_eps = np.sqrt(np.maximum(0.0, 1 - next_cumprod - sigma**2))
    return _table("ddim", timesteps, here, np.zeros(steps), of_eps, np.sqrt(next_cumprod), sigma, clip_sample)


def _table(
    name: str,
    timesteps: NDArray[np.int64],
    alphas_cumprod: NDArray[np.float64],
    of_x: NDArray[np.float64],
    of_eps: NDArray[np.float64],
    of_x_0: NDArray[np.float64],
    of_noise: NDArray[np.float64],
    clip: float | None,
) -> Sampler:
    """Put the calls' coefficients side by side; without a clip, fold x_0 into x and eps (DDPM, equation 11)."""
    to_x_0 = np.stack([np.sqrt(1 / alphas_cumprod), -np.sqrt(1 / alphas_cumprod - 1)], axis=1)
    if clip is None:
        of_x, of_eps = of_x + of_x_0 * to_x_0[:, 0], of_eps + of_x_0 * to_x_0[:, 1]
        of_x_0 = np.zeros_like(of_x_0)
    update = np.stack([of_x, of_eps, of_x_0, of_noise], axis=1)
    return Sampler(name, timesteps.astype(np.float64), to_x_0, update, clip)
