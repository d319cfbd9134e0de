"""PyTorch on a GPU: static sub-networks, channels-last, in half precision with float32 islands, captured in graphs.

**Memory under capture.** torch takes memory from a caching allocator, and a graph replays the addresses that it saw.
All calls of a device's engines allocate from one ``torch.cuda.MemPool`` that nothing else uses and that lives until the
last of them is closed. What is free in it after a call was only needed within the call, so all graphs may use the same
blocks in turn, and do: their calls follow each other on one stream. The largest engine decides the size.

Three things follow. What outlives a call must not lie in the pool, where the graph of another engine writes: weights,
and what libraries keep between calls (cuBLAS' workspaces), are made at opening, outside of it. A capture that others
begin, by ``cudaStreamBeginCapture`` on the stream, is no concern of the allocator's, which would ask the driver for
memory in the middle of it; a call before the capture leaves every block that the captured one needs in the pool, so
that it does not have to. And libraries keep handles by thread: that call and the capture come from the same thread.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ddsm_engine.backends.device import Device, DeviceProperties, describe_gpu_target, no_gpu
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.engine_cache import Target
from ddsm_engine.errors import BackendError
from ddsm_engine.networks.inference_form import DTYPES, InferenceForm
from ddsm_engine.networks.unet import NormSwish, UNet
from ddsm_engine.untrusted import one_line

log = logging.getLogger(__name__)

MOST_COMPILED = 256
"""Networks that one process compiles, as many as torch counts in all; of one kind, it gives up after eight."""


def resolve_precision(options: EngineOptions, gpu: DeviceProperties) -> str:
    """What an engine with these options computes in.

    Raises:
        BackendError: the GPU has no such arithmetic.
    """
    has_bf16 = int(gpu.compute_capability.split(".")[0]) >= 8
    if options.precision == "auto":
        return "bf16" if has_bf16 else "fp16"
    if options.precision == "bf16" and not has_bf16:
        raise BackendError(
            f"bf16 needs a GPU of compute capability 8.0, found {gpu.name} with {gpu.compute_capability}; "
            f"use --precision fp16"
        )
    return options.precision


def backend_name(*, compiled: bool) -> str:
    """What people call it."""
    return "torch-compile" if compiled else "torch"


def target(options: EngineOptions, batch: int, gpu: DeviceProperties, *, compiled: bool) -> Target:
    """What the time of a call depends on beside the model.

    Raises:
        BackendError: the GPU has no such arithmetic.
    """
    name, version = backend_name(compiled=compiled), str(torch.__version__)
    return describe_gpu_target(name, version, resolve_precision(options, gpu), gpu, batch)


def prefers_fused_norms(*, compiled: bool) -> bool:
    """Whether the Triton kernel takes the norms' place.

    Unmeasured. Eagerly it is one launch instead of six and a sixth of the traffic; torch's compiler writes kernels of
    the same kind itself, and cannot fuse anything into one that it did not write.
    """
    return not compiled and importlib.util.find_spec("triton") is not None


@cache
def launches_fused_norms(where: torch.device) -> bool:
    """Try the Triton kernel on one value of a device, which is current; why it does not run is a warning.

    Its first launch compiles Triton's own way to the driver, with a C compiler and ``Python.h``.
    """
    try:
        from ddsm_kernels.group_norm_silu import group_norm_silu

        one = torch.ones(1, device=where)
        group_norm_silu(one.reshape(1, 1, 1, 1), 1, one, one, 1.0)
    except Exception as error:  # it asserts, runs other programs, and raises errors of its own
        log.warning("torch's norms take the place of Triton's and run slower: %s; see `ddsm doctor`", one_line(error))
        return False
    return True


class FusedNorm(nn.Module):
    """A group norm, with the activation that may follow, in one kernel."""

    def __init__(self, norm: nn.GroupNorm, dtype: torch.dtype) -> None:
        """Normalise as ``norm`` does, in float32; the output is of ``dtype``."""
        super().__init__()
        # Needs Triton, which not every torch brings along.
        from ddsm_kernels.group_norm_silu import group_norm_silu

        self.norm, self.dtype, self._fused = norm, dtype, group_norm_silu
        self._silu = isinstance(norm, NormSwish)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W], channels-last."""
        x = x.to(self.dtype, memory_format=torch.channels_last)
        norm = self.norm
        return self._fused(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=self._silu)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Products of float32 are of float32: not of TF32's 11 bits, which convolutions take unless they are told.

    What the process had set is put back. Only the newer of torch's two interfaces is used: it refuses a mixture.
    """
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = convolutions.fp32_precision, products.fp32_precision
    convolutions.fp32_precision = products.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision, products.fp32_precision = before


@contextmanager
def compiling() -> Iterator[None]:
    """Compile as many networks as there are: torch counts those of one class as variations of one."""
    from torch._dynamo import config  # takes a second, which eager runs need not wait for

    with config.patch(recompile_limit=MOST_COMPILED):
        yield


class Queue:
    """A device's stream and memory as torch sees them: all of this module that needs a GPU."""

    _pools: ClassVar["WeakValueDictionary[int, torch.cuda.MemPool]"] = WeakValueDictionary()
    """By stream; held by the engines that are open."""

    def __init__(self, device: Device, backend: str) -> None:
        """Take over the stream of a device, which is current.

        Raises:
            BackendError: this torch cannot use it.
        """
        if not torch.cuda.is_available():
            built = "whose driver torch cannot use" if torch.version.cuda else "but a torch built without CUDA"
            raise no_gpu(backend, f"{device.properties.name}, {built}")
        self.where = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.ExternalStream(device.stream, self.where)  # type: ignore[no-untyped-call]
        self._pool = self._pools.get(device.stream) or torch.cuda.MemPool()
        self._pools[device.stream] = self._pool

    def tensor(self, address: int, shape: tuple[int, ...]) -> Tensor:
        """The float32 at an address, not a copy of it."""
        tensor = torch.as_tensor(_DeviceMemory(address, shape), device=self.where)
        if tensor.data_ptr() != address:
            raise BackendError(f"torch copied the memory at {address:#x} instead of using it; report this as a defect")
        return tensor

    @contextmanager
    def prepare(self) -> Iterator[None]:
        """For work whose memory stays: on the stream, outside of the pool. What did not stay is given back."""
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.empty_cache()

    def submit(self, work: Callable[[], None]) -> None:
        """Put a call on the stream; its memory is of the pool."""
        with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool, self.where):
            work()


class _DeviceMemory:
    """Memory by its address, in words that torch understands (the CUDA array interface, version 3)."""

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": shape,
            "typestr": "<f4",
            "data": (address, False),
            "strides": None,  # C-contiguous
            "version": 3,
        }


class TorchCudaEngine:
    """One sub-network at one batch size on a device's stream."""

    is_capturable = True

    def __init__(
        self,
        device: Device,
        network: UNet,
        batch: int,
        options: EngineOptions,
        *,
        compiled: bool,
        fused_norms: bool | None = None,
    ) -> None:
        """Take over a sub-network, move it to the device, and run it once.

        Args:
            device: Where; it is current, now and whenever the engine is used.
            network: Cut by ``network_from_weights``; it cannot be used afterwards.
            batch: Images per call.
            options: Their precision.
            compiled: By torch's compiler, for this batch size alone.
            fused_norms: Whether the Triton kernel takes the norms' place; None leaves it to ``prefers_fused_norms`` and
                ``launches_fused_norms``.

        Raises:
            BackendError: torch cannot use the device, the precision is not there, or the network does not run.
        """
        self.precision = resolve_precision(options, device.properties)
        self._queue = Queue(device, backend_name(compiled=compiled))
        if fused_norms is None:
            with self._queue.prepare():
                fused_norms = prefers_fused_norms(compiled=compiled) and launches_fused_norms(self._queue.where)
        spec, where = network.spec, self._queue.where
        sample = (batch, *spec.sample_shape)
        self._shapes = {"sample": sample, "time_features": (batch, spec.time_features), "out_sample": sample}
        self._dtype = DTYPES[self.precision]
        try:
            with self._queue.prepare():
                form = InferenceForm(network, self._dtype, FusedNorm if fused_norms else None).eval()
                form.to(device=where, memory_format=torch.channels_last)  # type: ignore[call-overload]
                self._network: Callable[[Tensor, Tensor], Tensor] = form
                if compiled:
                    self._network = torch.compile(form, fullgraph=True, dynamic=False)
                with compiling() if compiled else nullcontext():
                    self._forward({name: torch.zeros(shape, device=where) for name, shape in self._shapes.items()})
        except RuntimeError as error:
            raise BackendError(
                f"torch cannot run this network on {device.properties.name}: {one_line(error)}"
            ) from error
        self._tensors: dict[str, Tensor] = {}

    def _forward(self, tensors: Mapping[str, Tensor]) -> None:
        """One forward pass."""
        with torch.inference_mode(), exact_float32():
            sample = tensors["sample"].to(self._dtype, memory_format=torch.channels_last)
            tensors["out_sample"].copy_(self._network(sample, tensors["time_features"]))

    def place(self, addresses: Mapping[str, int]) -> None:
        """Use these addresses from now on.

        Raises:
            BackendError: not those of its inputs and outputs.
        """
        if addresses.keys() != self._shapes.keys():
            raise BackendError(f"expected addresses of {sorted(self._shapes)}, found those of {sorted(addresses)}")
        if any(name not in self._tensors or self._tensors[name].data_ptr() != addresses[name] for name in addresses):
            self._tensors = {name: self._queue.tensor(addresses[name], shape) for name, shape in self._shapes.items()}

    def enqueue(self) -> None:
        """Put one forward pass on the stream.

        Raises:
            BackendError: it was refused.
        """
        try:
            self._queue.submit(partial(self._forward, self._tensors))
        except RuntimeError as error:
            raise BackendError(f"torch failed in a call: {one_line(error)}") from error

    def close(self) -> None:
        """Release the weights; graphs of its calls were released before."""
        self._tensors = {}
        del self._network, self._queue
