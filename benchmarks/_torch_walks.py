"""Sampling loops in torch that the runs of ``strategy_latency`` are compared with: in their answers and in time."""

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks._comparison import TOLERANCES
from benchmarks.cifar10 import SEED, some_calls
from benchmarks.dynamic_torch import DrawNoise, DynamicLoop, dynamic_unet_from_bundle
from ddsm_engine.backends.torch import network_from_weights
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import BackendError
from ddsm_engine.noise import INITIAL, PER_CALL, SeededNoise
from ddsm_engine.parity import distance
from ddsm_engine.pipeline import Batch, Pipeline
from ddsm_engine.plan import Plan

Images = NDArray[np.float32]

Walk = Callable[[Plan, Tensor, DrawNoise], Tensor]
"""(the calls to make, x [B, C, H, W] to start from, noise) → the final state."""

STATIC: Final = "torch fp32, static, channels-last"
SLICED: Final = "torch fp32, sliced at run time"


def make_walks(bundle: Bundle, plan: Plan) -> dict[str, Walk]:
    """Both loops; the plan names the timesteps that they may visit."""
    return {STATIC: static_walk(bundle), SLICED: sliced_walk(bundle, plan)}


def sliced_walk(bundle: Bundle, plan: Plan) -> Walk:
    """The published loop, which cuts the supernet at run time, over any of the plan's timesteps at any widths."""
    timesteps = [int(t) for t in plan.timesteps]
    loop = DynamicLoop(dynamic_unet_from_bundle(bundle), bundle.manifest.noise_schedule, timesteps, "fp32")

    def walk(own: Plan, x: Tensor, noise: DrawNoise) -> Tensor:
        visited, mults = [int(t) for t in own.timesteps], [1.0] * bundle.manifest.spec.timesteps
        for t, identifier in zip(visited, own.variants, strict=True):
            mults[t] = bundle.variants[identifier].width / bundle.full.width
        return loop.run(x, mults, visited, noise)

    return walk


def static_walk(bundle: Bundle) -> Walk:
    """The full width as an ordinary eager network in the layout that CPUs prefer, and our update."""
    network = network_from_weights(bundle.weights(bundle.full), bundle.manifest.spec, bundle.full.width)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def walk(own: Plan, x: Tensor, noise: DrawNoise) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            for call, ((of_x, of_eps, _, of_noise),) in enumerate(own.update.tolist()):
                features = torch.from_numpy(own.time_features[call]).expand(len(x), -1)
                x = of_x * x + of_eps * network(x, features)
                if of_noise:
                    x = x + of_noise * noise(x, call)
        return x

    return walk


def check_answers(pipe: Pipeline, plans: Mapping[str, Plan], batch: int, walks: Mapping[str, Walk]) -> dict[str, float]:
    """Run the first call of every variant and the last call of every plan, all given the same noise.

    Returns:
        Relative L2 between the final states and those of the published loop, by run.

    Raises:
        BackendError: a difference beyond ``TOLERANCES``.
    """
    seeded = SeededNoise(SEED)
    start = np.empty((batch, *pipe.bundle.manifest.spec.sample_shape), np.float32)
    seeded.fill(start, INITIAL, 0)

    def noise(like: Tensor, call: int) -> Tensor:
        out = np.empty(like.shape, np.float32)
        seeded.fill(out, PER_CALL, call)
        return torch.from_numpy(out)

    differences = {}
    for name, plan in plans.items():
        first = [plan.variants.index(variant) for variant in set(plan.variants)]
        few = some_calls(plan, sorted({*first, len(plan.variants) - 1}))
        expected = walks[SLICED](few, torch.from_numpy(start), noise).numpy()
        found = draw_batch(pipe, few, batch).x_final
        differences[name] = check_answer(f"{name} on {pipe.backend}", pipe.precision, found, expected)
        if set(plan.variants) == {pipe.bundle.full.id}:
            found = walks[STATIC](few, torch.from_numpy(start), noise).contiguous().numpy()
            differences[STATIC] = check_answer(STATIC, "fp32", found, expected)
    return differences


def check_answer(name: str, precision: str, found: Images, expected: Images) -> float:
    """Relative L2 of two final states.

    Raises:
        BackendError: beyond the precision's tolerance.
    """
    difference, _ = distance(found, expected)
    if difference > TOLERANCES[precision]:
        raise BackendError(
            f"{name} ({precision}) differs from the published loop in torch by {difference:.1e} (relative L2), "
            f"expected at most {TOLERANCES[precision]:.0e}; they do not compute the same thing, so nothing was timed"
        )
    return difference


def draw_batch(pipe: Pipeline, plan: Plan, batch: int) -> Batch:
    """One batch of images of the benchmarks' seed."""
    (drawn,) = pipe.batches(plan, num_images=batch, batch_size=batch, seed=SEED)
    return drawn
