"""The noise schedule a network was trained with."""

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.errors import SamplerError
from ddsm_engine.untrusted import brief

VarianceType = Literal["fixed_large", "fixed_small"]
VARIANCE_TYPES: tuple[VarianceType, ...] = ("fixed_large", "fixed_small")

ScheduleType = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
SCHEDULE_TYPES: tuple[ScheduleType, ...] = get_args(ScheduleType)

COSINE_OFFSET = 0.008
MOST_COSINE_BETA = 0.999
"""Nichol & Dhariwal 2021, section 3.2."""

LEAST_BETA = 1e-7
LEAST_SIGNAL = 1e-60
"""Of the last ᾱ: with less, the coefficients that recover the clean image do not fit float32. Published: 4e-5."""


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """The betas of a network's training, and the variance its sampler was published with.

    Attributes:
        beta_start: β of timestep 0, the clean end.
        beta_end: β of the last timestep.
        timesteps: Number of training timesteps.
        variance_type: Reverse-process variance of DDPM; ``fixed_large`` is β, ``fixed_small`` the posterior's.
        type: How β grows, in diffusers' words. ``linear`` (Ho et al. 2020, section 4, and DDSM); ``scaled_linear``, the
            square of a line (Rombach et al. 2022); ``squaredcos_cap_v2``, where ᾱ is a squared cosine (Nichol &
            Dhariwal 2021), for which ``beta_start`` and ``beta_end`` are recorded and mean nothing.
    """

    beta_start: float
    beta_end: float
    timesteps: int
    variance_type: VarianceType = "fixed_large"
    type: ScheduleType = "linear"

    def __post_init__(self) -> None:
        """Refuse a schedule that cannot be sampled."""
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            found = f"{brief(self.beta_start)} … {brief(self.beta_end)}"
            raise SamplerError(f"betas must satisfy 0 < start ≤ end < 1, found {found}")
        if not 2 <= self.timesteps <= 1 << 16:
            raise SamplerError(f"timesteps must be from 2 to 65536, found {brief(self.timesteps)}")
        if self.variance_type not in VARIANCE_TYPES:
            raise SamplerError(f"variance_type must be one of {VARIANCE_TYPES}, found {brief(self.variance_type)}")
        if self.type not in SCHEDULE_TYPES:
            raise SamplerError(f"type must be one of {SCHEDULE_TYPES}, found {brief(self.type)}")
        if self.beta_start < LEAST_BETA or not self.alphas_cumprod[-1] >= LEAST_SIGNAL:
            raise SamplerError(
                f"betas {self.beta_start} … {self.beta_end} over {self.timesteps} timesteps cannot be computed with: "
                f"expected a start of at least {LEAST_BETA:g}, and at the end ᾱ of at least {LEAST_SIGNAL:g}"
            )

    @property
    def betas(self) -> NDArray[np.float64]:
        """β_t as published: made in float32, then widened (a float64 spacing differs by 1e-7)."""
        match self.type:
            case "linear":
                betas = _float32_linspace(self.beta_start, self.beta_end, self.timesteps)
            case "scaled_linear":
                betas = _float32_linspace(self.beta_start**0.5, self.beta_end**0.5, self.timesteps) ** 2
            case "squaredcos_cap_v2":
                betas = _cosine_betas(self.timesteps)
        return betas.astype(np.float64)

    @property
    def alphas_cumprod(self) -> NDArray[np.float64]:
        """ᾱ_t, float64, length ``timesteps``; index 0 is the clean end."""
        return np.cumprod(1.0 - self.betas, dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        """The schedule as JSON values."""
        return {"type": self.type} | asdict(self)

    @classmethod
    def from_json(cls, data: object) -> "NoiseSchedule":
        """Read what ``to_json`` wrote.

        Raises:
            SamplerError: a missing, unknown or impossible value.
        """
        names = {"type", "beta_start", "beta_end", "timesteps", "variance_type"}
        if not isinstance(data, dict) or set(data) != names or data["type"] not in SCHEDULE_TYPES:
            raise SamplerError(
                f"a noise schedule must have {sorted(names)}, its type one of {SCHEDULE_TYPES}; found {brief(data)}"
            )
        start, end, timesteps = data["beta_start"], data["beta_end"], data["timesteps"]
        if type(start) not in (int, float) or type(end) not in (int, float) or type(timesteps) is not int:
            found = f"{brief(start)}, {brief(end)}, {brief(timesteps)}"
            raise SamplerError(f"betas must be numbers and timesteps a whole number, found {found}")
        return cls(start, end, timesteps, data["variance_type"], data["type"])


def _float32_linspace(start: float, end: float, count: int) -> NDArray[np.float32]:
    """The float32 linspace of torch: it counts from the nearer end, with a float32 step and fused multiply-add."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    # float64 holds the product exactly and rounds the sum once: what a fused multiply-add does.
    rising = (np.float64(first) + step * index).astype(np.float32)
    falling = (np.float64(last) - step * (count - 1 - index)).astype(np.float32)
    return np.where(index < count // 2, rising, falling)


def _cosine_betas(count: int) -> NDArray[np.float32]:
    """β of ᾱ = cos²((t + 0.008) / 1.008 · π / 2), capped (Nichol & Dhariwal 2021, equation 17)."""
    alphas = [math.cos((i / count + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2 for i in range(count + 1)]
    betas = [min(1 - after / before, MOST_COSINE_BETA) for before, after in pairwise(alphas)]
    return np.array(betas, np.float32)
