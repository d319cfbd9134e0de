"""What did a run do, and how long did each part take?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.plan import Plan

HOST = "host"
"""The execution of a run whose calls are made one by one from here."""


@dataclass(frozen=True, slots=True)
class TraceSegment:
    """Consecutive calls of one variant.

    Attributes:
        batch: Which batch of images, 0 first.
        variant: Its id.
        first_call: Number of its first call.
        calls: How many.
        latency_ms: From the first call's start to the last call's end, updates between them included.
        swap_ms: From the end of the previous segment's last call to the start of this one's first: the host's update
            and the change of engine. 0 for the first segment of a batch, and where the host has no part in the run:
            calls are then timed from update to update, and a swap is part of the call that follows it.
    """

    batch: int
    variant: str
    first_call: int
    calls: int
    latency_ms: float
    swap_ms: float


@dataclass(frozen=True, slots=True)
class Trace:
    """The by-product of a run.

    Attributes:
        segments: In execution order.
        latency_ms: Wall time of all batches, noise and updates included; opening engines is not.
        engine_ms: Wall time inside the engines.
        open_ms: Wall time of opening every engine.
        images: How many were drawn.
        batch_size: How many at a time (a last partial batch is padded to it).
        backend: What ran.
        precision: What it computed in.
        execution: ``host``: a loop over the calls here; on a GPU without the host one of
            ``ddsm_engine.device_scheduler.EXECUTIONS``.
    """

    segments: tuple[TraceSegment, ...]
    latency_ms: float
    engine_ms: float
    open_ms: float
    images: int
    batch_size: int
    backend: str
    precision: str
    execution: str = HOST

    @property
    def images_per_s(self) -> float:
        """Images per second, opening excluded."""
        return 1e3 * self.images / self.latency_ms if self.latency_ms else 0.0

    def ms_per_call(self) -> dict[str, float]:
        """Mean milliseconds per call of each variant, in the order of first use."""
        calls: dict[str, int] = {}
        total: dict[str, float] = {}
        for segment in self.segments:
            calls[segment.variant] = calls.get(segment.variant, 0) + segment.calls
            total[segment.variant] = total.get(segment.variant, 0.0) + segment.latency_ms
        return {variant: total[variant] / calls[variant] for variant in calls}

    def to_json(self) -> dict[str, Any]:
        """The trace as JSON values."""
        return {**asdict(self), "images_per_s": self.images_per_s}


def segments_from_clock(plan: Plan, batch: int, clock_ns: NDArray[np.int64]) -> Sequence[TraceSegment]:
    """Turn the start and end of every call into segments.

    Args:
        plan: What ran.
        batch: Number of the batch.
        clock_ns: [calls, 2], start and end of every call, nanoseconds.
    """
    rows = []
    for segment in plan.segments:
        first, last = segment.first_call, segment.first_call + segment.calls - 1
        swap_ns = clock_ns[first, 0] - clock_ns[first - 1, 1] if first else 0
        latency_ns = clock_ns[last, 1] - clock_ns[first, 0]
        rows.append(TraceSegment(batch, segment.variant, first, segment.calls, latency_ns / 1e6, swap_ns / 1e6))
    return rows
