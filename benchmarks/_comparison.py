"""Programs beside each other: how near is the same answer, and what is left between their turns?"""

from typing import Final

from ddsm_engine.backends import REFERENCE
from ddsm_engine.bundle import Parity
from ddsm_engine.errors import BackendError

TOLERANCES: Final = {"fp32": 2e-5, "fp16": 1e-2, "bf16": 5e-2}
"""Relative L2 of a state against the published network in fp32. fp32 differs by the order of sums; fp16 and bf16 keep
11 and 8 bits of every activation, some fifty times in a row."""

PAUSE_S: Final = 0.02
"""Before each turn, not counted: worker threads that still spin for more work would take the next one's cores."""


def refuse_unlike(variant: str, parity: Parity) -> None:
    """Refuse an answer beyond its tolerance.

    Raises:
        BackendError: naming the variant and both figures.
    """
    if parity.relative_l2 > parity.tolerance:
        raise BackendError(
            f"{variant} on {parity.backend} differs from the {REFERENCE} reference by {parity.relative_l2:.1e} "
            f"(relative L2, at most {parity.tolerance:.0e}); it was not timed"
        )
