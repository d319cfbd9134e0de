"""What does a swap cost? The calls that follow another variant's, beside those that follow the same variant's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def swap_gaps(variants: Sequence[str], clocks_ns: Sequence[NDArray[np.int64]]) -> dict[str, Any] | None:
    """What calls after a swap take beyond the median of calls of the same variant that follow their own.

    A call lasts from the end of the one before to its own end, so that nothing between two calls is lost; the first one
    of a run counts for neither.

    Args:
        variants: [calls], the variant of each call.
        clocks_ns: Of each repetition [calls, 2], start and end of every call, nanoseconds.

    Returns:
        ``swaps``: how many were compared; ``mean_us``, ``p99_us``; ``non_swap_p99_us``, the same figure of the calls
        that follow their own, which says how much of it is noise; ``clock_step_ns``, which the clock's differences are
        multiples of. None where there is no swap to a variant that also follows itself.
    """
    names = np.array(variants)
    is_swap = names[1:] != names[:-1]
    spans = np.stack([np.diff(clock[:, 1]) for clock in clocks_ns])
    gaps: list[NDArray[np.float64]] = []
    others: list[NDArray[np.float64]] = []
    for name in dict.fromkeys(variants):
        own = spans[:, (names[1:] == name) & ~is_swap]
        if own.size:
            gaps.append((spans[:, (names[1:] == name) & is_swap] - np.median(own)).ravel())
            others.append((own - np.median(own)).ravel())
    found = np.concatenate(gaps) if gaps else np.zeros(0)
    if not found.size:
        return None
    return {
        "swaps": len(found),
        "mean_us": float(found.mean()) / 1e3,
        "p99_us": float(np.percentile(found, 99)) / 1e3,
        "non_swap_p99_us": float(np.percentile(np.concatenate(others), 99)) / 1e3,
        "clock_step_ns": int(np.gcd.reduce(spans, axis=None)),
    }
