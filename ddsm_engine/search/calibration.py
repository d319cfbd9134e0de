"""How much does each variant err at each call? Minutes of measuring, before any candidate is drawn.

Two questions of the same calls. *Along trajectories*: the full width draws images; at the states that it meets, every
variant answers, too, and the mean squared difference from the full width's answer is its error. *Against data*: real
images with noise added; a variant's error is its loss (of what the network was trained to answer) beyond the full
width's. Both are in units of the network's output.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ddsm_engine.backends import engine_target
from ddsm_engine.bundle import checksum_of
from ddsm_engine.files import atomic_path
from ddsm_engine.noise import INITIAL, SeededNoise
from ddsm_engine.pipeline import Pipeline
from ddsm_engine.plan import Plan, nearest_timestep
from ddsm_engine.quality import Images
from ddsm_engine.search.space import Space
from ddsm_engine.untrusted import open_safetensors

log = logging.getLogger(__name__)

Plans = dict[str, Plan]
"""Of every variant, the run in which it serves all calls."""


CALIBRATION_IMAGES = 16
"""Trajectories of each seed; an error is a mean over all pixels of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Errors of every variant.

    Attributes:
        along: [seeds, groups, variants], along the full width's trajectories.
        data: [groups, variants], against data; None where there were none.
        evaluations: Image evaluations of a network that it took.
    """

    along: NDArray[np.float64]
    data: NDArray[np.float64] | None
    evaluations: int

    def tables(self, seed: int | None = None) -> list[NDArray[np.float64]]:
        """One table [groups, variants] of each kind, of all seeds or of one (by its index)."""
        along = self.along.mean(axis=0) if seed is None else self.along[seed]
        return [along] if self.data is None else [along, self.data]


def calibrate(
    pipeline: Pipeline,
    plans: Plans,
    space: Space,
    *,
    seeds: Sequence[int],
    batch_size: int,
    real: Images | None,
    keep: Path,
    report: Callable[[str], None],
) -> Calibration:
    """Measure both errors, or read what was measured before.

    Args:
        pipeline: What draws.
        plans: See ``Plans``.
        space: Variants and groups.
        seeds: Of the trajectories, ``CALIBRATION_IMAGES`` each.
        batch_size: Images at a time.
        real: Images [N, C, H, W] in [-1, 1] to measure errors against, or None.
        keep: A folder where what is measured is kept.
        report: Told one line for every seed.
    """
    size = (len(seeds), len(space.groups), len(space.variants))
    calls = sum(space.groups)
    evaluations = len(seeds) * CALIBRATION_IMAGES * (calls + size[1] * size[2])
    evaluations += 0 if real is None else len(real) * size[1] * size[2]
    file = keep / f"calibration-{_key(pipeline, plans, space, seeds, batch_size, real)[:12]}.safetensors"
    if (kept := _read(file, size, evaluations)) is not None:
        return kept
    along = []
    for seed in seeds:
        along.append(errors_along(pipeline, plans, space, seed=seed, images=CALIBRATION_IMAGES, batch_size=batch_size))
        report(f"errors of every variant along the full width's trajectories: seed {len(along)} of {len(seeds)}")
    data = None
    if real is not None:
        data = errors_against_data(pipeline, plans, space, real, seed=seeds[0], batch_size=batch_size)
        report("errors of every variant against data")
    found = Calibration(np.stack(along), data, evaluations)
    with atomic_path(file) as temporary:
        save_file({"along": found.along} | ({} if data is None else {"data": data}), temporary)
    return found


def _key(
    pipeline: Pipeline, plans: Plans, space: Space, seeds: Sequence[int], batch_size: int, real: Images | None
) -> str:
    """A checksum of everything that a calibration depends on."""
    backend = pipeline.settle_backend(next(iter(plans.values())), batch_size)
    return checksum_of({
        "bundle": pipeline.bundle.manifest.checksum,
        "plans": [plans[variant].checksum for variant in space.variants],
        "groups": list(space.groups),
        "seeds": list(seeds),
        "images": CALIBRATION_IMAGES,
        "target": dict(engine_target(backend, pipeline.options, batch_size)),
        "data": None if real is None else sha256(real.tobytes()).hexdigest(),
    })  # fmt: skip


def _read(file: Path, size: tuple[int, int, int], evaluations: int) -> Calibration | None:
    if not file.is_file():
        return None
    try:
        with open_safetensors(file, "np") as opened:
            along = opened.get_tensor("along")
            data = opened.get_tensor("data") if "data" in opened.keys() else None  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        log.warning("%s is damaged and is measured again: %s", file, error)
        return None
    return Calibration(along, data, evaluations) if along.shape == size else None


def middle_calls(space: Space) -> list[int]:
    """The call of each group that stands for it."""
    ends = np.cumsum(space.groups)
    return [int(end - length + length // 2) for end, length in zip(ends, space.groups, strict=True)]


def errors_along(
    pipeline: Pipeline,
    plans: Plans,
    space: Space,
    *,
    seed: int,
    images: int,
    batch_size: int,
) -> NDArray[np.float64]:
    """Mean squared difference [groups, variants] from the full width's answer, at the states that it meets.

    Args:
        pipeline: What draws.
        plans: See ``Plans``.
        space: Variants and groups.
        seed: Of the noise.
        images: How many trajectories.
        batch_size: Images at a time.
    """
    full = pipeline.bundle.full.id
    asked = middle_calls(space)
    states = _states(pipeline, plans[full], asked, seed=seed, images=images, batch_size=batch_size)
    errors = np.zeros((len(asked), len(space.variants)))
    for group, (call, x) in enumerate(zip(asked, states, strict=True)):
        expected = pipeline.answer(plans[full], call, x, batch_size=batch_size)
        for index, variant in enumerate(space.variants):
            found = expected if variant == full else pipeline.answer(plans[variant], call, x, batch_size=batch_size)
            errors[group, index] = _mean_square(found, expected)
    return errors


def errors_against_data(
    pipeline: Pipeline, plans: Plans, space: Space, real: Images, *, seed: int, batch_size: int
) -> NDArray[np.float64]:
    """Loss [groups, variants] beyond the full width's on real images [N, C, H, W]; below 0 where it is less."""
    manifest = pipeline.bundle.manifest
    full = pipeline.bundle.full.id
    noise = np.empty_like(real)
    SeededNoise(seed).fill(noise, INITIAL, 0)
    losses = np.zeros((len(space.groups), len(space.variants)))
    for group, call in enumerate(middle_calls(space)):
        t = nearest_timestep(float(plans[full].timesteps[call]), manifest.noise_schedule.timesteps)
        level = manifest.noise_schedule.alphas_cumprod[t]
        alpha, sigma = np.float32(np.sqrt(level)), np.float32(np.sqrt(1 - level))
        x = alpha * real + sigma * noise
        match manifest.prediction_type:
            case "epsilon":
                expected = noise
            case "sample":
                expected = real
            case "v_prediction":
                expected = alpha * noise - sigma * real
        for index, variant in enumerate(space.variants):
            found = pipeline.answer(plans[variant], call, x, batch_size=batch_size)
            losses[group, index] = _mean_square(found, expected)
    return losses - losses[:, [space.variants.index(full)]]


def _states(
    pipeline: Pipeline, plan: Plan, calls: Sequence[int], *, seed: int, images: int, batch_size: int
) -> list[Images]:
    """What the network reads in each of these calls of a run, [N, C, H, W] each."""
    initial = np.empty((images, *pipeline.bundle.manifest.spec.sample_shape), np.float32)
    SeededNoise(seed).fill(initial, INITIAL, 0)
    met: dict[int, list[Images]] = {call: [] for call in calls}

    def keep(call: int, _: float, x: Images) -> None:
        if call + 1 in met:
            met[call + 1].append(x.copy())

    for _ in pipeline.batches(plan, num_images=images, batch_size=batch_size, seed=seed, callback=keep):
        pass
    if 0 in met:
        met[0].append(initial * np.float32(plan.start))
    return [np.concatenate(met[call])[:images] for call in calls]


def _mean_square(found: Images, expected: Images) -> float:
    return float(np.mean((found.astype(np.float64) - expected) ** 2))
