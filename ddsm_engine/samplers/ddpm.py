"""DDPM and DDIM: one call a step, on whole timesteps."""

import math
from typing import Any

from ddsm_engine.errors import SamplerError
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.samplers.grid import Level, whole_timesteps
from ddsm_engine.samplers.table import Draft

LEAST_VARIANCE = 1e-20
"""Of a step that adds noise at all; diffusers' bound."""


def draft_ddpm(draft: Draft, config: dict[str, Any], schedule: NoiseSchedule, steps: int) -> None:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), over every timestep or some of them."""
    timesteps = _timesteps(config, schedule, steps)
    alphas_cumprod = schedule.alphas_cumprod
    for t, cleaner in zip(timesteps, [*timesteps[1:], None], strict=True):
        here, after = float(alphas_cumprod[t]), 1.0 if cleaner is None else float(alphas_cumprod[cleaner])
        alpha = here / after
        beta = 1 - alpha
        x_0, _ = draft.predict(_level(here))
        # Equation 7: the mean of the posterior.
        x = math.sqrt(after) * beta / (1 - here) * x_0 + math.sqrt(alpha) * (1 - after) / (1 - here) * draft.x
        if t > 0:
            posterior = max((1 - after) / (1 - here) * beta, LEAST_VARIANCE)
            x = x + math.sqrt(beta if config["variance_type"] == "fixed_large" else posterior) * draft.noise
        draft.call(t, x)


def draft_ddim(draft: Draft, config: dict[str, Any], schedule: NoiseSchedule, steps: int, eta: float) -> None:
    """DDIM (Song et al. 2021, equation 12); each step ends an even stride below its timestep, as diffusers' does."""
    timesteps = _timesteps(config, schedule, steps)
    alphas_cumprod, stride = schedule.alphas_cumprod, schedule.timesteps // steps
    clean = 1.0 if config["set_alpha_to_one"] else float(alphas_cumprod[0])
    for t in timesteps:
        here, after = float(alphas_cumprod[t]), float(alphas_cumprod[t - stride]) if t >= stride else clean
        x_0, eps = draft.predict(_level(here))
        noise = eta * math.sqrt((1 - after) / (1 - here) * (1 - here / after))
        x = math.sqrt(after) * x_0 + math.sqrt(max(0.0, 1 - after - noise**2)) * eps
        draft.call(t, x + noise * draft.noise)


def _timesteps(config: dict[str, Any], schedule: NoiseSchedule, steps: int) -> list[int]:
    timesteps = whole_timesteps(config, schedule, steps)
    if not 0 <= min(timesteps) <= max(timesteps) < schedule.timesteps or len(set(timesteps)) != len(timesteps):
        raise SamplerError(
            f"{steps} steps with {config['timestep_spacing']} spacing and offset {config['steps_offset']} do not visit "
            f"different timesteps within 0 … {schedule.timesteps - 1}; take fewer steps or a smaller steps_offset"
        )
    return timesteps


def _level(alpha_cumprod: float) -> Level:
    return Level(math.sqrt((1 - alpha_cumprod) / alpha_cumprod))
