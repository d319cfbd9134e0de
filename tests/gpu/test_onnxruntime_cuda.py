"""Sessions on a GPU: what they are opened with, what is bound, which graph is launched; artefacts run on the host.

The library is real, in its build for a CPU: every call goes on to it, with the device's name changed, so that a name or
a signature that it does not have fails here.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from ddsm_engine.backends import open_engine
from ddsm_engine.backends.device import StagedEngine
from ddsm_engine.backends.engine import EngineOptions, artefact_precision
from ddsm_engine.backends.onnxruntime_cuda import (
    MOST_GRAPHS,
    NO_GRAPH,
    OnnxRuntimeCudaEngine,
    target,
)
from ddsm_engine.bundle import Bundle
from ddsm_engine.doctor import probe
from ddsm_engine.errors import BackendError
from tests.conftest import TINY
from tests.gpu.fake import A100, H100, FakeDevice
from tests.tolerances import FORWARD

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
VARIANTS = [f"w{width:03d}" for width in TINY.widths()]
BATCH = 2

OPTIONS = {
    "device_id", "has_user_compute_stream", "user_compute_stream", "gpu_mem_limit", "arena_extend_strategy",
    "cudnn_conv_algo_search", "do_copy_in_default_stream", "gpu_external_alloc", "gpu_external_free",
    "gpu_external_empty_cache", "cudnn_conv_use_max_workspace", "enable_cuda_graph", "cudnn_conv1d_pad_to_nc1d",
    "tunable_op_enable", "tunable_op_tuning_enable", "tunable_op_max_tuning_duration_ms",
    "enable_skip_layer_norm_strict_mode", "prefer_nhwc", "use_ep_level_unified_stream", "use_tf32",
}  # fmt: skip
"""Those that the provider knows, by its source (``cuda_execution_provider_info.cc``); it refuses any other."""

RealSession = ort.InferenceSession
Images = NDArray[np.float32]


class Library:
    """What the sessions of a test were asked for, and what they refuse.

    Attributes:
        opened: Options of the provider, by session.
        runs: The number of each call's graph.
        released: Numbers of graphs that were given back.
        bound: Device, its number and the address of every binding.
        refuses_graphs: ``opening`` or ``a call``.
        refuses_calls: Every call is refused.
        providers: What sessions say that they run on.
    """

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.opened: list[dict[str, str]] = []
        self.runs: list[int] = []
        self.released: list[int] = []
        self.bound: list[tuple[str, str, int, int]] = []
        self.refuses_graphs = ""
        self.refuses_calls = False
        self.providers = [CUDA, CPU]

    def session(
        self,
        model: Path,
        settings: ort.SessionOptions,
        providers: Sequence[tuple[str, Mapping[str, str]]],
        enable_fallback: int,
    ) -> "FakeSession":
        inspect.signature(RealSession).bind(model, settings, providers=providers, enable_fallback=enable_fallback)
        ((name, options),) = providers
        assert name == CUDA
        assert options.keys() <= OPTIONS
        assert all(isinstance(value, str) for value in options.values())
        self.opened.append(dict(options))
        if self.refuses_graphs == "opening" and options["enable_cuda_graph"] == "1":
            raise ort_errors.Fail("This session cannot use the graph capture feature\nas requested (invented)")
        assert settings.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
        real = RealSession(model, settings, providers=[CPU], enable_fallback=enable_fallback)
        return FakeSession(self, real, captures=options["enable_cuda_graph"] == "1")


class FakeBinding:
    def __init__(self, library: Library, real: ort.IOBinding) -> None:
        self.library, self.real = library, real

    def bind_input(self, name: str, device: str, number: int, kind: type, shape: Any, address: int) -> None:
        self.library.bound.append((name, device, number, address))
        self.real.bind_input(name, "cpu", number, kind, shape, address)

    def bind_output(self, name: str, device: str, number: int, kind: type, shape: Any, address: int) -> None:
        self.library.bound.append((name, device, number, address))
        self.real.bind_output(name, "cpu", number, kind, shape, address)


class FakeSession:
    """A graph that was captured keeps the addresses of its first call, whatever is bound later."""

    def __init__(self, library: Library, real: ort.InferenceSession, *, captures: bool) -> None:
        self.library, self.real, self.captures = library, real, captures
        self.graphs: dict[int, FakeBinding] = {}
        self.get_inputs, self.get_outputs = real.get_inputs, real.get_outputs

    def get_providers(self) -> list[str]:
        return self.library.providers

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self.library, self.real.io_binding())

    def run_with_iobinding(self, binding: FakeBinding, options: ort.RunOptions) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        graph = int(options.get_run_config_entry("gpu_graph_id"))
        assert graph == NO_GRAPH if not self.captures else graph > 0
        self.library.runs.append(graph)
        if self.library.refuses_calls or (self.captures and self.library.refuses_graphs == "a call"):
            raise ort_errors.RuntimeException("CUDA failure 900: operation not permitted\nwhen stream is capturing")
        used = self.graphs.setdefault(graph, binding) if self.captures else binding
        self.library.device.record(lambda: self.real.run_with_iobinding(used.real))

    def release_captured_graph(self, graph: int) -> None:
        self.real.release_captured_graph(graph)
        del self.graphs[graph]
        self.library.released.append(graph)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    device = FakeDevice()
    made = Library(device)
    monkeypatch.setattr(ort, "InferenceSession", made.session)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    with device.current():
        yield made


def opened(library: Library, bundle: Bundle, variant: str = "w016", batch: int = BATCH) -> OnnxRuntimeCudaEngine:
    found = bundle.variants[variant]
    options = EngineOptions(device="cuda")
    return OnnxRuntimeCudaEngine(library.device, bundle.artefact(found), found, batch, options)


def inputs(bundle: Bundle, batch: int = BATCH, seed: int = 0) -> dict[str, Images]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((batch, *TINY.sample_shape), dtype=np.float32),
        "time_features": bundle.time_table(bundle.full)[rng.integers(0, 1000, batch)],
    }


def placed(library: Library, engine: OnnxRuntimeCudaEngine, given: Mapping[str, Images]) -> dict[str, int]:
    """New addresses, with these inputs in them."""
    device = library.device
    addresses = {name: device.allocate(array.nbytes) for name, array in given.items()}
    addresses["out_sample"] = device.allocate(given["sample"].nbytes)
    for name, array in given.items():
        device.upload(addresses[name], array)
    engine.place(addresses)
    return addresses


def written(library: Library, addresses: Mapping[str, int], batch: int = BATCH) -> Images:
    found: Images = library.device.view(addresses["out_sample"], (batch, *TINY.sample_shape)).copy()
    return found


def expected(bundle: Bundle, variant: str, given: Mapping[str, Images]) -> Images:
    """The reference: torch, from the weights."""
    out = np.full_like(given["sample"], np.nan)
    engine = open_engine("torch", bundle, bundle.variants[variant], len(out), EngineOptions(precision="fp32"))
    engine.bind(given, {"out_sample": out})
    engine.run()
    engine.close()
    return out


def relative_l2(found: Images, wanted: Images) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_the_reference(variant: str, batch: int, library: Library, bundle: Bundle) -> None:
    given = inputs(bundle, batch)
    engine = opened(library, bundle, variant, batch)
    staged, out = StagedEngine(library.device, engine), np.full_like(given["sample"], np.nan)
    staged.bind(given, {"out_sample": out})
    staged.run()
    staged.close()
    wanted = expected(bundle, variant, given)
    assert wanted.std() > 0.05, "outputs must be of order one for the comparison to mean anything"
    assert relative_l2(out, wanted) <= FORWARD["onnxruntime"]
    assert relative_l2(out, expected(bundle, VARIANTS[VARIANTS.index(variant) - 1], given)) > 1e-2


def test_a_session_is_opened_on_the_stream_exactly_and_with_graphs(library: Library, bundle: Bundle) -> None:
    engine = opened(library, bundle)
    (options,) = library.opened
    assert options["user_compute_stream"] == str(library.device.stream)
    assert options["device_id"] == "0"
    assert {options["enable_cuda_graph"], options["prefer_nhwc"]} == {"1"}
    assert options["use_tf32"] == "0"
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert not engine.is_capturable
    assert engine.precision == "fp32"


def test_no_size_is_left_open_so_that_nothing_runs_on_the_cpu(
    library: Library, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_to = tmp_path / "optimised.onnx"
    original = ort.SessionOptions

    def settings() -> ort.SessionOptions:
        made = original()
        made.optimized_model_filepath = str(written_to)
        return made

    monkeypatch.setattr(ort, "SessionOptions", settings)
    engine = opened(library, bundle, batch=5)
    assert [node.shape[0] for node in engine._session.get_inputs()] == [5, 5]
    onnx = pytest.importorskip("onnx")
    assert "Shape" not in {node.op_type for node in onnx.load(written_to).graph.node}


def test_addresses_are_bound_as_they_are(library: Library, bundle: Bundle) -> None:
    engine = opened(library, bundle)
    addresses = placed(library, engine, inputs(bundle))
    engine.enqueue()
    assert {name: address for name, _, _, address in library.bound} == addresses
    assert {(device, number) for _, device, number, _ in library.bound} == {("cuda", 0)}


def test_every_set_of_addresses_has_a_graph_of_its_own(library: Library, bundle: Bundle) -> None:
    engine, given = opened(library, bundle), [inputs(bundle, seed=seed) for seed in range(2)]
    first, second = (placed(library, engine, one) for one in given)
    for addresses in (first, second, first, first, second):
        engine.place(addresses)
        engine.enqueue()
    assert library.runs == [1, 2, 1, 1, 2]
    assert len(library.bound) == 2 * len(first)
    for addresses, one in zip((first, second), given, strict=True):
        assert relative_l2(written(library, addresses), expected(bundle, "w016", one)) <= FORWARD["onnxruntime"]


def test_the_oldest_graph_is_given_back_and_its_number_never_used_again(library: Library, bundle: Bundle) -> None:
    engine, given = opened(library, bundle), inputs(bundle)
    places = []
    for _ in range(MOST_GRAPHS + 1):
        places.append(placed(library, engine, given))
        engine.enqueue()
    assert library.released == [1]
    engine.place(places[0])
    engine.enqueue()
    assert library.runs[-1] == MOST_GRAPHS + 2
    assert library.released == [1, 2]
    assert relative_l2(written(library, places[0]), expected(bundle, "w016", given)) <= FORWARD["onnxruntime"]


def test_other_names_than_those_of_the_network_are_refused(library: Library, bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=r"expected addresses of \['out_sample', 'sample', 'time_features'\]"):
        opened(library, bundle).place({"sample": 256})


# --- graphs that cannot be captured -----------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["opening", "a call"])
def test_without_a_graph_it_runs_on_and_says_so_once(
    moment: str, library: Library, bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    library.refuses_graphs = moment
    given = inputs(bundle)
    with caplog.at_level(logging.WARNING):
        engine = opened(library, bundle)
        first = placed(library, engine, given)
        engine.enqueue()
        second = placed(library, engine, given)
        engine.enqueue()
        for _ in range(MOST_GRAPHS):
            placed(library, engine, given)
            engine.enqueue()
    assert [one["enable_cuda_graph"] for one in library.opened] == ["1", "0"]
    (said,) = caplog.records
    assert said.getMessage().startswith("ONNX Runtime captures no graph of w016 and runs slower: ")
    assert "\n" not in said.getMessage()
    assert set(library.runs[moment == "a call" :]) == {NO_GRAPH}
    assert library.released == []
    for addresses in (first, second):
        assert relative_l2(written(library, addresses), expected(bundle, "w016", given)) <= FORWARD["onnxruntime"]


def test_a_call_that_fails_without_a_graph_too_is_one_line(library: Library, bundle: Bundle) -> None:
    engine = opened(library, bundle)
    placed(library, engine, inputs(bundle))
    library.refuses_calls = True
    with pytest.raises(BackendError, match=r"ONNX Runtime failed in a call: .*CUDA failure 900") as caught:
        engine.enqueue()
    assert "\n" not in str(caught.value)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_session_that_fell_back_is_refused(library: Library, bundle: Bundle) -> None:
    library.providers = [CPU]
    with pytest.raises(BackendError, match=f"fell back from {CUDA} to ..{CPU}"):
        opened(library, bundle)


def test_what_pip_installed_is_loaded_first_and_what_that_prints_is_not_shown(
    library: Library, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sessions: list[int] = []

    def preload() -> None:
        sessions.append(len(library.opened))
        monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
        print("Failed to load libcublasLt.so.13")  # noqa: T201 - as the library does

    inspect.signature(ort.preload_dlls).bind()
    monkeypatch.setattr(ort, "preload_dlls", preload)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])  # a build whose CUDA is a plug-in of its own
    opened(library, bundle)
    assert sessions == [0]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("works", [True, False])
def test_the_doctor_tries_the_session_that_a_run_opens(
    library: Library, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    library.refuses_calls = not works
    monkeypatch.setattr(probe, "open_device", lambda name: library.device)

    def session(model: Path, settings: ort.SessionOptions, providers: Any, enable_fallback: int) -> Any:
        made = RealSession if providers == [CPU] else library.session
        return made(model, settings, providers=providers, enable_fallback=enable_fallback)

    monkeypatch.setattr(ort, "InferenceSession", session)
    found = probe.onnxruntime()
    assert found["offers"] == [CUDA, CPU]
    assert {options["user_compute_stream"] for options in library.opened} == {str(library.device.stream)}
    assert found.get("cuda", False) is works
    assert works or "CUDA failure 900" in found["cuda_error"]


def test_a_library_without_cuda_is_refused(bundle: Bundle) -> None:
    if CUDA in ort.get_available_providers():
        pytest.skip("needs the build for a CPU")
    with pytest.raises(BackendError, match=r"offers no device 'cuda' here .*pip install 'ddsm-engine"):
        opened(Library(FakeDevice()), bundle)


def test_a_file_that_is_no_network_is_refused(library: Library, bundle: Bundle, tmp_path: Path) -> None:
    file, variant = tmp_path / "model.onnx", bundle.variants["w016"]
    file.write_bytes(b"not a network")
    with pytest.raises(BackendError, match="ONNX Runtime cannot open"):
        OnnxRuntimeCudaEngine(library.device, file, variant, BATCH, EngineOptions(device="cuda"))


def test_another_network_than_the_variant_s_is_refused(library: Library, bundle: Bundle) -> None:
    variant = bundle.variants["w016"]
    (sample, features) = variant.inputs
    other = replace(variant, inputs=(replace(sample, shape=(*sample.shape[:-1], 4)), features))
    with pytest.raises(BackendError, match=r"expected the input 'sample' of the network .*\[2, 3, 8, 4\], found"):
        OnnxRuntimeCudaEngine(library.device, bundle.artefact(variant), other, BATCH, EngineOptions(device="cuda"))


@pytest.mark.parametrize("asked", ["bf16", "fp16"])
def test_another_precision_than_the_artefact_s_is_refused(asked: Any, bundle: Bundle) -> None:
    options = EngineOptions(device="cuda", precision=asked)
    with pytest.raises(BackendError, match=f"fp32 for w016, found --precision {asked}; export the bundle with"):
        artefact_precision(options, bundle.variants["w016"])


def test_a_target_tells_apart_all_that_the_time_depends_on() -> None:
    options = EngineOptions(device="cuda")
    made = [target(options, 1, H100), target(options, 2, H100), target(options, 1, A100)]
    assert len({tuple(sorted(one.items())) for one in made}) == len(made)
    assert made[0]["version"] == ort.__version__
