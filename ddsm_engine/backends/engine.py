"""What every backend offers: one loaded variant, bound to named arrays and run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

Precision = Literal["auto", "fp32", "bf16"]

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How engines are opened.

    Attributes:
        device: ``cpu`` or ``cuda``.
        precision: ``auto`` takes the fastest the device computes in natively, ``fp32`` is exact.
        threads: Threads per engine; 0 leaves it to the backend.
    """

    device: str = "cpu"
    precision: Precision = "auto"
    threads: int = 0


class Engine(Protocol):
    """One variant, opened for one batch size: bound once, run often, closed."""

    @property
    def precision(self) -> str:
        """What it computes in."""
        ...

    def bind(self, inputs: Arrays, outputs: Arrays) -> None:
        """Use these arrays (C-contiguous float32) from now on: ``run`` reads and overwrites them in place."""
        ...

    def run(self) -> None:
        """One forward pass from the bound inputs into the bound outputs; returns when they are written."""
        ...

    def close(self) -> None:
        """Release everything; the engine cannot be used again."""
        ...
