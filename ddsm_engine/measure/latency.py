"""How long does each variant take? The per-variant table that every comparison starts from."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ddsm_engine.backends import open_engines
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.cost import gflops
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.timing import Timing, time_in_turns


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
    follows another variant's and says what a swap costs (``Timing.swap_ms``).

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
