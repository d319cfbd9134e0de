from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from benchmarks import _report, strategy_latency
from benchmarks._strategy_latency_report import FULL, SEARCHED, details, draw, summary
from benchmarks._torch_walks import SLICED, STATIC, Walk, check_answers, make_walks
from benchmarks.cifar10 import PUBLISHED
from benchmarks.dynamic_torch import DrawNoise
from benchmarks.strategy_latency import (
    BENCHMARK,
    Settings,
    Tally,
    make_plans,
    measure_target,
    overhead,
    pace,
    r_over_torch,
    speed_up,
    turns,
)
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import BackendError
from ddsm_engine.pipeline import Pipeline
from ddsm_engine.plan import Plan
from tests.conftest import Refusal

UNIFORM = [f"uniform {k}/8" for k in range(2, 8)]
WHOLE = Tally(
    calls=100, macs=400 * 10**9, conv_linear_macs=300 * 10**9, seconds=50.0, engine_s=49.0, isolated_s=40.0,
    pace=[0.06, 0.065],
)  # fmt: skip
NARROW = Tally(
    calls=20, macs=20 * 10**9, conv_linear_macs=12 * 10**9, seconds=4.0, engine_s=3.9, isolated_s=4.0, pace=[0.1, 0.1]
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak has a test of its own and takes seconds."""
    monkeypatch.setattr(strategy_latency, "matmul_peak_gflops", lambda precision: 100.0)
    monkeypatch.setattr(strategy_latency, "PAUSE_S", 0.0)


def test_r_is_the_part_of_the_promised_speed_up_that_arrives() -> None:
    found = speed_up(NARROW, WHOLE)
    assert found.pop("r_of_turns") == pytest.approx([0.6, 0.65])
    # A call costs a quarter of the arithmetic, and 0.2 s where the full width takes 0.5 s.
    assert found == pytest.approx({"theoretical": 4.0, "theoretical_conv_linear": 5.0, "realised": 2.5, "r": 0.625})
    assert speed_up(WHOLE, WHOLE)["r"] == 1.0


def test_a_run_of_fewer_calls_is_scaled_up() -> None:
    found = pace(NARROW, 100, 2, 100.0)
    assert (found["calls"], found["seconds"]) == (20, 4.0)
    assert found["s_per_image"] == pytest.approx(10.0)
    assert found["images_per_s"] == pytest.approx(0.1)
    # 20 calls of 2 GFLOPs for each of 2 images in 4 s, of 100 GFLOP/s.
    assert found["mfu"] == pytest.approx(0.2)


def test_a_run_is_compared_with_the_sum_of_its_isolated_calls() -> None:
    found = overhead(WHOLE, 100, 2)
    assert found["predicted_s_per_image"] == pytest.approx(20.0)
    assert found["measured_over_predicted"] == pytest.approx(1.25)
    assert found["host_us_per_call"] == pytest.approx(10_000)
    assert found["host_share"] == pytest.approx(0.02)


def test_the_full_width_may_be_torchs() -> None:
    ours = {"s_per_image": 2.0, "theoretical": 2.5}
    assert r_over_torch({"s_per_image": 10.0}, ours) == pytest.approx(2.0)


def test_the_pace_of_a_turn_is_its_time_over_its_arithmetic(bundle: Bundle) -> None:
    tally = Tally()
    with Pipeline.from_bundle(bundle.path, backend="onnxruntime") as pipe:
        for strategy, seconds in (("uniform:8/8", 3.0), ("uniform:4/8", 1.0)):
            tally.add(bundle, pipe.plan(strategy, "ddim", 2), seconds)
    wide, narrow = (2 * 2 * bundle.variants[name].macs / 1e9 for name in ("w032", "w016"))
    assert tally.pace == pytest.approx([3 / wide, 1 / narrow])
    assert (tally.calls, tally.seconds) == (4, 4.0)


@pytest.mark.parametrize(
    ("calls", "chunk", "few", "whole", "part"),
    [(100, 50, 20, [50, 50], [10, 10]), (7, 3, 1, [3, 2, 2], [3, 2, 2]), (1000, 500, 8, [500, 500], [4, 4])],
)
def test_every_call_has_its_turn_once(calls: int, chunk: int, few: int, whole: list[int], part: list[int]) -> None:
    taken = list(turns(Settings(calls=calls, chunk=chunk, uniform_calls=few)))
    assert [call for one, _ in taken for call in one] == list(range(calls))
    assert [len(one) for one, _ in taken] == whole
    assert [len(other) for _, other in taken] == part
    for one, other in taken:
        assert other[0] == one[0]
        assert other[-1] == one[-1]
        assert sorted(set(other)) == other


def test_a_whole_measurement(bundle: Bundle) -> None:
    found = measure_target(bundle, "onnxruntime", 2, Settings(calls=8, chunk=4, uniform_calls=2))
    assert list(found["runs"]) == [FULL, SEARCHED, *UNIFORM]
    assert set(found["relative_l2"]) == {FULL, SEARCHED, *UNIFORM, STATIC}
    macs = {variant.id: variant.macs for variant in bundle.manifest.variants}
    with Pipeline.from_bundle(bundle.path, backend="onnxruntime") as pipe:
        own = make_plans(pipe, 8)[SEARCHED].variants
    searched = found["runs"][SEARCHED]
    assert searched["calls"] == 8
    assert searched["theoretical"] == pytest.approx(8 * bundle.full.macs / sum(macs[v] for v in own))
    assert 1 < searched["theoretical"] < 4
    assert found["runs"]["uniform 2/8"]["theoretical"] == pytest.approx(bundle.full.macs / macs["w008"])
    for run in found["runs"].values():
        assert run["seconds"] > 0
        assert run["measured_over_predicted"] > 0
        assert 0 < run["host_share"] < 1
    best = min(peer["s_per_image"] for peer in found["peers"].values())
    assert set(found["peers"]) == {STATIC, SLICED}
    assert found["peers"][found["best_peer"]]["s_per_image"] == best
    assert found["r_over_torch"] == pytest.approx(best / searched["s_per_image"] / searched["theoretical"])


def test_all_calls_of_the_schedule_are_ddpm(bundle: Bundle) -> None:
    with Pipeline.from_bundle(bundle.path, backend="onnxruntime") as pipe:
        plans = make_plans(pipe, 1000)
        published, part = pipe.plan("uniform:8/8"), pipe.plan("uniform:8/8", "ddim", 10, eta=1.0)
        assert (plans[FULL].update == published.update).all()
        assert (make_plans(pipe, 10)[FULL].update == part.update).all()
    assert len(plans[SEARCHED].segments) == 29


@pytest.mark.parametrize("calls", [2, 10, 1000])
def test_ours_and_the_loops_in_torch_are_one_sampler(calls: int, bundle: Bundle) -> None:
    with Pipeline.from_bundle(bundle.path, backend="onnxruntime") as pipe:
        plans = make_plans(pipe, calls)
        differences = check_answers(pipe, plans, 2, make_walks(bundle, plans[FULL]))
    assert max(differences.values()) <= 2e-5
    assert min(differences.values()) > 0


def weaker_noise(walk: Walk) -> Walk:
    return lambda own, x, noise: walk(own, x, lambda like, call: 0.999 * noise(like, call))


def narrower(walk: Walk) -> Walk:
    def wrong(own: Plan, x: Tensor, noise: DrawNoise) -> Tensor:
        return walk(replace(own, variants=tuple("w028" if v == "w032" else v for v in own.variants)), x, noise)

    return wrong


@pytest.mark.parametrize(("loop", "spoil"), [(SLICED, narrower), (SLICED, weaker_noise), (STATIC, weaker_noise)])
def test_a_wrong_loop_is_refused_before_it_is_timed(
    loop: str, spoil: Callable[[Walk], Walk], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(bundle: Bundle, plan: Plan) -> dict[str, Walk]:
        walks = make_walks(bundle, plan)
        return {**walks, loop: spoil(walks[loop])}

    monkeypatch.setattr(strategy_latency, "make_walks", spoilt)
    monkeypatch.setattr(strategy_latency, "take_turns", lambda *arguments: pytest.fail("it was timed"))
    with pytest.raises(BackendError, match=r"\(fp32\) differs from the published loop .* nothing was timed"):
        measure_target(bundle, "onnxruntime", 1, Settings(calls=4, chunk=4))


@pytest.mark.parametrize(
    "wrong",
    [("--calls", "1"), ("--calls", "1001"), ("--chunk", "0"), ("--uniform-calls", "0"), ("--batch-size", "x")],
)
def test_an_option_out_of_range_is_refused_before_anything_is_exported(
    wrong: tuple[str, str], refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(strategy_latency, "cifar10_bundle", lambda folder: pytest.fail("it was exported"))
    assert wrong[0] in refusal(BENCHMARK.main, *wrong, "--output", tmp_path / "r.json")


def synthetic(calls: int = 100) -> _report.Record:
    def run(own: Tally) -> _report.Record:
        return pace(own, calls, 1, 100.0) | speed_up(own, WHOLE) | overhead(own, calls, 1)

    def target(backend: str, searched: Tally) -> _report.Record:
        runs = {FULL: run(WHOLE), SEARCHED: run(searched), "uniform 4/8": run(NARROW)}
        peers = {STATIC: pace(WHOLE, calls, 1, 100.0), SLICED: pace(WHOLE, calls, 1, 100.0)}
        return {
            "backend": backend, "precision": "fp32", "batch": 1, "peak_gflops": 100.0, "relative_l2": {},
            "runs": runs, "peers": peers, "best_peer": STATIC, "r_over_torch": 1.5,
        }  # fmt: skip

    slow = Tally(100, 200 * 10**9, 10**11, seconds=40.0, engine_s=39.0, isolated_s=39.0, pace=[0.1, 0.1])
    fast = Tally(100, 200 * 10**9, 10**11, seconds=30.0, engine_s=29.7, isolated_s=25.0, pace=[0.075, 0.0775])
    return {
        "benchmark": "strategy_latency",
        "machine": "test-2c",
        "environment": {
            "cpu": "Some CPU", "cores": 2, "cpu_features": ["avx2"], "versions": {"openvino": "1.0"},
            "date": "2026-01-02T03:04:05+00:00", "command": "c", "commit": "abc",
        },
        "calls": calls, "timesteps": 1000, "chunk": 50, "published": PUBLISHED,
        "targets": [target("slow", slow), target("fast", fast)],
    }  # fmt: skip


def test_the_table_says_which_run_it_was() -> None:
    text = details(synthetic())
    assert "fast fp32, batch 1: 100 calls, an even part of the published 1000 (DDIM, η = 1), in turns of 50;" in text
    searched = "| 100 | 30.00 | 0.033 | 13 % | 2.00x | 1.67x | 0.83 (0.81 to 0.83) | 25.00 | 1.200 | 3000 | 1.0 % |"
    uniform = "| 20 | 20.00 | 0.050 | 10 % | 4.00x | 2.50x | 0.62 (0.61 to 0.64) | 20.00 | 1.000 | 5000 | 2.5 % |"
    assert f"| published strategy {searched}" in text
    assert f"| uniform 4/8 {uniform}" in text
    assert "1 of 3 runs are within 5 % of the sum of their isolated calls; farthest: full width, 1.250." in text
    assert "R over the full width in torch: 1.50 with the published strategy (torch fp32, static, " in text
    assert "all 1000 calls of DDPM, as published" in details(synthetic(1000))


def test_the_summary_sets_the_fastest_engines_beside_what_was_published() -> None:
    text = summary(synthetic())
    assert "**fast fp32, batch 1: 50.00 s per image at full width, 30.00 s with the published strategy.**" in text
    assert "R = 0.83 (0.81 to 0.83), with the full width at 16 % MFU of this machine's own 100 GFLOP/s." in text
    assert "| slow fp32, batch 1 | 500.0 | 400.0 | 2.00x | 1.25x | 0.62 (0.61 to 0.64) | 16 % |" in text
    assert "| published, RTX 3090 | 0.93 | 0.59 | 1.96x (conv+linear) | 1.58x | 0.81 | - |" in text
    assert str(PUBLISHED["source"]) in text


def test_the_picture_is_drawn() -> None:
    assert _report.png_of(synthetic(), draw).startswith(b"\x89PNG")
