"""The whole engine on host memory, and what it asks of torch's CUDA by torch's own signatures."""

import inspect
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch._dynamo import config as compiler_settings

from ddsm_engine.backends import torch_cuda
from ddsm_engine.backends.device import DeviceProperties, StagedEngine
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.backends.torch_cuda import (
    FusedNorm,
    Queue,
    TorchCudaEngine,
    exact_float32,
    launches_fused_norms,
    prefers_fused_norms,
    resolve_precision,
    target,
)
from ddsm_engine.errors import BackendError
from ddsm_engine.networks.inference_form import InferenceForm
from ddsm_engine.networks.slicing import subnetwork
from ddsm_engine.networks.unet import UNet
from ddsm_engine.parity import TOLERANCES
from tests.conftest import TINY, tiny_supernet
from tests.gpu.fake import H100, FakeDevice
from tests.tolerances import FORWARD

T4 = DeviceProperties("Invented T4", "7.5", "580.65.06", (13, 0), 16 << 30)
BLACKWELL = DeviceProperties("Invented B200", "10.0", "580.65.06", (13, 0), 180 << 30)
WEIGHTS = tiny_supernet().weights

Images = NDArray[np.float32]


class HostQueue:
    """In ``Queue``'s place: the fake device's memory, which is the host's."""

    def __init__(self, device: FakeDevice, backend: str) -> None:
        self.where, self._device = torch.device("cpu"), device
        self.prepare = nullcontext

    def tensor(self, address: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(self._device.view(address, shape))

    def submit(self, work: Callable[[], None]) -> None:
        self._device.record(work)


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_cuda, "Queue", HostQueue)


def network(width: int) -> UNet:
    return subnetwork(TINY, WEIGHTS, width)


def inputs(batch: int, seed: int = 0) -> dict[str, Images]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((batch, *TINY.sample_shape), dtype=np.float32),
        "time_features": rng.standard_normal((batch, TINY.time_features), dtype=np.float32),
    }


def expected(width: int, given: dict[str, Images]) -> Images:
    """The network as it was cut, in float32."""
    with torch.inference_mode():
        answer = network(width)(torch.from_numpy(given["sample"]), torch.from_numpy(given["time_features"]))
    return np.asarray(answer.numpy(), np.float32)


def opened(
    device: FakeDevice, width: int, batch: int, precision: Any = "fp32", *, compiled: bool = False
) -> TorchCudaEngine:
    options = EngineOptions(device="cuda", precision=precision)
    with device.current():
        return TorchCudaEngine(device, network(width), batch, options, compiled=compiled, fused_norms=False)


def answer(engine: TorchCudaEngine, device: FakeDevice, given: dict[str, Images]) -> Images:
    staged, out = StagedEngine(device, engine), np.full_like(given["sample"], np.nan)
    staged.bind(given, {"out_sample": out})
    staged.run()
    return out


def relative_l2(found: Images, wanted: Images) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("width", TINY.widths())
def test_every_width_is_the_reference_network_in_float32(width: int, batch: int) -> None:
    device, given = FakeDevice(), inputs(batch, seed=width)
    engine = opened(device, width, batch)
    assert engine.precision == "fp32"
    wanted = expected(width, given)
    assert wanted.std() > 0.05, "outputs must be of order one for the comparison to mean anything"
    assert relative_l2(answer(engine, device, given), wanted) <= FORWARD["torch"]


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("width", TINY.widths())
def test_every_width_is_near_the_reference_in_half_precision(width: int, precision: str) -> None:
    device, given = FakeDevice(), inputs(2, seed=width)
    engine = opened(device, width, 2, precision)
    assert engine.precision == precision
    distance = relative_l2(answer(engine, device, given), expected(width, given))
    assert 1e-5 < distance <= TOLERANCES[precision].relative_l2, "below the lower bound nothing was rounded"


@pytest.mark.usefixtures("on_host")
def test_another_width_is_told_apart() -> None:
    device, given = FakeDevice(), inputs(1)
    narrow, wide = TINY.widths()[-2:]
    assert relative_l2(answer(opened(device, narrow, 1), device, given), expected(wide, given)) > 1e-2


@pytest.mark.usefixtures("on_host")
def test_time_embedding_norms_and_the_output_convolution_stay_in_float32() -> None:
    form = InferenceForm(network(TINY.base_channels), torch.bfloat16)
    kept = {name for name, parameter in form.named_parameters() if parameter.dtype == torch.float32}
    rounded = {name for name, parameter in form.named_parameters() if parameter.dtype == torch.bfloat16}
    assert {"unet.tail.conv.weight", "projection.weight", "time.linear1.weight"} <= kept
    assert {name for name in form.state_dict() if ".norm" in name} <= kept
    assert {"unet.head.weight", "unet.down.0.conv1.weight", "unet.middle.0.attention.q.weight"} <= rounded


@pytest.mark.usefixtures("on_host")
def test_weights_are_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    original = InferenceForm.forward

    def spy(self: InferenceForm, sample: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        seen.extend([sample, self.unet.head.weight, self.unet.tail.conv.weight])
        return original(self, sample, features)

    monkeypatch.setattr(InferenceForm, "forward", spy)
    opened(FakeDevice(), 16, 2, "bf16")
    assert len(seen) == 3
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen)
    assert not any(tensor.is_contiguous() for tensor in seen)


@pytest.mark.usefixtures("on_host")
def test_graphs_of_two_widths_keep_the_addresses_that_they_were_captured_with() -> None:
    device, given, other = FakeDevice(), inputs(2), inputs(2, seed=1)
    widths = TINY.widths()[:2]
    with device.current():
        places = {name: device.allocate(array.nbytes) for name, array in given.items()}
        outs = [device.allocate(given["sample"].nbytes) for _ in widths]
        captured = []
        for width, out in zip(widths, outs, strict=True):
            engine = opened(device, width, 2)
            engine.place({**places, "out_sample": out})
            engine.enqueue()
            captured.append(device.capture(engine.enqueue))
            elsewhere = {name: device.allocate(array.nbytes) for name, array in given.items()}
            engine.place({**elsewhere, "out_sample": device.allocate(given["sample"].nbytes)})
        for name, array in other.items():
            device.upload(places[name], array)
        device.instantiate(device.chain(captured)).launch()
        for width, out in zip(widths, outs, strict=True):
            found = device.view(out, other["sample"].shape)
            assert relative_l2(found, expected(width, other)) <= FORWARD["torch"]


@pytest.mark.usefixtures("on_host")
def test_other_names_than_those_of_the_network_are_refused() -> None:
    engine = opened(FakeDevice(), 8, 1)
    with pytest.raises(BackendError, match=r"expected addresses of \['out_sample', 'sample', 'time_features'\]"):
        engine.place({"sample": 256, "out_sample": 512})


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("moment", ["opening", "a call"])
def test_what_torch_refuses_is_one_line(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    device = FakeDevice()
    engine = opened(device, 8, 1)
    monkeypatch.setattr(InferenceForm, "forward", refuse)
    with pytest.raises(BackendError, match=r"torch .*: CUDA out of memory\. Tried") as caught:
        opened(device, 8, 1) if moment == "opening" else answer(engine, device, inputs(1))
    assert "\n" not in str(caught.value)


# --- precision, target ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "gpu", "found"),
    [
        ("auto", T4, "fp16"), ("auto", H100, "bf16"), ("auto", BLACKWELL, "bf16"),
        ("fp16", H100, "fp16"), ("fp32", T4, "fp32"), ("bf16", BLACKWELL, "bf16"),
    ],
)  # fmt: skip
def test_auto_is_bf16_where_the_gpu_has_it(asked: Any, gpu: DeviceProperties, found: str) -> None:
    assert resolve_precision(EngineOptions(device="cuda", precision=asked), gpu) == found


def test_bf16_is_refused_where_the_gpu_lacks_it() -> None:
    with pytest.raises(BackendError, match=r"needs a GPU of compute capability 8\.0, found Invented T4 with 7\.5"):
        resolve_precision(EngineOptions(device="cuda", precision="bf16"), T4)


def test_a_target_tells_apart_all_that_the_time_depends_on() -> None:
    options = EngineOptions(device="cuda")
    made = [
        target(options, 1, H100, compiled=False),
        target(options, 1, H100, compiled=True),
        target(options, 2, H100, compiled=False),
        target(options, 1, BLACKWELL, compiled=False),
        target(EngineOptions(device="cuda", precision="fp32"), 1, H100, compiled=False),
    ]
    assert len({tuple(sorted(one.items())) for one in made}) == len(made)
    assert made[1]["backend"] == "torch-compile"
    assert made[0]["version"] == torch.__version__


# --- the compiler -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_host")
def test_a_compiled_network_is_one_graph_and_compiled_at_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.fx.GraphModule] = []
    asked: list[dict[str, Any]] = []
    original = torch.compile

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    def spy(module: torch.nn.Module, **options: Any) -> object:
        asked.append(options)
        return original(module, **options, backend=backend)

    monkeypatch.setattr(torch, "compile", spy)
    device = FakeDevice()
    with compiler_settings.patch(recompile_limit=1):  # eight by default, of which it would take nine networks to tell
        for number, (width, batch) in enumerate([(8, 1), (12, 1), (8, 2)], start=1):
            engine = opened(device, width, batch, compiled=True)
            assert len(compiled) == number
            given = inputs(batch)
            assert relative_l2(answer(engine, device, given), expected(width, given)) <= FORWARD["torch"]
            assert len(compiled) == number, "compiled again in a call"
    torch.compiler.reset()
    assert asked == [{"fullgraph": True, "dynamic": False}] * 3


# --- fused norms ------------------------------------------------------------------------------------------------------


def test_norms_are_fused_eagerly_and_where_triton_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "triton" else None)
    assert prefers_fused_norms(compiled=False)
    assert not prefers_fused_norms(compiled=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not prefers_fused_norms(compiled=False)


FUSED = """
import sys
import torch
torch.set_num_threads(1)
from ddsm_engine.backends import torch_cuda
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.backends.torch_cuda import FusedNorm, TorchCudaEngine
from tests.gpu import test_torch_cuda as t

torch_cuda.Queue = t.HostQueue
fused = []
norm = FusedNorm.forward
FusedNorm.forward = lambda self, x: fused.append(self) or norm(self, x)
for precision in ("fp32", "bf16"):
    device, given = t.FakeDevice(), t.inputs(2)
    fused.clear()
    with device.current():
        options = EngineOptions(device="cuda", precision=precision)
        engine = TorchCudaEngine(device, t.network(20), 2, options, compiled=False)
    found = t.relative_l2(t.answer(engine, device, given), t.expected(20, given))
    print(precision, found, len(set(fused)))
"""


def test_fused_norms_are_the_same_network() -> None:
    """In a process of its own: Triton's interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FUSED], capture_output=True, text=True, check=False, cwd=root,
        env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in network(20).modules())
    for line, tolerance in zip(done.stdout.splitlines(), (FORWARD["openvino"], 5e-2), strict=True):
        _, distance, fused = line.split()
        assert 0 < float(distance) <= tolerance
        assert int(fused) == norms


@pytest.fixture
def untried() -> Iterator[None]:
    """Whether Triton launches its kernels is asked once in a process."""
    launches_fused_norms.cache_clear()
    yield
    launches_fused_norms.cache_clear()


@pytest.mark.usefixtures("on_host", "untried")
@pytest.mark.parametrize(
    "failure",
    [
        subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c", "-I/usr/include/python3.11"]),
        AssertionError("libcuda.so cannot found!\nPlease make sure GPU is set up"),
        FileNotFoundError("/sbin/ldconfig"),
        RuntimeError("Failed to find C compiler"),
        ImportError("libtriton.so: undefined symbol"),
        Exception("PTXAS error: Internal Triton PTX codegen error"),  # as Triton's own, which are no RuntimeError
    ],
    ids=["no Python.h", "no libcuda", "no ldconfig", "no compiler", "a broken Triton", "an old ptxas"],
)
def test_where_triton_launches_nothing_torch_s_norms_run_and_one_warning_says_why(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")

    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr("ddsm_kernels.group_norm_silu.group_norm_silu", fail)
    device, options = FakeDevice(), EngineOptions(device="cuda", precision="fp32")
    with caplog.at_level(logging.WARNING):
        for width in TINY.widths()[:2]:
            with device.current():
                engine = TorchCudaEngine(device, network(width), 1, options, compiled=False)
            given = inputs(1)
            assert relative_l2(answer(engine, device, given), expected(width, given)) <= FORWARD["torch"]
    (said,) = caplog.records
    assert "run slower: " + str(failure).split("\n")[0] in said.getMessage()
    assert "\n" not in said.getMessage()


@pytest.mark.usefixtures("on_host", "untried")
def test_a_compiled_network_does_not_ask_for_fused_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_cuda, "launches_fused_norms", lambda where: pytest.fail("asked"))
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    device = FakeDevice()
    with device.current():
        TorchCudaEngine(device, network(8), 1, EngineOptions(device="cuda", precision="fp32"), compiled=True)


def test_a_fused_norm_is_asked_for_what_the_network_says(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    asked: list[tuple[torch.dtype, bool]] = []

    def plain(x: torch.Tensor, groups: int, *_: object, silu: bool) -> torch.Tensor:
        asked.append((x.dtype, silu))
        return x

    monkeypatch.setattr("ddsm_kernels.group_norm_silu.group_norm_silu", plain)
    form = InferenceForm(network(8), torch.bfloat16, FusedNorm)
    given = {name: torch.from_numpy(array) for name, array in inputs(1).items()}
    with torch.inference_mode():
        form(given["sample"].to(memory_format=torch.channels_last), given["time_features"])
    attentions = sum(name.endswith("attention.q.weight") for name in form.state_dict())
    assert attentions > 0
    assert [silu for _, silu in asked].count(False) == attentions
    assert asked[-1] == (torch.float32, True), "the output convolution reads float32"
    assert {dtype for dtype, _ in asked[:-1]} == {torch.bfloat16}


# --- torch's CUDA -----------------------------------------------------------------------------------------------------


def precisions() -> tuple[str, str]:
    found: tuple[str, str] = (
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision,
    )
    return found


@pytest.fixture
def allowed_tf32() -> Iterator[None]:
    """As a user may have it, by the older interface."""
    before = precisions()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before  # type: ignore[attr-defined]


@pytest.mark.usefixtures("allowed_tf32")
def test_products_are_exact_and_the_process_keeps_its_settings() -> None:
    before = precisions()
    assert before == ("tf32", "tf32")
    with pytest.raises(KeyError), exact_float32():
        assert precisions() == ("ieee", "ieee")
        raise KeyError
    assert precisions() == before
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.usefixtures("on_host", "allowed_tf32")
def test_calls_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    original = InferenceForm.forward

    def spy(self: InferenceForm, *given: torch.Tensor) -> torch.Tensor:
        seen.append(precisions())
        return original(self, *given)

    monkeypatch.setattr(InferenceForm, "forward", spy)
    device = FakeDevice()
    answer(opened(device, 8, 1, "fp32"), device, inputs(1))
    assert seen == [("ieee", "ieee")] * 2


@pytest.mark.parametrize(("compiled", "name"), [(False, "torch"), (True, "torch-compile")])
def test_without_a_gpu_it_is_refused(*, compiled: bool, name: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    with pytest.raises(BackendError, match=f"the {name} backend needs an NVIDIA GPU, found .*torch"):
        opened(FakeDevice(), 8, 1, compiled=compiled)


class FakePool:
    pass


class FakeCuda:
    """Records how torch's CUDA is used; calls must fit the real signatures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.pools: list[Callable[[], object]] = []
        self._patch = monkeypatch
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        self._replace("ExternalStream", inspect.signature(torch.cuda.ExternalStream.__new__), self._stream)
        self._replace("MemPool", inspect.signature(torch.cuda.MemPool.__init__), self._pool)
        self._replace("stream", inspect.signature(torch.cuda.stream), self._on_stream, skip=0)
        self._replace("use_mem_pool", inspect.signature(torch.cuda.use_mem_pool), self._in_pool, skip=0)
        self._replace("empty_cache", inspect.signature(torch.cuda.empty_cache), self._empty, skip=0)

    def _replace(self, name: str, signature: inspect.Signature, by: Callable[..., Any], skip: int = 1) -> None:
        def call(*arguments: Any) -> Any:
            signature.bind(*[None] * skip, *arguments)
            return by(*arguments)

        self._patch.setattr(torch.cuda, name, call)

    def _stream(self, handle: int, where: torch.device) -> str:
        assert where == torch.device("cuda", 0)
        return f"stream {handle}"

    def _pool(self) -> object:
        pool = FakePool()
        self.pools.append(weakref.ref(pool))
        return pool

    @contextmanager
    def _on_stream(self, stream: str) -> Iterator[None]:
        self.log.append(f"enter {stream}")
        yield
        self.log.append(f"leave {stream}")

    @contextmanager
    def _in_pool(self, pool: object, where: torch.device) -> Iterator[None]:
        number = [made() for made in self.pools].index(pool)
        self.log.append(f"enter pool {number}")
        yield
        self.log.append(f"leave pool {number}")

    def _empty(self) -> None:
        self.log.append("empty cache")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_calls_run_on_the_stream_within_the_pool_and_openings_outside_of_it(cuda: FakeCuda) -> None:
    queue = Queue(FakeDevice(), "torch")
    with queue.prepare():
        cuda.log.append("weights")
    queue.submit(lambda: cuda.log.append("call"))
    opening = ["enter stream 5", "weights", "leave stream 5", "empty cache"]
    assert cuda.log == [*opening, "enter stream 5", "enter pool 0", "call", "leave pool 0", "leave stream 5"]


def test_engines_of_a_device_share_its_pool_and_no_others(cuda: FakeCuda) -> None:
    device, other = FakeDevice(), FakeDevice()
    other.stream = 0x7
    queues = [Queue(device, "torch"), Queue(device, "torch-compile"), Queue(other, "torch")]
    for queue in queues:
        queue.submit(lambda: None)
    assert [line for line in cuda.log if line.startswith("enter pool")] == ["enter pool 0"] * 2 + ["enter pool 1"]


def test_a_pool_goes_with_the_last_engine(cuda: FakeCuda) -> None:
    device = FakeDevice()
    first, second = Queue(device, "torch"), Queue(device, "torch")
    del first
    assert cuda.pools[0]() is not None
    del second
    assert cuda.pools[0]() is None
    Queue(device, "torch").submit(lambda: None)
    assert cuda.log[1] == "enter pool 1"


def test_memory_is_described_by_the_cuda_array_interface(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    block = np.zeros((2, 3), np.float32)
    asked: list[dict[str, Any]] = []

    def as_tensor(described: Any, device: torch.device) -> torch.Tensor:
        asked.append(described.__cuda_array_interface__)
        return torch.from_numpy(block)

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    queue = Queue(FakeDevice(), "torch")
    assert queue.tensor(block.ctypes.data, (2, 3)).shape == (2, 3)
    described = {"shape": (2, 3), "typestr": "<f4", "data": (block.ctypes.data, False), "strides": None, "version": 3}
    assert asked == [described]
    with pytest.raises(BackendError, match="copied the memory at 0x100 instead of using it"):
        queue.tensor(256, (2, 3))
