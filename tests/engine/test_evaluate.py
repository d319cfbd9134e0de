"""Does ``ddsm evaluate`` compare strategies on the same noise, and say what it compared?"""

import json
from pathlib import Path
from typing import Any

import pytest

from ddsm_engine.evaluate import main
from ddsm_engine.pipeline import Pipeline
from ddsm_engine.quality import choose_metric, interval, paired_interval
from ddsm_engine.strategy import Strategy
from tests.conftest import Refusal

STEPS, IMAGES, BATCH = 5, 10, 4
SAMPLING = ["--sampler", "ddim", "--steps", str(STEPS), "--clip-sample"]
OPTIONS = ["--images", str(IMAGES), "--batch-size", str(BATCH), "--backend", "onnxruntime"]


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddsm_engine.search.sampling.INSTEAD_IMAGES", 16)
    monkeypatch.setattr("ddsm_engine.quality.sliced_wasserstein.DIRECTIONS", 8)


def evaluate(capsys: pytest.CaptureFixture[str], bundle: Path, *words: str) -> str:
    capsys.readouterr()
    assert main([str(bundle), *OPTIONS, *words]) == 0
    return capsys.readouterr().out


def test_the_numbers_are_those_of_the_images_that_the_pipeline_draws(
    bundle_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["uniform:8/8", "uniform:4/8", "coarse"]
    words = [word for name in names for word in ("--strategy", name)]
    found: dict[str, Any] = json.loads(evaluate(capsys, bundle_path, *words, *SAMPLING, "--seed", "3", "--json"))
    assert list(found["strategies"]) == names
    with Pipeline.from_bundle(bundle_path, backend="onnxruntime") as pipe:
        plans = {name: pipe.plan(name, "ddim", STEPS, clip_sample=1.0) for name in names}

        def images(name: str, count: int, seed: int) -> Any:
            return pipe.draw(plans[name], num_images=count, batch_size=BATCH, seed=seed).images

        metric = choose_metric(
            pipe.bundle, kind=None, data=None, features=None, inception=None,
            instead=lambda: images("uniform:8/8", 16, 3 + (1 << 32)),
        )  # fmt: skip
        rows = {name: metric.describe(images(name, IMAGES, 3)) for name in names}
    assert found["metric"]["name"] == metric.name
    for name in names:
        own = found["strategies"][name]
        assert own["value"] == pytest.approx(metric.distance(rows[name]))
        expected = interval(metric, rows[name])
        assert (own["interval"]["low"], own["interval"]["high"]) == pytest.approx((expected.low, expected.high))
        paired = paired_interval(metric, rows[name], rows["uniform:8/8"])
        assert (own["loss_interval"]["low"], own["loss_interval"]["high"]) == pytest.approx((paired.low, paired.high))
        assert tuple(own["calls"]) == plans[name].variants
        assert own["ms_per_image"]["median_ms"] > 0
        assert own["ms_per_image"]["repeats"] == 3
    assert found["strategies"]["uniform:8/8"]["loss"] == 0


def test_the_table_has_a_row_for_each_and_compares_with_the_first(
    bundle_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--strategy", "uniform:8/8", "--strategy", "coarse", "--strategy", "uniform:8/8"]
    head, columns, first, second = evaluate(capsys, bundle_path, *words, *SAMPLING).splitlines()
    assert head == (
        "sliced Wasserstein distance of pixels to the full width's images, 10 images of each, from the same noise; "
        "less is better; [95 % interval]"
    )
    assert columns.split()[:4] == ["strategy", "calls", "swaps", "GFLOPs"]
    assert first.split()[:3] == ["uniform:8/8", "5", "0"]
    assert "1.00x" in first
    assert first.split()[-2:] == ["-", "-"]
    assert second.split()[:3] == ["coarse", "5", "2"]


def test_strategies_over_calls_bring_their_sampler(
    bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: Refusal
) -> None:
    for name, steps in (("a", 3), ("b", 3), ("c", 4)):
        Strategy(("w008",) * steps, "call", "ddim", steps).save(tmp_path / f"{name}.yaml")
    a, b, c = (str(tmp_path / f"{name}.yaml") for name in "abc")
    printed = evaluate(capsys, bundle_path, "--strategy", a, "--strategy", b, "--strategy", "uniform:8/8")
    assert [line.split()[1] for line in printed.splitlines()[2:]] == ["3", "3", "3"]
    common = (bundle_path, *OPTIONS, "--strategy", a, "--strategy", c)
    assert "belong to ddim with 3 steps and to ddim with 4 steps" in refusal(main, *common)
    assert "this run is ddim with 4" in refusal(main, *common, "--sampler", "ddim", "--steps", 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--images", "0"], "expected at least one image"),
        (["--images", "1"], "--images must be at least 2, found 1"),
        (["--strategy", "nowhere"], "has no strategy 'nowhere'"),
        (["--data", "nowhere"], "does not exist"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    bundle_path: Path, refusal: Refusal, changes: list[str], message: str
) -> None:
    line = refusal(main, bundle_path, *OPTIONS, *SAMPLING, "--strategy", "uniform:8/8", *changes)
    assert line.startswith("error: ")
    assert message in line


def test_a_run_of_a_strategy_over_calls_needs_no_sampler(bundle_path: Path) -> None:
    strategy = Strategy(("w008",) * 3, "call", "dpm++2m", 3)
    with Pipeline.from_bundle(bundle_path, backend="onnxruntime") as pipe:
        plan = pipe.plan(strategy, clip_sample=1.0)
        assert (plan.sampler, len(plan.variants)) == ("dpm++2m", 3)
        assert (plan.checksum) == pipe.plan(strategy, "dpm++2m", 3, clip_sample=1.0).checksum
