"""Our own kernels against what they replace and the bytes that they must move; which kernels a narrow net spends on."""

from contextlib import closing
from functools import partial
from typing import Any, Final

import numpy as np

from ddsm_engine.backends import open_device
from ddsm_engine.backends.device import Device, StagedEngine
from ddsm_engine.bundle import Bundle
from ddsm_engine.device_scheduler import LOOP, DeviceScheduler
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.gpu.answers import check_engine
from ddsm_engine.measure.gpu.device_timing import figures
from ddsm_engine.measure.gpu.subnetworks import open_on_device
from ddsm_engine.measure.gpu.torch_gpu import DEVICE, cuda_torch, refusing, time_events
from ddsm_engine.measure.gpu.work import Row, Work, variant_of
from ddsm_engine.measure.latency import standing_still
from ddsm_engine.measure.timing import summarise
from ddsm_engine.noise import SeededNoise

BATCHES: Final = (1, 256)
CHANNELS: Final = (32, 64, 128, 256)
"""Of the first level at 2/8, 4/8 and 8/8, and of 8/8 behind a skip."""
GROUPS: Final = 16
SIZE: Final = 32
CALLS: Final = 200
MOST_KERNELS: Final = 20
TOLERANCE: Final = 2e-2
"""Of bf16, for values of size one: 8 bits, and sums of thousands in another order."""


def measure(work: Work) -> None:
    """Time the fused norm and the update, and profile 2/8.

    Raises:
        BundleError: no bundle of 32x32.
    """
    for batch in BATCHES:
        for channels in CHANNELS:
            key = {"kernel": "group_norm_silu", "batch": batch, "channels": channels}
            work.take(key, partial(fused_norm, (batch, channels, SIZE, SIZE)))
        work.take({"kernel": "update", "batch": batch}, partial(update_alone, work.bundle(32), batch))
    work.take({"profile": "2/8", "batch": 1}, partial(profile, work.bundle(32)))


def fused_norm(shape: tuple[int, int, int, int]) -> Row:
    """Our norm with SiLU, and torch's two, in bf16 and channels-last; the rate counts one read and one write.

    Raises:
        BackendError: torch or Triton refused, or the two differ.
    """
    torch = cuda_torch()
    from ddsm_kernels.group_norm_silu import group_norm_silu, traffic_bytes

    with refusing("a fused norm"):
        x = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        weight, bias = (torch.randn(shape[1], device=DEVICE, dtype=torch.bfloat16) for _ in range(2))

        def ours() -> Any:  # noqa: ANN401 - a tensor
            return group_norm_silu(x, GROUPS, weight, bias, 1e-5)

        def torchs() -> Any:  # noqa: ANN401
            return torch.nn.functional.silu(torch.nn.functional.group_norm(x, GROUPS, weight, bias, 1e-5))

        difference = float((ours().float() - torchs().float()).abs().max())
        largest = float(torchs().abs().max())
        if not difference <= TOLERANCE * largest:
            raise BackendError(f"the fused norm differs from torch's by {difference:.1e} of {largest:.1e}")
        mine, other = time_events(ours), time_events(torchs)
    moved = traffic_bytes(shape, torch.bfloat16).fused
    return figures(mine) | {
        "bytes": moved,
        "gb_per_s": moved / mine.median_ms / 1e6,
        "torch_ms": other.median_ms,
        "max_abs": difference,
    }


class _Still:
    """A network whose answer is nothing, one memset: what is left of a call is the update."""

    precision, is_capturable = "fp32", True

    def __init__(self, device: Device, size_bytes: int) -> None:
        self._device, self._size_bytes, self._output = device, size_bytes, 0

    def place(self, addresses: Any) -> None:  # noqa: ANN401
        self._output = addresses["out_sample"]

    def enqueue(self) -> None:
        self._device.fill(self._output, self._size_bytes, 0)

    def close(self) -> None:
        """Nothing is held."""


def update_alone(bundle: Bundle, batch: int) -> Row:
    """A call without a network: the update with fresh noise, behind one memset, by the GPU's own clock.

    Raises:
        BackendError: no GPU, or it has no loops in graphs.
    """
    spec = bundle.manifest.spec
    shape = (batch, *spec.sample_shape)
    plan = standing_still(bundle, [bundle.full.id] * CALLS, noise=1e-3)
    with closing(open_device("update")) as device, closing(DeviceScheduler(device, shape)) as scheduler:
        scheduler.add(bundle.full.id, _Still(device, scheduler.x.nbytes), spec.time_features)
        scheduler.run(plan, SeededNoise(0), execution=LOOP)
        clock = scheduler.run(plan, SeededNoise(0), execution=LOOP)
    timing = summarise((clock[1:, 1] - clock[1:, 0]) / 1e6)
    moved = 4 * int(np.prod(shape)) * 4  # the memset, output and slot in, slot out
    return figures(timing) | {"bytes": moved, "gb_per_s": moved / timing.median_ms / 1e6 if timing.median_ms else None}


def profile(bundle: Bundle) -> Row:
    """Where the time of torch's 2/8 goes at batch 1, kernel by kernel: what a kernel of ours should replace next.

    Raises:
        BackendError: torch refused, or the engine does not open.
    """
    torch = cuda_torch()
    variant = variant_of(bundle, 2)
    with closing(open_on_device(bundle, variant, "torch", 1)) as staged:
        check_engine(bundle, variant, staged, 1, "torch")
        return {"kernels": profiled(torch, staged)}


def profiled(torch: Any, staged: StagedEngine) -> list[Row]:  # noqa: ANN401
    """The kernels of one call, the dearest first: name, launches, microseconds in all."""
    with refusing("the profiler"), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        staged.run()
    events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
    return [
        {"name": str(event.key)[:120], "launches": int(event.count), "us": float(event.self_device_time_total)}
        for event in events[:MOST_KERNELS]
        if event.self_device_time_total > 0
    ]
