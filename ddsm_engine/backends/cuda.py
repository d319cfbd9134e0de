"""The real device: memory, streams and kernels through pycuda, graphs through cuda-bindings, which pycuda lacks.

It lives in the GPU's primary context, so that torch and ONNX Runtime can work in the same process on the same memory.
Kernels are compiled by NVRTC when they are first launched.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycuda.driver as drv
from cuda.bindings import driver, nvrtc
from numpy.typing import NDArray

from ddsm_engine.backends.device import Block, Captured, DeviceProperties, Loop
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.environment import nvidia_driver
from ddsm_engine.untrusted import one_line

Handle = Any
"""Of a library without types."""

NON_BLOCKING = 1
"""Flag of a stream that does not wait for the default one."""


def open_device(ordinal: int = 0) -> "CudaDevice":
    """A stream of its own on a GPU.

    Args:
        ordinal: Which of those that ``CUDA_VISIBLE_DEVICES`` leaves.

    Raises:
        BackendError: there is none.
    """
    return CudaDevice(ordinal)


def properties(ordinal: int = 0) -> DeviceProperties:
    """Which GPU there is; nothing is opened on it.

    Raises:
        BackendError: there is none.
    """
    gpu = _gpu(ordinal)
    major, minor = gpu.compute_capability()
    version = drv.get_driver_version()
    return DeviceProperties(
        gpu.name(),
        f"{major}.{minor}",
        nvidia_driver() or "unknown",
        (version // 1000, version % 1000 // 10),
        gpu.total_memory(),
    )


def _gpu(ordinal: int) -> Handle:
    with _refused("to start"):
        drv.init()
        found = drv.Device.count()
        if ordinal >= found:
            raise BackendError(f"expected GPU {ordinal}, found {found} GPUs; see CUDA_VISIBLE_DEVICES and nvidia-smi")
        return drv.Device(ordinal)


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Spell pycuda's errors as ours."""
    try:
        yield
    except drv.MemoryError as error:
        raise BackendError(
            f"out of GPU memory: CUDA refused {what}; use a smaller --batch-size, or free what others hold (nvidia-smi)"
        ) from error
    except drv.Error as error:
        raise BackendError(f"CUDA refused {what}: {one_line(error)}; `ddsm doctor` says what is missing") from error


def _checked(result: tuple[Any, ...], what: str) -> Handle:
    """The value of a call of cuda-bindings, which returns its error first."""
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorName(error)
        raise BackendError(f"CUDA refused {what}: {name.decode() if name else error}")
    return values[0] if values else None


@dataclass(eq=False)
class CapturedGraph:
    """A CUgraph: a description, of which launchable graphs and larger descriptions are made by copying."""

    handle: Handle

    @property
    def nodes(self) -> int:
        """How many nodes it has; a graph within it is one."""
        error, _, count = driver.cuGraphGetNodes(self.handle)
        _checked((error,), "to count a graph's nodes")
        return int(count)

    def __del__(self) -> None:
        driver.cuGraphDestroy(self.handle)


@dataclass(eq=False)
class LaunchableGraph:
    """A CUgraphExec on a device's stream."""

    device: "CudaDevice"
    handle: Handle

    def launch(self) -> None:
        """Put it on the stream."""
        _checked(driver.cuGraphLaunch(self.handle, self.device.stream), "to launch a graph")

    def close(self) -> None:
        """Release it; the driver lets it finish."""
        _checked(driver.cuGraphExecDestroy(self.handle), "to release a graph")


class CudaDevice:
    """One stream of one GPU; see ``ddsm_engine.backends.device.Device``."""

    def __init__(self, ordinal: int = 0) -> None:
        self.properties = properties(ordinal)
        self.scratch = Block(self)
        self._memory: dict[int, Any] = {}
        self._pinned: list[Any] = []
        self._kernels: dict[tuple[str, str], Any] = {}
        with _refused("a context"):
            self._context = _gpu(ordinal).retain_primary_context()
        with self.current(), _refused("a stream"):
            self._stream = drv.Stream(NON_BLOCKING)

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return int(self._stream.handle)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the device the calling thread's."""
        self._context.push()
        try:
            yield
        finally:
            drv.Context.pop()

    # --- memory -------------------------------------------------------------------------------------------------------

    def allocate(self, size_bytes: int) -> int:
        """Device memory."""
        with _refused(f"{size_bytes / 1e6:.1f} MB of memory"):
            block = drv.mem_alloc(size_bytes)
        self._memory[int(block)] = block
        return int(block)

    def free(self, address: int) -> None:
        """Give it back."""
        with _refused("to free memory"):
            self._memory.pop(address).free()

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy to the device; from pageable memory, which CUDA has read when it returns."""
        with _refused("a copy"):
            drv.memcpy_htod_async(address, array, self._stream)

    def download(self, array: NDArray[Any], address: int) -> None:
        """Copy from the device, and wait."""
        with _refused("a copy, or what ran before it"):
            drv.memcpy_dtoh_async(array, address, self._stream)
            self._stream.synchronize()

    def fill(self, address: int, size_bytes: int, byte: int) -> None:
        """Set every byte."""
        with _refused("to set memory"):
            drv.memset_d8_async(address, byte, size_bytes, self._stream)

    def shared(self, length: int) -> tuple[NDArray[Any], int]:
        """Pinned host memory and its address on the device."""
        with _refused("pinned memory"):
            array = drv.pagelocked_zeros(length, np.int32, mem_flags=drv.host_alloc_flags.DEVICEMAP)
            address = int(array.base.get_device_pointer())
        self._pinned.append(array)
        return array, address

    # --- work ---------------------------------------------------------------------------------------------------------

    def compile(self, source: str, kernel: str) -> None:
        """Make a kernel ready."""
        if (source, kernel) not in self._kernels:
            binary = compile_cuda(source, self.properties.compute_capability)
            with _refused(f"the kernel {kernel}"):
                module = drv.module_from_buffer(binary)
                function = module.get_function(kernel)
                function.prepare("P")
            self._kernels[source, kernel] = function

    def launch(self, source: str, kernel: str, blocks: int, threads: int, argument: int) -> None:
        """Run a kernel of one argument, an address."""
        self.compile(source, kernel)
        function = self._kernels[source, kernel]
        with _refused(f"to launch {kernel}"):
            function.prepared_async_call((blocks, 1), (threads, 1, 1), self._stream, argument)

    def is_done(self) -> bool:
        """Whether all work is finished."""
        with _refused("to go on"):
            return bool(self._stream.is_done())

    def synchronize(self) -> None:
        """Wait for all work."""
        with _refused("to finish"):
            self._stream.synchronize()

    # --- graphs -------------------------------------------------------------------------------------------------------

    def capture(self, enqueue: Callable[[], None]) -> CapturedGraph:
        """Record what ``enqueue`` puts on the stream; other threads' work is none of it."""
        # Other threads may allocate meanwhile, which the global mode would forbid them.
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _checked(driver.cuStreamBeginCapture(self.stream, mode), "to capture")
        try:
            enqueue()
        except BaseException:
            error, graph = driver.cuStreamEndCapture(self.stream)  # what it met is said by the exception
            if error == driver.CUresult.CUDA_SUCCESS:
                driver.cuGraphDestroy(graph)
            raise
        return CapturedGraph(_checked(driver.cuStreamEndCapture(self.stream), "to end a capture"))

    def chain(self, parts: Sequence[Captured]) -> CapturedGraph:
        """All parts, one after the other."""
        whole = CapturedGraph(_checked(driver.cuGraphCreate(0), "a graph"))
        before: list[Any] = []
        for part in parts:
            before = [_embed(whole.handle, before, part)]
        return whole

    def loop(self, step: Captured, bodies: Sequence[Captured]) -> Loop:
        """WHILE { step; SWITCH { bodies } }."""
        whole = CapturedGraph(_checked(driver.cuGraphCreate(0), "a graph"))
        kinds = driver.CUgraphConditionalNodeType
        (turn,), more = _conditional(whole.handle, [], kinds.CU_GRAPH_COND_TYPE_WHILE, 1)
        stepped = _embed(turn, [], step)
        branches, body = _conditional(turn, [stepped], kinds.CU_GRAPH_COND_TYPE_SWITCH, len(bodies))
        for branch, captured in zip(branches, bodies, strict=True):
            _embed(branch, [], captured)
        return Loop(whole, more, body)

    def instantiate(self, captured: Captured) -> LaunchableGraph:
        """Make a graph launchable."""
        handle = _checked(driver.cuGraphInstantiate(captured.handle, 0), "to make a graph launchable")
        return LaunchableGraph(self, handle)

    def close(self) -> None:
        """Wait, and release everything; engines and graphs must be closed before."""
        with self.current():
            self.synchronize()
            self._kernels.clear()
            self._pinned.clear()
            while self._memory:
                self._memory.popitem()[1].free()
            del self._stream
        # To release a primary context pycuda makes it current and leaves it so (2025.1 to 2026.1): whatever next asked
        # this thread for its context would be given one that is gone.
        before = _checked(driver.cuCtxGetCurrent(), "its context")
        self._context.detach()
        _checked(driver.cuCtxSetCurrent(before), "to leave its context")


def _embed(graph: Handle, before: list[Handle], part: Captured) -> Handle:
    """Add a copy of captured work to a graph, behind these nodes."""
    return _checked(driver.cuGraphAddChildGraphNode(graph, before, len(before), part.handle), "a graph within a graph")


def _conditional(graph: Handle, before: list[Handle], kind: Handle, size: int) -> tuple[list[Handle], int]:
    """Add a conditional node behind these nodes: its empty bodies, and the handle of its condition.

    A launch begins with the condition 1: WHILE is entered, and the step then says all that follows.
    """
    context = _checked(driver.cuCtxGetCurrent(), "its context")
    flags = driver.CU_GRAPH_COND_ASSIGN_DEFAULT
    handle = _checked(driver.cuGraphConditionalHandleCreate(graph, context, 1, flags), "a condition")
    parameters = driver.CUgraphNodeParams()
    parameters.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
    parameters.conditional.handle = handle
    parameters.conditional.type = kind
    parameters.conditional.size = size
    parameters.conditional.ctx = context
    _checked(driver.cuGraphAddNode(graph, before, None, len(before), parameters), "a conditional node")
    return list(parameters.conditional.phGraph_out), int(handle)


def compile_cuda(source: str, compute_capability: str) -> bytes:
    """CUDA C++ → machine code of one kind of GPU.

    Raises:
        BackendError: NVRTC is not installed, does not know the GPU, or finds a mistake.
    """
    success = nvrtc.nvrtcResult.NVRTC_SUCCESS
    try:
        error, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    except RuntimeError as missing:  # the library that the bindings look for when they are first called
        raise BackendError(
            "NVRTC, which compiles kernels, is not installed: pip install nvidia-cuda-nvrtc"
        ) from missing
    if error != success:
        raise BackendError(f"NVRTC refused to begin: {error.name}; pip install --upgrade nvidia-cuda-nvrtc")
    try:
        architecture = f"--gpu-architecture=sm_{compute_capability.replace('.', '')}"
        (error,) = nvrtc.nvrtcCompileProgram(program, 1, [architecture.encode()])
        if error != success:
            _, length = nvrtc.nvrtcGetProgramLogSize(program)
            said = _room(length)
            nvrtc.nvrtcGetProgramLog(program, said)
            words = " ".join(said.decode(errors="replace").strip(" \0").split())[:300]
            raise BackendError(
                f"NVRTC cannot compile for compute capability {compute_capability}: {words or error.name}"
            )
        _, length = nvrtc.nvrtcGetCUBINSize(program)
        binary = _room(length)
        nvrtc.nvrtcGetCUBIN(program, binary)
        return binary[:length]
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _room(length: int) -> bytes:
    """Bytes that NVRTC may write to; one more than asked for, as Python has a single object for each single byte."""
    return b" " * (length + 1)
