"""How long does a call of every width take, on every backend, at every batch size and image size?"""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Final

from ddsm_engine.backends import open_engine
from ddsm_engine.backends.device import Device, DeviceEngine, StagedEngine
from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.cost import gflops
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.gpu.answers import check_engine
from ddsm_engine.measure.gpu.device_timing import figures, time_launches
from ddsm_engine.measure.gpu.work import OPTIONS, Row, Work, variant_of
from ddsm_engine.measure.timing import Timing

BATCHES: Final = (1, 256, 64)
"""In the order in which they are wanted most, should the time not be enough."""

WIDTHS: Final[Mapping[int, Sequence[int]]] = {32: (8, 2, 4, 6, 3, 5, 7), 64: (8, 2, 4), 128: (8, 2, 4)}
"""Eighths of the full width by image size, in such an order, too."""

SECONDS: Final = 0.5
"""Of timing one engine, about."""


def measure(work: Work, size: int) -> None:
    """Check and time a call of every width at every batch size.

    Raises:
        BundleError: no bundle of this image size, or one that lacks a width.
        BackendError: no backend runs here.
    """
    bundle, backends = work.bundle(size), work.backends()
    for batch in BATCHES:
        for eighths in WIDTHS[size]:
            variant = variant_of(bundle, eighths)
            for backend in backends:
                key = {"size": size, "batch": batch, "eighths": eighths, "backend": backend}
                work.take(key, partial(measure_call, bundle, variant, backend, batch))


def measure_call(bundle: Bundle, variant: Variant, backend: str, batch: int) -> Row:
    """Open one engine, let it answer, and time it.

    Raises:
        BackendError: it does not open, or answers something else.
    """
    started = time.perf_counter()
    with closing(open_on_device(bundle, variant, backend, batch)) as staged:
        opened_s = time.perf_counter() - started
        relative_l2 = check_engine(bundle, variant, staged, batch, backend)
        with staged.device.current():
            execution, timing = time_engine(staged.device, staged.engine)
        rate = gflops(variant.macs) * batch / timing.median_ms * 1e3
        return {
            "precision": staged.precision,
            "relative_l2": relative_l2,
            "opened_s": opened_s,
            "execution": execution,
            **figures(timing),
            "gflops": gflops(variant.macs),
            "gflops_per_s": rate,
        }


def open_on_device(
    bundle: Bundle, variant: Variant, backend: str, batch: int, device: Device | None = None
) -> StagedEngine:
    """Open an engine whose inputs and outputs may lie on the device; None opens a stream for it alone.

    Raises:
        BackendError: it does not open, or is none.
    """
    engine: Any = open_engine(backend, bundle, variant, batch, OPTIONS, device)
    if not isinstance(engine, StagedEngine):
        engine.close()
        raise BackendError(f"{backend} takes and returns arrays of the host; it has no place in a run on the GPU")
    return engine


def time_engine(device: Device, engine: DeviceEngine) -> tuple[str, Timing]:
    """Time a placed engine that has run: as a graph where it can be captured.

    Returns:
        ``graphs`` or ``launches``, and the time of one call.

    Raises:
        BackendError: the capture failed.
    """
    if not engine.is_capturable:
        return "launches", time_launches(device, engine.enqueue, seconds=SECONDS)
    captured = device.capture(engine.enqueue)
    if not captured.nodes:
        raise BackendError("the captured graph is empty: the engine is on another device or stream")
    with closing(device.instantiate(captured)) as graph:
        return "graphs", time_launches(device, graph.launch, seconds=SECONDS)
