"""``auto`` follows what was measured here, for the calls at hand."""

import logging
import shutil
from pathlib import Path

import pytest

from ddsm_engine.backends import engine_target
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import BackendError
from ddsm_engine.measure import choice
from ddsm_engine.measure.choice import fastest_backend
from ddsm_engine.measure.latency_table import LatencyTable, save_latency
from ddsm_engine.measure.timing import Timing
from ddsm_engine.pipeline import Pipeline

OPTIONS = EngineOptions(precision="fp32", threads=1)
BATCH = 2
NARROW, WIDE = "w008", "w032"


@pytest.fixture
def bundle(bundle_path: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(bundle_path, tmp_path / "x.bundle"))


def measured(bundle: Bundle, backend: str, narrow_ms: float, wide_ms: float) -> Path:
    """A table in which every variant but the full one takes ``narrow_ms``."""
    timings = {v: Timing(ms, ms, ms, 9) for v in bundle.variants for ms in [wide_ms if v == WIDE else narrow_ms]}
    return save_latency(bundle, LatencyTable(engine_target(backend, OPTIONS, BATCH), {}, 50.0, timings))


def test_the_calls_decide_between_measured_backends(bundle: Bundle) -> None:
    measured(bundle, "openvino", 1.0, 9.0)
    measured(bundle, "onnxruntime", 2.0, 5.0)
    measured(bundle, "native", 3.0, 6.0)
    for calls, expected in (([NARROW] * 5 + [WIDE], "openvino"), ([NARROW] * 3 + [WIDE], "onnxruntime")):
        assert fastest_backend(bundle, calls, OPTIONS, BATCH) == expected


def test_nothing_is_chosen_from_half_a_comparison(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    assert fastest_backend(bundle, [WIDE], OPTIONS, BATCH) is None
    measured(bundle, "onnxruntime", 1.0, 1.0)
    assert fastest_backend(bundle, [WIDE], OPTIONS, BATCH) is None, "others may be faster"
    table = measured(bundle, "openvino", 2.0, 2.0)
    assert fastest_backend(bundle, [WIDE], OPTIONS, BATCH) is None, "our own may be faster"
    measured(bundle, "native", 3.0, 3.0)
    assert fastest_backend(bundle, [WIDE], OPTIONS, BATCH) == "onnxruntime"
    assert fastest_backend(bundle, [WIDE], OPTIONS, BATCH + 1) is None, "another batch was not measured"
    assert not caplog.records
    table.write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert fastest_backend(bundle, [WIDE], OPTIONS, BATCH) is None
    assert str(table) in caplog.text


def test_a_backend_without_the_precision_does_not_count(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_openvino(name: str, options: EngineOptions, batch: int) -> object:
        if name != "openvino":
            raise BackendError("no")
        return engine_target(name, options, batch)

    monkeypatch.setattr(choice, "engine_target", only_openvino)
    measured(bundle, "openvino", 1.0, 1.0)
    assert fastest_backend(bundle, [WIDE], OPTIONS, BATCH) == "openvino"


@pytest.mark.parametrize("expected", ["openvino", "onnxruntime", "native"])
def test_auto_runs_on_what_was_measured_to_be_fastest(expected: str, bundle: Bundle) -> None:
    for backend in ("openvino", "onnxruntime", "native"):
        took_ms = 1.0 if backend == expected else 2.0
        measured(bundle, backend, took_ms, took_ms)
    with Pipeline.from_bundle(bundle.path, precision="fp32", threads=1) as pipe:
        trace = pipe("uniform:2/8", "ddim", 2, num_images=BATCH).trace
        assert (trace.backend, trace.precision, trace.batch_size) == (expected, "fp32", BATCH)
        assert pipe("uniform:2/8", "ddim", 2, num_images=1).trace.backend == "openvino", "batch 1 was not measured"
    with Pipeline.from_bundle(bundle.path, backend="openvino", precision="fp32", threads=1) as pipe:
        assert pipe("uniform:2/8", "ddim", 2, num_images=BATCH).trace.backend == "openvino", "what is named is taken"
