"""Strategy x sampler → the calls of a run in execution order."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.bundle import Variant
from ddsm_engine.errors import StrategyError
from ddsm_engine.samplers import Bound, Sampler
from ddsm_engine.strategy import Strategy
from ddsm_engine.time_table import TimeTable


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive calls of one variant."""

    variant: str
    first_call: int
    calls: int


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A table of calls; holds no tensor of a run and no engine.

    Attributes:
        sampler: Name of the sampler whose calls they are.
        variants: [calls], which variant each call names.
        timesteps: [calls], float64.
        time_features: [calls] of float32 [F], shared by the whole batch; F is that of the call's variant.
        start: Standard deviation of the initial sample.
        to_x_0: [calls, 2], float32; see ``ddsm_engine.samplers.Sampler``.
        update: [calls, slots, slots + 3], float32; see ``ddsm_engine.samplers.Sampler``.
        bound: What is done to a predicted clean image, or None.
    """

    sampler: str
    variants: tuple[str, ...]
    timesteps: NDArray[np.float64]
    time_features: tuple[NDArray[np.float32], ...]
    start: float
    to_x_0: NDArray[np.float32]
    update: NDArray[np.float32]
    bound: Bound | None

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The calls grouped into runs of one variant."""
        segments, first = [], 0
        for variant, group in groupby(self.variants):
            calls = len(list(group))
            segments.append(Segment(variant, first, calls))
            first += calls
        return tuple(segments)

    @property
    def checksum(self) -> str:
        """SHA-256 of everything that the calls compute with, hexadecimal."""
        digest = hashlib.sha256(f"{self.variants} {self.start} {self.bound}".encode())
        for table in (self.timesteps, self.to_x_0, self.update):
            digest.update(table.tobytes())
        return digest.hexdigest()

    def __str__(self) -> str:
        """A line that explains the run: ``w064×530, w096×163, … ; 1000 calls, 28 swaps``."""
        parts = [f"{s.variant}×{s.calls}" for s in self.segments]
        shown = parts if len(parts) <= 8 else [*parts[:4], f"… {len(parts) - 8} more …", *parts[-4:]]
        return f"{', '.join(shown)}; {len(self.variants)} calls, {len(parts) - 1} swaps"


def compile_plan(
    strategy: Strategy, sampler: Sampler, variants: Iterable[Variant], tables: Mapping[str, TimeTable]
) -> Plan:
    """Look up the variant of every call.

    A strategy over timesteps is asked at the timestep of each call; at a fractional one the nearest entry answers. One
    over calls must belong to this sampler and number of steps, and has an entry for each call: two for most of Heun's
    steps.

    Args:
        strategy: Which variant when.
        sampler: The calls.
        variants: Those there are.
        tables: Variant id → its table of time features.

    Raises:
        StrategyError: a wrong length, another sampler, or a choice that no variant offers.
    """
    ids = strategy.resolve(variants)
    if strategy.axis == "call":
        if (strategy.sampler, strategy.steps) != (sampler.name, sampler.steps) or len(ids) != sampler.calls:
            raise StrategyError(
                f"the strategy belongs to {strategy.sampler} with {strategy.steps} steps ({len(ids)} entries); this "
                f"run is {sampler.name} with {sampler.steps} ({sampler.calls} calls)"
            )
        return plan_calls(ids, sampler, tables)
    timesteps = next(iter(tables.values())).timesteps
    if len(ids) != timesteps:
        raise StrategyError(
            f"the strategy has {len(ids)} entries; this supernet has {timesteps} timesteps: use one made for it"
        )
    return plan_calls([ids[nearest_timestep(t, timesteps)] for t in sampler.timesteps], sampler, tables)


def plan_calls(variants: Sequence[str], sampler: Sampler, tables: Mapping[str, TimeTable]) -> Plan:
    """The plan that serves the sampler's calls by these variants, one per call."""
    rows = {variant: tables[variant][sampler.timesteps] for variant in dict.fromkeys(variants)}
    return Plan(
        sampler=sampler.name,
        variants=tuple(variants),
        timesteps=sampler.timesteps,
        time_features=tuple(rows[variant][call] for call, variant in enumerate(variants)),
        start=sampler.start,
        to_x_0=sampler.to_x_0.astype(np.float32),
        update=sampler.update.astype(np.float32),
        bound=sampler.bound,
    )


def nearest_timestep(t: float, timesteps: int) -> int:
    """The entry of a timestep strategy that serves ``t``: the nearest, halves towards the clean end."""
    return min(max(math.ceil(t - 0.5), 0), timesteps - 1)
