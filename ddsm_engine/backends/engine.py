"""What every backend offers: one loaded variant, bound to named arrays and run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from ddsm_engine.bundle import Variant
from ddsm_engine.engine_cache import Target
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.environment import cores, cpu
from ddsm_engine.untrusted import brief

Precision = Literal["auto", "fp32", "fp16", "bf16"]

PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "fp16", "bf16")

MAX_THREADS = 1024

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

    def __post_init__(self) -> None:
        """Refuse what a library would answer with words of its own, or with another device."""
        if self.device not in ("cpu", "cuda"):
            raise BackendError(f"expected the device cpu or cuda, found {brief(self.device)}")
        if self.precision not in PRECISIONS:
            raise BackendError(f"expected a precision of {', '.join(PRECISIONS)}, found {brief(self.precision)}")
        if type(self.threads) is not int or not 0 <= self.threads <= MAX_THREADS:
            raise BackendError(f"expected 0 to {MAX_THREADS} threads, found {brief(self.threads)}")


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


def artefact_precision(options: EngineOptions, variant: Variant) -> str:
    """What a library computes in that takes the precision from the artefact, as all do on a GPU.

    Raises:
        BackendError: another one was asked for.
    """
    if options.precision not in ("auto", variant.precision):
        raise BackendError(
            f"on a GPU an artefact computes in what it was exported in, {variant.precision} for {variant.id}, found "
            f"--precision {options.precision}; export the bundle with --precision {options.precision}"
        )
    return variant.precision


def fp32_alone(options: EngineOptions, refusal: str) -> str:
    """What a library computes in that has nothing else.

    Raises:
        BackendError: another precision was asked for; it says ``refusal``.
    """
    if options.precision not in ("auto", "fp32"):
        raise BackendError(refusal)
    return "fp32"


def describe_target(backend: str, version: str, precision: str, options: EngineOptions, batch: int) -> Target:
    """Everything beside the model that the time of a call on a CPU depends on."""
    return {
        "backend": backend,
        "version": version,
        "device": cpu()[0],
        "cores": cores(),
        "threads": options.threads,
        "precision": precision,
        "batch": batch,
    }
