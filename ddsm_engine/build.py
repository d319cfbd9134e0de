"""``ddsm build BUNDLE``: compile every variant for this machine once, so that later starts need not."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.backends.engine import Engine, EngineOptions
from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.cli import guarded
from ddsm_engine.engine_cache import EngineCache
from ddsm_engine.errors import BackendError
from ddsm_engine.noise import INITIAL, SeededNoise
from ddsm_engine.pipeline import DEFAULT_BATCH


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = argparse.ArgumentParser(
        prog="ddsm build", description="Compile every variant for this machine; `ddsm run` then loads the result."
    )
    p.add_argument("bundle", type=Path)
    p.add_argument("--backend", choices=("openvino",), default="openvino")
    p.add_argument("--batch-size", type=int, default=DEFAULT_BATCH, help=f"images per call (default {DEFAULT_BATCH})")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    p.add_argument("--threads", type=int, default=0, help="threads per engine (default: the backend's choice)")
    arguments = p.parse_args(argv)

    def command() -> None:
        options = EngineOptions(precision=arguments.precision, threads=arguments.threads)
        build(Bundle.open(arguments.bundle), arguments.batch_size, options)

    return guarded(command)


def build(bundle: Bundle, batch: int, options: EngineOptions) -> None:
    """Compile, check and keep every variant; each is kept as soon as it is ready.

    Raises:
        BackendError: OpenVINO cannot compile a variant, or a loaded engine answers otherwise than the compiled one.
        BundleError: an artefact is damaged.
        OutputError: there is nowhere to keep engines.
    """
    from ddsm_engine.backends.openvino import target

    if batch < 1:
        raise BackendError(f"a batch holds at least one image, found --batch-size {batch}")
    cache = EngineCache(bundle, target(options, batch))
    for variant in bundle.variants.values():
        print(_build(bundle, variant, batch, options, cache), file=sys.stderr, flush=True)
    print(
        f"{cache.kept_in}: {len(bundle.variants)} engines for batch {batch}; `ddsm run --batch-size {batch}` loads them"
    )


def _build(bundle: Bundle, variant: Variant, batch: int, options: EngineOptions, cache: EngineCache) -> str:
    from ddsm_engine.backends.openvino import OpenVINOEngine

    shapes = {tensor.name: tensor.at_batch(batch) for tensor in variant.inputs}
    model = bundle.artefact(variant)
    started = time.perf_counter()
    compiled = OpenVINOEngine(model, shapes, options)
    compiled_s = time.perf_counter() - started
    exported = compiled.export()
    started = time.perf_counter()
    loaded = OpenVINOEngine(model, shapes, options, exported)
    loaded_s = time.perf_counter() - started
    if not np.array_equal(_answer(compiled, bundle, variant, batch), _answer(loaded, bundle, variant, batch)):
        raise BackendError(f"the engine of {variant.id} answers otherwise once it is loaded again; it was not kept")
    cache.store(variant, exported)
    return f"{variant.id}  {len(exported) / 1e6:6.1f} MB  compiled in {compiled_s:.2f} s, loads in {loaded_s:.2f} s"


def _answer(engine: Engine, bundle: Bundle, variant: Variant, batch: int) -> NDArray[np.float32]:
    """One forward pass on the noise of seed 0 at the middle timestep; the engine is closed."""
    spec = bundle.spec(variant)
    sample = np.empty((batch, *spec.sample_shape), np.float32)
    SeededNoise(0).starting_at(0).fill(sample, INITIAL, 0)
    features = np.repeat(bundle.time_table(variant)[[spec.timesteps // 2]], batch, axis=0)
    output = np.zeros_like(sample)
    engine.bind({"sample": sample, "time_features": features}, {"out_sample": output})
    engine.run()
    engine.close()
    return output


if __name__ == "__main__":
    sys.exit(main())
