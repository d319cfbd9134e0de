"""The published search, by pymoo's NSGA-II, and random search beside it.

DDSM (arXiv 2310.03337 and its reviews): population 50, 10 generations, uniform and random candidates to begin with,
single-point crossover, a mutation rate of 0.001. Its code minimises one number, value + weight * cost (0.1 per GFLOP on
CIFAR-10, 0.25 on CelebA, says the rebuttal), and lets hardly a mutation through. Here the rate is the rate, cost and
value may be two objectives, and everything follows from the seed (and pymoo's version).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.search.space import Genome, Space

POPULATION = 50
GENERATIONS = 10
CROSSOVER = 0.9
"""Probability that a pair of parents exchanges what follows a point: pymoo's default, as published."""
MUTATION = 0.001
"""Probability that a gene changes to another variant."""

Scores = tuple[float, float]
"""Cost and metric value; less is better in both."""

Assess = Callable[[tuple[str, ...], str], Scores]
"""(variant of each call, origin) → scores.

It keeps every answer and gives the kept one for a candidate seen before: a search that is run again with the same seed
then goes on where it was stopped. Nothing here writes files.
"""


def nsga2(
    space: Space,
    assess: Assess,
    *,
    seed: int,
    population: int = POPULATION,
    generations: int = GENERATIONS,
    start: Sequence[Genome] = (),
) -> None:
    """Search for the front of cost and value, which is that of all that was assessed.

    The first generation is the uniform candidates, ``start``, and random ones; it counts, so that ``population *
    generations`` candidates are assessed, all of them different. There are fewer where the space holds no more or
    crossover finds nothing new, and more where the uniform candidates and ``start`` are more than ``population``.

    Raises:
        ModuleNotFoundError: pymoo is not installed.
    """
    _evolve(space, assess, "nsga2", lambda scores: scores, seed, population, generations, start)


def scalar(
    space: Space,
    assess: Assess,
    weight: float,
    *,
    seed: int,
    population: int = POPULATION,
    generations: int = GENERATIONS,
    start: Sequence[Genome] = (),
) -> None:
    """Search for the least value + ``weight`` * cost, as published: NSGA-II with one objective.

    Candidates are made and counted as for ``nsga2``.

    Raises:
        ModuleNotFoundError: pymoo is not installed.
    """

    def weighted(scores: Scores) -> tuple[float]:
        cost, value = scores
        return (value + weight * cost,)

    _evolve(space, assess, "scalar", weighted, seed, population, generations, start)


def random_search(space: Space, assess: Assess, *, seed: int, count: int) -> None:
    """Assess ``count`` different candidates, each gene drawn independently; fewer where the space holds no more."""
    for genome in _random(space, count, (), np.random.default_rng(seed)):
        assess(space.calls(genome), "random")


def _evolve(
    space: Space,
    assess: Assess,
    origin: str,
    objectives: Callable[[Scores], tuple[float, ...]],
    seed: int,
    population: int,
    generations: int,
    start: Sequence[Genome],
) -> None:
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.evaluator import Evaluator
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.pntx import SinglePointCrossover
    from pymoo.problems.static import StaticProblem

    assessed: dict[Genome, Scores] = {}

    def first_generation(_: object, size: int, *, random_state: np.random.Generator, **__: object) -> Any:  # noqa: ANN401
        known = list(dict.fromkeys([*space.uniform(), *start]))
        return Population.new(X=np.array(known + _random(space, size - len(known), known, random_state)))

    def mutation(_: object, children: Any, *, random_state: np.random.Generator, **__: object) -> Any:  # noqa: ANN401
        children.set("X", mutated(children.get("X"), len(space.variants), random_state))
        return children

    algorithm = NSGA2(
        pop_size=population,
        sampling=first_generation,
        crossover=SinglePointCrossover(prob=CROSSOVER),
        # A function, not a pymoo Mutation: that one applies what its operator changed to a share of the children only,
        # and the published operator's share is its rate, so that it takes effect with the rate's square.
        mutation=mutation,
        eliminate_duplicates=_Unseen(assessed),
    )
    genes = len(space.groups)
    problem = Problem(n_var=genes, n_obj=len(objectives((0.0, 0.0))), xl=0, xu=len(space.variants) - 1, vtype=int)
    algorithm.setup(problem, termination=("n_gen", generations), seed=seed)
    while algorithm.has_next():
        candidates = algorithm.ask()
        if candidates is None:  # nothing new could be made
            break
        genomes = [_genome(row) for row in candidates.get("X")]
        for genome in genomes:
            assessed[genome] = assess(space.calls(genome), origin)
        scores = np.array([objectives(assessed[genome]) for genome in genomes])
        Evaluator().eval(StaticProblem(problem, F=scores), candidates)
        algorithm.tell(infills=candidates)


def mutated(genes: NDArray[np.int64], variants: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Change each gene, with probability ``MUTATION``, to any of the other variants."""
    if variants == 1:
        return genes
    others = (genes + rng.integers(1, variants, genes.shape)) % variants
    return np.where(rng.random(genes.shape) < MUTATION, others, genes)


class _Unseen:
    """pymoo's elimination of duplicates, against all that was assessed and not only against the living."""

    def __init__(self, assessed: Mapping[Genome, Scores]) -> None:
        self._assessed = assessed

    def do(self, candidates: Any, *others: Any) -> Any:  # noqa: ANN401 - pymoo's populations
        """The candidates that are new; ``others`` hold those that wait to be assessed, among older ones."""
        seen = {_genome(other.X) for population in others for other in population}
        kept = []
        for position, candidate in enumerate(candidates):
            genome = _genome(candidate.X)
            if genome not in seen and genome not in self._assessed:
                seen.add(genome)
                kept.append(position)
        return candidates[kept]


def _genome(row: NDArray[np.int64]) -> Genome:
    return tuple(int(gene) for gene in row)


def _random(space: Space, count: int, taken: Collection[Genome], rng: np.random.Generator) -> list[Genome]:
    """Different candidates that are not in ``taken``, each gene drawn independently, as the published code does."""
    seen = set(taken)
    most = min(len(seen) + count, space.size)
    genomes = []
    while len(seen) < most:
        genome = _genome(rng.integers(len(space.variants), size=len(space.groups)))
        if genome not in seen:
            seen.add(genome)
            genomes.append(genome)
    return genomes
