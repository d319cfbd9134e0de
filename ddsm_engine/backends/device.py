"""What a run needs of a GPU: memory, one stream, kernels, graphs; and what an engine there offers.

``cuda.py`` is the real one. Everything above it is written to these protocols, so that it is tested without a GPU.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from ddsm_engine.backends.engine import Arrays
from ddsm_engine.engine_cache import Target
from ddsm_engine.errors import BackendError

ALIGNMENT = 256
"""Bytes: what TensorRT asks of every address that it is given."""


@dataclass(frozen=True, slots=True)
class DeviceProperties:
    """One GPU and what drives it.

    Attributes:
        name: As its driver calls it.
        compute_capability: ``9.0``.
        driver: Version of the driver, ``580.65.06``.
        cuda: The newest CUDA that the driver speaks, (major, minor).
        memory_bytes: All there is.
    """

    name: str
    compute_capability: str
    driver: str
    cuda: tuple[int, int]
    memory_bytes: int


def describe_gpu_target(backend: str, version: str, precision: str, gpu: DeviceProperties, batch: int) -> Target:
    """Everything beside the model that the time of a call on a GPU depends on."""
    return {
        "backend": backend,
        "version": version,
        "device": gpu.name,
        "compute_capability": gpu.compute_capability,
        "driver": gpu.driver,
        "precision": precision,
        "batch": batch,
        "threads": 0,  # no call takes any
    }


class Captured(Protocol):
    """Work that was recorded instead of done: the piece that larger graphs are made of."""

    @property
    def handle(self) -> Any:  # noqa: ANN401 - the device's own
        """What the device knows it by."""
        ...

    @property
    def nodes(self) -> int:
        """How many kernels, copies and inner graphs it holds."""
        ...


class Graph(Protocol):
    """Captured work made ready: one launch does all of it."""

    def launch(self) -> None:
        """Put it on the device's stream; returns before it is done."""
        ...

    def close(self) -> None:
        """Release it."""
        ...


@dataclass(frozen=True, slots=True)
class Loop:
    """A captured ``WHILE { step; SWITCH { bodies } }``.

    Attributes:
        captured: The loop; a launch of it enters it at least once.
        more: Handle of the condition of WHILE, which a kernel of the step sets: 0 ends the loop.
        body: Handle of the condition of SWITCH, which it sets, too: the number of the body that follows the step.
    """

    captured: Captured
    more: int
    body: int


NO_BODY = 2**32 - 1
"""The condition of SWITCH after which no body follows."""


class Device(Protocol):
    """One stream of one GPU and what a run keeps there. Not for two threads at once.

    All work is ordered on the stream. Addresses are those of device memory, ``ALIGNMENT`` bytes aligned. Every method
    raises BackendError for what the driver refuses, out of memory included.
    """

    @property
    def properties(self) -> DeviceProperties:
        """Which GPU it is."""
        ...

    @property
    def stream(self) -> int:
        """Handle (``cudaStream_t``) of the stream; not the default one, which waits for all others."""
        ...

    @property
    def scratch(self) -> "Block":
        """The block that all engines on this stream share."""
        ...

    def current(self) -> AbstractContextManager[None]:
        """Make the device the calling thread's: engines are opened, used and closed within."""
        ...

    def allocate(self, size_bytes: int) -> int:
        """Device memory, until ``free`` or ``close``."""
        ...

    def free(self, address: int) -> None:
        """Give it back; whatever was queued before may still use it."""
        ...

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy a C-contiguous array to the device; it may be changed as soon as this returns."""
        ...

    def download(self, array: NDArray[Any], address: int) -> None:
        """Fill a C-contiguous array from the device; returns when it is there, and so is all work before."""
        ...

    def fill(self, address: int, size_bytes: int, byte: int) -> None:
        """Set every byte."""
        ...

    def shared(self, length: int) -> tuple[NDArray[Any], int]:
        """Pinned host memory, int32 [length], zeros, and its address on the device: both sides read and write it.

        It lasts as long as the device.
        """
        ...

    def compile(self, source: str, kernel: str) -> None:
        """Make a kernel of this CUDA C++ source ready, which a capture cannot; once is enough."""
        ...

    def launch(self, source: str, kernel: str, blocks: int, threads: int, argument: int) -> None:
        """Run a kernel of this CUDA C++ source that takes one address."""
        ...

    def is_done(self) -> bool:
        """Whether all work is finished; asks without waiting."""
        ...

    def synchronize(self) -> None:
        """Wait for all work; an error that it met is raised here."""
        ...

    def capture(self, enqueue: Callable[[], None]) -> Captured:
        """Record what ``enqueue`` puts on the stream. It must have run once before, outside a capture."""
        ...

    def chain(self, parts: Sequence[Captured]) -> Captured:
        """All parts, one after the other; a part may occur often."""
        ...

    def loop(self, step: Captured, bodies: Sequence[Captured]) -> Loop:
        """The step and a body by number, again and again until the step says to stop; needs CUDA 12.8."""
        ...

    def instantiate(self, captured: Captured) -> Graph:
        """Make captured work ready to be launched."""
        ...

    def close(self) -> None:
        """Wait, and release everything."""
        ...


class Block:
    """Device memory as large as the largest of those that share it ask for.

    What engines only need while they run is one: those of a device run one after the other on its stream.
    """

    def __init__(self, device: Device) -> None:
        self._device, self.size_bytes, self._address, self._allocated = device, 0, 0, 0

    def reserve(self, size_bytes: int) -> None:
        """Ask for at least so much; the block moves at its next use if it has to grow."""
        self.size_bytes = max(self.size_bytes, size_bytes)

    @property
    def address(self) -> int:
        """Where it is now; engines and graphs that were given another address must be given this one."""
        if self._allocated < self.size_bytes:
            self.free()
            self._address, self._allocated = self._device.allocate(self.size_bytes), self.size_bytes
        return self._address

    def free(self) -> None:
        """Give it back when all work is done; its next use allocates it anew."""
        if self._allocated:
            self._device.synchronize()
            self._device.free(self._address)
            self._address, self._allocated = 0, 0


class DeviceEngine(Protocol):
    """One variant, opened for one batch size, that reads and writes device memory on its device's stream."""

    @property
    def precision(self) -> str:
        """What it computes in."""
        ...

    @property
    def is_capturable(self) -> bool:
        """Whether ``enqueue`` may be captured; ONNX Runtime's may not."""
        ...

    def place(self, addresses: Mapping[str, int]) -> None:
        """Use these addresses (float32, C-contiguous) of its inputs and outputs from now on."""
        ...

    def enqueue(self) -> None:
        """Put one forward pass on the stream; returns before it is done.

        Raises:
            BackendError: it was refused.
        """
        ...

    def close(self) -> None:
        """Release everything; the engine cannot be used again."""
        ...


class StagedEngine:
    """A device engine that serves arrays in host memory, as every other engine does: copies in, runs, copies out."""

    def __init__(self, device: Device, engine: DeviceEngine, closed: Callable[[], None] = lambda: None) -> None:
        """Take over an engine; ``closed`` is called when it has been closed."""
        self.device, self.engine, self._closed = device, engine, closed
        self._inputs: dict[str, tuple[NDArray[Any], int]] = {}
        self._outputs: dict[str, tuple[NDArray[Any], int]] = {}

    @property
    def precision(self) -> str:
        """What it computes in."""
        return self.engine.precision

    def bind(self, inputs: Arrays, outputs: Arrays) -> None:
        """Use these arrays from now on; see ``Engine``."""
        with self.device.current():
            self._release()
            self._inputs = {name: (array, self.device.allocate(array.nbytes)) for name, array in inputs.items()}
            self._outputs = {name: (array, self.device.allocate(array.nbytes)) for name, array in outputs.items()}
            for array, address in self._outputs.values():
                self.device.fill(address, array.nbytes, 0xFF)  # NaN: what an engine does not write is noticed

    def run(self) -> None:
        """One forward pass; see ``Engine``."""
        with self.device.current():
            # A run without the host places the same engine elsewhere.
            placed = self._inputs | self._outputs
            self.engine.place({name: address for name, (_, address) in placed.items()})
            for array, address in self._inputs.values():
                self.device.upload(address, array)
            self.engine.enqueue()
            for array, address in self._outputs.values():
                self.device.download(array, address)

    def close(self) -> None:
        """Release everything."""
        with self.device.current():
            self.device.synchronize()
            self._release()
            self.engine.close()
        self._closed()

    def _release(self) -> None:
        for _, address in [*self._inputs.values(), *self._outputs.values()]:
            self.device.free(address)
        self._inputs, self._outputs = {}, {}


def no_gpu(backend: str, reason: str) -> BackendError:
    """The refusal where a GPU was asked for and there is none."""
    return BackendError(
        f"the {backend} backend needs an NVIDIA GPU, found {reason}; use --backend openvino, or see `ddsm doctor`"
    )
