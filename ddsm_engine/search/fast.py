"""The fast search: measure single calls, fit what they do to the metric, solve, and draw only what looks best."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.search.cost import CallCost
from ddsm_engine.search.frontier import Point, pareto, solve_front
from ddsm_engine.search.space import Genome, Space
from ddsm_engine.search.surrogate import Surrogate, fit_surrogate, piecewise_probes

ROUNDS = 2
"""Times that the front is solved, its best drawn, and the surrogate fitted to these as well."""

NEIGHBOURS = 1
"""Of every candidate of the front that are drawn at the end."""

Judge = Callable[[Genome, str], float]
"""(candidate, origin) → the metric."""


@dataclass(frozen=True, slots=True)
class Prices:
    """The costs of a space, as arrays.

    Attributes:
        group: [groups, variants], of a group served by a variant.
        swap: [variants], of changing to it.
    """

    group: NDArray[np.float64]
    swap: NDArray[np.float64]

    @classmethod
    def of(cls, space: Space, cost: CallCost) -> "Prices":
        """Of every choice in a space."""
        call, swap = (np.array([prices[v] for v in space.variants]) for prices in (cost.per_call, cost.swap))
        return cls(np.outer(space.groups, call), swap)


def fast_search(
    space: Space,
    cost: CallCost,
    tables: Sequence[NDArray[np.float64]],
    judge: Judge,
    *,
    seed: int,
    probes: int,
    points: int,
    max_swaps: int | None = None,
    start: Sequence[Genome] = (),
) -> Surrogate:
    """Judge candidates until the front is known; which they were, the judge knows.

    Args:
        space: What may be chosen.
        cost: Of calls.
        tables: [groups, variants] each, errors of single calls, of one or more kinds.
        judge: Draws a candidate, or knows what it scored.
        seed: Of the probes.
        probes: Candidates drawn to fit the surrogate, beside the uniform ones.
        points: Candidates of a front.
        max_swaps: Most changes of variant in a run.
        start: Candidates to judge besides, as probes.

    Returns:
        The surrogate, fitted to all that was judged.
    """
    prices, known = Prices.of(space, cost), _Known(judge, tables)
    known.ask(space.uniform(), "uniform")
    known.ask(start, "start")
    known.ask(piecewise_probes(space, probes, seed=seed), "probe")
    for _ in range(ROUNDS):
        front = solve_front(known.fit().errors, prices.group, prices.swap, max_swaps=max_swaps)
        known.ask([point.genome for point in spread(front, points)], "front")
    surrogate = known.fit()
    costs = {genome: cost.of(space.calls(genome)) for genome in known.values}
    for genome in best_within(known.values, costs, points, max_swaps):
        near = [
            other for other in neighbours(genome, len(space.variants))
            if other not in known.values
            and swaps_of(other) <= swaps_of(genome)
            and cost.of(space.calls(other)) <= costs[genome]
        ]  # fmt: skip
        known.ask(sorted(near, key=surrogate.predict)[:NEIGHBOURS], "refinement")
    return known.fit()


def chosen_within(
    budget: float,
    space: Space,
    cost: CallCost,
    tables: Sequence[NDArray[np.float64]],
    values: Mapping[Genome, float],
    max_swaps: int | None = None,
) -> Genome:
    """What the surrogate that is fitted to these values thinks best within a budget; the cheapest where none fits."""
    prices = Prices.of(space, cost)
    surrogate = fit_surrogate(tables, list(values), list(values.values()))
    front = solve_front(surrogate.errors, prices.group, prices.swap, max_swaps=max_swaps)
    return ([point for point in front if point.cost <= budget] or front[:1])[-1].genome


class _Known:
    """The candidates that were judged."""

    def __init__(self, judge: Judge, tables: Sequence[NDArray[np.float64]]) -> None:
        self.values: dict[Genome, float] = {}
        self._judge, self._tables = judge, tables

    def ask(self, genomes: Sequence[Genome], origin: str) -> None:
        for genome in genomes:
            if genome not in self.values:
                self.values[genome] = self._judge(genome, origin)

    def fit(self) -> Surrogate:
        return fit_surrogate(self._tables, list(self.values), list(self.values.values()))


def spread(front: Sequence[Point], points: int) -> list[Point]:
    """At most ``points`` of a front, evenly over cost: of each budget the best."""
    budgets = np.linspace(front[0].cost, front[-1].cost, points)
    within = [max(index for index, p in enumerate(front) if p.cost <= budget * (1 + 1e-9)) for budget in budgets]
    return [front[index] for index in dict.fromkeys(within)]


def best_within(
    values: Mapping[Genome, float], costs: Mapping[Genome, float], points: int, max_swaps: int | None = None
) -> list[Genome]:
    """At most ``points`` of the candidates that were judged, cheapest first: of each budget the best.

    Each is better than all that cost less.
    """
    allowed = [genome for genome in values if max_swaps is None or swaps_of(genome) <= max_swaps]
    front = pareto([Point(genome, costs[genome], values[genome]) for genome in sorted(allowed)])
    return [point.genome for point in spread(front, points)]


def neighbours(genome: Genome, variants: int) -> list[Genome]:
    """Candidates that differ in one cut, moved by a group, or in one run, served by the next variant."""
    cuts = [index for index in range(1, len(genome)) if genome[index] != genome[index - 1]]
    found = []
    for cut in cuts:
        found.append((*genome[:cut], genome[cut - 1], *genome[cut + 1 :]))
        found.append((*genome[: cut - 1], genome[cut], *genome[cut:]))
    for first, last in zip([0, *cuts], [*cuts, len(genome)], strict=True):
        genes = [gene for gene in (genome[first] - 1, genome[first] + 1) if 0 <= gene < variants]
        found += [(*genome[:first], *[gene] * (last - first), *genome[last:]) for gene in genes]
    return [other for other in dict.fromkeys(found) if other != genome]


def swaps_of(genome: Genome) -> int:
    """Changes of variant between neighbouring groups."""
    return sum(before != after for before, after in pairwise(genome))
