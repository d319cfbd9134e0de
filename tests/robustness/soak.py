"""Many steps with random strategies: does the memory stay flat, and do the bytes stay the same?

python -m tests.robustness.soak --bundle tiny.bundle --backend openvino --calls 100000
"""

import argparse
import json
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ddsm_engine.pipeline import Pipeline
from ddsm_engine.plan import Plan, plan_calls
from ddsm_engine.samplers import make_sampler

STEPS = 50
BATCH = 2
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Soak:
    """What a soak showed.

    Attributes:
        backend: Which.
        calls: Engine calls.
        swaps: Changes of the variant between two calls.
        seconds: Wall time.
        resident_mb: Resident memory after the first tenth of the calls.
        leaked_bytes: Growth from there to the end: median of the last tenth over the median of the second.
        bytes_per_call: The same per call.
        same_bytes: How often a run was repeated and gave the same bytes.
    """

    backend: str
    calls: int
    swaps: int
    seconds: float
    resident_mb: float
    leaked_bytes: int
    bytes_per_call: float
    same_bytes: int


def soak(bundle: Path, backend: str, calls: int, seed: int = 0) -> Soak:
    """Run random strategies until so many calls were made; every twentieth run is the first one again.

    Raises:
        AssertionError: a repeated run gave other bytes.
    """
    rng = random.Random(seed)
    resident: list[int] = []
    done = swaps = repeats = 0
    first: bytes | None = None
    started = time.monotonic()
    with Pipeline.from_bundle(bundle, backend=backend, threads=1) as pipe:
        sampler = make_sampler("ddim", pipe.bundle.manifest.noise_schedule, STEPS, clip_sample=1.0)
        variants = list(pipe.bundle.variants)

        def run(plan: Plan, noise_seed: int) -> bytes:
            (batch,) = pipe.batches(plan, num_images=BATCH, batch_size=BATCH, seed=noise_seed)
            return batch.x_final.tobytes()

        tables = pipe.bundle.time_tables()
        fixed = plan_calls(random_strategy(variants, random.Random(seed)), sampler, tables)
        while done < calls:
            if done // STEPS % 20 == 0:
                plan, images = fixed, run(fixed, seed)
                if first not in (None, images):
                    raise AssertionError(f"{backend}: other bytes after {done} calls")
                first, repeats = images, repeats + 1
            else:
                plan = plan_calls(random_strategy(variants, rng), sampler, tables)
                run(plan, rng.randrange(1 << 32))
            done += STEPS
            swaps += len(plan.segments) - 1
            resident.append(resident_bytes())
    tenth = max(1, len(resident) // 10)
    leaked = int(np.median(resident[-tenth:]) - np.median(resident[tenth : 2 * tenth]))
    return Soak(
        backend=backend,
        calls=done,
        swaps=swaps,
        seconds=round(time.monotonic() - started, 1),
        resident_mb=round(resident[tenth] / 1e6, 1),
        leaked_bytes=leaked,
        bytes_per_call=round(leaked / (0.8 * done), 3),
        same_bytes=repeats,
    )


def random_strategy(variants: list[str], rng: random.Random) -> list[str]:
    """Runs of random length, from one call to all of them."""
    chosen: list[str] = []
    while len(chosen) < STEPS:
        chosen += [rng.choice(variants)] * rng.choice((1, 1, 2, 5, 10, STEPS))
    return chosen[:STEPS]


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


def main() -> None:
    """Print the result as JSON."""
    p = argparse.ArgumentParser(description="Run random strategies and watch the memory.")
    p.add_argument("--bundle", type=Path, required=True)
    p.add_argument("--backend", required=True)
    p.add_argument("--calls", type=int, default=100_000)
    arguments = p.parse_args()
    print(json.dumps(asdict(soak(arguments.bundle, arguments.backend, arguments.calls))))


if __name__ == "__main__":
    main()
