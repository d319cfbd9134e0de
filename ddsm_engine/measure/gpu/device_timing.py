"""How long does work on a device take? Rows of launches, waited for once, so that the host is not what is timed."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Final

from ddsm_engine.backends.device import Device
from ddsm_engine.measure.timing import Timing, time_in_turns

WARMUP: Final = 3
SAMPLE_S: Final = 0.01
"""Of one sample, at least: the wait at its end costs some ten microseconds."""
MOST_LAUNCHES: Final = 1000


def time_launches(device: Device, launch: Callable[[], None], *, seconds: float = 1.0, repeats: int = 30) -> Timing:
    """Time one launch: each sample is a row of them, as many as take ``SAMPLE_S``.

    Args:
        device: Made current by the caller.
        launch: Puts the work on the device's stream.
        seconds: Stop after the sample in which they have passed (three samples at least).
        repeats: Samples, at most.
    """
    for _ in range(WARMUP):
        launch()
    device.synchronize()
    started = time.perf_counter()
    launch()
    device.synchronize()
    count = min(MOST_LAUNCHES, max(1, math.ceil(SAMPLE_S / max(time.perf_counter() - started, 1e-9))))

    def row() -> None:
        for _ in range(count):
            launch()
        device.synchronize()

    timing = time_in_turns({"": row}, repeats=repeats, warmup=1, budget_s=seconds)[""]
    return Timing(timing.median_ms / count, timing.p20_ms / count, timing.p80_ms / count, timing.repeats)


def figures(timing: Timing) -> dict[str, float | int]:
    """What a row says of a timing; what a swap costs is measured otherwise here."""
    return {name: value for name, value in asdict(timing).items() if name != "swap_ms"}
