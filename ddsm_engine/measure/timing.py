"""The timing protocol: warm up, take turns, quote the median with its spread."""

import random
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
        swap_ms: What the first call of a turn took beyond the last one, median over the turns: what it costs to come
            from another one's call. 0 where a turn is one call.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    swap_ms: float = 0.0


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
        settle: Calls that are not counted before each one that is: what the others left in the caches is then gone. A
            round is then shuffled (the same way every time), so that each follows all others, and the first of them
            says what a swap costs.
        budget_s: Stop after the round in which this many seconds have passed (three rounds at least).
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    swaps: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffled = list(calls.items()), random.Random(0)  # noqa: S311 - no secret
    before = ""
    started = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - started > budget_s:
            break
        if settle:
            shuffled.shuffle(order)
        for name, call in order:
            turn = [_ms(call) for _ in range(settle + 1)]
            samples[name].append(turn[-1])
            if name != before:  # a shuffled round may begin with what ended the one before
                swaps[name].append(turn[0] - turn[-1])
            before = name
    return {name: summarise(values, swaps[name]) for name, values in samples.items()}


def _ms(call: Callable[[], object]) -> float:
    before = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - before) / 1e6


def summarise(samples_ms: Sequence[float] | NDArray[np.float64], swaps_ms: Sequence[float] = ()) -> Timing:
    """Median and spread of milliseconds, and the median of what swaps took (0 where none was made)."""
    p20, median, p80 = np.percentile(samples_ms, (20, 50, 80))
    return Timing(float(median), float(p20), float(p80), len(samples_ms), float(np.median(swaps_ms or [0.0])))
