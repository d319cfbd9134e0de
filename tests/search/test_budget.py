"""Does ``budget:20ms`` find the best of the searched strategies that this machine runs in that time?"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
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


def searched(
    variant: str,
    value: Any,
    *,
    steps: int = 5,
    kind: str = "search",
    options: Mapping[str, Any] = MappingProxyType({}),
    **judged: Any,
) -> Strategy:
    metric = {"name": "a metric", "value": value, "images": 512, "seed": 65536} | judged
    return Strategy((variant,) * steps, "call", "ddim", steps, {"kind": kind, "metric": metric}, dict(options))


@pytest.fixture
def bundle_with_strategies(bundle_path: Path, tmp_path: Path) -> Bundle:
    bundle = copy_bundle(bundle_path, tmp_path / "b")
    for name, (variant, value) in SEARCHED.items():
        searched(variant, value).save(bundle.path / "strategies" / f"{name}.yaml")
    keep_table(bundle)
    return bundle


def within(bundle: Bundle, text: str, **given: Any) -> tuple[str, float]:
    """Name and milliseconds, rounded as far as rounding can go."""
    found = strategy_within(bundle, text, backend="onnxruntime", options=OPTIONS, batch=BATCH, given=given)
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
    with pytest.raises(StrategyError, match=r"several searches.*ddim with 3 steps, by a metric.*; ddim with 5 steps"):
        within(bundle, "budget:10ms")
    assert within(bundle, "budget:10ms", steps=3)[0] == "short"
    assert within(bundle, "budget:10ms", sampler="ddim", steps=5)[0] == "middle"
    with pytest.raises(StrategyError, match=r"holds no searched strategy for sampler heun to choose from"):
        within(bundle, "budget:10ms", sampler="heun")


def test_only_strategies_that_were_searched_with_the_clip_asked_for_are_compared(
    bundle_with_strategies: Bundle,
) -> None:
    bundle = bundle_with_strategies
    searched("w008", 1.0, options={"clip_sample": 1.0}).save(bundle.path / "strategies" / "clipped.yaml")
    with pytest.raises(StrategyError, match=r"several searches.*steps, clip_sample 1.0, by a metric"):
        within(bundle, "budget:10ms")
    assert within(bundle, "budget:10ms", clip_sample=1.0)[0] == "clipped"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"name": "another"}, "by another of 512 images, seed 65536"),
        ({"images": 256}, "by a metric of 256 images, seed 65536"),
        ({"seed": 7}, "by a metric of 512 images, seed 7"),
    ],
    ids=str,
)
def test_values_of_two_metrics_or_of_other_images_are_not_compared(
    bundle_with_strategies: Bundle, changes: dict[str, Any], found: str
) -> None:
    searched("w008", 0.1, **changes).save(bundle_with_strategies.path / "strategies" / "other.yaml")
    with pytest.raises(StrategyError, match=f"cannot be compared.*{found}"):
        within(bundle_with_strategies, "budget:10ms")


def test_a_search_here_takes_the_place_of_what_the_bundle_came_with(bundle_with_strategies: Bundle) -> None:
    bundle = bundle_with_strategies
    file = bundle.path / "strategies" / "coarse.yaml"
    searched("w008", 0.001, images=256).save(file)
    content = file.read_bytes()
    files = tuple(
        replace(info, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
        if info.path == "strategies/coarse.yaml" else info
        for info in bundle.manifest.files
    )  # fmt: skip
    bundle = Bundle(bundle.path, replace(bundle.manifest, files=files))
    keep_table(bundle)
    assert within(bundle, "budget:10ms")[0] == "middle"
    for name in SEARCHED:
        (bundle.path / "strategies" / f"{name}.yaml").unlink()
    assert within(bundle, "budget:10ms")[0] == "coarse"


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
    line = [*common, "--strategy", "budget:10ms", "-o", str(tmp_path / "x.npz"), "-v"]
    assert run([*line, "--trace", str(trace)]) == 0
    printed = capsys.readouterr()
    assert "budget:10ms: middle, 10.0 ms an image expected" in printed.err
    assert "plan: w016×5; 5 calls, 0 swaps" in printed.out
    assert "can meet budget:1ms" in refusal(run, *common, "--strategy", "budget:1ms", "-o", tmp_path / "y.npz")
    assert not (tmp_path / "y.npz").exists()
