"""How good and how fast are given strategies? Each on the same noise, in turns, with intervals."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ddsm_engine.measure.timing import Timing, summarise
from ddsm_engine.quality import Interval, basic_interval, bootstrap
from ddsm_engine.search.trials import Calls, Drawn, Trials, chunks_of


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
    """Draw some images of one strategy, then of the next, and again: a machine whose speed drifts treats them alike.

    Args:
        trials: What draws, judges and keeps.
        strategies: By name.
        reference: The name of the one that the others are compared with.
        seed: Of the noise, the same for all.
        images: Of each.
        report: Told when all have drawn as many images.
    """
    drawn: dict[str, list[Drawn]] = {name: [] for name in strategies}
    for first, count in chunks_of(images, trials.batch_size):
        for name, calls in strategies.items():
            drawn[name].append(trials.draw_chunk(calls, seed, first, count))
        report(f"{first + count} of {images} images of each of {len(strategies)} strategies")
    rows = {name: np.concatenate([chunk.rows for chunk in chunks]) for name, chunks in drawn.items()}
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
            summarise(np.concatenate([chunk.ms_per_image for chunk in drawn[name]])),
        )
        for name, calls in strategies.items()
    }
