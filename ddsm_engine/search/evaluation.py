"""How good and how fast are given strategies? Each on the same noise, in turns, with intervals."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ddsm_engine.measure.timing import Timing, summarise
from ddsm_engine.quality import Interval, basic_interval, bootstrap
from ddsm_engine.search.trials import Calls, Drawn, Trials

LEAST_TURNS = 3
"""That a time is the median of."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is reported of a strategy.

    Attributes:
        calls: See ``Calls``.
        value: The metric.
        interval: Of 95 %, by resampling the images.
        loss: The metric less that of the reference, from the same noise.
        loss_interval: Of 95 %, by resampling the images of both alike.
        ms_per_image: Wall time of whole runs; repeats are batches.
    """

    calls: Calls
    value: float
    interval: Interval
    loss: float
    loss_interval: Interval
    ms_per_image: Timing


def evaluate_in_turns(
    trials: Trials,
    strategies: Mapping[str, Calls],
    reference: str,
    *,
    seed: int,
    images: int,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Evaluation]:
    """Draw a batch of one strategy, then of the next, and again: a machine whose speed drifts treats them alike.

    Only turns in which each of them was really drawn count as time; where too few did, for the rest was drawn and kept
    by a search that was stopped, some are drawn for nothing else.

    Args:
        trials: What draws, judges and keeps.
        strategies: By name.
        reference: The name of the one that the others are compared with.
        seed: Of the noise, the same for all.
        images: Of each.
        report: Told when all have drawn as many images.
    """
    turns: list[dict[str, Drawn]] = []
    for first, count in trials.batches(images):
        turns.append({name: trials.draw_batch(calls, seed, first, count) for name, calls in strategies.items()})
        report(f"{first + count} of {images} images of each of {len(strategies)} strategies")
    rows = {name: np.concatenate([turn[name].rows for turn in turns]) for name in strategies}
    taken = [{name: drawn.ms_per_image for name, drawn in turn.items()} for turn in turns]
    times = [turn for turn in taken if None not in turn.values()]
    while len(times) < LEAST_TURNS:
        times.append({name: trials.time_batch(calls) for name, calls in strategies.items()})
    metric = trials.metric
    values = {name: metric.distance(own) for name, own in rows.items()}
    resampled = {name: bootstrap(metric, own) for name, own in rows.items()}
    return {
        name: Evaluation(
            calls,
            values[name],
            basic_interval(values[name], resampled[name]),
            values[name] - values[reference],
            basic_interval(values[name] - values[reference], resampled[name] - resampled[reference]),
            summarise(np.array([turn[name] for turn in times])),
        )
        for name, calls in strategies.items()
    }
