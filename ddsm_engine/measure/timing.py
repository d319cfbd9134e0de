"""The timing protocol: warm up, take turns, quote the median with its spread."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall time of one call over many repeats.

    Attributes:
        median_ms: The figure to quote.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        repeats: How many were taken.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 30,
    warmup: int = 3,
    settle: int = 0,
    budget_s: float = 60.0,
) -> dict[str, Timing]:
    """Time several calls A B C A B C …, so that a machine whose speed drifts treats them alike.

    Args:
        calls: What to time, by name.
        repeats: Rounds, at most.
        warmup: Calls of each that are not counted, before all else.
        settle: Calls that are not counted before each one that is: what the others left in the caches is then gone.
        budget_s: Stop after the round in which this many seconds have passed (three rounds at least).
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - started > budget_s:
            break
        for name, call in calls.items():
            for _ in range(settle):
                call()
            before = time.perf_counter_ns()
            call()
            samples[name].append((time.perf_counter_ns() - before) / 1e6)
    return {name: summarise(values) for name, values in samples.items()}


def summarise(samples_ms: Sequence[float] | NDArray[np.float64]) -> Timing:
    """Median and spread of milliseconds."""
    p20, median, p80 = np.percentile(samples_ms, (20, 50, 80))
    return Timing(float(median), float(p20), float(p80), len(samples_ms))
