"""Strategy x sampler → the calls of a run in execution order."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.bundle import Variant
from ddsm_engine.errors import StrategyError
from ddsm_engine.sampler import Sampler
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
        variants: [calls], which variant each call names.
        timesteps: [calls], float64.
        time_features: [calls, F], float32, one row per call, shared by the whole batch.
        to_x_0: [calls, 2], float32; see ``ddsm_engine.sampler``.
        update: [calls, 4], float32; see ``ddsm_engine.sampler``.
        clip: Bound of the predicted clean image, or None.
    """

    variants: tuple[str, ...]
    timesteps: NDArray[np.float64]
    time_features: NDArray[np.float32]
    to_x_0: NDArray[np.float32]
    update: NDArray[np.float32]
    clip: float | None

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The calls grouped into runs of one variant."""
        segments, first = [], 0
        for variant, group in groupby(self.variants):
            calls = len(list(group))
            segments.append(Segment(variant, first, calls))
            first += calls
        return tuple(segments)

    def __str__(self) -> str:
        """A line that explains the run: ``w064×530, w096×163, … ; 1000 calls, 28 swaps``."""
        parts = [f"{s.variant}×{s.calls}" for s in self.segments]
        shown = parts if len(parts) <= 8 else [*parts[:4], f"… {len(parts) - 8} more …", *parts[-4:]]
        return f"{', '.join(shown)}; {len(self.variants)} calls, {len(parts) - 1} swaps"


def compile_plan(strategy: Strategy, sampler: Sampler, variants: Iterable[Variant], table: TimeTable) -> Plan:
    """Look up the variant of every call.

    A strategy over timesteps is asked at the timesteps the sampler visits; one over calls must belong to this sampler
    and number of steps.

    Raises:
        StrategyError: a wrong length, another sampler, or a choice that no variant offers.
    """
    ids = strategy.resolve(variants)
    if strategy.axis == "call":
        if (strategy.sampler, strategy.steps) != (sampler.name, sampler.calls) or len(ids) != sampler.calls:
            raise StrategyError(
                f"the strategy belongs to {strategy.sampler} with {strategy.steps} steps ({len(ids)} entries); this "
                f"run is {sampler.name} with {sampler.calls}"
            )
        return plan_calls(ids, sampler, table)
    if len(ids) != table.timesteps:
        raise StrategyError(
            f"the strategy has {len(ids)} entries; this supernet has {table.timesteps} timesteps: use one made for it"
        )
    return plan_calls([ids[nearest_timestep(t, table.timesteps)] for t in sampler.timesteps], sampler, table)


def plan_calls(variants: Sequence[str], sampler: Sampler, table: TimeTable) -> Plan:
    """The plan that serves the sampler's calls by these variants, one per call."""
    return Plan(
        variants=tuple(variants),
        timesteps=sampler.timesteps,
        time_features=table[sampler.timesteps],
        to_x_0=sampler.to_x_0.astype(np.float32),
        update=sampler.update.astype(np.float32),
        clip=sampler.clip,
    )


def nearest_timestep(t: float, timesteps: int) -> int:
    """The entry of a timestep strategy that serves ``t``: the nearest, halves towards the clean end."""
    return min(max(math.ceil(t - 0.5), 0), timesteps - 1)
