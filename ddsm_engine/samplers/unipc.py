"""UniPC (Zhao et al. 2023): a predictor of order p, and a corrector that costs no call of its own.

The corrector of a step waits for the next call, whose prediction it uses, so a call first corrects the sample that it
was given and then predicts the next.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddsm_engine.samplers.grid import Grid, Level
from ddsm_engine.samplers.table import Draft, Row


def draft_unipc(draft: Draft, config: dict[str, Any], grid: Grid) -> None:
    """One call a step."""
    calls, most = len(grid.timesteps), config["solver_order"]
    order = 0
    for i, t in enumerate(grid.timesteps):
        x_0, eps = draft.predict(grid.levels[i])
        prediction = x_0 if config["predict_x0"] else eps
        start, *earlier = draft.kept
        x = draft.x
        if i > 0 and i - 1 not in config["disable_corrector"]:
            x = _step(config, start, [*earlier[:order], prediction], [*_back(grid, i - 1, order), grid.levels[i]])
        order = min(most, i + 1, calls - i if config["lower_order_final"] else most)
        predictions = [prediction, *earlier]
        after = _step(config, x, predictions[:order], _back(grid, i, order), grid.levels[i + 1])
        draft.call(t, after, x, *predictions[:most])


def _back(grid: Grid, i: int, count: int) -> list[Level]:
    """The levels of call i and those before it, latest first."""
    return [grid.levels[i - k] for k in range(count)]


def _step(
    config: dict[str, Any], x: Row, predictions: Sequence[Row], levels: Sequence[Level], after: Level | None = None
) -> Row:
    """A step from ``x`` at ``levels[0]``, with the prediction at each of ``levels``.

    Args:
        config: The sampler's.
        x: The sample at ``levels[0]``.
        predictions: At ``levels``; the first at the step's start.
        levels: The step's start, the levels before it, and for the corrector the step's end.
        after: The step's end for the predictor; None for the corrector.
    """
    here = levels[0]
    end = levels[-1] if after is None else after
    if here == end:
        return x
    h = end.log_snr - here.log_snr
    signed = -h if config["predict_x0"] else h
    grown = math.expm1(signed)
    if config["predict_x0"]:
        of_x, scale = end.sigma / here.sigma, end.alpha
    else:
        of_x, scale = end.alpha / here.alpha, end.sigma
    base = of_x * x - scale * grown * predictions[0]
    ratios = np.array([(level.log_snr - here.log_snr) / h for level in levels[1:]])
    if not len(ratios):
        return base
    slopes = [(m - predictions[0]) / ratio for m, ratio in zip(predictions[1:], ratios, strict=True)]
    basis = signed if config["solver_type"] == "bh1" else grown
    weights = _weights(ratios, signed, basis)
    return base - scale * basis * sum((w * slope for w, slope in zip(weights, slopes, strict=True)), np.zeros_like(x))


def _weights(ratios: Row, h: float, basis: float) -> Row:
    """Solve for the weights of the difference quotients (equations 9 to 11)."""
    if len(ratios) == 1:
        return np.array([0.5])  # what the authors take in place of the solution
    powers = np.arange(len(ratios))
    return np.asarray(np.linalg.solve(ratios ** powers[:, None], _moments(len(ratios), h) / basis), np.float64)


def _moments(count: int, h: float) -> Row:
    """The right-hand sides k! h φ_{k+1}(h) for k = 1 … count."""
    phi, found = math.expm1(h) / h - 1, []
    for k in range(1, count + 1):
        found.append(phi * math.factorial(k))
        phi = phi / h - 1 / math.factorial(k + 1)
    return np.array(found)
