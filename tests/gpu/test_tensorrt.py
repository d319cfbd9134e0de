"""TensorRT's engines: found by what they were built for, opened, placed, enqueued; and every way in which one refuses.

The library behind them is ``fake_tensorrt``. That it has no name that TensorRT lacks, and the backend uses none, is
held against the names in ``tests/data/tensorrt_names.json``.
"""

import ast
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ddsm_engine import engine_cache
from ddsm_engine.backends import tensorrt as backend
from ddsm_engine.backends import tensorrt_build
from ddsm_engine.backends.device import DeviceProperties, StagedEngine
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.backends.tensorrt import TensorRTEngine, built_target, import_tensorrt, open_tensorrt, shapes_at
from ddsm_engine.bundle import Bundle
from ddsm_engine.engine_cache import ENGINE, SEAL, EngineCache, user_cache_folder
from ddsm_engine.errors import BackendError
from tests.gpu import fake_tensorrt
from tests.gpu.fake import A100, H100, FakeDevice

BATCH = 2
SHAPES = {"sample": (BATCH, 3, 4, 4), "time_features": (BATCH, 6), "out_sample": (BATCH, 3, 4, 4)}
NAMES = json.loads((Path(__file__).parents[1] / "data/tensorrt_names.json").read_text())


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    """A GPU, current, and the library on it."""
    device = FakeDevice()
    monkeypatch.setattr(fake_tensorrt, "state", fake_tensorrt.State(device))
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    with device.current():
        yield device


def opened(device: FakeDevice, engine: bytes | None = None) -> TensorRTEngine:
    return TensorRTEngine(device, fake_tensorrt, engine or fake_tensorrt.engine_bytes(SHAPES), SHAPES, "fp32")


def placed(device: FakeDevice, engine: TensorRTEngine) -> dict[str, int]:
    addresses = {name: device.allocate(4 * int(np.prod(shape))) for name, shape in SHAPES.items()}
    engine.place(addresses)
    device.view(addresses["sample"], SHAPES["sample"])[:] = np.arange(96).reshape(SHAPES["sample"])
    device.view(addresses["time_features"], SHAPES["time_features"])[:] = 2
    return addresses


# --- running ----------------------------------------------------------------------------------------------------------


def test_an_engine_reads_and_writes_where_it_was_told(device: FakeDevice) -> None:
    engine = opened(device)
    for _ in range(2):  # and it can be told anew
        addresses = placed(device, engine)
        engine.enqueue()
        expected = 2 * np.arange(96).reshape(SHAPES["sample"]) + 0.25
        assert np.array_equal(device.view(addresses["out_sample"], SHAPES["out_sample"]), expected)
    assert engine.precision == "fp32"
    assert engine.is_capturable
    engine.close()


def test_a_captured_call_replays_the_same_bits(device: FakeDevice) -> None:
    engine = opened(device)
    addresses = placed(device, engine)
    engine.enqueue()
    output = device.view(addresses["out_sample"], SHAPES["out_sample"])
    expected = output.copy()
    graph = device.instantiate(device.capture(engine.enqueue))
    output[:] = np.nan
    graph.launch()
    assert np.array_equal(output, expected)


def test_it_serves_arrays_in_host_memory_as_every_engine_does(device: FakeDevice) -> None:
    staged = StagedEngine(device, opened(device))
    sample, features = np.ones(SHAPES["sample"], np.float32), np.full(SHAPES["time_features"], 3, np.float32)
    output = np.zeros_like(sample)
    staged.bind({"sample": sample, "time_features": features}, {"out_sample": output})
    staged.run()
    assert np.array_equal(output, np.full_like(sample, 3.25))
    staged.close()


def test_engines_share_one_block_as_large_as_the_largest_needs(device: FakeDevice) -> None:
    small, large = (opened(device, fake_tensorrt.engine_bytes(SHAPES, scratch=size)) for size in (512, 8192))
    for engine in (small, large, small):
        placed(device, engine)
        engine.enqueue()
    assert device.scratch.size_bytes == 8192
    given = [address for call, address in fake_tensorrt.state.calls if call == "set_device_memory"]
    assert given == [device.scratch.address] * 2, "once each: it did not move"


def test_an_engine_follows_the_block_when_it_has_moved(device: FakeDevice) -> None:
    first = opened(device, fake_tensorrt.engine_bytes(SHAPES, scratch=512))
    placed(device, first)
    first.enqueue()
    before = device.scratch.address
    opened(device, fake_tensorrt.engine_bytes(SHAPES, scratch=8192))
    first.enqueue()  # its call writes to all of the block that it was given
    given = [address for call, address in fake_tensorrt.state.calls if call == "set_device_memory"]
    assert given == [before, device.scratch.address]


@pytest.mark.parametrize("answer", [True, False])
def test_a_library_that_can_say_whether_an_engine_is_capturable_is_asked(device: FakeDevice, answer: bool) -> None:
    engine = opened(device)
    engine._context.is_stream_capturable = lambda stream: answer and stream == device.stream
    assert engine.is_capturable is answer


# --- refusing ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "Runtime": "start its runtime",
    "deserialize_cuda_engine": "load it",
    "create_execution_context": "make room for it",
    "set_tensor_address": "use 0x[0-9a-f]+ as sample",
    "set_device_memory": "use the block of memory",
    "execute_async_v3": "enqueue a call",
}


@pytest.mark.parametrize("call", REFUSED)
def test_every_call_that_the_library_refuses_is_an_error_with_its_words(device: FakeDevice, call: str) -> None:
    fake_tensorrt.state.faults = {call: "Invented Error Code 7"}
    with pytest.raises(BackendError, match=f"TensorRT could not {REFUSED[call]}.*: it says: Invented Error Code 7$"):
        engine = opened(device)
        placed(device, engine)
        engine.enqueue()


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        (
            "The engine plan file is generated on an incompatible device, expecting compute 8.6 got compute 7.5, "
            "please rebuild.",
            "built on another kind of GPU",
        ),
        ("expecting library version 10.9.0.34 got 10.13.0.35, please rebuild.", "built by another version"),
        ("Version tag does not match. Current Version: 228, Serialized Engine Version: 237", "by another version"),
        ("Size specified in header does not match archive size", "it is cut short"),
        ("Magic tag does not match", "it is no engine"),
        ("Requested amount of GPU memory (17179869184 bytes) could not be allocated: OutOfMemory", "memory is full"),
        ("Error Code 1: Cuda Runtime (out of memory)", "memory is full: .* smaller --batch-size"),
        ("CUDA driver version is insufficient driver for CUDA runtime version", "driver is older"),
    ],
)
def test_what_the_library_says_of_an_engine_is_put_plainly(device: FakeDevice, words: str, meaning: str) -> None:
    fake_tensorrt.state.faults = {"deserialize_cuda_engine": words}
    with pytest.raises(BackendError, match=rf"could not load it: .*{meaning}.*; it says: {re.escape(words[:40])}"):
        opened(device)


def test_a_library_that_gives_no_reason_is_quoted_as_that(device: FakeDevice) -> None:
    fake_tensorrt.state.faults = {"deserialize_cuda_engine": ""}
    with pytest.raises(BackendError, match=r"could not load it: it gave no reason$"):
        opened(device)


def test_an_engine_that_is_cut_short_is_named_as_that(device: FakeDevice) -> None:
    with pytest.raises(BackendError, match="could not load it: it is cut short; it says: IRuntime"):
        opened(device, fake_tensorrt.engine_bytes(SHAPES)[:-5])


def test_long_words_with_control_characters_stay_one_printable_line() -> None:
    log = backend.Log(fake_tensorrt)
    for number in range(20):
        log.listener.log(fake_tensorrt.ILogger.ERROR, f"\x1b[2Jline {number}\nand more " * 500)
    log.listener.log(fake_tensorrt.ILogger.WARNING, "not this")
    assert len(log.errors) == backend.MOST_ERRORS
    assert log.reason().isprintable()
    assert log.reason().startswith("it says: ?[2Jline 19 and more")
    assert len(log.reason()) < 320


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (fake_tensorrt.engine_bytes(SHAPES | {"sample": (1, 3, 4, 4)}), r"found .*'sample': \(1, 3, 4, 4\)"),
        (fake_tensorrt.engine_bytes({"sample": (BATCH, 3, 4, 4)}), "expected inputs and outputs .*'time_features'"),
        (fake_tensorrt.engine_bytes(SHAPES | {"more": (1,)}), "found .*'more'"),
        (fake_tensorrt.engine_bytes(SHAPES, dtype="HALF"), "expected float32 .* found another type for sample"),
    ],
    ids=["another batch", "an input less", "an input more", "half"],
)
def test_an_engine_with_other_inputs_or_outputs_is_refused(device: FakeDevice, engine: bytes, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        opened(device, engine)


def test_addresses_of_other_names_are_refused(device: FakeDevice) -> None:
    engine = opened(device)
    with pytest.raises(BackendError, match=r"expected addresses of .*'time_features'\], found those of \['sample'\]"):
        engine.place({"sample": 0})


def test_a_block_that_does_not_fit_is_out_of_memory(device: FakeDevice) -> None:
    device.properties = replace(H100, memory_bytes=1 << 20)
    engine = opened(device, fake_tensorrt.engine_bytes(SHAPES, scratch=1 << 20))
    placed(device, engine)
    with pytest.raises(BackendError, match="out of GPU memory"):
        engine.enqueue()


# --- which engine is opened -------------------------------------------------------------------------------------------


@pytest.fixture
def own(bundle_path: Path, tmp_path: Path, device: FakeDevice) -> Bundle:
    """A bundle of the test's own."""
    return Bundle.open(shutil.copytree(bundle_path, tmp_path / "own.bundle"))


def keep(bundle: Bundle, gpu: DeviceProperties = H100, batch: int = BATCH, precision: str = "fp32") -> Path:
    """Keep an engine of the full width that was built on a GPU; returns its folder."""
    cache = EngineCache(bundle, built_target("tensorrt", precision, batch, gpu))
    cache.store(bundle.full, fake_tensorrt.engine_bytes(shapes_at(bundle.full, batch)))
    return cache.kept_in / bundle.full.id


def open_full(bundle: Bundle, device: FakeDevice, options: EngineOptions | None = None) -> TensorRTEngine:
    return open_tensorrt("tensorrt", bundle, bundle.full, BATCH, options or EngineOptions(device="cuda"), device)


def test_the_engine_that_was_built_for_this_machine_is_opened(own: Bundle, device: FakeDevice) -> None:
    keep(own)
    keep(own, A100)
    keep(own, batch=1)
    assert open_full(own, device).precision == "fp32"


@pytest.fixture
def nothing_is_deserialised(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("an engine that is not ours was handed to the library")

    monkeypatch.setattr(fake_tensorrt.Runtime, "deserialize_cuda_engine", loaded)


OTHERS: Mapping[str, tuple[dict[str, Any], str]] = {
    "compute capability": ({"gpu": A100}, "GPU Invented A100, compute capability 8.0, driver 550.54.15"),
    "driver": ({"gpu": replace(H100, driver="570.1")}, "driver 570.1"),
    "batch": ({"batch": 16}, "batch 16"),
    "precision": ({"precision": "fp16"}, "precision fp16"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.usefixtures("nothing_is_deserialised")
def test_an_engine_for_something_else_is_named_and_not_read(own: Bundle, device: FakeDevice, other: str) -> None:
    arguments, found = OTHERS[other]
    folder = keep(own, **arguments)
    (folder / ENGINE).unlink()  # it could not even be read
    with pytest.raises(BackendError) as refusal:
        open_full(own, device)
    assert str(refusal.value) == (
        f"w032 has no engine of tensorrt for this machine and call: expected one for version 10.13.0.35, GPU Invented "
        f"H100, compute capability 9.0, driver 580.65.06, precision fp32, batch 2; found one for {found}; build it: "
        f"`ddsm build {own.path} --backend tensorrt --batch-size 2`"
        f"{', or run with --batch-size 16' if other == 'batch' else ''}"
    )


@pytest.mark.usefixtures("nothing_is_deserialised")
def test_an_engine_of_another_version_is_named(
    own: Bundle, device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(own)
    monkeypatch.setattr(fake_tensorrt, "__version__", "11.4.0.106")
    with pytest.raises(BackendError, match=r"for version 11.4.0.106, .* found one for version 10.13.0.35;"):
        open_full(own, device)


def test_the_nearest_of_several_engines_is_named(own: Bundle, device: FakeDevice) -> None:
    keep(own, A100, batch=16)
    keep(own, batch=1)
    keep(own, A100)
    with pytest.raises(BackendError, match="found one for batch 1; build it"):
        open_full(own, device)


@pytest.mark.parametrize(("built", "named"), [((1, 64, 16), 16), ((1,), 1), ((1, 1024, 256), 256), ((), None)], ids=str)
def test_a_run_can_take_the_next_larger_batch_that_was_built_or_the_largest(
    own: Bundle, device: FakeDevice, built: tuple[int, ...], named: int | None
) -> None:
    keep(own, replace(H100, driver="570.1"))  # no nearer, and of no use
    for batch in built:
        keep(own, batch=batch)
    with pytest.raises(BackendError) as refusal:
        open_full(own, device)
    found, _, instead = str(refusal.value).partition("; found one for ")[2].partition("; build it: ")
    assert found == ("driver 570.1" if named is None else f"batch {named}")
    assert instead.partition("`, ")[2] == ("" if named is None else f"or run with --batch-size {named}")


def test_without_any_engine_the_remedy_is_the_same(own: Bundle, device: FakeDevice) -> None:
    EngineCache(own, {"backend": "tensorrt-rtx", "batch": BATCH}).store(own.full, b"of another backend")
    with pytest.raises(BackendError, match=r"found none; build it: `ddsm build .* --backend tensorrt --batch-size 2`"):
        open_full(own, device)


HOSTILE = {
    "long": {"backend": "tensorrt", "version": "x" * 50_000},
    "control characters": {"backend": "tensorrt", "version": "\x1b[2J\n\u202e"},
    "another kind": ["tensorrt"],
    "values of another kind": {"backend": "tensorrt", "version": {"a": [1] * 1000}, "batch": None},
}


@pytest.mark.parametrize("target", HOSTILE.values(), ids=HOSTILE)
def test_what_a_foreign_seal_says_is_cut_short_in_the_message(own: Bundle, device: FakeDevice, target: object) -> None:
    folder = own.path / "engines/tensorrt-0/w032"
    folder.mkdir(parents=True)
    (folder / SEAL).write_text(json.dumps({"target": target}))
    with pytest.raises(BackendError) as refusal:
        open_full(own, device)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 990


def reseal_as_another_user(folder: Path) -> None:
    seal = json.loads((folder / SEAL).read_text())
    del seal["seal"]
    (folder / SEAL).write_text(json.dumps(seal | {"seal": engine_cache._seal(seal, b"k" * 32)}))


DAMAGE: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda f: (f / ENGINE).write_bytes((f / ENGINE).read_bytes()[:-9]), "is damaged: its content"),
    "another's seal": (reseal_as_another_user, "not built by this user on this machine"),
    "no seal": (lambda f: (f / SEAL).unlink(), "seal cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.usefixtures("nothing_is_deserialised")
def test_a_damaged_or_foreign_engine_stops_a_run(own: Bundle, device: FakeDevice, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(keep(own))
    with pytest.raises(BackendError, match=f"{message}.*; build it anew: `ddsm build .* --batch-size 2`"):
        open_full(own, device)


def test_an_own_engine_in_the_user_s_folder_is_taken_though_the_bundle_brought_another(
    own: Bundle, device: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = EngineCache(own, built_target("tensorrt", "fp32", BATCH, H100))
    shutil.copytree(keep(own), cache.folders[1] / "w032")
    reseal_as_another_user(cache.folders[0] / "w032")
    assert cache.folders[1].is_relative_to(user_cache_folder())
    assert open_full(own, device).precision == "fp32"


def test_an_own_engine_that_the_library_refuses_says_how_to_build_it_anew(own: Bundle, device: FakeDevice) -> None:
    keep(own)
    fake_tensorrt.state.faults = {"create_execution_context": "Error Code 1: Cuda Runtime (out of memory)"}
    with pytest.raises(
        BackendError, match=r"w032: its engine cannot be opened: .*memory is full.*; to build it anew: `"
    ):
        open_full(own, device)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_another_precision_than_the_bundle_s_is_refused(own: Bundle, device: FakeDevice, precision: Any) -> None:
    with pytest.raises(BackendError, match=f"fp32 for w032, found --precision {precision}; export the bundle"):
        open_full(own, device, EngineOptions(device="cuda", precision=precision))


def test_engines_of_tensorrt_rtx_fit_any_gpu_and_their_timings_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_tensorrt)
    assert built_target("tensorrt-rtx", "fp32", 2, H100) == built_target("tensorrt-rtx", "fp32", 2, None)
    options = EngineOptions(device="cuda", precision="fp32")
    of = [backend.target("tensorrt-rtx", options, 2, gpu) for gpu in (H100, A100)]
    assert [(target["device"], target["driver"]) for target in of] == [(gpu.name, gpu.driver) for gpu in (H100, A100)]


@pytest.mark.parametrize("name", backend.LIBRARIES)
def test_a_library_that_is_not_there_or_does_not_load_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name.replace("-", "_"), None)
    with pytest.raises(BackendError, match=f"the backend {name} is not installed.*: pip install"):
        import_tensorrt(name)

    def broken(module: str) -> None:
        raise OSError("libnvinfer.so.11: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(backend, "importlib", SimpleNamespace(import_module=broken))
    with pytest.raises(BackendError, match=f"the backend {name} cannot be loaded: libnvinfer.so.11: cannot open"):
        import_tensorrt(name)


# --- names ------------------------------------------------------------------------------------------------------------

OBJECTS = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "config.get_timing_cache()": "ITimingCache",
    "first": "ParserError",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "self._context": "IExecutionContext",
    "self._engine": "ICudaEngine",
    "self._runtime": "Runtime",
    "tensor": "ITensor",
}
"""How the two modules call objects of the library → their class."""

ASKED_FOR = {("BuilderFlag", "REQUIRE_USER_ALLOCATION"), ("IExecutionContext", "is_stream_capturable")}
"""What TensorRT-RTX alone has; hasattr or getattr stands before it."""

OVERRIDDEN = {"ILogger": {"log"}, "IProgressMonitor": {"phase_start", "phase_finish", "step_complete"}}


def names_used(source: str) -> Iterator[tuple[str, str]]:
    """Every (class, attribute) of the library that a module uses; ("", class) for the library's own."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner == "trt":
                yield "", node.attr
            elif owner in OBJECTS or owner.startswith("trt."):
                yield OBJECTS.get(owner, owner.removeprefix("trt.")), node.attr


def unknown_names(source: str, classes: Mapping[str, Iterable[str]]) -> set[tuple[str, str]]:
    used = set(names_used(source)) - ASKED_FOR - {("", "__version__")}
    return {(owner, name) for owner, name in used if name not in (classes.get(owner, ()) if owner else classes)}


SOURCES = [Path(str(module.__file__)).read_text() for module in (backend, tensorrt_build)]


def test_no_name_is_used_that_one_of_the_versions_lacks() -> None:
    assert NAMES["versions"][0].startswith("10.9.")
    assert NAMES["versions"][-1].startswith("11.")
    for source in SOURCES:
        assert unknown_names(source, NAMES["classes"]) == set()
    for owner, methods in OVERRIDDEN.items():
        assert methods <= set(NAMES["classes"][owner])
    seen = {owner for source in SOURCES for owner, _ in names_used(source)}
    assert set(OBJECTS.values()) <= seen, "an object that the modules call otherwise now is not checked"


@pytest.mark.parametrize(
    "line",
    [
        "size = self._engine.device_memory_size",
        "self._context = self._engine.create_execution_context_without_device_memory()",
        "config.set_flag(trt.BuilderFlag.FP16)",
        "flags = 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)",
        "builder.build_engine(network, config)",
        "calibrator = trt.IInt8Calibrator",
        "config.get_timing_cache().save()",
    ],
)
def test_a_name_that_is_gone_in_one_version_is_found(line: str) -> None:
    assert len(unknown_names(line, NAMES["classes"])) == 1


def test_names_that_only_some_have_are_asked_for_first() -> None:
    trees = [node for source in SOURCES for node in ast.walk(ast.parse(source))]
    calls = [node for node in trees if isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr")]
    assert {ast.literal_eval(call.args[1]) for call in calls} == {name for _, name in ASKED_FOR}
    assert not {name for owner, name in ASKED_FOR if name in NAMES["classes"][owner]}


def test_the_fake_has_nothing_that_the_library_lacks() -> None:
    for name, fake in fake_tensorrt.CLASSES.items():
        if name == "State":
            continue
        offered = {attribute for attribute in vars(fake) if not attribute.startswith("_")}
        assert offered <= set(NAMES["classes"][name]), name


def test_tensorrt_rtx_has_the_names_too() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    classes = {name: dir(value) for name, value in vars(rtx).items() if isinstance(value, type)}
    for source in SOURCES:
        assert unknown_names(source, classes) == set()
    assert all(hasattr(getattr(rtx, owner), name) for owner, name in ASKED_FOR)
