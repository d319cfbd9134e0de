"""Which backend is the fastest here? What was measured says; a guess would be right on one kind of machine."""

import logging
from collections.abc import Sequence

from ddsm_engine.backends import artefact_backends, engine_target
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import BackendError, BundleError
from ddsm_engine.measure.latency_table import latency_file, load_latency

log = logging.getLogger(__name__)


def fastest_backend(bundle: Bundle, calls: Sequence[str], options: EngineOptions, batch: int) -> str | None:
    """The backend on which these calls take least, by the tables that ``ddsm bench --save`` kept.

    Args:
        bundle: With its tables.
        calls: The variant of every call.
        options: Device, precision and threads.
        batch: Images per call.

    Returns:
        Its name, or None unless every backend that could run here was measured with these options.
    """
    took_ms: dict[str, float] = {}
    for name in artefact_backends(options.device):
        try:
            target = engine_target(name, options, batch)
        except BackendError:
            continue  # it has not this device or precision
        if not latency_file(bundle, target).exists():
            return None
        try:
            timings = load_latency(bundle, target).timings
        except BundleError as error:
            log.warning("%s", error)  # a table must not stop a run
            return None
        took_ms[name] = sum(timings[variant].median_ms for variant in calls)
    return min(took_ms, key=lambda name: took_ms[name]) if took_ms else None
