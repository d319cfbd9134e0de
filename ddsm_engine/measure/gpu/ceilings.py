"""What can this GPU do at best? Its copies, its matrix products, and the least that a kernel in a graph takes."""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Final

from ddsm_engine.backends import open_device
from ddsm_engine.backends.device import Device
from ddsm_engine.measure.gpu.device_timing import figures, time_launches
from ddsm_engine.measure.gpu.torch_gpu import DEVICE, cuda_torch, refusing, time_events
from ddsm_engine.measure.gpu.work import Row, Work

COPY_BYTES: Final = 1 << 30
MATRIX: Final = 8192
PRECISIONS: Final = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

KERNELS: Final = (100, 1100)
"""Empty kernels of two graphs: in their difference the launch of the graph cancels."""

NOTHING: Final = "ddsm_nothing"
SOURCE: Final = f'extern "C" __global__ void {NOTHING}(const void *) {{}}'


def measure_ceilings(work: Work) -> None:
    """Device-to-device copy and large square matrix products of random numbers, through torch; fp32 without TF32.

    Raises:
        BackendError: torch sees no GPU.
    """
    cuda_torch()
    work.take({"ceiling": "copy"}, copy)
    for precision in PRECISIONS:
        work.take({"ceiling": "matrix product", "precision": precision}, partial(matrix_product, precision))


def copy() -> Row:
    """Time a copy of ``COPY_BYTES``; a byte read and written counts as two.

    Raises:
        BackendError: torch refused.
    """
    torch = cuda_torch()
    with refusing("a copy"):
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE).random_(0, 255)
        target = torch.empty_like(source)
        timing = time_events(lambda: target.copy_(source))
    return figures(timing) | {"gb_per_s": 2 * COPY_BYTES / timing.median_ms / 1e6}


def matrix_product(precision: str) -> Row:
    """Time C = A·B of ``MATRIX`` squared; the rate is that of the fastest fifth, as a slow peak flatters every share.

    Raises:
        BackendError: torch refused.
    """
    torch = cuda_torch()
    with refusing("a matrix product"):
        dtype = getattr(torch, PRECISIONS[precision])
        a, b = (torch.randn(MATRIX, MATRIX, device=DEVICE).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        timing = time_events(lambda: torch.matmul(a, b, out=out))
    return figures(timing) | {"gflops_per_s": 2 * MATRIX**3 / timing.p20_ms / 1e6}


def measure_kernel_floor(work: Work) -> None:
    """What one more empty kernel takes, in a graph and launched by itself.

    Raises:
        BackendError: no GPU.
    """

    def floor() -> Row:
        with closing(open_device("kernel floor")) as device:
            return kernel_floor(device)

    work.take({"kernel": "empty"}, floor)


def kernel_floor(device: Device) -> Row:
    """Microseconds of one more empty kernel."""

    def some(count: int) -> Callable[[], None]:
        def enqueue() -> None:
            for _ in range(count):
                device.launch(SOURCE, NOTHING, 1, 1, 0)

        return enqueue

    few, many = KERNELS
    with device.current():
        some(1)()  # compiled, and known to work, before it is captured
        device.synchronize()
        graphs = {count: device.instantiate(device.capture(some(count))) for count in KERNELS}
        in_a_graph = {count: time_launches(device, graph.launch).median_ms for count, graph in graphs.items()}
        alone = {count: time_launches(device, some(count)).median_ms for count in KERNELS}
        for graph in graphs.values():
            graph.close()
    return {
        "kernels": list(KERNELS),
        "us_in_a_graph": 1e3 * (in_a_graph[many] - in_a_graph[few]) / (many - few),
        "us_launched": 1e3 * (alone[many] - alone[few]) / (many - few),
        "graph_of_fewer_ms": in_a_graph[few],
    }
