"""What does a run cost? By the milliseconds that were measured on this machine, or by counted GFLOPs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ddsm_engine.backends import choose_backend, engine_target
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import Bundle
from ddsm_engine.cost import gflops
from ddsm_engine.engine_cache import Target
from ddsm_engine.errors import BundleError
from ddsm_engine.measure.choice import fastest_backend
from ddsm_engine.measure.environment import cpu
from ddsm_engine.measure.latency_table import LatencyTable, latency_file, load_latency

Unit = Literal["ms", "GFLOPs"]


@dataclass(frozen=True, slots=True)
class CallCost:
    """What calls cost, per image.

    Attributes:
        unit: Of all that follows.
        per_call: Of one call, by variant.
        swap: What a variant's call costs on top when the call before was another variant's.
        target: What was timed; None for counted GFLOPs, which are every machine's.
    """

    unit: Unit
    per_call: Mapping[str, float]
    swap: Mapping[str, float]
    target: Target | None = None

    def of(self, calls: Sequence[str]) -> float:
        """Cost of a whole run, per image; ``calls`` names the variant of every call."""
        swaps = sum(self.swap[variant] for before, variant in pairwise(calls) if before != variant)
        return sum(self.per_call[variant] for variant in calls) + swaps


def counted_cost(bundle: Bundle) -> CallCost:
    """True GFLOPs: what the paper's search weighed, less attention. A swap computes nothing."""
    per_call = {variant.id: gflops(variant.macs) for variant in bundle.manifest.variants}
    return CallCost("GFLOPs", per_call, dict.fromkeys(per_call, 0.0))


def measured_cost(
    bundle: Bundle, backend: str, options: EngineOptions, batch: int, calls: Sequence[str] = ()
) -> CallCost:
    """Milliseconds, by the table that ``ddsm bench --save`` kept on this machine.

    Args:
        bundle: With its tables.
        backend: A backend, or ``auto``: the one that a run of these calls would take.
        options: Device, precision and threads.
        batch: Images per call.
        calls: The variant of every call; none: the full width throughout.

    Raises:
        BundleError: no table for this target, a damaged one, or one from another machine.
        BackendError: the backend, device or precision is not there.
    """
    if backend == "auto":
        fastest = fastest_backend(bundle, calls or [bundle.full.id], options, batch)
        backend = fastest or choose_backend("auto", options.device)
    table = _own_table(bundle, engine_target(backend, options, batch))
    return CallCost(
        "ms",
        {variant: timing.median_ms / batch for variant, timing in table.timings.items()},
        # Less than nothing is noise: a variant that ran hot for another's turn.
        {variant: max(timing.swap_ms, 0.0) / batch for variant, timing in table.timings.items()},
        table.target,
    )


def _own_table(bundle: Bundle, target: Target) -> LatencyTable:
    table = load_latency(bundle, target)
    here, there = cpu()[0], table.environment.get("cpu")
    if there != here:
        raise BundleError(
            f"{latency_file(bundle, target)} was measured on {str(there)[:80]}, this machine is {here}; measure here: "
            f"ddsm bench {bundle.path} --backend {target['backend']} --batch-size {target['batch']} --save"
        )
    return table
