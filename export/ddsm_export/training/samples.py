"""Grids of samples from the averaged weights, one per width: what a loss does not show."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.backends.torch import TorchEngine
from ddsm_engine.images import grid, save_png
from ddsm_engine.networks.slicing import subnetwork
from ddsm_engine.noise import SeededNoise
from ddsm_engine.plan import plan_calls
from ddsm_engine.samplers import make_sampler
from ddsm_engine.scheduler import Scheduler
from ddsm_export.supernet import Supernet


def draw(supernet: Supernet, width: int, *, count: int, steps: int, seed: int = 0) -> NDArray[np.float32]:
    """Draw with one width and DDIM; the same seed gives every width the same initial noise.

    The predicted clean image is clipped to ± 1: at the noisy end an error of a young network is divided by √ᾱ = 1/157,
    and without the clip its samples are black or white long after they have shapes.

    Returns:
        float32 [count, C, H, W], clipped to [-1, 1].
    """
    spec = supernet.spec
    sampler = make_sampler("ddim", supernet.noise_schedule, steps, clip_sample=1.0)
    plan = plan_calls([str(width)] * steps, sampler, {str(width): supernet.time_features})
    scheduler = Scheduler((count, *spec.sample_shape))
    engine = TorchEngine(subnetwork(spec, supernet.weights, width), EngineOptions())
    scheduler.add(str(width), engine, spec.time_features)
    scheduler.run(plan, SeededNoise(seed))
    scheduler.close()
    return np.clip(scheduler.x, -1, 1)


def save_grids(supernet: Supernet, widths: Sequence[int], folder: Path, *, count: int = 16, steps: int = 50) -> None:
    """Write ``w016.png`` … of every width."""
    steps = min(steps, supernet.spec.timesteps)
    for width in widths:
        save_png(grid(draw(supernet, width, count=count, steps=steps), columns=8), folder / f"w{width:03d}.png")
