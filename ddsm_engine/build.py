"""``ddsm build BUNDLE``: compile every variant for this machine once, so that later starts need not."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ddsm_engine.backends import open_device
from ddsm_engine.backends.device import Device, StagedEngine
from ddsm_engine.backends.engine import PRECISIONS, Engine, EngineOptions, artefact_precision
from ddsm_engine.backends.tensorrt import (
    LIBRARIES,
    TensorRTEngine,
    built_target,
    import_tensorrt,
    shapes_at,
)
from ddsm_engine.backends.tensorrt_build import Built, build_engine
from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.cli import batch_sizes, guarded
from ddsm_engine.engine_cache import EngineCache
from ddsm_engine.errors import BackendError, OutputError
from ddsm_engine.noise import INITIAL, SeededNoise
from ddsm_engine.pipeline import DEFAULT_BATCH

LOG = "build.log"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = argparse.ArgumentParser(
        prog="ddsm build", description="Compile every variant for this machine; `ddsm run` then loads the result."
    )
    p.add_argument("bundle", type=Path)
    p.add_argument("--backend", choices=("openvino", *LIBRARIES), default="openvino")
    p.add_argument(
        "--batch-size", default=str(DEFAULT_BATCH), metavar="N,…",
        help=f"images per call, engines for each (default {DEFAULT_BATCH})",
    )  # fmt: skip
    p.add_argument("--precision", choices=PRECISIONS, default="auto")
    p.add_argument("--threads", type=int, default=0, help="threads per engine of openvino (default: its choice)")
    arguments = p.parse_args(argv)

    def command() -> None:
        options = EngineOptions(precision=arguments.precision, threads=arguments.threads)
        batches = batch_sizes(arguments.batch_size)
        bundle = Bundle.open(arguments.bundle)
        if arguments.backend in LIBRARIES:
            build_ahead(bundle, arguments.backend, batches, options)
        else:
            for batch in batches:
                build(bundle, batch, options)

    return guarded(command)


# --- OpenVINO: what it would compile at every start -------------------------------------------------------------------


def build(bundle: Bundle, batch: int, options: EngineOptions) -> None:
    """Compile, check and keep every variant; each is kept as soon as it is ready.

    Raises:
        BackendError: OpenVINO cannot compile a variant, or a loaded engine answers otherwise than the compiled one.
        BundleError: an artefact is damaged.
        OutputError: there is nowhere to keep engines.
    """
    from ddsm_engine.backends.openvino import target

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


# --- TensorRT: what it never builds at a start ------------------------------------------------------------------------


def build_ahead(bundle: Bundle, name: str, batches: Sequence[int], options: EngineOptions) -> None:
    """Build, try and keep an engine for every variant and batch size; each is kept as soon as it is ready.

    Args:
        bundle: Whose variants.
        name: ``tensorrt``, which needs the GPU, or ``tensorrt-rtx``, whose engines are only tried where there is one.
        batches: Batch sizes.
        options: Their precision must be the artefacts' own, or ``auto``.

    Raises:
        BackendError: the library or the GPU is not there, a variant cannot be built, or its engine does not run.
        BundleError: an artefact is damaged.
        OutputError: there is nowhere to keep engines.
    """
    trt = import_tensorrt(name)
    precisions = {variant.id: artefact_precision(options, variant) for variant in bundle.variants.values()}
    device = open_gpu(name)
    try:
        for batch in batches:
            for precision in dict.fromkeys(precisions.values()):
                target = built_target(name, precision, batch, device.properties if device is not None else None)
                same = [variant for variant in bundle.variants.values() if precisions[variant.id] == precision]
                _build_alike(trt, EngineCache(bundle, target), same, device)
    finally:
        if device is not None:
            device.close()


def open_gpu(name: str) -> Device | None:
    """The GPU; None where there is none and the backend builds without one.

    Raises:
        BackendError: the backend needs one.
    """
    try:
        return open_device(name)
    except BackendError:
        if name == "tensorrt":
            raise
    return None


def _build_alike(trt: Any, cache: EngineCache, variants: Sequence[Variant], device: Device | None) -> None:  # noqa: ANN401
    """Build variants for one target."""
    name, batch = str(cache.target["backend"]), int(cache.target["batch"])
    timings = cache.load_timings() if name == "tensorrt" else None
    with _new_log(cache.kept_in / LOG) as log:
        for variant in variants:
            try:
                built = _build_one(trt, cache.bundle, variant, batch, log, timings)
                tried = "not loaded" if device is None else _try(trt, cache, variant, built.engine, device)
            except BackendError as error:
                raise BackendError(f"{variant.id}: {error}") from error
            cache.store(variant, built.engine)
            if built.timings is not None:
                cache.store_timings(built.timings)
                timings = built.timings
            size_mb = len(built.engine) / 1e6
            line = f"{variant.id}  {size_mb:6.1f} MB  built in {built.seconds:.2f} s, {tried}"
            print(line, file=sys.stderr, flush=True)
    use = f"`ddsm run --backend {name} --batch-size {batch}` loads them"
    use = "no GPU here: not loaded" if device is None else use
    print(f"{cache.kept_in}: {len(variants)} engines for batch {batch}, {LOG} beside them; {use}")


def _build_one(
    trt: Any,  # noqa: ANN401
    bundle: Bundle,
    variant: Variant,
    batch: int,
    log: TextIO,
    timings: bytes | None,
) -> Built:
    onnx = bundle.artefact(variant).read_bytes()
    shapes = {tensor.name: tensor.at_batch(batch) for tensor in variant.inputs}
    log.write(f"--- {variant.id}, batch {batch}\n")
    with tqdm(desc=variant.id, bar_format="{desc}", leave=False, disable=not sys.stderr.isatty()) as bar:
        return build_engine(
            trt, onnx, shapes, log=log, timings=timings,
            progress=lambda phase: bar.set_description_str(f"{variant.id}  {phase}"),
        )  # fmt: skip


def _try(trt: Any, cache: EngineCache, variant: Variant, built: bytes, device: Device) -> str:  # noqa: ANN401
    """Load an engine and run it once: what a builder gives back has not run yet."""
    batch = int(cache.target["batch"])
    started = time.perf_counter()
    with device.current():
        engine = TensorRTEngine(device, trt, built, shapes_at(variant, batch), variant.precision)
    loaded_s = time.perf_counter() - started
    if not np.isfinite(_answer(StagedEngine(device, engine), cache.bundle, variant, batch)).all():
        raise BackendError("its engine answers noise with numbers that are not finite; it was not kept")
    return f"loads in {loaded_s:.2f} s"


def _new_log(file: Path) -> TextIO:
    """A new file, line by line: a process that ends in the middle leaves what was said until then.

    What has its name is removed, as it may be a link that came with the bundle.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        return file.open("x", encoding="utf-8", errors="backslashreplace", buffering=1)
    except OSError as error:
        raise OutputError(f"the builder's log cannot be written to {file}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
