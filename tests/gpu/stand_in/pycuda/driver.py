"""What backends/cuda.py uses of pycuda.driver, on host memory and the invented driver; it takes the calls it must."""

import ctypes
import os
from typing import Any

import numpy as np

_LIBRARY = ctypes.CDLL("libcuda.so.1")
_ROOM = int(os.environ.get("FAKE_CUDA_ROOM", 1 << 20))
CONTEXTS: list["Context"] = []


class Error(Exception):
    pass


class MemoryError(Error):
    pass


class LogicError(Error):
    pass


def init() -> None:
    if os.environ.get("FAKE_CUDA_REFUSES") == "init":
        raise LogicError("cuInit failed: no CUDA-capable device is detected")


def get_driver_version() -> int:
    return 13020


class Context:
    """A primary context as pycuda 2026.1 has it: by ``context`` and ``primary_context`` of its cuda.hpp."""

    def __init__(self) -> None:
        self._handle = ctypes.c_void_p()
        assert _LIBRARY.cuDevicePrimaryCtxRetain(ctypes.byref(self._handle), 0) == 0

    def push(self) -> None:
        _float()
        _LIBRARY.cuCtxPushCurrent_v2(self._handle)
        CONTEXTS.append(self)

    @staticmethod
    def pop() -> None:
        _float()
        CONTEXTS.pop()
        if CONTEXTS:
            _LIBRARY.cuCtxPushCurrent_v2(CONTEXTS[-1]._handle)

    def detach(self) -> None:
        assert not CONTEXTS, "still current"
        _LIBRARY.cuCtxPushCurrent_v2(self._handle)
        _LIBRARY.cuDevicePrimaryCtxRelease_v2(0)


def _float() -> None:
    """pycuda keeps only the last of its contexts on the driver's stack."""
    if CONTEXTS:
        _LIBRARY.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


class Device:
    def __init__(self, ordinal: int) -> None:
        assert ordinal == 0

    @staticmethod
    def count() -> int:
        return int(os.environ.get("FAKE_CUDA_GPUS", "1"))

    def name(self) -> str:
        return "Invented GPU"

    def compute_capability(self) -> tuple[int, int]:
        return (9, 0)

    def total_memory(self) -> int:
        return _ROOM

    def retain_primary_context(self) -> "Context":
        return Context()


class Stream:
    handle = 0x51

    def __init__(self, flags: int = 0) -> None:
        assert CONTEXTS, "no context is current"
        assert flags == 1, "the default stream waits for all others"

    def synchronize(self) -> None:
        pass

    def is_done(self) -> bool:
        return True


class DeviceAllocation:
    def __init__(self, size: int) -> None:
        self.block = np.full(size, 0xA5, np.uint8)

    def __int__(self) -> int:
        return int(self.block.ctypes.data)

    def free(self) -> None:
        BLOCKS.remove(self)


BLOCKS: list["DeviceAllocation"] = []


def mem_alloc(size: int) -> "DeviceAllocation":
    assert CONTEXTS, "no context is current"
    if sum(len(other.block) for other in BLOCKS) + size > _ROOM:
        raise MemoryError("cuMemAlloc failed: out of memory")
    BLOCKS.append(DeviceAllocation(size))
    return BLOCKS[-1]


def memcpy_htod_async(dest: Any, src: Any, stream: Any) -> None:
    assert isinstance(stream, Stream)
    ctypes.memmove(dest, src.ctypes.data, src.nbytes)


def memcpy_dtoh_async(dest: Any, src: Any, stream: Any) -> None:
    assert isinstance(stream, Stream)
    ctypes.memmove(dest.ctypes.data, src, dest.nbytes)


def memset_d8_async(dest: Any, data: int, count: int, stream: Any) -> None:
    assert isinstance(stream, Stream)
    ctypes.memset(dest, data, count)


class host_alloc_flags:
    DEVICEMAP = 2


class _Pinned:
    def __init__(self, array: Any) -> None:
        self.__array_interface__ = {**array.__array_interface__}
        self._array = array

    def get_device_pointer(self) -> np.intp:
        return np.intp(self._array.ctypes.data)


def pagelocked_zeros(shape: Any, dtype: Any, order: Any = "C", mem_flags: int = 0) -> Any:
    assert mem_flags == host_alloc_flags.DEVICEMAP
    array = np.asarray(_Pinned(np.zeros(shape, dtype, order)))
    assert isinstance(array.base, _Pinned)
    return array


class Function:
    def __init__(self, name: str) -> None:
        self.name = name

    def prepare(self, arg_types: str) -> None:
        assert arg_types == "P"

    def prepared_async_call(self, grid: Any, block: Any, stream: Any, *args: Any) -> None:
        assert (len(grid), len(block), len(args)) == (2, 3, 1)
        assert isinstance(stream, Stream)
        _LIBRARY.fake_kernel(self.name.encode())


class Module:
    def __init__(self, binary: bytes) -> None:
        assert binary[:4] == b"\x7fELF", "machine code of a GPU"
        self.binary = binary

    def get_function(self, name: str) -> "Function":
        if name.encode() not in self.binary:
            raise LogicError("cuModuleGetFunction failed: named symbol not found")
        return Function(name)


def module_from_buffer(binary: bytes) -> "Module":
    return Module(binary)
