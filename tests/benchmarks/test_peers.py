import argparse
import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import _contenders, _peers_report, peers
from benchmarks._comparison import TOLERANCES
from benchmarks._contenders import (
    Compiled,
    Contender,
    Diffusers,
    GivenNoise,
    Images,
    OnnxRuntime,
    OpenVINO,
    Ours,
    Sliced,
    even_walk,
)
from benchmarks._peers_report import BATCH_1, details, draw, headline, summary
from benchmarks._report import Record, new_record, png_of
from benchmarks.cifar10 import STRATEGY
from benchmarks.dynamic_torch import DynamicUNet, dynamic_unet_from_bundle
from benchmarks.peers import Session, Settings, compare, contenders, has_bf16, mean_step_ms, why_not
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.timing import Timing
from ddsm_engine.pipeline import Pipeline
from ddsm_engine.strategy import Strategy
from ddsm_export.diffusers import diffusers_unet

SETTINGS = Settings(batches=(2,), calls=10, repeats=1, bf16=True)

MAKERS: dict[str, Callable[[Bundle, DynamicUNet], Contender]] = {
    "ours": lambda bundle, network: Ours(bundle),
    "sliced bf16": lambda bundle, network: Sliced(bundle, network, "bf16"),
    "compiled fp32": lambda bundle, network: Compiled(bundle, "fp32", "eager"),
    "onnxruntime": lambda bundle, network: OnnxRuntime(bundle),
    "openvino": lambda bundle, network: OpenVINO(bundle),
    "diffusers fp32": lambda bundle, network: Diffusers(bundle, "fp32"),
    "diffusers bf16": lambda bundle, network: Diffusers(bundle, "bf16"),
}


@pytest.fixture(scope="module")
def network(bundle: Bundle) -> DynamicUNet:
    return dynamic_unet_from_bundle(bundle)


@pytest.fixture(scope="module")
def session(bundle: Bundle, network: DynamicUNet) -> Session:
    return Session(bundle, Strategy.load(STRATEGY), SETTINGS, network)


def found_of(*some: Contender) -> dict[str, Record]:
    return {contender.name: {"full_only": contender.full_only, "batches": {}} for contender in some}


@pytest.mark.parametrize("name", MAKERS)
def test_every_contender_draws_what_the_published_loop_draws(
    name: str, session: Session, bundle: Bundle, network: DynamicUNet
) -> None:
    contender = MAKERS[name](bundle, network)
    with session.opened([contender], 2, found_of(contender)) as ready:
        (one,) = ready
        assert one.quick
        walk = session.walk(contender, 10)
        assert set(walk.widths) == {32} if contender.full_only else len(set(walk.widths)) > 1
        noise = GivenNoise(3, (2, 3, 8, 8))
        found, expected = contender.prepare(walk)(noise), session.reference.prepare(walk)(noise)
        difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert difference <= TOLERANCES[contender.precision]
        assert contender.precision in ("bf16", "fp32")
        own = contender.prepare(walk)(None)
        assert own.shape == (2, 3, 8, 8)
        assert np.isfinite(own).all()


class Lying(_contenders.Numpy):
    """Answers for one width with another's network."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, "lying")
        self.honest = OnnxRuntime(bundle)

    def _load(self) -> None:
        self.honest.open(self.batch, self.widths)

    def _network(self, width: int, x: Images, features: Images) -> Images:
        return self.honest._network(24 if width == 16 else width, x, features)

    def close(self) -> None:
        self.honest.close()


def refused(session: Session, contender: Contender, match: str) -> None:
    found = found_of(contender)
    with pytest.raises(BackendError, match=match), session.opened([contender], 1, found):
        pytest.fail("it could be timed")
    assert found[contender.name]["batches"] == {}


def test_a_wrong_network_at_one_width_is_refused(session: Session, bundle: Bundle) -> None:
    refused(session, Lying(bundle), r"lying, batch 1: the noise predicted at width 16 \(4/8\) .* it was not timed")


def test_a_network_that_answers_nothing_finite_is_refused(
    session: Session, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxRuntime, "_network", lambda self, width, x, features: x * np.float32(np.nan))
    refused(session, OnnxRuntime(bundle), "differs from the published network's by inf")


@pytest.mark.parametrize("wrong", ["noise left out", "widths mixed up", "one call too few"])
def test_a_wrong_loop_is_refused(wrong: str, session: Session, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    right = _contenders.ancestral

    def loop(walk: Any, alphas: Any, x: Any, predict: Any, normals: Any) -> Any:
        if wrong == "noise left out":
            return right(walk, alphas, x, predict, lambda call: normals(call) * 0)
        if wrong == "widths mixed up":
            return right(walk, alphas, x, lambda width, x, t: predict(32, x, t), normals)
        shorter = _contenders.Walk(walk.timesteps[:-1], walk.widths[:-1])
        return right(shorter, alphas, x, predict, normals)

    monkeypatch.setattr(_contenders, "ancestral", loop)
    refused(session, OnnxRuntime(bundle), "the state after two calls of its loop")


def test_a_pipeline_that_draws_something_else_is_refused(
    session: Session, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Pipeline.batches
    monkeypatch.setattr(Pipeline, "batches", lambda self, plan, **rest: right(self, plan, **{**rest, "seed": 5}))
    refused(session, Ours(bundle), "ddsm-engine, batch 1")


def test_heads_as_diffusers_would_have_them_are_another_function(
    session: Session, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def more_heads(*arguments: Any) -> Any:
        unet: Any = diffusers_unet(*arguments)
        unet.mid_block.attentions[0].heads = 4
        return unet

    monkeypatch.setattr(_contenders, "diffusers_unet", more_heads)
    refused(session, Diffusers(bundle, "fp32"), "diffusers, full width, fp32, batch 1: the noise predicted")


def test_a_network_that_does_not_compile_is_an_error_of_ours(
    session: Session, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> Any:
        def call(*inputs: object) -> None:
            raise RuntimeError("no compiler\nis there")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    refused(session, Compiled(bundle, "fp32"), "torch.compile failed at width 8: no compiler is there")


def test_a_whole_comparison(bundle: Bundle, network: DynamicUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "RUNS", 2)
    some = [Ours(bundle), OnnxRuntime(bundle), Diffusers(bundle, "fp32")]
    record, saved = new_record("peers", "test"), []
    save = lambda: saved.append(copy.deepcopy(record))  # noqa: E731
    compare(bundle, Strategy.load(STRATEGY), SETTINGS, some, network, record, save)
    assert "best" not in saved[0]["contenders"]["ddsm-engine"]
    assert "Each at its best batch" not in details(saved[0])
    assert "Each at batch 1" in details(saved[0])
    for own in record["contenders"].values():
        first = own["batches"]["1"]
        assert list(first["steps"]) == (["32"] if own["full_only"] else ["8", "16", "24", "32"])
        assert (first["calls"], first["run"]["repeats"], first["steps"]["32"]["repeats"]) == (10, 2, 1)
        assert first["images_per_s"] * first["s_per_image"] == pytest.approx(1)
        assert first["full_s_per_image"] == pytest.approx(first["steps"]["32"]["median_ms"])
        assert first["open_s"] > 0
        assert 0 <= first["relative_l2"] <= 2e-5
        assert own["best"] in (1, 2)
        assert "images_per_s" in own["batches"][str(own["best"])]
    assert len(saved) == 1 + any(own["best"] == 2 for own in record["contenders"].values())


def test_too_slow_for_the_budget_is_run_a_little_and_at_batch_1_alone(
    bundle: Bundle, network: DynamicUNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "PAUSE_S", 0)
    settings = Settings(batches=(2,), calls=10, repeats=2, budget_s=1e-6)
    record: Record = {}
    compare(bundle, Strategy.load(STRATEGY), settings, [OnnxRuntime(bundle)], network, record, lambda: None)
    own = record["contenders"]["ONNX Runtime per width"]
    assert list(own["batches"]) == ["1"]
    assert (own["batches"]["1"]["calls"], own["batches"]["1"]["run"]["repeats"]) == (10, 1)
    assert own["best"] == 1


def test_what_cannot_run_here_is_named(bundle: Bundle, network: DynamicUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    everybody = contenders(bundle, network)
    assert everybody[0].name == "ddsm-engine"
    assert len({contender.name for contender in everybody}) == len(everybody) == 9
    left_out = {c.name for c in everybody if why_not(c, bf16=False)}
    assert left_out == {
        f"{n}, bf16" for n in ("torch, sliced at run time", "torch.compile per width", "diffusers, full width")
    }
    assert not [c for c in everybody if why_not(c, bf16=True)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "diffusers" else object())
    assert [why_not(c, bf16=True) for c in everybody if c.full_only] == ["diffusers is not installed"] * 2


@pytest.mark.parametrize(
    ("features", "there"),
    [((), False), (("avx2", "avx512f"), False), (("avx512_bf16",), True), (("avx2", "amx_bf16"), True)],
)
def test_which_processors_compute_in_bf16(features: tuple[str, ...], there: bool) -> None:
    assert has_bf16(features) is there


def test_a_walk_is_an_even_part_of_the_strategy(bundle: Bundle) -> None:
    walk = even_walk(bundle, [32] * 300 + [8] * 700, 4)
    assert walk.timesteps == (750, 500, 250, 0)
    assert walk.widths == (8, 8, 32, 32)


def test_a_step_on_average_over_widths() -> None:
    assert mean_step_ms({"8": 3, "32": 1}, {"8": 2.0, "16": 100.0, "32": 10.0}) == 4.0


def test_the_best_batch_has_the_cheapest_mix_of_steps(session: Session) -> None:
    def steps(narrow: float, full: float) -> Record:
        return {"steps": {str(w): {"median_ms": ms} for w, ms in ((8, narrow), (16, narrow), (24, narrow), (32, full))}}

    batches = {"1": steps(5, 10), "4": steps(3, 11), "16": steps(6, 9)}
    assert session.best({"full_only": False, "batches": batches}) == 4
    assert session.best({"full_only": True, "batches": batches}) == 16


def test_a_part_of_the_strategy_is_scaled_by_the_widths_it_visits(
    session: Session, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten calls are five of 16 channels, two of 24 and three of 32; the thousand are another mix."""
    ours = OnnxRuntime(bundle)
    ms = {"8": 1.0, "16": 2.0, "24": 4.0, "32": 8.0}
    steps = {width: {"median_ms": value} for width, value in ms.items()}
    found: dict[str, Record] = {ours.name: {"full_only": False, "batches": {"2": {"steps": steps}}}}
    counts = {16: 5, 24: 2, 32: 3}
    seen = session.walk(ours, 10).widths
    assert {width: seen.count(width) for width in counts} == counts
    run_ms = 2 * sum(ms[str(width)] * count for width, count in counts.items())  # two images, no overhead
    timing = Timing(run_ms, run_ms, run_ms, 1)
    monkeypatch.setattr(session, "_in_turns", lambda draws, repeats, warmup: {ours.name: timing})
    session.time_runs([peers.Ready(ours, quick=False)], 2, found)
    own = found[ours.name]["batches"]["2"]
    assert own["s_per_image"] == pytest.approx((534 * 2 + 181 * 4 + 274 * 8 + 11 * 1) / 1e3)
    assert own["images_per_s"] == pytest.approx(1e3 / 3995)
    assert own["full_s_per_image"] == pytest.approx(8.0)


def made_up() -> Record:
    def at(narrow: float, full: float, images_per_s: float, calls: int = 40) -> Record:
        return {
            "steps": {"32": {"median_ms": narrow}, "128": {"median_ms": full}},
            "calls": calls, "images_per_s": images_per_s, "s_per_image": 1 / images_per_s, "full_s_per_image": full,
            "run": {"median_ms": 10.0, "p20_ms": 9.0, "p80_ms": 11.0},
        }  # fmt: skip

    ours: Record = {"full_only": False, "precision": "bf16", "not_run": None}
    ours |= {"best": 16, "batches": {"1": at(5, 20, 0.1), "16": at(4, 16, 0.2)}}
    sliced: Record = {"full_only": False, "precision": "fp32", "not_run": None}
    sliced |= {"best": 1, "batches": {"1": at(40, 80, 0.02), "16": {"steps": at(60, 90, 1)["steps"]}}}
    openvino: Record = {"full_only": False, "precision": "bf16", "not_run": None}
    openvino |= {"best": 4, "batches": {"1": at(10, 30, 0.05, calls=10), "4": at(9, 28, 0.08)}}
    diffusers: Record = {"full_only": True, "precision": "fp32", "not_run": None}
    diffusers |= {"best": 1, "batches": {"1": at(0, 50, 0.01)}}
    del diffusers["batches"]["1"]["steps"]["32"]
    compiled: Record = {"full_only": False, "precision": "bf16", "batches": {}}
    compiled |= {"not_run": "this CPU has no bf16 arithmetic"}
    where = {"cpu": "X", "cores": 2, "cpu_features": [], "versions": {}, "date": "2026-11-21T00:00", "commit": "c"}
    return {
        "benchmark": "peers", "environment": where, "settings": {"calls": 40}, "timesteps": 1000, "groups": 16,
        "widths": {"32": "2/8", "128": "8/8"}, "mix": {"32": 700, "128": 300}, "full": "128",
        "contenders": {
            "ddsm-engine": ours, "torch, sliced at run time, fp32": sliced, "OpenVINO per width": openvino,
            "torch.compile per width, bf16": compiled, "diffusers, full width, fp32": diffusers,
        },
    }  # fmt: skip


HEADLINE = (
    "**With the published strategy over 1000 calls, 40 of which were run, and scaled: at batch 1 0.1 images/s, 2.00x "
    "the fastest peer (OpenVINO per width, bf16), 5.00x the loop as published in fp32, Net R 1.04 (full width: "
    "OpenVINO per width, bf16); each at its best batch 0.2 images/s, 2.50x the fastest peer (OpenVINO per width, "
    "bf16), 10.00x the loop as published in fp32, Net R 1.95 (full width: OpenVINO per width, bf16).**"
)


def test_net_r_is_what_arrived_over_the_best_that_a_peer_makes_of_the_full_width() -> None:
    record, measured = made_up(), _peers_report.rows(made_up(), BATCH_1)
    # 700 calls of 0.843 and 300 of 12.444 GFLOPs where a peer makes 1000 of 12.444; 30 s became 10.
    theoretical = 12.444 / (0.7 * 0.843 + 0.3 * 12.444)
    found = _peers_report.net_r(measured, "OpenVINO per width", _peers_report.theoretical(record))
    assert found == pytest.approx(30 / 10 / theoretical, rel=1e-3)


@pytest.mark.parametrize(("images_per_s", "expected"), [(0.1, True), (0.12, True), (0.13, False), (0.05, False)])
def test_runs_that_overlap_are_said_to(images_per_s: float, expected: bool) -> None:
    record = made_up()
    record["contenders"]["OpenVINO per width"]["batches"]["1"]["images_per_s"] = images_per_s
    measured = _peers_report.rows(record, BATCH_1)
    assert _peers_report.overlap(measured["ddsm-engine"], measured["OpenVINO per width"]) is expected
    assert ("(OpenVINO per width, bf16; their runs overlap)" in headline(record)[0]) is expected


def test_the_headline_compares_with_the_fastest_peer_and_with_the_published_loop() -> None:
    assert headline(made_up()) == [HEADLINE]


def test_the_tables_show_who_ran_and_who_did_not() -> None:
    text = details(made_up())
    assert "| ddsm-engine, bf16 | 16 | 4.0 | 16.0 | 0.2 | 5.0 | 16.0 | 1.00x |" in text
    assert "| torch, sliced at run time, fp32 | 1 | 40.0 | 80.0 | 0.02 | 50.0 | 80.0 | 5.00x |" in text
    assert "| diffusers, full width, fp32 | 1 | - | 50.0 | 0.01 | 100.0 | 50.0 | 10.00x |" in text
    assert "Not run: this CPU has no bf16 arithmetic (torch.compile per width, bf16)." in text
    assert "40 evenly strided calls of the strategy really run, swaps included (10 for those too slow" in text
    assert "(2/8 × 700, 8/8 × 300)" in text


def test_the_summary_is_the_sentence_and_where_it_was_measured() -> None:
    assert re.fullmatch(
        re.escape(HEADLINE) + r" \*.+, \d+ cores \(.+\); \d{4}-\d\d-\d\d, commit .+\.\*", summary(made_up())
    )


@pytest.mark.parametrize("change", ["whole", "ours alone", "nothing yet"])
def test_the_picture_is_drawn_of_any_part(change: str) -> None:
    record = made_up()
    if change == "ours alone":
        record["contenders"] = {"ddsm-engine": record["contenders"]["ddsm-engine"]}
    if change == "nothing yet":
        record["contenders"] = {}
    assert png_of(record, draw).startswith(b"\x89PNG")
    if change != "whole":
        assert headline(record) == []


@pytest.mark.parametrize(
    "words", [["--batch-size", "0"], ["--batch-size", "1,,2"], ["--calls", "9"], ["--repeats", "0"]]
)
def test_an_option_out_of_range_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    p = argparse.ArgumentParser()
    peers.options(p)
    with pytest.raises(SystemExit):
        p.parse_args(words)
    assert "expected" in capsys.readouterr().err


def test_batch_1_is_always_among_the_candidates() -> None:
    p = argparse.ArgumentParser()
    peers.options(p)
    assert p.parse_args(["--batch-size", "8,4,8"]).batch_size == (1, 4, 8)
