"""What a search chooses from: one variant for each group of consecutive calls."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ddsm_engine.errors import StrategyError
from ddsm_engine.untrusted import brief

Genome = tuple[int, ...]
"""One index into ``Space.variants`` for each group of calls."""

MOST_GROUPS = 100
"""A longer run is searched in groups of calls: nobody can measure a thousand choices one by one."""


@dataclass(frozen=True, slots=True)
class Space:
    """What a search chooses from.

    Attributes:
        variants: Their ids, cheapest first.
        groups: Numbers of consecutive calls that share a variant, first executed first. Their sum is that of all calls.
    """

    variants: tuple[str, ...]
    groups: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse a space without a candidate."""
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise StrategyError(f"a search needs variants of different ids, found {brief(self.variants)}")
        if not self.groups or min(self.groups) < 1:
            raise StrategyError(f"a search needs groups of at least one call each, found {brief(self.groups)}")

    @property
    def size(self) -> int:
        """Number of candidates."""
        return int(len(self.variants) ** len(self.groups))

    def calls(self, genome: Iterable[int]) -> tuple[str, ...]:
        """The variant of each call, first executed call first."""
        genes = zip(genome, self.groups, strict=True)
        return tuple(self.variants[gene] for gene, length in genes for _ in range(length))

    def genome(self, calls: Sequence[str]) -> Genome:
        """The candidate that is nearest to a variant for each call.

        A group whose calls differ takes the variant that most of them have; of several, the costliest.

        Raises:
            StrategyError: another number of calls, or a variant that is not searched.
        """
        if len(calls) != sum(self.groups):
            raise StrategyError(f"this search chooses for {sum(self.groups)} calls, found a strategy for {len(calls)}")
        unknown = sorted(set(calls) - set(self.variants))
        if unknown:
            offered = ", ".join(self.variants)
            raise StrategyError(f"{brief(unknown[0])} is not among the variants that are searched: {offered}")
        index = {variant: k for k, variant in enumerate(self.variants)}
        genome, first = [], 0
        for length in self.groups:
            votes = Counter(index[variant] for variant in calls[first : first + length])
            genome.append(max(votes, key=lambda gene: (votes[gene], gene)))
            first += length
        return tuple(genome)

    def uniform(self) -> list[Genome]:
        """One variant throughout, for each variant; cheapest first."""
        return [(gene,) * len(self.groups) for gene in range(len(self.variants))]


def groups_of(calls: int) -> tuple[int, ...]:
    """Groups of one call, or ``MOST_GROUPS`` of nearly equal length."""
    count = min(calls, MOST_GROUPS)
    return tuple(calls * (group + 1) // count - calls * group // count for group in range(count))
