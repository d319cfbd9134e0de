"""Does the fast search find the front of a metric that it can only ask for, at the price of few questions?"""

from itertools import pairwise, product

import numpy as np
import pytest

from ddsm_engine.search.cost import CallCost
from ddsm_engine.search.fast import Prices, best_within, fast_search, neighbours, spread, swaps_of
from ddsm_engine.search.frontier import Point, solve_front
from ddsm_engine.search.space import Genome, Space

SPACE = Space(("a", "b", "c"), (2,) * 8)
COST = CallCost("ms", {"a": 1.0, "b": 3.0, "c": 6.0}, {"a": 0.1, "b": 0.2, "c": 0.3})
RNG = np.random.default_rng(1)
TABLE = RNG.uniform(0.2, 2, (8, 1)) * np.array([5.0, 1.5, 0.0])
MATTERS = np.array([0, 0, 0.2, 0.5, 1, 3, 4, 6.0])


def metric(genome: Genome) -> float:
    """What no search sees: the sum of what the calls' errors do."""
    return 10 + float((MATTERS * TABLE[np.arange(8), genome]).sum())


def search(**changes: object) -> tuple[dict[Genome, float], list[str]]:
    judged: dict[Genome, float] = {}
    origins = []

    def judge(genome: Genome, origin: str) -> float:
        assert genome not in judged, "a candidate is judged once"
        judged[genome] = metric(genome)
        origins.append(origin)
        return judged[genome]

    options: dict[str, object] = {"seed": 0, "probes": 20, "points": 6} | changes
    fast_search(SPACE, COST, [TABLE], judge, **options)  # type: ignore[arg-type]
    return judged, origins


def test_what_it_finds_is_close_to_the_best_of_all_candidates() -> None:
    judged, _ = search()
    assert len(judged) < 60, "of 6561 candidates"
    everything = {genome: metric(genome) for genome in product(range(3), repeat=8)}
    costs = {genome: COST.of(SPACE.calls(genome)) for genome in everything}
    worst = metric((0,) * 8) - metric((2,) * 8)
    for genome in best_within(judged, costs, 6):
        best = min(value for other, value in everything.items() if costs[other] <= costs[genome])
        assert judged[genome] - best < 0.02 * worst


def test_the_same_seed_asks_for_the_same_candidates_in_the_same_order() -> None:
    assert list(search()[0]) == list(search()[0]) != list(search(seed=1)[0])


def test_uniform_ones_and_those_to_start_from_come_first() -> None:
    start = [(0, 0, 0, 1, 1, 2, 2, 2)]
    judged, origins = search(start=start)
    assert list(judged)[:4] == [*SPACE.uniform(), *start]
    assert origins[:4] == ["uniform"] * 3 + ["start"]
    assert set(origins) == {"uniform", "start", "probe", "front", "refinement"}


def test_a_bound_on_swaps_binds_the_front_and_its_neighbours() -> None:
    judged, origins = search(max_swaps=1)
    chosen = [genome for genome, origin in zip(judged, origins, strict=True) if origin in ("front", "refinement")]
    assert chosen
    assert max(map(swaps_of, chosen)) == 1
    costs = {genome: COST.of(SPACE.calls(genome)) for genome in judged}
    assert max(map(swaps_of, best_within(judged, costs, 6, max_swaps=1))) == 1
    assert max(map(swaps_of, best_within(judged, costs, 6))) > 1


def test_prices_are_those_of_the_calls_in_a_group() -> None:
    prices = Prices.of(SPACE, COST)
    for genome in ((0, 1, 2, 2, 0, 0, 1, 1), (2,) * 8):
        swaps = sum(prices.swap[b] for a, b in pairwise(genome) if a != b)
        total = prices.group[np.arange(8), genome].sum() + swaps
        assert total == pytest.approx(COST.of(SPACE.calls(genome)))


def test_points_are_spread_over_cost_and_none_exceeds_its_budget() -> None:
    prices = Prices.of(SPACE, COST)
    front = solve_front(TABLE, prices.group, prices.swap)
    chosen = spread(front, 5)
    assert chosen[0] is front[0]
    assert chosen[-1] is front[-1]
    assert 3 <= len(chosen) <= 5
    budgets = np.linspace(front[0].cost, front[-1].cost, 5)
    for point in chosen:
        assert any(
            point.cost <= budget + 1e-6 and not any(point.cost < o.cost <= budget for o in front) for budget in budgets
        )
    assert spread([Point((0,), 1.0, 1.0)], 5) == [Point((0,), 1.0, 1.0)]


def test_each_of_the_best_is_better_than_all_that_cost_less() -> None:
    values: dict[Genome, float] = {(0,): 5.0, (1,): 6.0, (2,): 4.0, (3,): 4.0, (4,): 1.0}
    costs: dict[Genome, float] = {(0,): 1.0, (1,): 2.0, (2,): 3.0, (3,): 4.0, (4,): 5.0}
    assert best_within(values, costs, 9) == [(0,), (2,), (4,)]


def test_neighbours_move_one_cut_or_change_one_run() -> None:
    found = neighbours((0, 0, 1, 1), 3)
    assert sorted(found) == [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 2, 2), (0, 1, 1, 1), (1, 1, 1, 1)]
    assert sorted(neighbours((1, 1), 2)) == [(0, 0)]
