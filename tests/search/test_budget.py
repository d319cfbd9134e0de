"""Does ``budget:20ms`` find the best of the searched strategies that this machine runs in that time?"""

from pathlib import Path
from typing import Any

import pytest

from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import BundleError, StrategyError
from ddsm_engine.run import main as run
from ddsm_engine.search.budget import parse_budget, strategy_within
from ddsm_engine.strategy import Strategy
from tests.conftest import Refusal
from tests.search.measured import BATCH, OPTIONS, copy_bundle, keep_table

# Of five calls, per image: 5.0, 10.0 and 30.0 ms.
SEARCHED = {"fast": ("w008", 9.0), "middle": ("w016", 4.0), "full": ("w032", 5.0)}


def searched(variant: str, value: Any, *, steps: int = 5, metric: str = "a metric", kind: str = "search") -> Strategy:
    provenance = {"kind": kind, "metric": {"name": metric, "value": value}}
    return Strategy((variant,) * steps, "call", "ddim", steps, provenance)


@pytest.fixture
def bundle_with_strategies(bundle_path: Path, tmp_path: Path) -> Bundle:
    bundle = copy_bundle(bundle_path, tmp_path / "b")
    for name, (variant, value) in SEARCHED.items():
        searched(variant, value).save(bundle.path / "strategies" / f"{name}.yaml")
    keep_table(bundle)
    return bundle


def within(bundle: Bundle, text: str, **changes: Any) -> tuple[str, float]:
    """Name and milliseconds, rounded as far as rounding can go."""
    options: dict[str, Any] = {"backend": "onnxruntime", "options": OPTIONS, "batch": BATCH} | changes
    found = strategy_within(bundle, text, **options)
    return found.name, round(found.predicted_ms, 9)


def test_the_best_of_those_that_fit_is_taken(bundle_with_strategies: Bundle) -> None:
    assert within(bundle_with_strategies, "budget:9.9ms") == ("fast", 5.0)
    assert within(bundle_with_strategies, "budget:10ms") == ("middle", 10.0)
    assert within(bundle_with_strategies, "budget:1s")[0] == "middle", "the dearest is not the best"


def test_a_budget_that_nothing_meets_is_refused_naming_the_fastest(bundle_with_strategies: Bundle) -> None:
    with pytest.raises(StrategyError, match=r"can meet budget:4ms: the fastest, fast, takes 5.0 ms an image .batch 4"):
        within(bundle_with_strategies, "budget:4ms")


def test_only_strategies_of_the_sampler_asked_for_are_compared(bundle_with_strategies: Bundle) -> None:
    bundle = bundle_with_strategies
    searched("w008", 1.0, steps=3).save(bundle.path / "strategies" / "short.yaml")
    with pytest.raises(StrategyError, match=r"several searches .ddim, 3 steps, by a metric; ddim, 5 steps.*--sampler"):
        within(bundle, "budget:10ms")
    assert within(bundle, "budget:10ms", steps=3)[0] == "short"
    assert within(bundle, "budget:10ms", sampler="ddim", steps=5)[0] == "middle"
    with pytest.raises(StrategyError, match=r"holds no searched strategy for heun, any steps"):
        within(bundle, "budget:10ms", sampler="heun")


def test_values_of_two_metrics_are_not_compared(bundle_with_strategies: Bundle) -> None:
    searched("w008", 0.1, metric="another").save(bundle_with_strategies.path / "strategies" / "other.yaml")
    with pytest.raises(StrategyError, match=r"by a metric; ddim, 5 steps, by another|by another; ddim"):
        within(bundle_with_strategies, "budget:10ms")


def test_somebodys_own_strategies_are_not_chosen_from(bundle_with_strategies: Bundle) -> None:
    searched("w008", 0.1, kind="mine").save(bundle_with_strategies.path / "strategies" / "mine.yaml")
    assert within(bundle_with_strategies, "budget:10ms")[0] == "middle"


@pytest.mark.parametrize("value", [None, "4", True, [1]])
def test_a_strategy_that_does_not_say_what_it_scored_is_refused(bundle_with_strategies: Bundle, value: object) -> None:
    searched("w008", value).save(bundle_with_strategies.path / "strategies" / "odd.yaml")
    with pytest.raises(StrategyError, match=r"the strategy odd does not say what it scored"):
        within(bundle_with_strategies, "budget:10ms")


def test_a_bundle_without_a_search_or_a_table_names_the_command(bundle_path: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(bundle_path, tmp_path / "b")
    with pytest.raises(StrategyError, match=r"holds no searched strategy to choose from; make some: ddsm search"):
        within(bundle, "budget:10ms")
    searched("w008", 1.0).save(bundle.path / "strategies" / "one.yaml")
    with pytest.raises(BundleError, match=r"ddsm bench .* --save"):
        within(bundle, "budget:10ms")


@pytest.mark.parametrize(
    ("text", "ms"), [("budget:200ms", 200.0), ("budget:0.25s", 250.0), ("budget:1.5ms", 1.5), ("budget:2s", 2000.0)]
)
def test_budgets_have_a_unit(text: str, ms: float) -> None:
    assert parse_budget(text) == ms


@pytest.mark.parametrize(
    "text", ["budget:", "budget:200", "budget:-1ms", "budget:1e3ms", "budget:0ms", "budget:ms", "budget:1 ms"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(StrategyError, match=r"expected budget:200ms or budget:0.2s"):
        parse_budget(text)


def test_a_run_takes_the_strategy_with_its_own_sampler_and_says_which(
    bundle_with_strategies: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: Refusal
) -> None:
    common = ["--bundle", str(bundle_with_strategies.path), "--backend", "onnxruntime", "--num-images", str(BATCH)]
    trace = tmp_path / "trace.json"
    line = [*common, "--strategy", "budget:10ms", "-o", str(tmp_path / "x.npz"), "--clip-sample", "-v"]
    assert run([*line, "--trace", str(trace)]) == 0
    printed = capsys.readouterr()
    assert "budget:10ms: middle, 10.0 ms an image expected" in printed.err
    assert "plan: w016×5; 5 calls, 0 swaps" in printed.out
    assert "can meet budget:1ms" in refusal(run, *common, "--strategy", "budget:1ms", "-o", tmp_path / "y.npz")
    assert not (tmp_path / "y.npz").exists()
