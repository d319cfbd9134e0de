"""Are errors those of the variants at the states that the full width meets, and against data?"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ddsm_engine.bundle import Bundle
from ddsm_engine.noise import INITIAL, SeededNoise
from ddsm_engine.pipeline import Pipeline
from ddsm_engine.plan import Plan
from ddsm_engine.search import calibration as module
from ddsm_engine.search.calibration import calibrate, errors_against_data, errors_along, middle_calls
from ddsm_engine.search.space import Space, groups_of
from ddsm_engine.strategy import Strategy

BATCH = 4
IMAGES = 6
VARIANTS = ("w008", "w016", "w032")


@pytest.fixture(scope="module")
def pipe(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(bundle.path, backend="onnxruntime", threads=1) as opened:
        yield opened


def plans(pipe: Pipeline, sampler: str = "ddim", steps: int = 5) -> dict[str, Plan]:
    return {
        variant: pipe.plan(Strategy.uniform(variant, 1000), sampler, steps, clip_sample=1.0) for variant in VARIANTS
    }


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm++2m"])
def test_an_error_is_the_difference_at_the_state_that_the_full_width_meets(pipe: Pipeline, sampler: str) -> None:
    own = plans(pipe, sampler)
    full = own["w032"]
    calls = len(full.variants)
    space = Space(VARIANTS, (1,) * calls)
    found = errors_along(pipe, own, space, seed=7, images=IMAGES, batch_size=BATCH)
    assert found.shape == (calls, 3)
    assert (found[:, 2] == 0).all(), "the full width does not differ from itself"
    assert (found[:, :2] > 0).all()
    # Once more by hand: the state before the last call, from a run of one image at a time.
    states: list[NDArray[np.float32]] = []
    keep = {calls - 2}
    result = pipe.draw(
        full, num_images=IMAGES, batch_size=1, seed=7,
        callback=lambda call, t, x: states.append(x.copy()) if call in keep else None,
    )  # fmt: skip
    assert len(result.images) == IMAGES
    x = np.concatenate(states)
    expected, narrow = (pipe.answer(own[v], calls - 1, x, batch_size=BATCH) for v in ("w032", "w008"))
    assert found[-1, 0] == pytest.approx(float(((narrow - expected) ** 2).mean()), rel=1e-4)


def test_the_first_state_is_the_noise_that_a_run_begins_with(pipe: Pipeline) -> None:
    own = plans(pipe)
    found = errors_along(pipe, own, Space(VARIANTS, (1,) * 5), seed=7, images=IMAGES, batch_size=BATCH)
    x = np.empty((IMAGES, *pipe.bundle.manifest.spec.sample_shape), np.float32)
    SeededNoise(7).fill(x, INITIAL, 0)
    expected, narrow = (pipe.answer(own[v], 0, x, batch_size=BATCH) for v in ("w032", "w008"))
    assert found[0, 0] == pytest.approx(float(((narrow - expected) ** 2).mean()), rel=1e-5)


def test_a_loss_against_data_is_that_of_the_noise_beyond_the_full_widths(pipe: Pipeline) -> None:
    own = plans(pipe)
    real = np.random.default_rng(0).uniform(-1, 1, (5, *pipe.bundle.manifest.spec.sample_shape)).astype(np.float32)
    found = errors_against_data(pipe, own, Space(VARIANTS, (1,) * 5), real, seed=11, batch_size=BATCH)
    assert (found[:, 2] == 0).all()
    noise = np.empty_like(real)
    SeededNoise(11).fill(noise, INITIAL, 0)
    call = 3
    level = pipe.bundle.manifest.noise_schedule.alphas_cumprod[int(own["w032"].timesteps[call])]
    x = (np.sqrt(level) * real + np.sqrt(1 - level) * noise).astype(np.float32)
    losses = [float(((pipe.answer(own[v], call, x, batch_size=BATCH) - noise) ** 2).mean()) for v in VARIANTS]
    assert found[call] == pytest.approx([loss - losses[-1] for loss in losses], abs=1e-5)


def test_a_group_is_measured_at_its_middle_call(pipe: Pipeline) -> None:
    space = Space(VARIANTS, (2, 3))
    assert middle_calls(space) == [1, 3]
    own = plans(pipe)
    grouped = errors_along(pipe, own, space, seed=7, images=IMAGES, batch_size=BATCH)
    single = errors_along(pipe, own, Space(VARIANTS, (1,) * 5), seed=7, images=IMAGES, batch_size=BATCH)
    assert (grouped == single[[1, 3]]).all()


@pytest.mark.parametrize(("calls", "longest", "count"), [(7, 1, 7), (100, 1, 100), (250, 3, 100), (1000, 10, 100)])
def test_long_runs_are_grouped(calls: int, longest: int, count: int) -> None:
    groups = groups_of(calls)
    assert (sum(groups), max(groups), len(groups)) == (calls, longest, count)


def test_what_was_measured_is_read_again_and_what_was_damaged_measured_again(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "CALIBRATION_IMAGES", 2)
    own, space = plans(pipe), Space(VARIANTS, (1,) * 5)
    real = np.zeros((3, *pipe.bundle.manifest.spec.sample_shape), np.float32)
    lines: list[str] = []

    def measure(images: NDArray[np.float32] | None = real) -> module.Calibration:
        return calibrate(
            pipe, own, space, seeds=[1, 2], batch_size=BATCH, real=images, keep=tmp_path, report=lines.append
        )

    first = measure()
    assert first.along.shape == (2, 5, 3)
    assert first.evaluations == 2 * 2 * (5 + 15) + 3 * 15
    assert [table.shape for table in first.tables()] == [(5, 3), (5, 3)]
    assert (first.tables()[0] == first.along.mean(axis=0)).all()
    assert (first.tables(1)[0] == first.along[1]).all()
    said = len(lines)
    assert (measure().along == first.along).all()
    assert len(lines) == said, "nothing was measured"
    [file] = tmp_path.iterdir()
    file.write_bytes(b"not what it was")
    assert (measure().along == first.along).all()
    assert "is damaged and is measured again" in caplog.text
    assert measure(None).data is None
    assert len(list(tmp_path.iterdir())) == 2
