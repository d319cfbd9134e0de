"""Does an artefact compute what the network it was made from computes? Both answer the same probes and are compared.

Export asks before a bundle is written, ``ddsm verify`` asks again on the machine that runs it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.backends import open_engine
from ddsm_engine.backends.engine import Arrays, Engine, EngineOptions
from ddsm_engine.bundle import Bundle, Parity
from ddsm_engine.errors import BackendError
from ddsm_engine.pipeline import Pipeline, choose_batch_size
from ddsm_engine.plan import Plan
from ddsm_engine.spec import UNetSpec
from ddsm_engine.time_table import TimeTable

Images = NDArray[np.float32]

Engines = tuple[str, EngineOptions]
"""A backend, and how its engines are opened."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far an artefact may be from its network, and why so far.

    Attributes:
        relative_l2: Largest ‖artefact - network‖ / ‖network‖ over a batch.
        reason: What the difference comes from, and what was observed.
    """

    relative_l2: float
    reason: str


TOLERANCES: Final[Mapping[str, Tolerance]] = {
    "fp32": Tolerance(5e-6, "only the order of sums and fused multiply-adds differ (observed 4e-7 to 2.1e-6)"),
    "fp16": Tolerance(1e-2, "every activation is rounded to 11 bits some fifty times in a row (observed 4e-4 to 3e-3)"),
    "bf16": Tolerance(5e-2, "as fp16 with 8 bits, three fewer (observed 5e-3 to 2.3e-2, OpenVINO with matrix tiles)"),
}
"""By what is really computed, see ``effective_precision``. The bf16 figures are largest differences relative to the
largest value, 2/8 to 8/8 with random weights, on another CPU than this project is tested on; torch's bf16 autocast lies
6e-3 to 1.0e-2 (relative L2) from fp32 on the network of the tests. An artefact in bf16 lies 6e-3 to 8e-3 from it where
torch computes it in bf16, and 2.7e-3 to 3.7e-3 where OpenVINO computes it in fp32: the weights alone are rounded."""

BATCHES: Final = (1, 3)
"""Batch sizes of the probes: a file that froze the example's batch fails on one of them."""

SEED: Final = 20231005

PEAK_TO_PEAK: Final = 2.0
"""Of images in [-1, 1]."""


def effective_precision(artefact: str, computed: str, backend: str = "") -> str:
    """The coarser of what an artefact holds and what an engine computes in; ``auto`` is what the artefact holds.

    The native backend reads no artefact, but the weights.
    """
    if backend == "native":
        return "fp32"
    coarseness = list(TOLERANCES)
    return max(artefact, artefact if computed == "auto" else computed, key=coarseness.index)


# --- one call ---------------------------------------------------------------------------------------------------------


def make_probes(spec: UNetSpec, table: TimeTable, batches: Sequence[int] = BATCHES) -> list[Arrays]:
    """Random inputs of a network, one set per batch size: ``sample`` [B, C, H, W] and ``time_features`` [B, F].

    Timesteps are the clean end alone, then both ends and the middle of the schedule.
    """
    generator = np.random.default_rng(SEED)
    return [
        {
            "sample": generator.standard_normal((batch, *spec.sample_shape), dtype=np.float32),
            "time_features": table[np.linspace(0, table.timesteps - 1, batch).round()],
        }
        for batch in batches
    ]


def answer(open_at: Callable[[int], Engine], probes: Sequence[Arrays]) -> list[Images]:
    """What an engine answers, float32 [B, C, H, W] per probe; NaN where it writes nothing.

    Args:
        open_at: Opens the engine for a batch size. One is open at a time, and it is closed.
        probes: See ``make_probes``.
    """
    answers = []
    for probe in probes:
        out = np.full_like(probe["sample"], np.nan)
        engine = open_at(len(out))
        try:
            engine.bind(probe, {"out_sample": out})
            engine.run()
        finally:
            engine.close()
        answers.append(out)
    return answers


def compare(found: Sequence[Images], expected: Sequence[Images], *, precision: str, backend: str) -> Parity:
    """The worst figures over all probes.

    Args:
        found: Answers of the artefact.
        expected: Answers of the reference.
        precision: Effective precision of ``found``; chooses the tolerance.
        backend: What ran the artefact.
    """
    figures = [distance(one, other) for one, other in zip(found, expected, strict=True)]
    return Parity(
        relative_l2=max(relative for relative, _ in figures),
        max_abs=max(largest for _, largest in figures),
        tolerance=TOLERANCES[precision].relative_l2,
        backend=backend,
    )


def distance(found: Images, expected: Images) -> tuple[float, float]:
    """Relative L2 and the largest difference of one value; both infinite where an input is not finite."""
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return math.inf, math.inf
    exact = expected.astype(np.float64)
    difference = found - exact
    size, scale = float(np.linalg.norm(difference)), float(np.linalg.norm(exact))
    relative = size / scale if scale else math.inf if size else 0.0
    return relative, float(np.abs(difference).max())


@dataclass(frozen=True, slots=True)
class VariantParity:
    """One variant on one backend beside the reference.

    Attributes:
        variant: Its id.
        precision: Effective precision, a key of ``TOLERANCES``.
        parity: The figures, and the backend that ran the artefact.
    """

    variant: str
    precision: str
    parity: Parity

    @property
    def excess(self) -> float:
        """Relative L2 as a multiple of the tolerance; above 1 the artefact is not its network."""
        return self.parity.relative_l2 / self.parity.tolerance


def compare_variants(
    bundle: Bundle, reference: Engines, candidates: Sequence[Engines], batches: Sequence[int] = BATCHES
) -> Iterator[VariantParity]:
    """Let every variant answer a probe of each batch size on the reference and on every candidate.

    Raises:
        BackendError: an engine that does not open or run, or a reference that is not finite.
    """
    tables = bundle.time_tables()
    for variant in bundle.manifest.variants:
        probes = make_probes(bundle.spec(variant), tables[variant.id], batches)
        expected, *found = (
            answer(partial(open_engine, backend, bundle, variant, options=options), probes)
            for backend, options in (reference, *candidates)
        )
        if not all(np.isfinite(out).all() for out in expected):
            raise BackendError(
                f"{variant.id} on {reference[0]} answers with values that are not finite; export the bundle again from "
                f"a supernet whose weights are sound"
            )
        for (backend, options), answers in zip(candidates, found, strict=True):
            precision = effective_precision(variant.precision, options.precision, backend)
            parity = compare(answers, expected, precision=precision, backend=backend)
            yield VariantParity(variant.id, precision, parity)


# --- a whole run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryParity:
    """A whole run beside the reference's run of the same plan and noise.

    Attributes:
        backend: What ran it.
        precision: Effective precision.
        psnr_worst_db: PSNR of the clipped images: the worst image's. Infinite where they are equal.
        psnr_mean_db: The mean over images.
        max_abs: Largest difference of one value of the final state, not clipped.
        relative_l2: ‖state - reference's‖ / ‖reference's‖ of the final state, not clipped.
        seconds: Of the run, opening excluded.
        reference_seconds: Of the reference's run.
    """

    backend: str
    precision: str
    psnr_worst_db: float
    psnr_mean_db: float
    max_abs: float
    relative_l2: float
    seconds: float
    reference_seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """A run that several engines repeat: same plan, same noise.

    ``batch_size`` is that of the engines that are compared: of some there is none for any other.
    """

    bundle: Bundle
    plan: Plan
    num_images: int
    batch_size: int
    seed: int

    def compare(self, reference: Engines, candidates: Sequence[Engines]) -> Iterator[TrajectoryParity]:
        """Run the reference, then every candidate; the engines of one are closed before the next one's are opened.

        Raises:
            BackendError: an engine that does not open or run, or a state that is not finite.
        """
        expected, reference_seconds = self._draw(reference, choose_batch_size(self.num_images, None))
        held = {self.bundle.variants[variant].precision for variant in self.plan.variants}
        artefact = max(held, key=list(TOLERANCES).index)
        for backend, options in candidates:
            found, seconds = self._draw((backend, options), self.batch_size)
            psnr = psnr_db(np.clip(found, -1, 1), np.clip(expected, -1, 1))
            relative_l2, max_abs = distance(found, expected)
            yield TrajectoryParity(
                backend=backend,
                precision=effective_precision(artefact, options.precision, backend),
                psnr_worst_db=min(psnr),
                psnr_mean_db=sum(psnr) / len(psnr),
                max_abs=max_abs,
                relative_l2=relative_l2,
                seconds=seconds,
                reference_seconds=reference_seconds,
            )

    def _draw(self, engines: Engines, size: int) -> tuple[Images, float]:
        """The final state, not clipped, and seconds."""
        with Pipeline(self.bundle, *engines) as pipe:
            batches = list(pipe.batches(self.plan, num_images=self.num_images, batch_size=size, seed=self.seed))
        return np.concatenate([batch.x_final for batch in batches]), sum(batch.latency_ms for batch in batches) / 1e3


def psnr_db(found: Images, expected: Images) -> list[float]:
    """Peak signal-to-noise ratio of every image in [-1, 1], dB; infinite where the images are equal."""
    errors = ((found.astype(np.float64) - expected) ** 2).reshape(len(found), -1).mean(axis=1)
    return [10 * math.log10(PEAK_TO_PEAK**2 / error) if error else math.inf for error in errors.tolist()]
