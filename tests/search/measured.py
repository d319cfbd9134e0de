"""A tiny bundle with strategies of its own and latency tables that nobody had to measure."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from ddsm_engine.backends import engine_target
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import Bundle
from ddsm_engine.measure.environment import cpu
from ddsm_engine.measure.latency_table import LatencyTable, save_latency
from ddsm_engine.measure.timing import Timing

BATCH = 4
OPTIONS = EngineOptions()
MS = {"w008": 4.0, "w012": 6.0, "w016": 8.0, "w020": 10.0, "w024": 14.0, "w028": 20.0, "w032": 24.0}
"""Of a call of the whole batch."""
SWAP_MS = dict.fromkeys(MS, 0.4) | {"w032": 1.2, "w008": -0.8}


def copy_bundle(source: Path, target: Path) -> Bundle:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("latency", "engines"))
    return Bundle.open(target)


def keep_table(
    bundle: Bundle, backend: str = "onnxruntime", *, ms: Mapping[str, float] = MS, processor: str | None = None
) -> Path:
    timings = {
        variant: Timing(ms[variant], ms[variant], ms[variant], 9, SWAP_MS[variant]) for variant in bundle.variants
    }
    target = engine_target(backend, OPTIONS, BATCH)
    return save_latency(bundle, LatencyTable(target, {"cpu": processor or cpu()[0]}, 50.0, timings))
