"""Does ``ddsm evaluate`` compare strategies on the same noise, and say what it compared?"""

import json
from pathlib import Path
from typing import Any

import pytest

from ddsm_engine.errors import StrategyError
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


SEARCHED = Strategy(("w008",) * 3, "call", "ddim", 3, options={"eta": 0.5, "clip_sample": 1.0})


@pytest.mark.parametrize(
    "given", [{}, {"steps": 3}, {"sampler": "ddim"}, {"sampler": "ddim", "steps": 3}, {"eta": 0.5}], ids=str
)
def test_a_run_of_a_strategy_over_calls_takes_its_sampler_as_it_was_told(
    bundle_path: Path, given: dict[str, Any]
) -> None:
    with Pipeline.from_bundle(bundle_path, backend="onnxruntime") as pipe:
        expected = pipe.plan(Strategy(("w008",) * 3, "call", "ddim", 3), "ddim", 3, eta=0.5, clip_sample=1.0)
        assert pipe.plan(SEARCHED, **given).checksum == expected.checksum
        for other in ({"eta": 0.0}, {"clip_sample": 2.0}):
            own = pipe.plan(SEARCHED, **(given | other))
            assert own.checksum != expected.checksum, "what is asked for goes before"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampler": "euler"}, "belongs to ddim with 3 steps .*; this run is euler with 3"),
        ({"steps": 4}, "this run is ddim with 4"),
    ],
)
def test_another_sampler_or_number_of_steps_is_refused(bundle_path: Path, given: dict[str, Any], message: str) -> None:
    with (
        Pipeline.from_bundle(bundle_path, backend="onnxruntime") as pipe,
        pytest.raises(StrategyError, match=message),
    ):
        pipe.plan(SEARCHED, **given)


CONFIGS: dict[str, dict[str, Any]] = {
    "an offset": {"_class_name": "DDIMScheduler", "steps_offset": 1, "clip_sample_range": 2.0},
    "thresholding": {"_class_name": "DDPMScheduler", "thresholding": True},
    "a solver": {"_class_name": "DPMSolverMultistepScheduler", "solver_type": "heun", "use_karras_sigmas": True},
    "what the name says": {"_class_name": "EulerDiscreteScheduler"},
    "two grids, which no name has": {
        "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "use_karras_sigmas": True
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_strategy_brings_the_config_that_its_sampler_was_made_of(
    bundle_path: Path, tmp_path: Path, kind: str
) -> None:
    with Pipeline.from_bundle(bundle_path, backend="onnxruntime") as pipe:
        sampler = pipe.sampler(CONFIGS[kind], 6)
        strategy = Strategy(("w008",) * sampler.calls, "call", sampler.name, 6, options=sampler.options)
        strategy.save(tmp_path / "own.yaml")
        again = pipe.plan(tmp_path / "own.yaml")
        assert again.checksum == pipe.plan(Strategy.uniform("w008", 1000), CONFIGS[kind], 6).checksum
    assert ("config" in sampler.options) == (kind != "what the name says")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([1], "options are eta and clip_sample"),
        ({"eta": "1"}, "options are eta and clip_sample"),
        ({"eta": True}, "options are eta and clip_sample"),
        ({"config": "ddim"}, "options are eta and clip_sample"),
        ({"speed": 1.0}, "options are eta and clip_sample"),
    ],
    ids=str,
)
def test_options_that_no_sampler_has_are_refused(tmp_path: Path, options: object, message: str) -> None:
    found = SEARCHED.to_json() | {"options": options}
    (tmp_path / "bad.yaml").write_text(json.dumps(found))
    with pytest.raises(StrategyError, match=message):
        Strategy.load(tmp_path / "bad.yaml")
    with pytest.raises(StrategyError, match="belongs to no sampler"):
        Strategy(("w008",) * 3, options={"eta": 1.0})
