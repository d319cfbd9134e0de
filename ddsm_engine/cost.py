"""What does a network or a strategy cost? Three conventions with three names, never mixed.

- *true MACs*: convolutions, linears and attention products, per image, from real tensor shapes;
- *conv+linear MACs*: the same without the attention products (what the profilers of the paper counted);
- the *published table*: the constants of DDSM's search code for its CIFAR-10 network, kept to reproduce its figures.

GFLOPs are 2 x MACs / 1e9 in all three.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

PUBLISHED_CIFAR10_MMACS: Mapping[Fraction, float] = {
    Fraction(8, 8): 6070.0,
    Fraction(6, 8): 3420.0,
    Fraction(4, 8): 1520.0,
    Fraction(2, 8): 382.5,
}
"""Width multiplier → 1e6 MACs per image: the table DDSM's search code carries (CIFAR-10, attention left out)."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one image costs in one call.

    Attributes:
        macs: True multiply-accumulates.
        conv_linear_macs: Those of convolutions and linears alone.
        params: Trained numbers of the network.
    """

    macs: int
    conv_linear_macs: int
    params: int


def gflops(macs: float) -> float:
    """GFLOPs of a number of multiply-accumulates: two operations each."""
    return 2 * macs / 1e9


def theoretical_speedup(full: float, costs: Sequence[float]) -> float:
    """Cost of always the full width over the mean cost of the calls that were made."""
    return full * len(costs) / sum(costs)
