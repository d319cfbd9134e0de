"""Is it right? Every engine and every peer answers before it is timed, and the CPU answers the same in float32."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.backends import REFERENCE, open_engine
from ddsm_engine.backends.engine import Engine, EngineOptions
from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.errors import BackendError
from ddsm_engine.parity import compare, effective_precision

Images = NDArray[np.float32]

SEED: Final = 20231005


def probe(bundle: Bundle, variant: Variant, batch: int) -> tuple[Images, Images]:
    """A random batch [B, C, H, W] and time features [B, F] of timesteps from one end of the schedule to the other.

    Whatever the batch, its first image is the same, and so is its last: the reference answers these two alone.
    """
    spec, table = bundle.spec(variant), bundle.time_table(variant)
    ends = np.random.default_rng(SEED).standard_normal((2, *spec.sample_shape), dtype=np.float32)
    sample = np.random.default_rng(SEED + 1).standard_normal((batch, *spec.sample_shape), dtype=np.float32)
    sample[0], timesteps = ends[0], np.linspace(0, table.timesteps - 1, batch).round()
    if batch > 1:
        sample[-1] = ends[1]
    return sample, table[timesteps]


@cache
def _expected(path: Path, checksum: str, identifier: str) -> Images:  # noqa: ARG001 - tells bundles apart
    bundle = Bundle.open(path)
    variant = bundle.variants[identifier]
    return _ask(open_engine(REFERENCE, bundle, variant, 2, EngineOptions(precision="fp32")), *probe(bundle, variant, 2))


def check_engine(bundle: Bundle, variant: Variant, engine: Engine, batch: int, name: str) -> float:
    """Let an engine answer, and leave it bound.

    Returns:
        Relative L2 from the reference.

    Raises:
        BackendError: beyond the tolerance of its precision.
    """
    sample, features = probe(bundle, variant, batch)
    found = np.full_like(sample, np.nan)
    engine.bind({"sample": sample, "time_features": features}, {"out_sample": found})
    engine.run()
    return check_answer(bundle, variant, found, engine.precision, name)


def check_answer(bundle: Bundle, variant: Variant, found: Images, precision: str, name: str) -> float:
    """Compare the first and the last image of an answer to ``probe``.

    Returns:
        Relative L2 from the reference.

    Raises:
        BackendError: beyond the tolerance, or not finite anywhere.
    """
    expected = _expected(bundle.path, bundle.manifest.checksum, variant.id)
    rows = [0, -1] if len(found) > 1 else [0]
    effective = effective_precision(variant.precision, precision)
    parity = compare([found[rows]], [expected[rows]], precision=effective, backend=name)
    if not np.isfinite(found).all() or parity.relative_l2 > parity.tolerance:
        raise BackendError(
            f"{variant.id} on {name} ({effective}) differs from the fp32 reference by {parity.relative_l2:.1e} "
            f"(relative L2, at most {parity.tolerance:.0e}); it was not timed"
        )
    return parity.relative_l2


def _ask(engine: Engine, sample: Images, features: Images) -> Images:
    found = np.full_like(sample, np.nan)
    try:
        engine.bind({"sample": sample, "time_features": features}, {"out_sample": found})
        engine.run()
    finally:
        engine.close()
    return found


Answer = Callable[[Images, Images], Images]
"""Sample [B, C, H, W], time features [B, F] → predicted noise."""


def check_callable(bundle: Bundle, variant: Variant, answer: Answer, batch: int, precision: str, name: str) -> float:
    """``check_engine`` for what is no engine."""
    return check_answer(bundle, variant, answer(*probe(bundle, variant, batch)), precision, name)
