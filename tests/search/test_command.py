"""Does ``ddsm search`` leave strategies, a record and a report, go on where it was stopped, and refuse in one line?"""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import OutputError
from ddsm_engine.pipeline import Pipeline
from ddsm_engine.quality import choose_metric, paired_interval
from ddsm_engine.search import command
from ddsm_engine.search.command import HOLDOUT_SEED, RECORD, REPORT, main
from ddsm_engine.search.record import put_into_bundle
from ddsm_engine.search.report import FULL, write_report
from ddsm_engine.search.trials import JOURNAL, PARTS, Calls, Trials
from ddsm_engine.strategy import Strategy
from ddsm_engine.verify import main as verify
from tests.conftest import Refusal
from tests.search.measured import BATCH, MS, SWAP_MS, copy_bundle, keep_table

IMAGES, HOLDOUT, STEPS, POINTS = 2 * PARTS, 8, 6, 3
OPTIONS = [
    "--sampler", "ddim", "--steps", STEPS, "--clip-sample", "--batch-size", BATCH, "--backend", "onnxruntime",
    "--images", IMAGES, "--holdout", HOLDOUT, "--probes", 3, "--points", POINTS,
]  # fmt: skip


@pytest.fixture
def measured(bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle with a table, in a folder of its own; what is slow and has tests of its own is made small."""
    monkeypatch.setattr("ddsm_engine.search.sampling.INSTEAD_IMAGES", 16)
    monkeypatch.setattr("ddsm_engine.search.calibration.CALIBRATION_IMAGES", 2)
    monkeypatch.setattr("ddsm_engine.quality.sliced_wasserstein.DIRECTIONS", 8)
    monkeypatch.setattr(command, "write_report", lambda record, pictures, path: path.write_text("a page"))
    bundle = copy_bundle(bundle_path, tmp_path / "my.bundle")
    keep_table(bundle)
    return bundle


def search(bundle: Bundle, *more: object) -> dict[str, Any]:
    assert main([str(word) for word in (bundle.path, *OPTIONS, *more)]) == 0
    found: dict[str, Any] = json.loads((bundle.path.with_suffix(".search") / RECORD).read_bytes())
    return found


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """What a clock has no part in."""
    front = [{name: value for name, value in entry.items() if name != "measured_ms"} for entry in record["front"]]
    return {name: v for name, v in record.items() if name not in ("seconds", "environment")} | {"front": front}


def calls_of(entry: dict[str, Any]) -> Calls:
    return tuple(variant for variant, count in entry["calls"] for _ in range(count))


def test_a_search_leaves_strategies_a_record_and_a_report(
    measured: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "write_report", write_report)
    record = search(measured)
    printed = capsys.readouterr().out
    folder = measured.path.with_suffix(".search")
    names = [entry["name"] for entry in record["front"]]
    assert names[-1] == FULL
    assert 1 < len(names) <= POINTS + 1
    costs = [entry["cost"] for entry in record["front"]]
    assert costs == sorted(costs)
    # What the record says of a strategy's cost is what the table says.
    for entry in record["front"]:
        calls = calls_of(entry)
        swaps = sum(max(SWAP_MS[b], 0) for a, b in itertools.pairwise(calls) if a != b)
        assert entry["cost"] == entry["predicted_ms"] == pytest.approx((sum(MS[v] for v in calls) + swaps) / BATCH)
        if entry["name"] != FULL:
            assert entry["name"] == f"ddim{STEPS}-clip1-{100 * entry['cost'] / costs[-1]:02.0f}"
    # The bundle holds them, each with its provenance, and is still whole.
    names[-1] = f"ddim{STEPS}-clip1-100"
    assert set(measured.strategies()) == {"coarse", *names}
    for name, entry in zip(names, record["front"], strict=True):
        strategy = Strategy.load(measured.strategy_file(name))
        assert strategy.resolve(measured.manifest.variants) == calls_of(entry)
        assert (strategy.axis, strategy.sampler, strategy.steps) == ("call", "ddim", STEPS)
        assert strategy.provenance["metric"]["value"] == entry["holdout"]["value"]
        assert (strategy.provenance["kind"], strategy.options) == ("search", {"clip_sample": 1.0})
    assert verify([str(measured.path), "--backend", "onnxruntime"]) == 0
    # Nothing that is reported was seen by the search.
    assert record["metric"]["holdout_seed"] == HOLDOUT_SEED
    assert {e["origin"] for e in record["evaluations"]} >= {"uniform", "probe", "front"}
    journal = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    assert [e["calls"] for e in journal] == [e["calls"] for e in record["evaluations"]]
    assert {e["seed"] for e in journal} == {0}
    # Work is counted: a network's answer for one image is one.
    groups, variants = STEPS, len(measured.variants)
    assert record["spent"]["calibration"] == PARTS * 2 * (STEPS + groups * variants)
    drawn = sum(count for origin, count in record["spent"].items() if origin not in ("calibration", "holdout"))
    assert drawn == len(journal) * IMAGES * STEPS
    assert record["spent"]["holdout"] == len(names) * HOLDOUT * STEPS
    assert len(record["seeds"]) == PARTS
    page = (folder / REPORT).read_text()
    assert all(name in page for name in [*names[:-1], FULL])
    assert page.count("<img ") == len(names)
    assert f"{HOLDOUT} images of each that the search has not seen" in printed
    assert all(name in printed for name in names)


def test_strategies_are_not_written_through_a_link_out_of_the_bundle(measured: Bundle, refusal: Refusal) -> None:
    outside = measured.path.parent / "outside"
    (measured.path / "strategies").rename(outside)
    (measured.path / "strategies").symlink_to(outside)
    before = {file.name: file.read_bytes() for file in outside.iterdir()}
    with pytest.raises(OutputError, match="strategies cannot be written: it is a link that leaves the bundle"):
        put_into_bundle(measured, {"mine": Strategy.uniform(0.5, 1000)})
    assert "it is a link that leaves the bundle" in refusal(main, measured.path, *OPTIONS), "before it searches"
    assert not measured.path.with_suffix(".search").exists()
    assert {file.name: file.read_bytes() for file in outside.iterdir()} == before


def test_what_is_reported_of_a_strategy_can_be_computed_from_its_images(measured: Bundle) -> None:
    record = search(measured)
    full = (measured.full.id,) * STEPS
    with Pipeline.from_bundle(measured.path, backend="onnxruntime") as pipe:
        sampler = pipe.sampler("ddim", STEPS, clip_sample=1.0)
        own = pipe.plan(Strategy.uniform("w032", 1000), "ddim", STEPS, clip_sample=1.0)
        stand_in = pipe.draw(own, num_images=16, batch_size=BATCH, seed=1 << 32).images
        metric = choose_metric(measured, kind=None, data=None, features=None, inception=None, instead=lambda: stand_in)
        trials = Trials(pipe, sampler, metric, None, batch_size=BATCH)
        rows = {
            calls: metric.describe(
                pipe.draw(trials.plan(calls), num_images=HOLDOUT, batch_size=BATCH, seed=HOLDOUT_SEED).images
            )
            for calls in {full, *(calls_of(entry) for entry in record["front"])}
        }
    for entry in record["front"]:
        found = rows[calls_of(entry)]
        assert entry["holdout"]["value"] == pytest.approx(metric.distance(found))
        assert entry["loss"]["value"] == pytest.approx(metric.distance(found) - metric.distance(rows[full]))
        expected = paired_interval(metric, found, rows[full])
        assert (entry["loss"]["low"], entry["loss"]["high"]) == pytest.approx((expected.low, expected.high))
    assert record["front"][-1]["loss"]["value"] == 0


def test_a_search_that_was_stopped_ends_as_if_it_had_not_been(
    measured: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, after = search(measured), 9
    shutdown = measured.path.with_suffix(".search")
    shutdown.rename(tmp_path / "whole.search")
    for name in measured.strategies():
        if name != "coarse":
            measured.strategy_file(name).unlink()
    judge = Trials.judge
    judged: list[Calls] = []

    def stopping(self: Trials, calls: Calls, origin: str, **options: Any) -> Any:
        if len(judged) == after:
            raise KeyboardInterrupt
        judged.append(calls)
        return judge(self, calls, origin, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trials, "judge", stopping)
        assert main([str(word) for word in (measured.path, *OPTIONS)]) == 1
    assert set(measured.strategies()) == {"coarse"}
    drawn: list[Calls] = []
    draw = Trials.draw_batch

    def counting(self: Trials, calls: Calls, *where: int) -> Any:
        drawn.append(calls)
        return draw(self, calls, *where)

    monkeypatch.setattr(Trials, "draw_batch", counting)
    assert timeless(search(measured)) == timeless(whole)
    again = {calls for calls in judged if calls in drawn[: PARTS * (len(whole["evaluations"]) - after)]}
    assert not again, "what was judged before is not drawn again"


def test_a_later_search_replaces_its_own_strategies_and_no_others(measured: Bundle) -> None:
    own = measured.path / "strategies" / "mine.yaml"
    Strategy(("w008",) * STEPS, "call", "ddim", STEPS, {"note": "mine"}).save(own)
    search(measured)
    first = set(measured.strategies())

    def leave(name: str, steps: int, options: dict[str, Any]) -> None:
        left = Strategy(("w008",) * steps, "call", "ddim", steps, {"kind": "search"}, options)
        left.save(measured.path / "strategies" / f"{name}.yaml")

    leave("stale", STEPS, {"clip_sample": 1.0})
    leave("ddim9-50", 9, {"clip_sample": 1.0})
    leave("unclipped", STEPS, {})
    leave("noisy", STEPS, {"clip_sample": 1.0, "eta": 1.0})
    search(measured)
    assert set(measured.strategies()) == {"ddim9-50", "unclipped", "noisy", *first}
    search(measured, "--eta", 0.5)
    beside = set(measured.strategies()) - first
    assert {name.rpartition("-")[0] for name in beside} >= {f"ddim{STEPS}-eta0.5-clip1"}, "another search"


def test_what_was_searched_is_drawn_as_it_was_judged(measured: Bundle) -> None:
    record = search(measured, "--eta", 0.5)
    with Pipeline.from_bundle(measured.path, backend="onnxruntime") as pipe:
        judged = pipe.sampler("ddim", STEPS, eta=0.5, clip_sample=1.0)
        for name in measured.strategies().keys() - {"coarse"}:
            plan = pipe.plan(name)
            assert plan.bound == judged.bound
            assert (plan.update == judged.update.astype(np.float32)).all()
    assert record["options"] == {"eta": 0.5, "clip_sample": 1.0}


@pytest.mark.parametrize("method", ["nsga2", "scalar", "random"])
def test_the_published_search_and_random_search_leave_the_same(measured: Bundle, method: str) -> None:
    small = (
        "--method",
        method,
        *(["--weight", 0.1] if method == "scalar" else []),
        "--population",
        8 if method != "random" else 5,
        "--generations",
        2,
    )
    record = search(measured, *small)
    origins = [entry["origin"] for entry in record["evaluations"]]
    assert set(origins) <= {method, "uniform"}
    assert len(set(map(calls_of, record["evaluations"]))) == len(origins)
    uniform = {(variant,) * STEPS for variant in measured.variants}
    assert uniform <= set(map(calls_of, record["evaluations"])), "the baseline is always there"
    assert len(origins) == (17 if method == "random" else 16), "random search has the uniform ones beside its own"
    assert (record["error_table"], record["surrogate"], record["seeds"]) == (None, None, [])
    assert timeless(search(measured, *small)) == timeless(record)


def test_gflops_may_be_the_cost_and_need_no_table(bundle_path: Path, tmp_path: Path, measured: Bundle) -> None:
    for file in (measured.path / "latency").iterdir():
        file.unlink()
    record = search(measured, "--cost", "gflops")
    assert record["cost"]["unit"] == "GFLOPs"
    for entry in record["front"]:
        assert entry["cost"] == pytest.approx(entry["gflops"])
        assert entry["predicted_ms"] is None
        assert entry["measured_ms"] > 0


def test_a_bound_on_swaps_holds_for_every_strategy(measured: Bundle) -> None:
    record = search(measured, "--max-swaps", 1)
    assert max(len(entry["calls"]) for entry in record["front"]) <= 2


def test_a_search_may_begin_with_strategies_for_something_else(measured: Bundle, tmp_path: Path) -> None:
    Strategy(("w008",) * 4 + ("w032",) * 8, "call", "ddim", 12).save(tmp_path / "longer.yaml")
    record = search(measured, "--from", tmp_path / "longer.yaml", "--from", "coarse")
    start = [calls_of(entry) for entry in record["evaluations"] if entry["origin"] == "start"]
    # The noisy third of the calls, of six as of twelve; and the one over timesteps at the timesteps visited.
    assert start[0] == ("w008",) * 2 + ("w032",) * 4
    coarse = Strategy.load(measured.strategy_file("coarse"))
    with Pipeline.from_bundle(measured.path, backend="onnxruntime") as pipe:
        assert start[1] == pipe.plan(coarse, "ddim", STEPS).variants


REFUSED: dict[str, tuple[list[object], str]] = {
    "no table": (
        ["--batch-size", 5],
        r"is missing: this machine was not measured .*ddsm bench .* --batch-size 5 --save",
    ),
    "images": (["--images", 12], r"--images must be a multiple of 5"),
    "too few images": (["--images", 5], r"--images must be at least 10, found 5"),
    "no held out image": (["--holdout", 0], r"expected at least one image"),
    "one held out image": (["--holdout", 1], r"--holdout must be at least 2"),
    "no points": (["--points", 0], r"--points must be at least 1"),
    "population": (["--population", 1], r"--population must be at least 2"),
    "weight": (["--weight", "nan"], r"--weight must be a number of at least 0, found nan"),
    "a weight of no unit": (
        ["--method", "scalar"],
        r"needs --weight, in units of the metric per millisecond, or --cost",
    ),
    "swaps": (["--max-swaps", -1], r"the number of swaps cannot be less than 0"),
    "sampler": (["--sampler", "magic"], r"magic"),
    "a metric without what it needs": (["--metric", "frechet"], r"needs a feature network"),
    "no such start": (["--from", "nowhere"], r"has no strategy 'nowhere'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_searched_is_refused(measured: Bundle, refusal: Refusal, kind: str) -> None:
    changes, message = REFUSED[kind]
    assert re.search(message, refusal(main, measured.path, *OPTIONS, *changes))
    assert set(measured.strategies()) == {"coarse"}


def test_a_table_from_another_machine_is_refused(measured: Bundle, refusal: Refusal) -> None:
    keep_table(measured, processor="Another CPU")
    assert "was measured on Another CPU, this machine is" in refusal(main, measured.path, *OPTIONS)


def test_one_variant_leaves_nothing_to_search(
    measured: Bundle, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    monkeypatch.setattr(Bundle, "variants", {measured.full.id: measured.full})
    assert "holds one variant, which serves every call" in refusal(main, measured.path, *OPTIONS)


def test_a_bundle_that_could_not_take_the_strategies_is_refused_before_the_work(
    measured: Bundle, refusal: Refusal
) -> None:
    (measured.path / "strategies").rename(measured.path / "elsewhere")
    (measured.path / "strategies").write_text("not a folder")
    assert "is not a folder that you may write to" in refusal(main, measured.path, *OPTIONS)
    assert not measured.path.with_suffix(".search").exists()


def test_a_metric_that_is_no_number_ends_the_search(
    measured: Bundle, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ddsm_engine.quality.sliced_wasserstein.SlicedWasserstein.__call__",
        lambda self, rows, counts: np.full(len(counts), np.nan),
    )
    assert "is not a finite number" in refusal(main, measured.path, *OPTIONS)
    assert (measured.path.with_suffix(".search") / JOURNAL).read_text() == ""


def test_a_folder_that_holds_something_else_is_left_alone(measured: Bundle, tmp_path: Path, refusal: Refusal) -> None:
    folder = tmp_path / "holiday"
    folder.mkdir()
    (folder / "photo.jpg").write_text("mine")
    assert "holds something else than a search" in refusal(main, measured.path, *OPTIONS, "-o", folder)
    assert [file.name for file in folder.iterdir()] == ["photo.jpg"]


def test_a_name_that_the_export_gave_is_not_taken(
    measured: Bundle, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    monkeypatch.setattr(command, "front_names", lambda sampler, best, full, cost: {"coarse": full, FULL: full})
    before = measured.strategy_file("coarse").read_bytes()
    assert "was exported with a strategy of the name coarse" in refusal(main, measured.path, *OPTIONS)
    assert measured.strategy_file("coarse").read_bytes() == before
