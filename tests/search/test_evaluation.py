"""Are strategies timed side by side, and never by what was drawn another time?"""

from pathlib import Path
from typing import Any

import pytest

from ddsm_engine.pipeline import Pipeline
from ddsm_engine.search.evaluation import LEAST_TURNS, evaluate_in_turns
from ddsm_engine.search.trials import Calls, Drawn, Trials
from tests.search.test_trials import BATCH, pipe, trials

__all__ = ["pipe"]

STRATEGIES: dict[str, Calls] = {"wide": ("w032",) * 3, "narrow": ("w008",) * 3, "both": ("w032", "w008", "w008")}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Calls, int, int]]:
    """Every request for images: calls, first image and how many."""
    found: list[tuple[Calls, int, int]] = []
    draw = Trials.draw_batch

    def spy(self: Trials, calls: Calls, seed: int, first: int, count: int) -> Drawn:
        found.append((calls, first, count))
        return draw(self, calls, seed, first, count)

    monkeypatch.setattr(Trials, "draw_batch", spy)
    return found


def evaluated(own: Trials, strategies: dict[str, Calls], images: int) -> dict[str, Any]:
    return dict(evaluate_in_turns(own, strategies, "wide", seed=3, images=images))


def test_a_turn_is_a_batch_of_each(pipe: Pipeline, asked: list[tuple[Calls, int, int]]) -> None:
    own, _ = trials(pipe, None)
    images = 3 * BATCH + 1
    found = evaluated(own, STRATEGIES, images)
    expected = [
        (calls, first, min(BATCH, images - first)) for first in range(0, images, BATCH) for calls in STRATEGIES.values()
    ]
    assert asked == expected
    assert {evaluation.ms_per_image.repeats for evaluation in found.values()} == {4}


def test_what_was_kept_is_no_time(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = 4 * BATCH
    before = {name: STRATEGIES[name] for name in ("wide", "narrow")}
    first = evaluated(trials(pipe, tmp_path)[0], before, images)
    timed: list[Calls] = []
    time_batch = Trials.time_batch

    def spy(self: Trials, calls: Calls) -> float:
        timed.append(calls)
        return time_batch(self, calls)

    monkeypatch.setattr(Trials, "time_batch", spy)
    later = evaluated(trials(pipe, tmp_path)[0], STRATEGIES, images)
    assert timed == [*STRATEGIES.values()] * LEAST_TURNS, "all of them anew, in turns"
    assert {evaluation.ms_per_image.repeats for evaluation in later.values()} == {LEAST_TURNS}
    assert [later[name].value for name in before] == [first[name].value for name in before]
