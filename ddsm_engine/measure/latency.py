"""How long does each variant take? The per-variant table that every comparison starts from."""

import random
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from ddsm_engine.backends import open_engines
from ddsm_engine.backends.device import StagedEngine
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.cost import gflops
from ddsm_engine.device_scheduler import DeviceScheduler
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.timing import Timing, summarise, time_in_turns
from ddsm_engine.noise import SeededNoise
from ddsm_engine.plan import Plan


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """One variant on one backend at one batch size.

    Attributes:
        variant: The variant.
        batch: Images per call.
        timing: Of one call of the whole batch.
        expected_speedup: True MACs of the full width, or the largest expert, / of this variant.
        measured_speedup: Median time of the same / of this variant, taken in turns in the same run.
    """

    variant: Variant
    batch: int
    timing: Timing
    expected_speedup: float
    measured_speedup: float

    @property
    def ms_per_image(self) -> float:
        """Median milliseconds per image."""
        return self.timing.median_ms / self.batch

    @property
    def gflops_per_s(self) -> float:
        """True GFLOPs per second."""
        return gflops(self.variant.macs) / self.ms_per_image * 1e3


def measure_latency(
    bundle: Bundle, variants: Sequence[Variant], backend: str, batch: int, options: EngineOptions, *, repeats: int = 30
) -> list[LatencyRow]:
    """Time every variant in turns on random inputs; the full width must be among them.

    A turn is two calls and the second one counts: most calls of a run follow one of the same variant. The first one
    follows another variant's and says what a swap costs (``Timing.swap_ms``). On a GPU the turns are the calls of one
    run without the host, timed by its own clock.

    Raises:
        BackendError: a variant whose output is not finite.
    """
    spec = bundle.manifest.spec
    middle, tables = [spec.timesteps // 2], bundle.time_tables()
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((batch, *spec.sample_shape), dtype=np.float32)
    engines = open_engines(backend, bundle, variants, batch, options)
    try:
        for identifier, engine in engines.items():
            output = np.full_like(sample, np.nan)
            features = np.repeat(tables[identifier][middle], batch, axis=0)
            engine.bind({"sample": sample, "time_features": features}, {"out_sample": output})
            engine.run()
            if not np.isfinite(output).all():
                raise BackendError(f"{identifier} on {backend} returned values that are not finite; it was not timed")
        staged = {identifier: engine for identifier, engine in engines.items() if isinstance(engine, StagedEngine)}
        if staged:
            timings = time_on_device(bundle, staged, sample.shape, repeats=repeats)
        else:
            runs = {identifier: engine.run for identifier, engine in engines.items()}
            timings = time_in_turns(runs, repeats=repeats, settle=1)
    finally:
        for engine in engines.values():
            engine.close()
    full = bundle.full
    return [
        LatencyRow(v, batch, timings[v.id], full.macs / v.macs, timings[full.id].median_ms / timings[v.id].median_ms)
        for v in variants
    ]


def time_on_device(
    bundle: Bundle, engines: Mapping[str, StagedEngine], shape: tuple[int, ...], *, repeats: int
) -> dict[str, Timing]:
    """Time engines of one GPU, each call with its update, in a run of shuffled turns of two calls.

    Args:
        bundle: Theirs.
        engines: By variant, opened together.
        shape: [B, C, H, W] of a batch.
        repeats: Turns of each.

    Raises:
        BackendError: the run failed.
    """
    shuffled, order, calls = random.Random(0), list(engines), list[str]()  # noqa: S311 - no secret
    for _ in range(repeats + 1):  # the first round warms up
        shuffled.shuffle(order)
        calls += [variant for variant in order for _ in range(2)]
    device = next(iter(engines.values())).device
    with closing(DeviceScheduler(device, shape)) as scheduler:
        for variant, engine in engines.items():
            scheduler.add(variant, engine.engine, bundle.spec(bundle.variants[variant]).time_features)
        clock = scheduler.run(standing_still(bundle, calls), SeededNoise(0))
    took_ms = (clock[:, 1] - clock[:, 0]) / 1e6
    timings = {}
    for variant in engines:
        seconds = [call for call in range(2 * len(engines) + 1, len(calls), 2) if calls[call] == variant]
        after_others = [call for call in seconds if calls[call - 2] != variant]
        swaps = [took_ms[call - 1] - took_ms[call] for call in after_others]
        timings[variant] = summarise(took_ms[seconds], swaps)
    return timings


def standing_still(bundle: Bundle, variants: Sequence[str], *, noise: float = 0.0) -> Plan:
    """A run at the middle timestep whose updates leave the sample as it is, but for so much fresh noise."""
    middle, tables = bundle.manifest.spec.timesteps // 2, bundle.time_tables()
    features = {variant: tables[variant][[middle]][0] for variant in set(variants)}
    update = np.zeros((len(variants), 1, 4), np.float32)
    update[:, 0, 0], update[:, 0, -1] = 1, noise
    return Plan(
        sampler="none",
        variants=tuple(variants),
        timesteps=np.full(len(variants), float(middle)),
        time_features=tuple(features[variant] for variant in variants),
        start=1.0,
        to_x_0=np.zeros((len(variants), 2), np.float32),
        update=update,
        bound=None,
    )
