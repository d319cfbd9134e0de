"""DPM-Solver and DPM-Solver++ (Lu et al. 2022a, 2022b): exponential integrators in λ, half the log SNR.

The ++ forms integrate the predicted clean image, the older ones the predicted noise; ``sde-`` forms add fresh noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ddsm_engine.samplers.grid import Grid, Level
from ddsm_engine.samplers.table import Draft, Row

SHORT = 15
"""Runs of fewer calls end with lower orders, which keeps them stable (diffusers' and the authors' bound)."""


def draft_multistep(draft: Draft, config: dict[str, Any], grid: Grid) -> None:
    """2M and 3M: one call a step; earlier predictions give the higher order."""
    order: int = config["solver_order"]
    calls = len(grid.timesteps)
    is_short = config["lower_order_final"] and calls < SHORT
    for i, t in enumerate(grid.timesteps):
        predictions = [_prediction(draft, config, grid.levels[i]), *draft.kept]
        known = min(order, i + 1)
        if i == calls - 1 and (config["euler_at_final"] or is_short or config["final_sigmas_type"] == "zero"):
            known = 1
        elif i == calls - 2 and is_short:
            known = min(known, 2)
        levels = [grid.levels[i - k] for k in range(known)]
        draft.call(t, _multistep(draft, config, predictions, levels, grid.levels[i + 1]), *predictions[: order - 1])


def draft_singlestep(draft: Draft, config: dict[str, Any], grid: Grid) -> None:
    """2S and 3S: calls in groups, each starting again from the group's first sample."""
    orders = singlestep_orders(config, len(grid.timesteps))
    for i, (t, order) in enumerate(zip(grid.timesteps, orders, strict=True)):
        prediction = _prediction(draft, config, grid.levels[i])
        start, earlier = (draft.x, ()) if order == 1 else (draft.kept[0], draft.kept[1:order])
        predictions = [prediction, *earlier]
        levels = [grid.levels[i - k] for k in range(order)]
        x = _singlestep(draft, config, start, predictions, levels, grid.levels[i + 1])
        is_group_over = i + 1 == len(orders) or orders[i + 1] == 1
        draft.call(t, x, *(() if is_group_over else (start, *predictions)))


def singlestep_orders(config: dict[str, Any], calls: int) -> list[int]:
    """The order of every call of a single-step solver: 1, 2, … within each group."""
    order: int = config["solver_order"]
    group = list(range(1, order + 1))
    # A run that ends clean, or that the groups do not fill, ends with lower orders; diffusers switches this on itself.
    if not (config["lower_order_final"] or config["final_sigmas_type"] == "zero" or calls % order):
        return group * (calls // order)
    whole, rest = divmod(calls, order)
    if rest:
        return [*group * whole, *group[: rest - 1], 1 if config["final_sigmas_type"] == "zero" else rest]
    return [*group * (whole - 1), *group[:-1], 1]


def _prediction(draft: Draft, config: dict[str, Any], level: Level) -> Row:
    """What is integrated: the clean image, or the noise that goes with it."""
    x_0, eps = draft.predict(level)
    if config["algorithm_type"] in ("dpmsolver++", "sde-dpmsolver++"):
        return x_0
    return (draft.x - level.alpha * x_0) / level.sigma if config["thresholding"] else eps


@dataclass(frozen=True, slots=True)
class _Step:
    """Coefficients of a step from one level to another.

    Attributes:
        h: Its length in λ.
        of_x: Of the sample.
        of_prediction: Of the prediction.
        of_slope: Of its first difference quotient, by the formula called ``heun``.
        of_slope_midpoint: The same, by the one called ``midpoint``.
        of_curve: Of the second difference quotient.
        of_noise: Of fresh noise.
    """

    h: float
    of_x: float
    of_prediction: float
    of_slope: float
    of_slope_midpoint: float
    of_curve: float
    of_noise: float


def _step(algorithm: str, here: Level, after: Level) -> _Step:
    h, noise = after.log_snr - here.log_snr, 0.0
    match algorithm:
        case "dpmsolver++":
            grown, scale, of_x = math.expm1(-h), -after.alpha, after.sigma / here.sigma
            slope, curve = -(grown / h + 1), (grown + h) / h**2 - 0.5
        case "sde-dpmsolver++":
            grown, scale, of_x = math.expm1(-2 * h), -after.alpha, after.sigma / here.sigma * math.exp(-h)
            slope, curve = -(grown / (2 * h) + 1), (grown + 2 * h) / (2 * h) ** 2 + 0.5
            noise = after.sigma * math.sqrt(-grown)
        case "dpmsolver":
            grown, scale, of_x = math.expm1(h), -after.sigma, after.alpha / here.alpha
            slope, curve = grown / h - 1, (grown - h) / h**2 - 0.5
        case _:  # sde-dpmsolver, which has no third order
            grown, scale, of_x = math.expm1(h), -2 * after.sigma, after.alpha / here.alpha
            slope, curve = grown / h - 1, math.nan
            noise = after.sigma * math.sqrt(math.expm1(2 * h))
    return _Step(h, of_x, scale * grown, scale * slope, scale * grown / 2, scale * curve, noise)


def _multistep(
    draft: Draft, config: dict[str, Any], predictions: Sequence[Row], levels: Sequence[Level], after: Level
) -> Row:
    """A step from ``levels[0]`` with the predictions at every one of ``levels``, the latest first."""
    here = levels[0]
    if here == after:
        return draft.x  # what the formulas tend to, where they would divide by its length
    step = _step(config["algorithm_type"], here, after)
    x: Row = step.of_x * draft.x + step.of_prediction * predictions[0] + step.of_noise * draft.noise
    if len(levels) == 1:
        return x
    ratios = [(a.log_snr - b.log_snr) / step.h for a, b in pairwise(levels)]
    slopes: list[Row] = [
        (a - b) / ratio for a, b, ratio in zip(predictions, predictions[1 : len(levels)], ratios, strict=False)
    ]
    if len(levels) == 2:
        is_midpoint = config["solver_type"] == "midpoint"
        return x + (step.of_slope_midpoint if is_midpoint else step.of_slope) * slopes[0]
    first, second = ratios
    curve: Row = (slopes[0] - slopes[1]) / (first + second)
    return x + step.of_slope * (slopes[0] + first * curve) + step.of_curve * curve


def _singlestep(
    draft: Draft,
    config: dict[str, Any],
    start: Row,
    predictions: Sequence[Row],
    levels: Sequence[Level],
    after: Level,
) -> Row:
    """A step from the last of ``levels``, where the group started with ``start``, to ``after``; the latest first."""
    here = levels[-1]
    if here == after:
        return start
    step = _step(config["algorithm_type"], here, after)
    x: Row = step.of_x * start + step.of_prediction * predictions[-1] + step.of_noise * draft.noise
    ratios = [(level.log_snr - here.log_snr) / step.h for level in levels[:-1]]
    slopes: list[Row] = [(m - predictions[-1]) / ratio for m, ratio in zip(predictions, ratios, strict=False)]
    is_midpoint = config["solver_type"] == "midpoint"
    if len(levels) == 1:
        return x
    if len(levels) == 2:
        return x + (step.of_slope_midpoint if is_midpoint else step.of_slope) * slopes[0]
    if is_midpoint:
        return x + step.of_slope * slopes[0]
    late, early = ratios
    slope: Row = (late * slopes[1] - early * slopes[0]) / (late - early)
    curve: Row = 2 * (slopes[0] - slopes[1]) / (late - early)
    return x + step.of_slope * slope + step.of_curve * curve
