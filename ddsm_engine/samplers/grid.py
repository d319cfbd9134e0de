"""At which timesteps and noise levels does a sampler call the network?"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.errors import SamplerError
from ddsm_engine.noise_schedule import NoiseSchedule

Timesteps = NDArray[np.float64]

RHO = 7.0
"""Karras et al. 2022, equation 5."""


@dataclass(frozen=True, slots=True)
class Level:
    """A noise level of the variance-preserving process, x_t = alpha x_0 + sigma noise, alpha² + sigma² = 1.

    Attributes:
        ratio: sigma / alpha, which Karras et al. call σ; 0 is clean.
    """

    ratio: float

    @property
    def alpha(self) -> float:
        """Share of the clean image."""
        return 1 / math.hypot(1, self.ratio)

    @property
    def sigma(self) -> float:
        """Share of the noise."""
        return self.ratio / math.hypot(1, self.ratio)

    @property
    def log_snr(self) -> float:
        """Half the log of the signal-to-noise ratio, λ of DPM-Solver; infinite where it is clean."""
        return -math.log(self.ratio) if self.ratio else math.inf


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the steps of a sampler begin and end.

    Attributes:
        timesteps: What the network is told, one per step, noisiest first.
        levels: Where each step begins, and behind them where the last one ends.
    """

    timesteps: list[float]
    levels: list[Level]


def whole_timesteps(config: dict[str, Any], schedule: NoiseSchedule, steps: int) -> list[int]:
    """Whole timesteps from the noisy to the clean end, both of which ``linspace`` visits (DDPM's and DDIM's grid)."""
    return [int(t) for t in _spaced(config, schedule.timesteps, steps).round()]


def fractional_grid(config: dict[str, Any], schedule: NoiseSchedule, steps: int) -> Grid:
    """The grid of Euler and Heun: timesteps between the trained ones have the level between theirs.

    ``karras`` and ``exponential`` space the levels from the first to the last of them, and ask which timestep would
    have each.
    """
    ratios = _ratios(schedule)
    timesteps = _spaced(config, schedule.timesteps, steps)
    _check_range(timesteps, schedule)
    found = np.interp(timesteps, np.arange(len(ratios)), ratios)
    if config.get("interpolation_type") == "log_linear":
        found = np.exp(np.linspace(np.log(ratios[-1]), np.log(ratios[0]), steps + 1))
    spaced = _level_spacing(config, float(found[0]), float(found[-1]), steps)
    if spaced is not None:
        found, timesteps = spaced, _timestep_of(spaced, ratios)
    last = ratios[0] if config.get("final_sigmas_type") == "sigma_min" else 0.0
    ends = np.append(found, last)[: len(timesteps) + 1]
    if not (np.diff(ends[:-1]) < 0).all() or ends[-1] > ends[-2]:
        raise SamplerError(f"{steps} steps on this grid do not fall from noise level to noise level; take another grid")
    return _grid(timesteps, ends)


def solver_grid(config: dict[str, Any], schedule: NoiseSchedule, steps: int) -> Grid:
    """The grid of DPM-Solver and UniPC: whole timesteps, of which the last is not yet clean.

    ``karras``, ``exponential`` and ``lu`` (even in log SNR) space the levels over the whole schedule; the network is
    told the nearest trained timestep, or for ``exponential`` the one below. Levels that are spaced down to the last
    trained one end in a step of no length where the grid ends there, too (``sigma_min``), as diffusers' do.
    """
    ratios = _ratios(schedule)
    spaced = _level_spacing(config, ratios[-1], ratios[0], steps)
    if spaced is None:
        timesteps, found = _solver_timesteps(config, schedule, ratios, steps)
    else:
        timesteps, found = _timestep_of(spaced, ratios), spaced
        below = config["use_exponential_sigmas"] or (
            schedule.type == "squaredcos_cap_v2" and config["_class_name"] == "DPMSolverMultistepScheduler"
        )
        # A grid begins and ends on trained timesteps, which rounding error may not push below themselves.
        timesteps = np.floor(timesteps + 1e-6) if below else timesteps.round()
    last = 0.0
    if config["final_sigmas_type"] == "sigma_min":
        least = float(ratios[0])
        # UniPC ends where its own levels do. DPM-Solver's end at the last trained one, less a rounding error.
        own = config["_class_name"] == "UniPCMultistepScheduler" or math.isclose(found[-1], least)
        last = float(found[-1]) if own and spaced is not None else least
    if not (np.diff(found) < 0).all() or last > found[-1]:
        raise SamplerError(
            f"{steps} steps on this grid make two calls at one noise level, which {config['_class_name']} cannot; take "
            f"fewer steps, or another grid"
        )
    return _grid(timesteps, np.append(found, last))


def _solver_timesteps(
    config: dict[str, Any], schedule: NoiseSchedule, ratios: Timesteps, steps: int
) -> tuple[Timesteps, Timesteps]:
    noisiest = int(np.count_nonzero(-np.log(ratios) >= config.get("lambda_min_clipped", -math.inf)))
    if noisiest < steps:
        raise SamplerError(
            f"{steps} steps need as many timesteps, and the noise schedule leaves {noisiest}; take fewer"
        )
    match config.get("timestep_spacing", "linspace"):
        case "linspace":
            timesteps = np.linspace(0, noisiest - 1, steps + 1).round()[:0:-1]
        case "leading":
            timesteps = np.arange(steps, 0, -1) * float(noisiest // (steps + 1)) + config["steps_offset"]
        case _:
            timesteps = np.arange(noisiest, 0, -schedule.timesteps / steps).round() - 1
    _check_range(timesteps, schedule)
    return timesteps, np.interp(timesteps, np.arange(len(ratios)), ratios)


def _spaced(config: dict[str, Any], timesteps: int, steps: int) -> Timesteps:
    """Table 2 of Lin et al. 2024, noisiest first."""
    spaced: Timesteps
    match config["timestep_spacing"]:
        case "linspace":
            spaced = np.linspace(0, timesteps - 1, steps)[::-1]
        case "leading":
            spaced = np.arange(steps, dtype=np.float64)[::-1] * (timesteps // steps) + config["steps_offset"]
        case _:
            spaced = np.arange(timesteps, 0, -timesteps / steps).round() - 1
    return spaced


def _check_range(timesteps: Timesteps, schedule: NoiseSchedule) -> None:
    if not 0 <= timesteps.min() <= timesteps.max() <= schedule.timesteps - 1:
        raise SamplerError(
            f"the grid visits timesteps {timesteps.min():g} … {timesteps.max():g}, expected them within 0 … "
            f"{schedule.timesteps - 1}; take fewer steps or a smaller steps_offset"
        )


def _ratios(schedule: NoiseSchedule) -> NDArray[np.float64]:
    return np.sqrt((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)


def _level_spacing(config: dict[str, Any], most: float, least: float, steps: int) -> NDArray[np.float64] | None:
    """Levels spaced by a formula of their own, noisiest first; None where they follow from the timesteps."""
    most, least = config.get("sigma_max") or most, config.get("sigma_min") or least
    if config.get("use_karras_sigmas"):
        ends = np.linspace(most ** (1 / RHO), least ** (1 / RHO), steps)
        return np.asarray(ends**RHO)
    if config.get("use_exponential_sigmas") or config.get("use_lu_lambdas"):
        return np.asarray(np.exp(np.linspace(np.log(most), np.log(least), steps)))
    return None


def _timestep_of(levels: NDArray[np.float64], ratios: NDArray[np.float64]) -> Timesteps:
    """The timestep at which the schedule, even in log between its timesteps, has each level."""
    return np.asarray(np.interp(np.log(levels), np.log(ratios), np.arange(len(ratios))), np.float64)


def _grid(timesteps: Timesteps, ratios: NDArray[np.float64]) -> Grid:
    return Grid([float(t) for t in timesteps], [Level(float(ratio)) for ratio in ratios])
