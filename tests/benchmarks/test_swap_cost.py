from typing import Any

import numpy as np
import pytest

from benchmarks import swap_cost
from benchmarks.swap_cost import RUN, alternate, details, measure_pairs
from ddsm_engine.bundle import Bundle
from ddsm_engine.plan import Plan

MS = 1_000_000


class Clock:
    """A scheduler that runs nothing: a call takes its width in milliseconds, and 5 more right after a swap."""

    def run(self, plan: Plan, noise: object) -> Any:
        clock, now = np.zeros((len(plan.variants), 2), np.int64), 0
        before = ""
        for call, variant in enumerate(plan.variants):
            swapped = before not in ("", variant)
            now += MS // 100 * (3 if swapped else 1)  # the gap before the call
            clock[call, 0] = now
            now += MS * (int(variant[1:]) + 5 * swapped)
            clock[call, 1] = now
            before = variant
        return clock


@pytest.fixture
def pairs(bundle: Bundle) -> list[dict[str, Any]]:
    narrow, wide = bundle.variants["w008"], bundle.variants["w032"]
    return alternate(bundle, Clock(), narrow, wide, 4)  # type: ignore[arg-type]


def test_the_first_call_of_a_run_is_told_from_the_last(pairs: list[dict[str, Any]]) -> None:
    found = {(p["from"], p["to"]): (p["inside"]["median_ms"], p["first"]["median_ms"]) for p in pairs}
    assert found == {("w032", "w008"): (8.0, 13.0), ("w008", "w032"): (32.0, 37.0)}
    assert [p["first"]["repeats"] for p in pairs] == [4, 4], "the first run of each is the warm-up"
    assert [p["gap_first"]["median_ms"] for p in pairs] == pytest.approx([0.03, 0.03])
    assert [p["gap_inside"]["median_ms"] for p in pairs] == pytest.approx([0.01, 0.01])


def test_the_table_shows_what_a_swap_adds(pairs: list[dict[str, Any]]) -> None:
    where = {"cpu": "X", "cores": 2, "cpu_features": [], "versions": {}, "date": "2026-11-21T00:00", "commit": "c"}
    record = {"batch": 1, "environment": where, "backends": {"openvino": {"precision": "fp32", "pairs": pairs}}}
    assert "openvino fp32, batch 1" in details(record)
    row = "| 32 (8/8) → 8 (2/8) | 8.00 (8.00 to 8.00) | 13.00 (13.00 to 13.00) | +5.00 | +62 % | 10 → 30 |"
    assert row in details(record)


def test_every_two_widths_are_measured_in_both_directions(bundle: Bundle) -> None:
    found = measure_pairs(bundle, "onnxruntime", 1, rounds=1)
    assert found["precision"] == "fp32"
    assert len({(p["from"], p["to"]) for p in found["pairs"]}) == 12
    assert all(p["first"]["median_ms"] > 0 and p["inside"]["repeats"] == 1 for p in found["pairs"])
    assert RUN > 1
    assert len(swap_cost.EIGHTHS) == 4
