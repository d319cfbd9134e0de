"""The parts of the suite, in the order in which they are run, and how ten minutes are shared among them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from ddsm_engine.measure.gpu import ceilings, kernels, memory, peers, strategies, subnetworks
from ddsm_engine.measure.gpu.strategies import Setting
from ddsm_engine.measure.gpu.work import Work


@dataclass(frozen=True, slots=True)
class Part:
    """What is measured in one process.

    Attributes:
        seconds: Its share: nothing new is begun after it.
        measure: Adds rows to the work that it is given.
    """

    seconds: float
    measure: Callable[[Work], None]


AT_BATCH_1: Final = Setting(size=32, batch=1, calls=200, eighths=(8, 4, 2))
AT_BATCH_256: Final = Setting(size=32, batch=256, calls=100, seconds=8.0)
STAND_INS: Final = Setting(size=64, batch=256, calls=60, seconds=8.0)

PARTS: Final[Mapping[str, Part]] = {
    "ceilings": Part(10, ceilings.measure_ceilings),
    "kernel-floor": Part(8, ceilings.measure_kernel_floor),
    "strategies-b1": Part(115, partial(strategies.measure, setting=AT_BATCH_1)),
    "strategies-b256": Part(120, partial(strategies.measure, setting=AT_BATCH_256)),
    "strategies-64-b256": Part(100, partial(strategies.measure, setting=STAND_INS)),
    "peers": Part(100, peers.measure),
    "memory": Part(35, memory.measure),
    "kernels": Part(15, kernels.measure),
    "subnetworks-32": Part(35, partial(subnetworks.measure, size=32)),
    "subnetworks-64": Part(10, partial(subnetworks.measure, size=64)),
    "subnetworks-128": Part(12, partial(subnetworks.measure, size=128)),
}
"""What the targets need comes first; to compile seven widths at three batch sizes may well take more than one run."""
