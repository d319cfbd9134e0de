"""A short soak; ``python -m benchmarks.robustness`` runs a hundred thousand calls."""

from pathlib import Path

import pytest

from tests.robustness.processes import answer

CALLS = 4000
FLAT = 500
"""Bytes a call: a batch's noise has 1536, and the allocator's own arenas come to a few hundred over so few calls."""


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_the_memory_stays_flat_under_random_strategies(bundle_path: Path, backend: str) -> None:
    found = answer("-m", "tests.robustness.soak", "--bundle", bundle_path, "--backend", backend, "--calls", CALLS)
    assert found["calls"] >= CALLS
    assert found["swaps"] > 100
    assert found["same_bytes"] >= 4
    assert found["bytes_per_call"] < FLAT


LEAKY = """
import sys
from ddsm_engine.scheduler import Scheduler
from tests.robustness import soak

kept, run = [], Scheduler.run

def leaky(self, plan, noise, on_call=None):
    return run(self, plan, noise, lambda call, t, x: kept.append(x.copy()))

Scheduler.run = leaky
sys.argv = ["soak", "--bundle", sys.argv[1], "--backend", "onnxruntime", "--calls", sys.argv[2]]
soak.main()
"""


def test_the_soak_would_notice_one_array_per_call(bundle_path: Path) -> None:
    assert answer("-c", LEAKY, bundle_path, CALLS)["bytes_per_call"] > 2 * FLAT
