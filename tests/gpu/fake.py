"""A device that is host memory: what runs on a GPU, without one.

Work is done when it is put on the stream, or recorded while a capture is open, as on a real stream; what a real one
refuses during a capture fails here too. Addresses are those of live numpy arrays, so a wrong one is found.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.backends.device import ALIGNMENT, NO_BODY, Block, Captured, Device, DeviceProperties, Loop
from ddsm_engine.errors import BackendError
from ddsm_engine.noise import SeededNoise
from ddsm_kernels import update

H100 = DeviceProperties("Invented H100", "9.0", "580.65.06", (13, 0), 80 << 30)
A100 = DeviceProperties("Invented A100", "8.0", "550.54.15", (12, 4), 80 << 30)

Work = Callable[[], None]
Kernel = Callable[["FakeDevice", int], None]


@dataclass
class FakeCaptured:
    handle: list[Work]

    @property
    def nodes(self) -> int:
        return len(self.handle)


@dataclass
class FakeGraph:
    device: "FakeDevice"
    work: list[Work]
    is_open: bool = True

    def launch(self) -> None:
        assert self.is_open, "a closed graph was launched"
        self.device.launches += 1
        for piece in self.work:
            piece()

    def close(self) -> None:
        assert self.device._entered, "closed without its device being current"
        self.is_open = False


class FakeDevice:
    """See the module.

    Args:
        properties: What it says of itself.
        refuses: What the driver refuses: ``capture``, ``chain``, ``loop``, ``instantiate``, ``compile with a loop``;
            ``record`` leaves captures empty without a word; ``shared``, pinned memory.
        kernels: What ``launch`` runs, by the kernel's name.
    """

    def __init__(
        self,
        properties: DeviceProperties = H100,
        refuses: Sequence[str] = (),
        kernels: Mapping[str, Kernel] | None = None,
    ) -> None:
        self.properties, self.refuses, self.stream = properties, set(refuses), 0x5
        self.scratch = Block(self)
        self.launches = self.synchronizations = 0
        self.conditions: dict[int, int] = {}
        self._kernels = dict(kernels or {update.KERNEL: update_kernel})
        self._memory: dict[int, NDArray[np.uint8]] = {}
        self._recording: list[Work] | None = None
        self._compiled: set[tuple[str, str]] = set()
        self._entered = 0

    # --- what engines for tests need ----------------------------------------------------------------------------------

    def record(self, work: Work) -> None:
        """Put work on the stream."""
        assert self._entered, "used without being made current"
        if self._recording is None:
            work()
        elif "record" not in self.refuses:
            self._recording.append(work)

    def view(self, address: int, shape: tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
        """The array at an address, which must lie within an allocation."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        for start, block in self._memory.items():
            if start <= address and address + size <= start + len(block):
                found: NDArray[Any] = block[address - start : address - start + size].view(dtype).reshape(shape)
                return found
        raise AssertionError(f"nothing of {size} bytes is allocated at {address:#x}")

    @property
    def allocated(self) -> int:
        """How many blocks are in use."""
        return len(self._memory)

    @property
    def allocated_bytes(self) -> int:
        return sum(len(block) for block in self._memory.values())

    # --- the protocol -------------------------------------------------------------------------------------------------

    @contextmanager
    def current(self) -> Iterator[None]:
        self._entered += 1
        try:
            yield
        finally:
            self._entered -= 1

    def allocate(self, size_bytes: int) -> int:
        assert self._recording is None, "no allocation while capturing"
        if self.allocated_bytes + size_bytes > self.properties.memory_bytes:
            raise BackendError(f"out of GPU memory: {size_bytes} bytes do not fit; use a smaller --batch-size")
        block = np.full(size_bytes + ALIGNMENT, 0xA5, np.uint8)
        block = block[-block.ctypes.data % ALIGNMENT :][:size_bytes]
        self._memory[block.ctypes.data] = block
        return block.ctypes.data

    def free(self, address: int) -> None:
        assert self._recording is None, "no release while capturing"
        del self._memory[address]

    def upload(self, address: int, array: NDArray[Any]) -> None:
        assert self._recording is None, "no copy from pageable memory while capturing"
        assert array.flags.c_contiguous
        self.view(address, (array.nbytes,), np.uint8)[:] = array.reshape(-1).view(np.uint8)

    def download(self, array: NDArray[Any], address: int) -> None:
        self.synchronize()
        assert array.flags.c_contiguous
        array.reshape(-1).view(np.uint8)[:] = self.view(address, (array.nbytes,), np.uint8)

    def fill(self, address: int, size_bytes: int, byte: int) -> None:
        self.record(lambda: self.view(address, (size_bytes,), np.uint8).fill(byte))

    def shared(self, length: int) -> tuple[NDArray[Any], int]:
        if "shared" in self.refuses:
            raise BackendError("out of GPU memory: CUDA refused pinned memory (invented)")
        address = self.allocate(4 * length)
        array = self.view(address, (length,), np.int32)
        array[:] = 0
        return array, address

    def compile(self, source: str, kernel: str) -> None:
        assert self._recording is None, "no module can be loaded while capturing"
        assert kernel in source
        if "compile with a loop" in self.refuses and "#define WITH_LOOP 1" in source:
            raise BackendError("the driver knows no cudaGraphSetConditional (invented)")
        self._compiled.add((source, kernel))

    def launch(self, source: str, kernel: str, blocks: int, threads: int, argument: int) -> None:
        if (source, kernel) not in self._compiled:
            self.compile(source, kernel)
        assert 0 < threads <= 1024
        assert blocks > 0
        self.record(lambda: self._kernels[kernel](self, argument))

    def is_done(self) -> bool:
        return True

    def synchronize(self) -> None:
        assert self._recording is None, "no synchronisation while capturing"
        self.synchronizations += 1

    def capture(self, enqueue: Work) -> FakeCaptured:
        assert self._recording is None
        if "capture" in self.refuses:
            raise BackendError("the driver refused to capture (invented)")
        recorded: list[Work] = []
        self._recording = recorded
        try:
            enqueue()
        finally:
            self._recording = None
        return FakeCaptured(recorded)

    def chain(self, parts: Sequence[Captured]) -> FakeCaptured:
        if "chain" in self.refuses:
            raise BackendError("the driver refused a chain (invented)")
        return FakeCaptured([work for part in parts for work in part.handle])

    def loop(self, step: Captured, bodies: Sequence[Captured]) -> Loop:
        if "loop" in self.refuses:
            raise BackendError("the driver refused a loop (invented)")
        more, body = 2 * len(self.conditions) + 101, 2 * len(self.conditions) + 102
        self.conditions |= {more: 0, body: 0}

        def run() -> None:
            self.conditions[more] = 1
            while self.conditions[more]:
                for work in step.handle:
                    work()
                if self.conditions[body] < len(bodies):
                    for work in bodies[self.conditions[body]].handle:
                        work()

        return Loop(FakeCaptured([run]), more, body)

    def instantiate(self, captured: Captured) -> FakeGraph:
        if "instantiate" in self.refuses:
            raise BackendError("the driver refused a graph (invented)")
        return FakeGraph(self, captured.handle)

    def close(self) -> None:
        self._memory.clear()


def _is_a_device(device: FakeDevice) -> Device:
    return device


def update_kernel(device: FakeDevice, argument: int) -> None:
    """What ``ddsm_update`` does, by its plain reference."""
    (run,) = device.view(argument, (1,), update.RUN)
    images, elements, slot_count, calls = (int(run[name]) for name in ("images", "elements", "slot_count", "calls"))
    (state,) = device.view(int(run["state"]), (1,), update.STATE)
    rows = device.view(int(run["rows"]), (calls + 1,), update.ROW)
    due = int(state["next"])
    row = rows[due]
    columns = slot_count + 3
    update_row = device.view(int(run["coefficients"]), (calls + 1, slot_count, columns))[due]
    slots = device.view(int(run["slots"]), (slot_count, images, elements))
    output = device.view(int(run["output"]), (images, elements))
    noise = np.zeros((images, elements), np.float32)
    if row["has_noise"]:
        SeededNoise(int(run["seed"]), int(run["first_image"])).fill(noise, int(row["stream"]), int(row["call"]))
    bound = float(run["bound"]) if run["is_bounded"] else None
    with np.errstate(invalid="ignore", over="ignore"):
        slots[:] = update.reference(list(slots.copy()), output, noise, row["to_x_0"], update_row, bound)
    if not np.isfinite(slots[0]).all():
        state["first_bad"] = min(due, int(state["first_bad"]))
    if due < calls:
        following = rows[due + 1]
        count, offset = int(following["features"]), int(following["feature_offset"])
        device.view(int(run["features"]), (images, count))[:] = device.view(
            int(run["feature_rows"]) + 4 * offset, (count,)
        )
    state["next"] = due + 1
    device.view(int(run["clock"]), (calls + 1,), np.uint64)[due] = device.launches * 1_000_000 + due * 1000
    device.view(int(run["progress"]), (1,), np.int32)[0] = due
    if run["is_loop"]:
        is_on = due < calls and not device.view(int(run["stop"]), (1,), np.int32)[0]
        device.conditions[int(run["more"])] = int(is_on)
        device.conditions[int(run["body"])] = int(rows[due + 1]["body"]) if is_on else NO_BODY


@dataclass
class FakeEngine:
    """A network in numpy: any function of a sample and its time features, [B, C, H, W] and [B, F]."""

    device: FakeDevice
    network: Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]]
    shape: tuple[int, ...]
    features: int
    precision: str = "fp32"
    is_capturable: bool = True
    scratch_bytes: int = 0
    addresses: Mapping[str, int] = field(default_factory=dict)
    is_open: bool = True

    def __post_init__(self) -> None:
        self.device.scratch.reserve(self.scratch_bytes)

    def place(self, addresses: Mapping[str, int]) -> None:
        self.addresses = dict(addresses)

    def enqueue(self) -> None:
        assert self.is_open
        addresses, scratch = self.addresses, self.device.scratch.address if self.scratch_bytes else 0

        def work() -> None:
            if scratch:
                self.device.view(scratch, (self.scratch_bytes,), np.uint8).fill(7)
            sample = self.device.view(addresses["sample"], self.shape)
            features = self.device.view(addresses["time_features"], (self.shape[0], self.features))
            self.device.view(addresses["out_sample"], self.shape)[:] = self.network(sample.copy(), features.copy())

        self.device.record(work)

    def close(self) -> None:
        self.is_open = False
