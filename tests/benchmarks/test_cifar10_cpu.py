import copy
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import _cifar10_report, _report, cifar10_cpu
from benchmarks._report import machine_name
from benchmarks.cifar10_cpu import NAME, Settings, check_same_run, measure, new_record
from benchmarks.dynamic_torch import DynamicLoop, SlimmableConv, dynamic_unet_from_bundle
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import BackendError, OutputError
from ddsm_engine.strategy import Strategy
from tests.conftest import CONFIG, STATE, TINY
from tests.oracle.dynamic_unet import dynamic_unet
from tests.oracle.sampling import PublishedSchedule, ddim_states, ddpm_states
from tests.tolerances import SLICED_FORWARD, TRAJECTORY

SETTINGS = Settings(eighths=(2, 8), repeats=2, calls=4, peer_calls=3, threads=1)


def relative_l2(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def record() -> _report.Record:
    return new_record("test", SETTINGS, TINY)


@pytest.fixture(autouse=True)
def _quick_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak has a test of its own and takes seconds."""
    monkeypatch.setattr(cifar10_cpu, "matmul_peak_gflops", lambda precision, threads: 100.0)


@pytest.fixture(scope="module")
def strategy() -> Strategy:
    return Strategy.load(cifar10_cpu.STRATEGY)


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_the_dynamic_module_is_the_published_network(k: int, bundle: Bundle) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(k))
    t = torch.tensor([371, 371])
    loop = DynamicLoop(dynamic_unet_from_bundle(bundle), bundle.manifest.noise_schedule, [999, 0], "fp32")
    found = loop.predict(x, t, [k / 8] * 1000)
    assert relative_l2(found, dynamic_unet(CONFIG, STATE, x, t, k / 8)) <= SLICED_FORWARD


def test_the_width_follows_the_timestep(bundle: Bundle) -> None:
    loop = DynamicLoop(dynamic_unet_from_bundle(bundle), bundle.manifest.noise_schedule, [999, 0], "fp32")
    x, mults = torch.ones(1, 3, 8, 8), [1.0] * 500 + [0.25] * 500
    for t, width_mult in ((499, 1.0), (500, 0.25), (499, 1.0)):
        found = loop.predict(x, torch.tensor([t]), mults)
        assert relative_l2(found, dynamic_unet(CONFIG, STATE, x, torch.tensor([t]), width_mult)) <= SLICED_FORWARD


@pytest.mark.parametrize("timesteps", [range(999, -1, -1), (750, 500, 250, 0)], ids=["ddpm", "part"])
def test_the_loop_samples_as_published(timesteps: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = DynamicLoop(dynamic_unet_from_bundle(bundle), bundle.manifest.noise_schedule, timesteps, "fp32")
    monkeypatch.setattr(loop, "predict", lambda x, t, width_mults: x * 0.5)
    generator = torch.Generator().manual_seed(0)
    x_T, *noises = torch.randn(len(timesteps) + 1, 1, 3, 8, 8, generator=generator)
    found = loop.run(x_T, [], noise=lambda like, call: noises[call])
    if len(timesteps) == 1000:
        expected = ddpm_states(lambda x, t: x * 0.5, x_T, noises, PublishedSchedule())[-1]
    else:
        expected = ddim_states(lambda x, t: x * 0.5, x_T, noises, timesteps, PublishedSchedule(), eta=1.0)[-1]
    assert relative_l2(found, expected) <= TRAJECTORY


def test_a_whole_measurement_is_kept_part_by_part(bundle: Bundle, strategy: Strategy, tmp_path: Path) -> None:
    stages: list[_report.Record] = []
    found = measure(bundle, strategy, SETTINGS, record=record(), save=lambda r: stages.append(copy.deepcopy(r)))
    assert [(*s["rows"], *(part for part in ("strategy", "memory") if part in s)) for s in stages] == [
        ("2/8",), ("2/8", "8/8"), ("2/8", "8/8", "strategy"), ("2/8", "8/8", "strategy", "memory")
    ]  # fmt: skip
    row = found["rows"]["2/8"]
    assert {"onnxruntime fp32", "openvino fp32", "torch dynamic fp32", "torch dynamic bf16"} <= set(row["timings"])
    assert next(iter(row["timings"])) == row["auto"]
    for timing in row["timings"].values():
        assert timing["repeats"] == 2
        assert 0 < timing["p20_ms"] <= timing["median_ms"] <= timing["p80_ms"]
    assert row["relative_l2"]["onnxruntime fp32"] <= cifar10_cpu.TOLERANCES["fp32"]
    ran = found["strategy"]
    assert (ran["calls"], ran["sampler"]) == (4, "ddim")
    ours = ran["contenders"][ran["ours"]]
    # 4 calls visit 750, 500, 250, 0: half width twice, full width twice.
    macs = {round(8 * v.width_mult): v.macs for v in bundle.manifest.variants}
    assert ours["theoretical"] == pytest.approx(4 * macs[8] / (2 * macs[8] + 2 * macs[4]))
    assert ours["r"] == pytest.approx(ours["full_s"] / ours["strategy_s"] / ours["theoretical"])
    peer = ran["contenders"][ran["best_peer"]]
    assert peer["calls"] == 3
    assert ran["net_r"] == pytest.approx(peer["full_s"] / ours["strategy_s"] / ours["theoretical"])
    for values in found["memory"].values():
        assert values["variants"] == 7
        assert values["open_s"] > 0
        assert 20e6 < values["peak_rss_bytes"] < 2e9
    path = tmp_path / "result.json"
    _report.save(found, path, _cifar10_report.details(found))
    assert _report.load(path, NAME) == found
    assert "| 2/8 |" in path.with_suffix(".md").read_text()


def test_a_finished_part_is_not_measured_again(
    bundle: Bundle, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("measure_strategy", "measure_memory"):
        monkeypatch.setattr(cifar10_cpu, name, lambda *arguments: {"fresh": True})
    monkeypatch.setattr(cifar10_cpu, "measure_width", lambda *arguments: "fresh")
    begun = {**record(), "rows": {"2/8": "kept"}, "memory": "kept"}
    found = measure(bundle, strategy, SETTINGS, record=begun)
    assert found["rows"] == {"2/8": "kept", "8/8": "fresh"}
    assert (found["strategy"], found["memory"]) == ({"fresh": True}, "kept")


def test_a_network_that_slices_differently_is_refused_before_it_is_timed(
    bundle: Bundle, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trailing(self: SlimmableConv, arriving: int) -> tuple[Tensor, Tensor | None]:
        out = int(self.out_channels * self.width_mult) if self.sliced else self.out_channels
        return self.weight[:out, -arriving:], None if self.bias is None else self.bias[:out]

    def timed(*arguments: object, **options: object) -> None:
        pytest.fail("it was timed")

    monkeypatch.setattr(SlimmableConv, "block", trailing)
    monkeypatch.setattr(cifar10_cpu, "time_in_turns", timed)
    begun = record()
    with pytest.raises(BackendError, match=r"width 8 \(2/8\): .* differs from torch dynamic fp32 .* nothing was timed"):
        measure(bundle, strategy, SETTINGS, record=begun)
    assert begun["rows"] == {}


def test_an_answer_that_is_not_finite_is_refused() -> None:
    outputs = {"openvino fp32": np.full(3, np.nan, np.float32), "torch dynamic fp32": np.ones(3, np.float32)}
    with pytest.raises(BackendError, match="nothing was timed"):
        cifar10_cpu.check_answers(outputs, "here")


def test_a_strategy_the_bundle_cannot_run_is_left_out(bundle: Bundle) -> None:
    odd = Strategy.uniform(Fraction(1, 16), 1000)
    assert not cifar10_cpu._offers(bundle, odd)


def test_a_result_of_another_run_is_not_continued() -> None:
    begun = record()
    check_same_run(begun, record())
    begun["environment"]["cores"] = 1024
    begun["settings"]["repeats"] = 7
    with pytest.raises(OutputError, match="another cores, repeats"):
        check_same_run(begun, record())


@pytest.mark.parametrize(
    ("cpu", "cores", "name"),
    [
        ("AMD EPYC", 2, "amd-epyc-2c"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", 8, "intel-xeon-platinum-8481c-8c"),
        ("AMD EPYC 9B14 96-Core Processor", 4, "amd-epyc-9b14-4c"),
    ],
)
def test_a_machine_has_a_short_name(cpu: str, cores: int, name: str) -> None:
    assert machine_name(cpu, cores) == name


def synthetic() -> _report.Record:
    def timing(median_ms: float) -> dict[str, float]:
        return {"median_ms": median_ms, "p20_ms": median_ms - 1, "p80_ms": median_ms + 2, "repeats": 30}

    def row(macs: int, openvino: float, ort: float, fp32: float, bf16: float) -> dict[str, Any]:
        names = ("openvino fp32", "onnxruntime fp32", "torch dynamic fp32", "torch dynamic bf16")
        timings = dict(zip(names, map(timing, (openvino, ort, fp32, bf16)), strict=True))
        return {"macs": macs, "conv_linear_macs": macs // 2, "auto": names[0], "timings": timings}

    return {
        "benchmark": NAME,
        "machine": "test-2c",
        "environment": {
            "cpu": "Some CPU", "cores": 2, "cpu_features": ["avx2"],
            "versions": {"ddsm-engine": "0", "openvino": "1.0"},
            "date": "2026-01-02T03:04:05+00:00", "command": "cifar10_cpu.py", "commit": "abc",
        },
        "settings": {"groups": 16},
        "published": cifar10_cpu.PUBLISHED,
        "rows": {"2/8": row(10**9, 10, 12, 20, 40), "8/8": row(4 * 10**9, 30, 48, 60, 120)},
        "memory": {"openvino fp32": {"variants": 7, "open_s": 3.21, "peak_rss_bytes": 900_000_000}},
    }  # fmt: skip


GOLDEN = """\
| width | GFLOPs | expected | OpenVINO fp32, ms | measured | ONNX Runtime fp32, ms | measured | torch dynamic fp32, ms \
| torch dynamic bf16, ms |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| 2/8 | 2.000 | 4.00x | 10.0 | 3.00x | 12.0 | 4.00x | 20.0 | 40.0 |
| 8/8 | 8.000 | 1.00x | 30.0 | 1.00x | 48.0 | 1.00x | 60.0 | 120.0 |

Milliseconds are the median of one sampling step (network and update) at batch 1, all contenders of a row taken in \
turns; GFLOPs are true ones (attention included); 16 groups, random weights.

All 7 variants resident: OpenVINO fp32 900 MB peak, 3.2 s cold start (a fresh process each, without torch).

Some CPU, 2 cores (avx2); openvino 1.0; 2026-01-02, commit abc."""


def test_the_block_of_the_readme() -> None:
    assert _cifar10_report.summary(synthetic()) == GOLDEN


def test_without_the_full_width_no_speed_up_is_invented() -> None:
    partial = synthetic()
    del partial["rows"]["8/8"], partial["memory"]
    assert "| 2/8 | 2.000 | - | 10.0 | - | 12.0 | - | 20.0 | 40.0 |" in _cifar10_report.summary(partial)
    assert "| 2/8 | 2.000 | 1.000 | - | 10.00 (9.00 to 12.00) | - |" in _cifar10_report.details(partial)


def test_the_strategy_line_quotes_r_beside_mfu() -> None:
    contender = {
        "calls": 1000, "full_s": 60.0, "strategy_s": 40.0, "theoretical": 2.0, "realised": 1.5, "r": 0.75, "mfu": 0.4
    }  # fmt: skip
    strategy = {
        "calls": 1000, "sampler": "ddpm", "ours": "openvino fp32", "best_peer": "torch dynamic fp32", "net_r": 1.25,
        "peak_gflops": {"fp32": 123.4}, "peak_of_ours": "fp32",
        "contenders": {"openvino fp32": contender, "torch dynamic fp32": {**contender, "calls": 100, "full_s": 100.0}},
    }  # fmt: skip
    text = _cifar10_report.summary({**synthetic(), "strategy": strategy})
    assert "60.0 s per image at full width, 40.0 s with the published strategy" in text
    assert "R = 0.75, with the full width at 40 % MFU of this machine's own 123 GFLOP/s; Net R = 1.25" in text
    assert "torch dynamic fp32, 100.0 s, scaled from 100 calls" in text
    strided = _cifar10_report.summary({**synthetic(), "strategy": {**strategy, "sampler": "ddim", "calls": 50}})
    assert "50 evenly strided DDIM calls" in strided


def test_a_block_goes_between_its_markers_and_nowhere_else() -> None:
    text = "a\n<!-- begin cifar10_cpu -->\nold\n<!-- end cifar10_cpu -->\nb\n"
    once = _report.with_block(text, NAME, r"new \1")
    assert once == "a\n<!-- begin cifar10_cpu -->\n\nnew \\1\n\n<!-- end cifar10_cpu -->\nb\n"
    assert _report.with_block(once, NAME, r"new \1") == once
    assert _report.block_of(once, NAME) == r"new \1"
    with pytest.raises(OutputError, match="markers"):
        _report.with_block("a", NAME, "new")
