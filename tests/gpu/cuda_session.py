"""Run by test_cuda.py in a process of its own, whose driver and pycuda are invented: prints what happened as JSON."""

import ctypes
import gc
import json
import sys

import numpy as np

from ddsm_engine.backends import cuda
from ddsm_engine.backends.device import Captured, DeviceProperties
from ddsm_engine.errors import BackendError

SOURCE = """
extern "C" __global__ void first(int *x) { *x = 1; }
extern "C" __global__ void second(int *x) { *x = 2; }
"""


def main() -> dict[str, object]:
    library = ctypes.CDLL("libcuda.so.1")
    library.fake_launched.restype = ctypes.c_char_p
    said: dict[str, object] = {"properties": _fields(cuda.properties())}
    device = cuda.open_device()
    text = ctypes.create_string_buffer(4096)

    def spelled(captured: Captured) -> str:
        library.fake_describe(ctypes.c_void_p(int(captured.handle)), text)
        return text.value.decode()

    with device.current():
        address = device.allocate(64)
        numbers = np.arange(16, dtype=np.int32)
        device.upload(address, numbers)
        back = np.zeros_like(numbers)
        device.download(back, address)
        device.fill(address, 64, 0xFF)
        filled = np.zeros_like(numbers)
        device.download(filled, address)
        said["copied"] = bool((back == numbers).all() and (filled == -1).all())
        flags, flags_address = device.shared(2)
        said["shared"] = flags.tolist() == [0, 0] and flags_address == flags.ctypes.data

        def launch(name: str) -> None:
            device.launch(SOURCE, name, 2, 32, address)

        launch("first")
        one = device.capture(lambda: launch("first"))

        def both() -> None:
            launch("second")
            launch("first")

        two = device.capture(both)
        empty = device.capture(lambda: None)
        said["nodes"] = [one.nodes, two.nodes, empty.nodes]
        chain = device.chain([one, two, one])
        loop = device.loop(one, [two, one, two])
        said["chain"], said["loop"] = spelled(chain), spelled(loop.captured)
        said["handles"] = [loop.more, loop.body]
        graph = device.instantiate(chain)
        graph.launch()
        graph.close()
        try:
            device.capture(_fail)
        except ZeroDivisionError:
            said["after an error"] = device.capture(lambda: launch("second")).nodes
        try:
            device.launch('extern "C" __global__ void wrong() { nothing(); }', "wrong", 1, 1, address)
        except BackendError as error:
            said["mistake"] = str(error)
        said["space"] = ord(b" ")
        said["launched"] = library.fake_launched().decode()
        del one, two, empty, chain, loop, graph
        gc.collect()
        said["alive"] = [library.fake_graphs_alive(), library.fake_launchable_alive()]
        device.free(address)
    other = cuda.open_device()
    other.close()
    said["contexts beside one in use"] = [library.fake_contexts(), library.fake_retained()]
    device.close()
    said["contexts left"] = [library.fake_contexts(), library.fake_retained()]
    from pycuda import driver

    said["blocks left"] = len(driver.BLOCKS)
    return said


def _fields(properties: DeviceProperties) -> list[object]:
    return [properties.name, properties.compute_capability, list(properties.cuda), properties.memory_bytes]


def _fail() -> None:
    raise ZeroDivisionError


if __name__ == "__main__":
    try:
        print(json.dumps(main()))
    except BackendError as error:
        print(json.dumps({"refused": str(error)}))
        sys.exit(1)
