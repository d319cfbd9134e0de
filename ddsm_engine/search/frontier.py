"""The least error for every cost: exact, by dynamic programming over the groups of calls.

A strategy's error is a sum over groups, its cost a sum over groups and swaps: a multiple-choice knapsack in which the
price of an item depends on the one before. Costs are rounded to whole units of ``1 / UNITS`` of the costliest strategy,
and for every whole cost the least error is known; what was rounded is added up again exactly at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.errors import StrategyError
from ddsm_engine.search.space import Genome

UNITS = 20_000
"""Whole costs that are told apart. The error of rounding a run of 50 calls is below 50 / 2 of them: 0.13 %."""

MOST_CELLS = 100_000_000
"""Of the table of predecessors, a byte each; with a bound on swaps, fewer whole costs are told apart instead."""


@dataclass(frozen=True, slots=True)
class Point:
    """A strategy that no other beats in both respects.

    Attributes:
        genome: Index of the variant of each group.
        cost: Exact, in the unit of the costs given.
        error: The sum that is minimised.
    """

    genome: Genome
    cost: float
    error: float


def solve_front(
    errors: NDArray[np.float64],
    costs: NDArray[np.float64],
    swap: NDArray[np.float64],
    *,
    max_swaps: int | None = None,
    units: int = UNITS,
) -> list[Point]:
    """Every strategy of least error for its cost, cheapest first.

    Args:
        errors: [groups, variants], of a group served by a variant.
        costs: [groups, variants], positive.
        swap: [variants], added when a group's variant is not that of the group before; not negative.
        max_swaps: Most changes of variant in a run; None: any number.
        units: See ``UNITS``.

    Raises:
        StrategyError: a negative bound on swaps.
    """
    if max_swaps is not None and max_swaps < 0:
        raise StrategyError(f"the number of swaps cannot be less than 0, found {max_swaps}")
    groups, variants = errors.shape
    if max_swaps is not None and max_swaps >= groups - 1:
        max_swaps = None  # it bounds nothing
    # Without a bound one layer holds strategies of any number of swaps; with one, layer s those of exactly s.
    layers = 1 if max_swaps is None else max_swaps + 1
    units = max(groups, min(units, MOST_CELLS // (groups * variants * layers)))
    unit = (costs.max(axis=1).sum() + (groups - 1) * swap.max()) / units
    whole, whole_swap = np.rint(costs / unit).astype(int), np.rint(swap / unit).astype(int)
    width = units + groups + 1  # rounding up may add half a unit a group and a swap

    best = np.full((layers, variants, width), np.inf)
    for variant in range(variants):
        best[0, variant, whole[0, variant]] = errors[0, variant]
    came_from = np.empty((groups, layers, variants, width), np.uint8)
    for group in range(1, groups):
        following = np.full_like(best, np.inf)
        for variant in range(variants):
            stay = whole[group, variant]
            least, source = _shifted(best[:, variant], stay), np.full((layers, width), variant, np.uint8)
            for before in range(variants):
                if before == variant:
                    continue
                moved = _shifted(best[:, before], stay + whole_swap[variant])
                if max_swaps is not None:
                    moved = np.concatenate([np.full((1, width), np.inf), moved[:-1]])
                source[moved < least] = before
                np.minimum(least, moved, out=least)
            following[:, variant] = least + errors[group, variant]
            came_from[group, :, variant] = source
        best = following
    points = [
        _trace(came_from, whole, whole_swap, layer, variant, cost, bounded=max_swaps is not None)
        for layer, variant, cost in _ends(best)
    ]
    return pareto([Point(genome, *_sums(genome, errors, costs, swap)) for genome in dict.fromkeys(points)])


def pareto(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in cost and error, cheapest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.error)):
        if not kept or point.error < kept[-1].error:
            kept.append(point)
    return kept


def _shifted(rows: NDArray[np.float64], by: int) -> NDArray[np.float64]:
    """Rows [layers, width] moved to the right: what costs ``by`` more."""
    moved = np.full_like(rows, np.inf)
    moved[:, by:] = rows[:, : rows.shape[1] - by]
    return moved


def _ends(best: NDArray[np.float64]) -> list[tuple[int, int, int]]:
    """(layer, variant, cost) where the least error so far falls, cheapest first."""
    flat = best.transpose(2, 0, 1).reshape(best.shape[2], -1)  # [cost, layer * variant]
    least = flat.min(axis=1)
    before = np.concatenate([[np.inf], np.minimum.accumulate(least)[:-1]])
    return [(*divmod(int(flat[cost].argmin()), best.shape[1]), int(cost)) for cost in np.flatnonzero(least < before)]


def _trace(
    came_from: NDArray[np.uint8],
    whole: NDArray[np.int_],
    whole_swap: NDArray[np.int_],
    layer: int,
    variant: int,
    cost: int,
    *,
    bounded: bool,
) -> Genome:
    """Walk back from an end to the first group."""
    genome = [variant]
    for group in range(len(whole) - 1, 0, -1):
        before = int(came_from[group, layer, variant, cost])
        cost -= whole[group, variant] + (whole_swap[variant] if before != variant else 0)
        layer -= bounded and before != variant
        variant = before
        genome.append(variant)
    return tuple(reversed(genome))


def _sums(
    genome: Genome, errors: NDArray[np.float64], costs: NDArray[np.float64], swap: NDArray[np.float64]
) -> tuple[float, float]:
    rows = np.arange(len(genome))
    swaps = sum(swap[after] for before, after in pairwise(genome) if before != after)
    return float(costs[rows, genome].sum() + swaps), float(errors[rows, genome].sum())
