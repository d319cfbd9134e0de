"""Samplers as tables of calls: the numerics of a run as data, computed once in float64.

Every sampler here equals the diffusers scheduler of its class: same grid, same final level, same number of steps.
"""

from collections.abc import Mapping
from dataclasses import replace
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from ddsm_engine.errors import SamplerError
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.samplers.config import NAMES, Config, checked_config, name_of, named_config, read_config, unnamed
from ddsm_engine.samplers.ddpm import draft_ddim, draft_ddpm
from ddsm_engine.samplers.dpm_solver import draft_multistep, draft_singlestep
from ddsm_engine.samplers.euler import draft_euler, draft_heun
from ddsm_engine.samplers.grid import Grid, fractional_grid, solver_grid
from ddsm_engine.samplers.table import (
    PREDICTION_TYPES,
    Bound,
    Clip,
    Draft,
    DynamicThreshold,
    PredictionType,
    Sampler,
)
from ddsm_engine.samplers.unipc import draft_unipc
from ddsm_engine.untrusted import brief, one_line

__all__ = [
    "NAMES", "PREDICTION_TYPES", "Bound", "Clip", "DynamicThreshold", "PredictionType", "Sampler", "SamplerLike",
    "make_sampler",
]  # fmt: skip

SamplerLike = str | Path | Mapping[str, Any]
"""A name (``ddim``, ``heun:karras``), the path of a diffusers ``scheduler_config.json``, or such a config itself."""


def make_sampler(
    sampler: SamplerLike,
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    prediction_type: PredictionType = "epsilon",
    eta: float | None = None,
    clip_sample: float | None = None,
) -> Sampler:
    """Build the table of a sampler.

    Args:
        sampler: See ``SamplerLike``.
        schedule: The noise schedule that the network was trained with.
        steps: Number of steps; None means all of the schedule's timesteps, which only DDPM and DDIM take.
        prediction_type: What the network answers.
        eta: DDIM's share of fresh noise, 0 (none, the default) to 1; no other sampler has it.
        clip_sample: Clip every predicted clean image to ± this, in place of what a config says. DDSM was published
            without; diffusers' default for DDPM and DDIM is 1.

    Raises:
        SamplerError: an unknown name or class, a config that belongs to another network, an option that the sampler
            does not have, or a number of steps that it cannot make.
    """
    if isinstance(sampler, str) and not sampler.endswith(".json"):
        config = named_config(sampler, schedule)
    else:
        found = read_config(Path(sampler)) if isinstance(sampler, str | Path) else sampler
        config = checked_config(found, schedule, prediction_type)
    name = name_of(config)
    if eta is not None and name.partition(":")[0] != "ddim":
        raise SamplerError(f"{name} takes no eta; use --sampler ddim --eta")
    if eta is not None and not 0.0 <= eta <= 1.0:
        raise SamplerError(f"eta must lie in [0, 1], found {eta}")
    if clip_sample is not None and not clip_sample > 0:
        raise SamplerError(f"clip_sample must be positive, found {clip_sample}")
    if steps is None and config["_class_name"] not in ("DDPMScheduler", "DDIMScheduler"):
        raise SamplerError(f"{name} needs a number of steps, 10 to 100 as a rule; name it with --steps")
    count = schedule.timesteps if steps is None else steps
    if not isinstance(count, SupportsIndex) or not 1 <= index(count) <= schedule.timesteps:
        raise SamplerError(f"{name} takes 1 to {schedule.timesteps} steps, found {brief(count)}")
    count = index(count)
    bound = _bound(config) if clip_sample is None else Clip(clip_sample)
    # What numpy cannot divide by comes out as not finite, and is refused when the table is finished.
    try:
        with np.errstate(all="ignore"):
            table = _table(config, schedule, count, prediction_type, eta or 0.0, bound)
    except (ZeroDivisionError, OverflowError, np.linalg.LinAlgError) as error:
        raise SamplerError(
            f"{name} with {count} steps cannot be computed ({one_line(error)}); take fewer steps, or another grid, "
            f"order or final level"
        ) from error
    told = {"config": unnamed(config, schedule), "eta": eta, "clip_sample": clip_sample}
    return replace(table, name=name, options={option: value for option, value in told.items() if value is not None})


def _bound(config: Config) -> Bound | None:
    if config.get("thresholding"):
        return DynamicThreshold(config["dynamic_thresholding_ratio"], config["sample_max_value"])
    return Clip(config["clip_sample_range"]) if config.get("clip_sample") else None


def _table(
    config: Config,
    schedule: NoiseSchedule,
    steps: int,
    prediction_type: PredictionType,
    eta: float,
    bound: Bound | None,
) -> Sampler:
    def draft(kept: int) -> Draft:
        return Draft(kept, prediction_type, bound)

    start = 1.0
    match config["_class_name"]:
        case "DDPMScheduler":
            draft_ddpm(pen := draft(0), config, schedule, steps)
        case "DDIMScheduler":
            draft_ddim(pen := draft(0), config, schedule, steps, eta)
        case "EulerDiscreteScheduler":
            grid = fractional_grid(config, schedule, steps)
            start = _start(config, grid)
            draft_euler(pen := draft(0), grid)
        case "HeunDiscreteScheduler":
            grid = fractional_grid(config, schedule, steps)
            start = _start(config, grid)
            draft_heun(pen := draft(1), grid)
        case "DPMSolverMultistepScheduler":
            pen = draft(config["solver_order"] - 1)
            draft_multistep(pen, config, solver_grid(config, schedule, steps))
        case "DPMSolverSinglestepScheduler":
            pen = draft(config["solver_order"] if config["solver_order"] > 1 else 0)
            draft_singlestep(pen, config, solver_grid(config, schedule, steps))
        case _:
            pen = draft(config["solver_order"] + 1)
            draft_unipc(pen, config, solver_grid(config, schedule, steps))
    return pen.finish(config["_class_name"], steps, start)


def _start(config: Config, grid: Grid) -> float:
    """Euler and Heun start with the noise alone where the grid begins at the noisy end, and at unit variance else."""
    return 1.0 if config["timestep_spacing"] == "leading" else grid.levels[0].sigma
