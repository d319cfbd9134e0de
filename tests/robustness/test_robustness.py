"""Kills, races and a soak, in small; ``python -m benchmarks.robustness`` runs the same in large."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def answer(*command: object) -> Any:
    """Run in a process of its own: what is forked must have begun no threads, and memory must be its own."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_two_hundred_kills_leave_the_old_state_or_the_new_one(bundle_path: Path) -> None:
    tallies = answer("-m", "tests.robustness.kills", "--bundle", bundle_path, "--kills", 200)
    assert sum(tally["kills"] for tally in tallies.values()) >= 200
    assert len(tallies) == 11
    for name in ("replace a file", "replace a folder"):
        assert {"old", "new"} <= tallies[name]["states"].keys(), "kills came before and after the change"
    assert any(state.startswith("put back") for state in tallies["replace a folder, no exchange of names"]["states"])


def test_of_two_processes_one_wins_and_none_corrupts(bundle_path: Path) -> None:
    endings = answer("-m", "tests.robustness.races", "--bundle", bundle_path, "--races", 9)
    assert endings["export"] == {"done and refused": 1}
    assert endings["train"] == {"done and refused": 1}
    assert len(endings) == 9


NOT_ATOMIC = """
import sys
from contextlib import contextmanager
from ddsm_engine import files
from tests.robustness import kills

@contextmanager
def in_two_steps(target, **_):
    if target.exists():
        target.unlink()
    yield target

files.atomic_path = in_two_steps
sys.argv = ["kills", "--bundle", sys.argv[1], "--kills", "200"]
kills.main()
"""


def test_the_kills_would_notice_a_write_that_is_not_atomic(bundle_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOT_ATOMIC, str(bundle_path)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "AssertionError: replace a file: neither old nor new" in done.stderr


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
