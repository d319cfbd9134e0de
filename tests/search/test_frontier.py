"""Does the dynamic programme find the strategies that trying all of them finds?"""

from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddsm_engine.errors import StrategyError
from ddsm_engine.search.frontier import Point, pareto, solve_front

Table = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def brute_force(errors: Table, costs: Table, swap: Table, max_swaps: int | None) -> list[tuple[float, float]]:
    """(cost, error) of every strategy, less those that another beats."""
    groups, variants = errors.shape
    found = []
    for genome in product(range(variants), repeat=groups):
        changes = [after for before, after in pairwise(genome) if before != after]
        if max_swaps is None or len(changes) <= max_swaps:
            cost = sum(costs[g, v] for g, v in enumerate(genome)) + sum(swap[v] for v in changes)
            found.append((round(float(cost), 9), float(sum(errors[g, v] for g, v in enumerate(genome)))))
    kept: list[tuple[float, float]] = []
    for cost, error in sorted(found):
        if not kept or error < kept[-1][1] - 1e-12:
            kept.append((cost, error))
    return kept


def values(points: Sequence[Point]) -> list[tuple[float, float]]:
    return [(round(point.cost, 9), point.error) for point in points]


tables = st.integers(1, 5).flatmap(
    lambda groups: st.integers(1, 4).flatmap(
        lambda variants: st.tuples(
            st.lists(
                st.lists(st.integers(0, 50), min_size=variants, max_size=variants), min_size=groups, max_size=groups
            ),
            st.lists(
                st.lists(st.integers(1, 9), min_size=variants, max_size=variants), min_size=groups, max_size=groups
            ),
            st.lists(st.integers(0, 3), min_size=variants, max_size=variants),
        )
    )
)


@given(tables, st.one_of(st.none(), st.integers(0, 5)))
@settings(max_examples=150, deadline=None)
def test_the_front_is_that_of_all_strategies(
    table: tuple[list[list[int]], list[list[int]], list[int]], max_swaps: int | None
) -> None:
    errors, costs, swap = (np.array(part, np.float64) for part in table)
    # Every cost is a whole multiple of a unit, so that nothing is rounded.
    units = int(costs.max(axis=1).sum() + (len(costs) - 1) * swap.max())
    front = solve_front(errors, costs, swap, max_swaps=max_swaps, units=units)
    assert values(front) == brute_force(errors, costs, swap, max_swaps)
    for point in front:
        assert len(point.genome) == len(errors)
        if max_swaps is not None:
            assert sum(a != b for a, b in zip(point.genome, point.genome[1:], strict=False)) <= max_swaps


def test_rounding_costs_no_more_than_it_says() -> None:
    rng = np.random.default_rng(3)
    errors, costs, swap = rng.random((6, 4)), rng.uniform(0.1, 1, (6, 4)), rng.uniform(0, 0.1, 4)
    exact = brute_force(errors, costs, swap, None)
    found = values(solve_front(errors, costs, swap))
    most = float(costs.max(axis=1).sum() + 5 * swap.max())
    for cost, error in exact:
        best = min(e for c, e in found if c <= cost + 6 * most / 20_000)
        assert best <= error + 1e-12, "for a cost that is hardly greater there is one as good"


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_front_does_not_depend_on_the_unit_of_cost(scale: float) -> None:
    rng = np.random.default_rng(4)
    errors, costs, swap = rng.random((8, 3)), rng.integers(1, 9, (8, 3)).astype(float), np.array([1.0, 2.0, 0.0])
    units = int(costs.max(axis=1).sum() + 7 * swap.max())
    plain = solve_front(errors, costs, swap, units=units)
    scaled = solve_front(errors, costs * scale, swap * scale, units=units)
    assert [point.genome for point in scaled] == [point.genome for point in plain]


def test_a_price_on_swaps_makes_longer_runs() -> None:
    errors = np.array([[0.0, 1.0], [1.0, 0.0]] * 10)
    costs = np.ones((20, 2))
    free = solve_front(errors, costs, np.zeros(2))
    assert [point.error for point in free] == [0.0]
    dear = solve_front(errors, costs, np.full(2, 5.0))
    assert dear[0].genome in ((0,) * 20, (1,) * 20), "the cheapest never swaps"
    swaps = [sum(a != b for a, b in zip(p.genome, p.genome[1:], strict=False)) for p in dear]
    assert swaps == sorted(swaps), "every swap is paid for by less error"
    assert dear[-1].error == 0


def test_a_thousand_calls_in_a_hundred_groups_are_solved_with_a_bound_on_swaps() -> None:
    rng = np.random.default_rng(5)
    share = np.linspace(0.1, 1, 7)
    errors = rng.random((100, 1)) * (1 / share - 1) ** 2
    costs = np.tile(share * 10, (100, 1))
    front = solve_front(errors, costs, np.full(7, 0.02), max_swaps=4)
    assert front[0].genome == (0,) * 100
    assert front[-1].genome == (6,) * 100
    assert all(sum(a != b for a, b in zip(p.genome, p.genome[1:], strict=False)) <= 4 for p in front)
    assert all(a.cost < b.cost and a.error > b.error for a, b in pairwise(front))


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(StrategyError, match="cannot be less than 0, found -1"):
        solve_front(np.ones((2, 2)), np.ones((2, 2)), np.zeros(2), max_swaps=-1)


def test_of_equal_costs_the_lesser_error_is_kept() -> None:
    points = [Point((0,), 1.0, 3.0), Point((1,), 1.0, 2.0), Point((2,), 2.0, 2.0), Point((3,), 3.0, 1.0)]
    assert [point.genome for point in pareto(points)] == [(1,), (3,)]
