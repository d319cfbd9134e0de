"""What do the published samplers compute, step by step, when the noise is given?

Ancestral DDPM sampling as DDSM (and pytorch-ddpm, from which it has it) runs it, and DDIM (Song et al. 2021,
equation 12) in the same manner: tables in float64, gathered into float32, the state in float32. Noise is injected,
because two implementations can only be compared on the same noise. Written without the product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

EpsFn = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, H, W] float32, t [B] int64) → predicted noise like x_t."""

Variance = Literal["fixedlarge", "fixedsmall"]


@dataclass(frozen=True, slots=True)
class PublishedSchedule:
    """The linear noise schedule; defaults are those of every published DDSM model."""

    beta_start: float = 1e-4
    beta_end: float = 0.02
    T: int = 1000

    @property
    def betas(self) -> Tensor:
        """β_t, spaced in float32 and then widened."""
        return torch.linspace(self.beta_start, self.beta_end, self.T).double()

    @property
    def alphas_bar(self) -> Tensor:
        """ᾱ_t, float64."""
        return torch.cumprod(1.0 - self.betas, dim=0)

    @property
    def alphas_bar_prev(self) -> Tensor:
        """ᾱ of the next cleaner timestep, float64; 1 before timestep 0."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_bar[:-1]])

    @property
    def posterior_var(self) -> Tensor:
        """Variance of q(x_{t−1} | x_t, x_0), float64; 0 at timestep 0."""
        return self.betas * (1.0 - self.alphas_bar_prev) / (1.0 - self.alphas_bar)

    def log_var(self, variance: Variance) -> Tensor:
        """Log variance of the reverse step, float64; the entry of timestep 0 is never used with noise."""
        posterior = self.posterior_var
        rest = self.betas[1:] if variance == "fixedlarge" else posterior[1:]
        return torch.cat([posterior[1:2], rest]).log()


def ddpm_states(
    eps_fn: EpsFn,
    x_T: Tensor,
    noises: Sequence[Tensor],
    schedule: PublishedSchedule,
    variance: Variance = "fixedlarge",
) -> list[Tensor]:
    """Walk all timesteps from T − 1 to 0.

    The published code clips x_0 after the mean was computed from it, to no effect, so nothing is clipped here. Only
    its final answer is, which is left to the caller.

    Args:
        eps_fn: The denoiser.
        x_T: [B, C, H, W], float32.
        noises: One per executed step, in that order; that of timestep 0 is not used and may be left out.
        schedule: The noise schedule.
        variance: Variance of the reverse process.

    Returns:
        The state after every step, unclipped, in order of execution: T of them.
    """
    alphas_bar, prev = schedule.alphas_bar, schedule.alphas_bar_prev
    recip, recipm1 = (1.0 / alphas_bar).sqrt(), (1.0 / alphas_bar - 1).sqrt()
    coef_x0 = prev.sqrt() * schedule.betas / (1.0 - alphas_bar)
    coef_xt = (1.0 - schedule.betas).sqrt() * (1.0 - prev) / (1.0 - alphas_bar)
    log_var = schedule.log_var(variance)

    x, states = x_T, []
    for i, t in enumerate(range(schedule.T - 1, -1, -1)):
        eps = eps_fn(x, timestep_batch(x, t))
        x_0 = recip[t].float() * x - recipm1[t].float() * eps
        x = coef_x0[t].float() * x_0 + coef_xt[t].float() * x
        if t > 0:
            x = x + torch.exp(0.5 * log_var[t].float()) * noises[i]
        states.append(x)
    return states


def ddim_states(
    eps_fn: EpsFn,
    x_T: Tensor,
    noises: Sequence[Tensor],
    timesteps: Sequence[int],
    schedule: PublishedSchedule,
    eta: float = 0.0,
) -> list[Tensor]:
    """Walk the given timesteps; the last step ends at ᾱ = 1, so it adds no noise whatever η.

    Args:
        eps_fn: The denoiser.
        x_T: [B, C, H, W], float32.
        noises: One per executed step, not used where σ is 0 (the last step, or every one at η = 0) and may end early.
        timesteps: Those visited, noisiest first.
        schedule: The noise schedule.
        eta: 0 is deterministic, 1 has the posterior's variance.

    Returns:
        The state after every step, unclipped, in order of execution.
    """
    visited = schedule.alphas_bar[list(timesteps)]
    cleaner = torch.cat([visited[1:], torch.ones(1, dtype=torch.float64)])
    sigma = eta * ((1.0 - cleaner) / (1.0 - visited) * (1.0 - visited / cleaner)).sqrt()
    direction = (1.0 - cleaner - sigma**2).clamp(min=0.0).sqrt()

    x, states = x_T, []
    for i, t in enumerate(timesteps):
        eps = eps_fn(x, timestep_batch(x, t))
        x_0 = (x - (1.0 - visited[i]).sqrt().float() * eps) / visited[i].sqrt().float()
        x = cleaner[i].sqrt().float() * x_0 + direction[i].float() * eps
        if sigma[i] > 0:
            x = x + sigma[i].float() * noises[i]
        states.append(x)
    return states


def damped(net: EpsFn, schedule: PublishedSchedule, weight: float = 0.1) -> EpsFn:
    """The exact denoiser of white noise plus a little of ``net``: eps = x_t·√(1 − ᾱ_t) + weight·net(x_t, t).

    Random weights predict no noise, so their own trajectories explode (standard deviation over 200) and end clipped
    almost everywhere, where any two samplers agree. These stay at 1 from the first step to the last.
    """
    scale = (1.0 - schedule.alphas_bar).sqrt().float()

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        return scale[t].view(-1, 1, 1, 1) * x + weight * net(x, t)

    return eps_fn


def timestep_batch(x: Tensor, t: int) -> Tensor:
    """The same timestep for every image of a batch, as the published networks take it."""
    return torch.full((x.shape[0],), t, dtype=torch.int64)
