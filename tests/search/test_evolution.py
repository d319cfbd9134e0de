import sys
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddsm_engine.cli import guarded
from ddsm_engine.errors import StrategyError
from ddsm_engine.search.evolution import MUTATION, mutated, nsga2, random_search, scalar
from ddsm_engine.search.space import Genome, Space

FOUR = ("w08", "w16", "w24", "w32")
SEVEN = ("w08", "w12", "w16", "w20", "w24", "w28", "w32")
SMALL = Space(FOUR, (10, 10, 5, 5, 20))
"""1,024 candidates: few enough for all of them to be tried."""


class Judge:
    """Costs that are squares of the widths, errors that weigh more towards the clean end; answers are kept."""

    def __init__(self, space: Space, stop_after: int | None = None) -> None:
        self.space, self.stop_after = space, stop_after
        self.asked: list[Genome] = []
        self.origins: set[str] = set()
        self.answers: dict[Genome, tuple[float, float]] = {}
        self.assessed: list[Genome] = []

    def __call__(self, calls: tuple[str, ...], origin: str) -> tuple[float, float]:
        genome = self.space.genome(calls)
        assert self.space.calls(genome) == calls
        self.asked.append(genome)
        self.origins.add(origin)
        if genome not in self.answers:
            if len(self.answers) == self.stop_after:
                raise KeyboardInterrupt
            self.assessed.append(genome)
            self.answers[genome] = self.scores(genome)
        return self.answers[genome]

    def scores(self, genome: Genome) -> tuple[float, float]:
        top = len(self.space.variants) - 1
        genes = list(zip(genome, self.space.groups, strict=True))
        cost = sum(length * (gene + 2) ** 2 for gene, length in genes)
        return cost / 10, sum((k + 1) * (top - gene) ** 1.5 for k, (gene, _) in enumerate(genes))


Search = Callable[[Judge, int], None]
SEARCHES: dict[str, Search] = {
    "nsga2": lambda judge, seed: nsga2(judge.space, judge, seed=seed, population=20, generations=6),
    "scalar": lambda judge, seed: scalar(judge.space, judge, 0.25, seed=seed, population=20, generations=6),
    "random": lambda judge, seed: random_search(judge.space, judge, seed=seed, count=120),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_seed_decides_every_candidate_and_their_order(name: str) -> None:
    judges = [Judge(SMALL), Judge(SMALL), Judge(SMALL)]
    found = [SEARCHES[name](judge, seed) for judge, seed in zip(judges, (3, 3, 4), strict=True)]
    assert judges[0].asked == judges[1].asked
    assert found[0] == found[1]
    assert judges[0].asked != judges[2].asked
    assert judges[0].origins == {name}


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("killed_after", [0, 1, 20, 77, -1])
def test_a_search_that_was_killed_goes_on_and_ends_with_the_same_set(name: str, killed_after: int) -> None:
    whole = Judge(SMALL)
    expected = SEARCHES[name](whole, 5)
    killed_after %= len(whole.asked)
    killed = Judge(SMALL, stop_after=killed_after)
    with pytest.raises(KeyboardInterrupt):
        SEARCHES[name](killed, 5)
    resumed = Judge(SMALL)
    resumed.answers = dict(killed.answers)
    assert SEARCHES[name](resumed, 5) == expected
    assert resumed.asked == whole.asked
    assert resumed.assessed == whole.asked[killed_after:], "what was answered before the kill is not assessed again"


@pytest.mark.parametrize("name", ["nsga2", "scalar"])
def test_the_published_size_is_five_hundred_different_candidates(name: str) -> None:
    space = Space(SEVEN, (10,) * 20)
    judge = Judge(space)
    if name == "nsga2":
        nsga2(space, judge, seed=0)
    else:
        scalar(space, judge, 0.1, seed=0)
    assert len(judge.asked) == len(set(judge.asked)) == 500
    assert judge.asked[:7] == space.uniform(), "the uniform widths come first"


def test_random_candidates_are_different_and_spread_over_all_variants() -> None:
    space = Space(SEVEN, (10,) * 20)
    judge = Judge(space)
    random_search(space, judge, seed=0, count=200)
    assert len(judge.asked) == len(set(judge.asked)) == 200
    counts = np.bincount(np.ravel(judge.asked), minlength=7)
    # 4,000 draws, 571 expected of each variant with a deviation of 22.
    assert np.all(abs(counts - 4000 / 7) < 4.5 * 22)


def test_what_a_search_starts_from_is_assessed() -> None:
    start = [(0, 1, 2, 3, 3), (3, 3, 2, 0, 0), (1, 1, 1, 1, 1)]
    judge = Judge(SMALL)
    nsga2(SMALL, judge, seed=0, population=10, generations=1, start=start)
    assert judge.asked[:6] == [*SMALL.uniform(), (0, 1, 2, 3, 3), (3, 3, 2, 0, 0)], "each of them once"
    assert len(judge.asked) == 10


def test_more_to_start_from_than_the_population_is_assessed_nevertheless() -> None:
    start = [(0, 0, 0, 0, gene) for gene in range(1, 4)]
    judge = Judge(SMALL)
    nsga2(SMALL, judge, seed=0, population=5, generations=3, start=start)
    assert judge.asked[:7] == [*SMALL.uniform(), *start]
    assert len(judge.asked) == 7 + 5 + 5


def test_genes_mutate_at_the_rate_that_is_stated() -> None:
    parents = np.tile(np.arange(7), (1000, 143))
    children = mutated(parents, 7, np.random.default_rng(0))
    changed = children != parents
    expected, deviation = parents.size * MUTATION, (parents.size * MUTATION) ** 0.5
    assert abs(changed.sum() - expected) < 4.5 * deviation
    assert children.min() == 0
    assert children.max() == 6
    # Each of the six other variants is as likely.
    steps = np.bincount(((children - parents) % 7)[changed], minlength=7)
    assert np.all(abs(steps[1:] - expected / 6) < 4.5 * (expected / 6) ** 0.5)


def test_mutations_reach_the_children_of_a_search() -> None:
    """Parents of long runs: crossover leaves long runs, and a gene that differs from both neighbours was mutated."""
    genes = 2000
    space = Space(SEVEN, (1,) * genes)
    start = [
        (left,) * cut + (right,) * (genes - cut)
        for cut in (400, 800, 1200)
        for left, right in product(range(7), repeat=2)
        if left != right
    ][:43]
    judge = Judge(space)
    nsga2(space, judge, seed=1, population=50, generations=2, start=start)
    assert judge.asked[:50] == [*space.uniform(), *start]
    children = np.array(judge.asked[50:])
    assert len(children) == 50
    isolated = (children[:, 1:-1] != children[:, :-2]) & (children[:, 1:-1] != children[:, 2:])
    expected = children.size * MUTATION
    assert abs(isolated.sum() - expected) < 4.5 * expected**0.5, "an operator gated twice leaves none"


def dominated_area(points: list[tuple[float, float]], corner: tuple[float, float]) -> float:
    """The hypervolume of two objectives."""
    area, best = 0.0, corner[1]
    for cost, value in sorted(points):
        if value < best:
            area += (corner[0] - cost) * (best - value)
            best = value
    return area


@pytest.mark.parametrize("seed", range(3))
def test_the_front_comes_near_the_exact_one_and_nearer_than_random_search(seed: int) -> None:
    judge = Judge(SMALL)
    every = [judge.scores(genome) for genome in product(range(4), repeat=5)]
    corner = (max(cost for cost, _ in every), max(value for _, value in every))
    exact = dominated_area(every, corner)
    nsga2(SMALL, judge, seed=seed, population=30, generations=10)
    assert len(judge.answers) <= 300, "less than a third of all"
    random_search(SMALL, chance := Judge(SMALL), seed=seed, count=300)
    reached, by_chance = (dominated_area([*own.answers.values()], corner) / exact for own in (judge, chance))
    assert reached > 0.98
    assert reached > by_chance


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.25, 2.0])
def test_the_scalar_form_finds_the_optimum_of_a_small_space(weight: float) -> None:
    space = Space(FOUR, (10, 10, 20))
    judge = Judge(space)

    def objective(genome: Genome) -> float:
        cost, value = judge.scores(genome)
        return value + weight * cost

    best = min(product(range(4), repeat=3), key=objective)
    scalar(space, judge, weight, seed=0, population=12, generations=5)
    assert min(map(objective, judge.answers)) == pytest.approx(objective(best))
    assert len(judge.answers) <= 60


@pytest.mark.parametrize(
    "space",
    [Space(("only",), (10, 10)), Space(SEVEN, (50,)), Space(("a", "b"), (1, 1, 1))],
    ids=["one variant", "one group", "eight candidates"],
)
def test_a_space_smaller_than_the_budget_is_searched_whole(space: Space) -> None:
    everything = list(product(range(len(space.variants)), repeat=len(space.groups)))
    for search in SEARCHES.values():
        judge = Judge(space)
        search(judge, 0)
        assert sorted(judge.asked) == everything


def test_without_pymoo_the_extra_to_install_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "pymoo"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pymoo", None)
    judge = Judge(SMALL)

    def command() -> None:
        SEARCHES["nsga2"](judge, 0)

    assert guarded(command) == 1
    assert capsys.readouterr().err == "error: pymoo is not installed: pip install 'ddsm-engine[search]'\n"
    assert judge.asked == []
    random_search(SMALL, judge, seed=0, count=5)
    assert len(judge.asked) == 5, "what needs no pymoo works"


@given(st.lists(st.integers(0, 3), min_size=5, max_size=5))
def test_a_candidate_comes_back_from_its_calls(genes: list[int]) -> None:
    calls = SMALL.calls(genes)
    assert len(calls) == 50
    assert calls[:10] == (FOUR[genes[0]],) * 10, "the first group serves the first executed calls"
    assert SMALL.genome(calls) == tuple(genes)


@pytest.mark.parametrize(
    ("calls", "variant"),
    [("aab", "a"), ("abb", "b"), ("abc", "c"), ("aabbc", "b"), ("ccaab", "c"), ("cba", "c")],
)
def test_a_group_whose_calls_differ_takes_the_commonest_variant_and_of_several_the_costliest(
    calls: str, variant: str
) -> None:
    space = Space(("a", "b", "c"), (len(calls), 1))
    assert space.calls(space.genome([*calls, "a"])) == (variant,) * len(calls) + ("a",)


def test_calls_that_do_not_fit_are_refused() -> None:
    with pytest.raises(StrategyError, match="chooses for 50 calls, found a strategy for 49"):
        SMALL.genome(("w08",) * 49)
    with pytest.raises(StrategyError, match="'w64' is not among the variants that are searched: w08, w16, w24, w32"):
        SMALL.genome(("w08",) * 49 + ("w64",))


@pytest.mark.parametrize(
    ("variants", "groups", "message"),
    [
        ((), (1,), r"variants of different ids, found \(\)"),
        (("a", "a"), (1,), "variants of different ids"),
        (("a",), (), r"groups of at least one call each, found \(\)"),
        (("a",), (2, 0), r"groups of at least one call each, found \(2, 0\)"),
    ],
)
def test_a_space_without_a_candidate_is_refused(
    variants: tuple[str, ...], groups: tuple[int, ...], message: str
) -> None:
    with pytest.raises(StrategyError, match=message):
        Space(variants, groups)
