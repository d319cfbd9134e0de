"""Engines built ahead: sealed, tried where there is a GPU, logged; and really built by TensorRT-RTX, without one."""

import io
import json
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import torch

import ddsm_engine.backends
import ddsm_engine.pipeline
from ddsm_engine import build, parity, run, verify
from ddsm_engine.backends import open_engine
from ddsm_engine.backends.device import no_gpu
from ddsm_engine.backends.engine import Engine, EngineOptions
from ddsm_engine.backends.tensorrt import LIBRARIES, built_target, import_tensorrt, open_tensorrt
from ddsm_engine.backends.tensorrt_build import build_engine
from ddsm_engine.bundle import MANIFEST, Bundle
from ddsm_engine.engine_cache import SEAL_LENGTH, TIMINGS, EngineCache, engines_of, read_sealed
from ddsm_engine.errors import BackendError, OutputError
from ddsm_engine.files import sha256_of
from ddsm_engine.networks.inference_form import DTYPES, InferenceForm
from ddsm_engine.networks.slicing import subnetwork
from ddsm_export.onnx import DEFAULT_OPSET, choose_opset, onnx_from_subnetwork
from ddsm_export.supernet import Supernet, load_supernet
from tests.conftest import Refusal
from tests.gpu import fake_tensorrt
from tests.gpu.fake import A100, H100, FakeDevice

SHIPPED = Path(__file__).parents[2] / "export/ddsm_export/data/fashion_mnist.safetensors"
BATCH = 2
INPUTS = {"sample": (BATCH, 3, 8, 8), "time_features": (BATCH, 32)}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """A GPU with the library on it; `ddsm build` finds both, and opens a stream of its own."""
    device = FakeDevice()
    monkeypatch.setattr(fake_tensorrt, "state", fake_tensorrt.State(device, inputs=INPUTS))
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)

    def open_gpu(name: str) -> FakeDevice:
        fake_tensorrt.state.device = FakeDevice(device.properties)
        return fake_tensorrt.state.device

    monkeypatch.setattr(build, "open_gpu", open_gpu)
    return device


@pytest.fixture
def own(bundle_path: Path, tmp_path: Path) -> Path:
    """A bundle of the test's own, with two of its variants: it takes a while to build one."""
    path = Path(shutil.copytree(bundle_path, tmp_path / "own.bundle"))
    manifest = Bundle.open(path).manifest
    narrowed = replace(manifest, variants=(manifest.variants[0], manifest.variants[-1]))
    (path / MANIFEST).write_text(json.dumps(narrowed.to_json()))
    return path


def command(path: Path, *more: str, batch: str = str(BATCH), backend: str = "tensorrt") -> int:
    return build.main([str(path), "--backend", backend, "--batch-size", batch, *more])


def cache_of(path: Path, batch: int = BATCH) -> EngineCache:
    return EngineCache(Bundle.open(path), built_target("tensorrt", "fp32", batch, H100))


# --- what is built can be verified and run ----------------------------------------------------------------------------


@pytest.fixture
def on_gpu(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of the same GPU for whoever opens an engine."""
    for module in (ddsm_engine.backends, ddsm_engine.pipeline):
        monkeypatch.setattr(module, "open_device", build.open_gpu)


@pytest.mark.usefixtures("on_gpu")
def test_engines_as_the_documentation_has_them_built_are_what_a_verification_opens(
    bundle_path: Path, tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(bundle_path, tmp_path / "whole.bundle"))
    assert command(path, batch="1,16") == 0
    opened = []

    def spy(name: str, *arguments: Any, **options: Any) -> Engine:
        opened.append((name, arguments[2]))
        return open_engine(name, *arguments, **options)

    monkeypatch.setattr(parity, "open_engine", spy)
    # The invented library computes something of its own, which is found only when every engine has answered.
    assert "on tensorrt differs from torch fp32" in refusal(verify.main, path, "--backend", "tensorrt", "--threads", 1)
    assert opened == [(name, batch) for _ in range(7) for name in ("torch", "tensorrt") for batch in (1, 16)]
    arguments = verify.parser().parse_args([str(path), "--backend", "tensorrt", "--trajectory", "--num-images", "4"])
    bundle = Bundle.open(path)
    batches = verify.choose_batches(arguments, verify.check_engines(bundle)[0])
    assert verify.plan_trajectory(bundle, arguments, batches).batch_size == 16
    assert verify.choose_batches(verify.parser().parse_args([str(path)]), verify.check_engines(bundle)[0]) == ()


@pytest.mark.usefixtures("on_gpu")
def test_a_run_of_another_batch_size_is_told_which_it_can_take(own: Path, refusal: Refusal, tmp_path: Path) -> None:
    assert command(own, batch="1,16") == 0
    asked = ["--bundle", own, "--backend", "tensorrt", "--strategy", "uniform:8/8", "--sampler", "ddim", "--steps", "2"]
    asked += ["--num-images", "4", "-o", tmp_path / "x.npz"]
    assert refusal(run.main, *asked).endswith(", or run with --batch-size 16")
    assert run.main([*map(str, asked), "--batch-size", "16"]) == 0


# --- a build, by the fake library -------------------------------------------------------------------------------------


def test_what_was_built_is_sealed_tried_and_opened(
    own: Path, device: FakeDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(own, batch="2,1,2") == 0
    said = capsys.readouterr()
    bundle = Bundle.open(own)
    assert len(list(engines_of(bundle))) == 4, "two variants for two batch sizes"
    assert [line.split()[0] for line in said.err.splitlines()] == ["w008", "w032"] * 2
    assert "loads in" in said.err
    assert "2 engines for batch 1, build.log beside them; `ddsm run --backend tensorrt --batch-size 1`" in said.out
    opened = FakeDevice()
    fake_tensorrt.state.device = opened
    with opened.current():
        for batch in (1, 2):
            open_tensorrt("tensorrt", bundle, bundle.full, batch, EngineOptions(device="cuda"), opened)


def test_a_second_build_replaces_the_first(own: Path, device: FakeDevice) -> None:
    assert command(own) == 0
    before = read_sealed(cache_of(own).kept_in / "w032")
    fake_tensorrt.state.bias = 0.5
    assert command(own) == 0
    after = read_sealed(cache_of(own).kept_in / "w032")
    assert before.replace(b"0.25", b"0.5") == after
    assert len(list(engines_of(Bundle.open(own)))) == 2


def test_engines_of_different_gpus_lie_beside_each_other(own: Path, device: FakeDevice) -> None:
    assert command(own) == 0
    device.properties = A100
    assert command(own) == 0
    assert len(list(engines_of(Bundle.open(own)))) == 4


def test_verify_passes_over_the_log_and_the_timings(bundle_path: Path, device: FakeDevice, tmp_path: Path) -> None:
    path = Path(shutil.copytree(bundle_path, tmp_path / "whole.bundle"))
    assert command(path) == 0
    assert len(verify.check_engines(Bundle.open(path))[0]) == 7
    assert verify.check_files(Bundle.open(path)) == []


def timings_given() -> list[bytes]:
    return [call[1] for call in fake_tensorrt.state.calls if call[0] == "timings"]


def test_timings_are_handed_on_and_kept_for_the_next_build(own: Path, device: FakeDevice) -> None:
    assert command(own) == 0
    assert timings_given() == [b"", b"+measured"], "those of one variant serve the next"
    fake_tensorrt.state.calls.clear()
    assert command(own) == 0
    assert timings_given()[0] == b"+measured" * 2


@pytest.mark.parametrize("damage", ["flipped", "short", "a link to nothing"])
def test_timings_that_are_not_ours_are_not_handed_to_the_library(own: Path, device: FakeDevice, damage: str) -> None:
    cache = cache_of(own)
    cache.store_timings(b"compiled kernels")
    assert cache.load_timings() == b"compiled kernels"
    file = cache.kept_in / TIMINGS
    content = file.read_bytes()
    file.unlink()
    if damage == "flipped":
        file.write_bytes(content[:-1] + b"S")
    elif damage == "short":
        file.write_bytes(content[: SEAL_LENGTH - 1])
    else:
        file.symlink_to(own / "nothing")
    assert cache.load_timings() == b""
    assert command(own) == 0
    assert timings_given()[0] == b""
    assert cache.load_timings() == b"+measured" * 2


@pytest.mark.parametrize("timings", [b"of another GPU", b"no timings"])
def test_timings_that_the_library_does_not_take_are_left(own: Path, device: FakeDevice, timings: bytes) -> None:
    cache_of(own).store_timings(timings)
    assert command(own) == 0
    assert cache_of(own).load_timings() == b"+measured" * 2


def test_the_log_holds_what_the_library_said_but_its_chatter(own: Path, device: FakeDevice) -> None:
    assert command(own) == 0
    assert (cache_of(own).kept_in / build.LOG).read_text().splitlines() == [
        "--- w008, batch 2",
        "info: Detected 2 inputs and 1 output network tensors.",
        "--- w032, batch 2",
        "info: Detected 2 inputs and 1 output network tensors.",
    ]


def test_the_log_is_not_written_through_a_link_that_came_with_the_bundle(
    own: Path, device: FakeDevice, tmp_path: Path
) -> None:
    (victim := tmp_path / "victim").write_text("kept")
    cache_of(own).kept_in.mkdir(parents=True)
    (cache_of(own).kept_in / build.LOG).symlink_to(victim)
    assert command(own) == 0
    assert victim.read_text() == "kept"


FAULTS = {
    "parse": ("No importer", ("cannot read the network: node conv_1 (Conv): No importer; see ", build.LOG)),
    "build_serialized_network": (
        "no implementation for node",
        ("builds no engine", "says: no implementation", build.LOG),
    ),
    "deserialize_cuda_engine": ("Cuda Runtime (out of memory)", ("could not load it: the GPU's memory is full",)),
}


@pytest.mark.parametrize("call", FAULTS)
def test_a_build_that_fails_is_one_line_and_keeps_nothing(
    own: Path, device: FakeDevice, call: str, refusal: Refusal
) -> None:
    words, said = FAULTS[call]
    fake_tensorrt.state.faults = {call: words}
    line = refusal(build.main, own, "--backend", "tensorrt", "--batch-size", "2")
    assert line.startswith("error: w008: TensorRT ")
    assert all(part in line for part in said), line
    assert not list(engines_of(Bundle.open(own)))


def test_an_engine_that_answers_with_nan_is_not_kept(own: Path, device: FakeDevice, refusal: Refusal) -> None:
    fake_tensorrt.state.bias = float("nan")
    line = refusal(build.main, own, "--backend", "tensorrt", "--batch-size", "2")
    assert "w008: its engine answers noise with numbers that are not finite; it was not kept" in line
    assert not list(engines_of(Bundle.open(own)))


def test_a_builder_that_does_not_start_is_one_line(
    own: Path, device: FakeDevice, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "open_gpu", lambda name: device)
    fake_tensorrt.state.device = None
    line = refusal(build.main, own, "--backend", "tensorrt", "--batch-size", "2")
    assert "w008: TensorRT's builder does not start here: it says: createInferBuilder: Error Code 6" in line


def test_a_log_that_cannot_be_written_is_one_line(own: Path, device: FakeDevice, refusal: Refusal) -> None:
    (cache_of(own).kept_in / build.LOG).mkdir(parents=True)
    assert "the builder's log cannot be written" in refusal(
        build.main, own, "--backend", "tensorrt", "--batch-size", "2"
    )


class FullDisk(io.StringIO):
    name = "build.log"

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_log_that_fills_the_disk_fails_the_build(device: FakeDevice) -> None:
    with pytest.raises(OutputError, match=r"build.log cannot be written: .*No space left"):
        build_engine(fake_tensorrt, b"", INPUTS, log=FullDisk())


def test_other_inputs_than_the_manifest_s_are_refused(device: FakeDevice, tmp_path: Path) -> None:
    for inputs in (
        {"sample": (2, 3, 8, 8)},
        INPUTS | {"sample": (2, 3, 16, 16)},
        INPUTS | {"time_features": (2, 32, 1)},
    ):
        fake_tensorrt.state.inputs = inputs
        with (tmp_path / "log").open("w") as log, pytest.raises(BackendError, match="expected the float32 inputs"):
            build_engine(fake_tensorrt, b"", INPUTS, log=log)


def test_progress_is_told_phase_by_phase(device: FakeDevice, tmp_path: Path) -> None:
    phases: list[str] = []
    with (tmp_path / "log").open("w") as log:
        built = build_engine(fake_tensorrt, b"", INPUTS, log=log, progress=phases.append)
    assert phases == ["Timing tactics"]
    assert built.timings is None


def test_an_interrupt_ends_a_build(device: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = threading.Event()

    def long_build(self: object, network: object, config: fake_tensorrt.IBuilderConfig) -> None:
        time.sleep(0.2)  # until the main thread waits
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            if not config.progress_monitor.step_complete("Timing tactics", 0):
                cancelled.set()
                return
            time.sleep(0.01)

    monkeypatch.setattr(fake_tensorrt.Builder, "build_serialized_network", long_build)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores interrupts
    try:
        with (tmp_path / "log").open("w") as log, pytest.raises(KeyboardInterrupt):
            build_engine(fake_tensorrt, b"", INPUTS, log=log)
    finally:
        signal.signal(signal.SIGINT, before)
    assert cancelled.is_set()


@pytest.mark.parametrize("name", LIBRARIES)
def test_only_tensorrt_rtx_builds_where_there_is_no_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(backend: str) -> None:
        raise no_gpu(backend, "none")

    monkeypatch.setattr(build, "open_device", refuse)
    if name == "tensorrt-rtx":
        assert build.open_gpu(name) is None
    else:
        with pytest.raises(BackendError, match="the tensorrt backend needs an NVIDIA GPU, found none"):
            build.open_gpu(name)


# --- a build, by TensorRT-RTX -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def rtx() -> ModuleType:
    pytest.importorskip("tensorrt_rtx")
    library: ModuleType = import_tensorrt("tensorrt-rtx")
    return library


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is one: what is tested is the build."""
    monkeypatch.setattr(build, "open_gpu", lambda name: None)


@pytest.mark.usefixtures("without_gpu")
def test_a_bundle_is_built_without_a_gpu(own: Path, rtx: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(own, backend="tensorrt-rtx") == 0
    said = capfd.readouterr()
    assert len(said.err.splitlines()) == 2, "none of the library's own lines"
    assert all("not loaded" in line for line in said.err.splitlines())
    assert said.out.endswith("2 engines for batch 2, build.log beside them; no GPU here: not loaded\n")
    cache = EngineCache(Bundle.open(own), built_target("tensorrt-rtx", "fp32", BATCH, None))
    assert cache.target["compute_capability"] == "any"
    for variant in cache.bundle.variants.values():
        engine = cache.find(variant)
        assert engine is not None
        assert len(engine) > 100_000
    log = (cache.kept_in / build.LOG).read_text()
    assert log.count("Engine generation completed") == 2
    assert "error" not in log
    assert not (cache.kept_in / TIMINGS).exists(), "it measures nothing"
    assert verify.check_engines(cache.bundle) == ([cache.target] * 2, 0)


@pytest.mark.usefixtures("without_gpu")
def test_a_network_that_the_parser_does_not_know_is_one_line(own: Path, rtx: ModuleType, refusal: Refusal) -> None:
    bundle = Bundle.open(own)
    narrow = bundle.manifest.variants[0]
    file = own / narrow.file
    file.write_bytes(file.read_bytes().replace(b"InstanceNormalization", b"InventedNormalization"))
    vouched = replace(narrow, sha256=sha256_of(file), size_bytes=file.stat().st_size)
    manifest = replace(bundle.manifest, variants=(vouched, *bundle.manifest.variants[1:]))
    (own / MANIFEST).write_text(json.dumps(manifest.to_json()))
    line = refusal(build.main, own, "--backend", "tensorrt-rtx", "--batch-size", "2")
    assert "w008: TensorRT cannot read the network: node " in line
    assert "InventedNormalization" in line


@pytest.mark.parametrize("content", [b"", b"junk" * 100, "half"])
def test_what_is_no_onnx_file_is_refused(bundle: Bundle, rtx: ModuleType, tmp_path: Path, content: bytes | str) -> None:
    onnx = content if isinstance(content, bytes) else bundle.artefact(bundle.full).read_bytes()[:50_000]
    with (
        (tmp_path / "log").open("w") as log,
        pytest.raises(BackendError, match=r"cannot read the network|the float32 inputs"),
    ):
        build_engine(rtx, onnx, INPUTS, log=log)


def export(supernet: Supernet, width: int, precision: Literal["fp32", "fp16"], path: Path) -> None:
    """The form that is exported, by torch's older exporter: the newer one takes ten times as long."""
    spec = supernet.spec
    form = InferenceForm(subnetwork(spec, supernet.weights, width), DTYPES[precision]).eval()
    names = ["sample", "time_features", "out_sample"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            form,
            (torch.zeros(2, *spec.sample_shape), torch.zeros(2, spec.time_features)),
            path,
            dynamo=False,
            opset_version=DEFAULT_OPSET,
            input_names=names[:2],
            output_names=names[2:],
            dynamic_axes={name: {0: "batch"} for name in names},
        )


def test_a_file_in_bf16_is_built(supernet: Supernet, rtx: ModuleType, tmp_path: Path) -> None:
    network = subnetwork(supernet.spec, supernet.weights, 8)
    onnx_from_subnetwork(network, tmp_path / "x.onnx", precision="bf16", opset=choose_opset("bf16", None))
    with (tmp_path / "log").open("w") as log:
        built = build_engine(rtx, (tmp_path / "x.onnx").read_bytes(), INPUTS, log=log)
    assert len(built.engine) > 100_000


@pytest.fixture(scope="module")
def shipped() -> Supernet:
    return load_supernet(SHIPPED)


WIDTHS = (16, 24, 32, 40, 48, 56, 64)


@pytest.mark.parametrize(("width", "precision"), [*((width, "fp32") for width in WIDTHS), (16, "fp16")])
def test_every_variant_of_the_shipped_supernet_is_built(
    shipped: Supernet, rtx: ModuleType, tmp_path: Path, width: int, precision: Literal["fp32", "fp16"]
) -> None:
    spec = shipped.spec
    assert spec.widths() == WIDTHS
    shapes = {"sample": (16, *spec.sample_shape), "time_features": (16, spec.time_features)}
    export(shipped, width, precision, tmp_path / "x.onnx")
    with (tmp_path / "log").open("w") as log:
        built = build_engine(rtx, (tmp_path / "x.onnx").read_bytes(), shapes, log=log)
    assert len(built.engine) > 1_000_000
    assert "error" not in (tmp_path / "log").read_text()
