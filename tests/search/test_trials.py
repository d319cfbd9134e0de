"""Is every candidate drawn from the same noise, judged once, and kept?"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import OutputError
from ddsm_engine.pipeline import Pipeline
from ddsm_engine.quality import Images, Rows
from ddsm_engine.search import trials as module
from ddsm_engine.search.trials import JOURNAL, PARTS, Trials, run_lengths, spell_calls

BATCH = 2
CALLS = ("w008", "w016", "w016")


class Brightness:
    """A metric anybody can compute: how bright the images are on average."""

    name = "brightness"
    identity = {"kind": "brightness"}  # noqa: RUF012 - a test's constant

    def __init__(self) -> None:
        self.described: list[Images] = []

    def describe(self, images: Images) -> Rows:
        self.described.append(images)
        return np.asarray(images.mean(axis=(1, 2, 3))[:, None], np.float32)

    def distance(self, rows: Rows) -> float:
        return float(rows.mean())

    def resampled(self, rows: Rows, counts: Any) -> Any:
        return (counts @ rows / counts.sum(axis=1, keepdims=True))[:, 0]

    def __call__(self, images: Images) -> float:
        return self.distance(self.describe(images))


@pytest.fixture(scope="module")
def pipe(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(bundle.path, backend="onnxruntime", threads=1) as opened:
        yield opened


def trials(pipe: Pipeline, folder: Path | None) -> tuple[Trials, Brightness]:
    metric = Brightness()
    sampler = pipe.sampler("ddim", len(CALLS), clip_sample=1.0)
    return Trials(pipe, sampler, metric, folder, batch_size=BATCH), metric


def judge(own: Trials, calls: tuple[str, ...] = CALLS, origin: str = "probe", *, lines: list[str] | None = None) -> Any:
    said = [] if lines is None else lines
    return own.judge(calls, origin, seed=3, images=2 * PARTS, cost=1.5, report=said.append)


def test_a_judgement_is_the_metric_of_the_images_that_the_pipeline_draws(pipe: Pipeline, tmp_path: Path) -> None:
    own, _ = trials(pipe, tmp_path)
    found = judge(own)
    parts = [
        pipe.draw(own.plan(CALLS), num_images=2, batch_size=BATCH, seed=3 + part).images.mean() for part in range(PARTS)
    ]
    assert found.parts == pytest.approx(parts)
    assert found.value == pytest.approx(np.mean(parts))


def test_a_candidate_is_drawn_once_even_by_the_next_process(pipe: Pipeline, tmp_path: Path) -> None:
    first, metric = trials(pipe, tmp_path)
    lines: list[str] = []
    found = judge(first, lines=lines)
    assert judge(first, origin="front", lines=lines) == found
    drawn = len(metric.described)
    second, other = trials(pipe, tmp_path)
    assert judge(second, lines=lines) == found
    assert (len(metric.described), len(other.described)) == (drawn, 0)
    assert lines == [f"probe: {found.value:.3f} at 1.5, w008×1, w016×2"]
    assert first.evaluations == second.evaluations == {"probe": 2 * PARTS * len(CALLS)}
    assert first.origin(CALLS) == "probe"
    entries = [json.loads(line) for line in (tmp_path / JOURNAL).read_text().splitlines()]
    assert [(e["calls"], e["origin"], e["cost"], e["value"]) for e in entries] == [
        ([["w008", 1], ["w016", 2]], "probe", 1.5, found.value)
    ]


def test_other_noise_calls_or_numbers_are_other_candidates(pipe: Pipeline, tmp_path: Path) -> None:
    own, _ = trials(pipe, tmp_path)
    values = {
        own.judge(calls, "x", seed=seed, images=images, cost=1.0, report=lambda line: None).value
        for calls, seed, images in (
            (CALLS, 3, 2 * PARTS), (CALLS, 4, 2 * PARTS), (CALLS, 3, 3 * PARTS), (CALLS[::-1], 3, 2 * PARTS),
        )
    }  # fmt: skip
    assert len(values) == 4


def test_a_judgement_that_was_cut_off_is_made_again_and_the_rest_is_kept(pipe: Pipeline, tmp_path: Path) -> None:
    own, _ = trials(pipe, tmp_path)
    found = judge(own)
    journal = tmp_path / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole[:40])
    again, metric = trials(pipe, tmp_path)
    assert journal.read_bytes() == whole, "the half line is gone"
    assert judge(again) == found
    assert not metric.described
    journal.write_bytes(whole[:-20])
    once_more, metric = trials(pipe, tmp_path)
    assert judge(once_more) == found
    assert not metric.described, "the images were described already"
    assert journal.read_bytes() == whole


def test_rows_that_were_damaged_are_drawn_again(
    pipe: Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own, _ = trials(pipe, tmp_path)
    before = own.draw(CALLS, seed=9, images=4)
    for file in (tmp_path / module.ROWS).iterdir():
        file.write_bytes(file.read_bytes()[:20])
    again, metric = trials(pipe, tmp_path)
    assert (again.draw(CALLS, seed=9, images=4) == before).all()
    assert metric.described
    assert "is damaged and is drawn again" in caplog.text


def test_a_foreign_journal_is_refused(pipe: Pipeline, tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text('{"note": "mine"}\n')
    with pytest.raises(OutputError, match="no journal of a search"):
        trials(pipe, tmp_path)


def test_batches_are_those_of_one_run(pipe: Pipeline) -> None:
    own, metric = trials(pipe, None)
    drawn = own.draw(CALLS, seed=5, images=11)
    whole = pipe.draw(own.plan(CALLS), num_images=11, batch_size=BATCH, seed=5).images
    assert (np.concatenate(metric.described) == whole).all()
    assert len(drawn) == 11


def test_only_what_is_really_drawn_takes_time(pipe: Pipeline, tmp_path: Path) -> None:
    own, _ = trials(pipe, tmp_path)
    found = [own.draw_batch(CALLS, 5, first, count).ms_per_image for first, count in ((2, 2), (4, 1), (2, 2))]
    assert found[2] is None, "the machine may have been another one when it was kept"
    assert all(ms is not None and ms > 0 for ms in found[:2])
    assert own.time_batch(CALLS) > 0


def test_candidates_are_spelt_as_runs() -> None:
    assert run_lengths(CALLS) == [["w008", 1], ["w016", 2]]
    many = spell_calls(["a", "b"] * 6)
    assert many == "a×1, b×1, a×1, b×1, a×1, b×1, a×1, … 5 more"
