"""What does it take to hold these variants open? A fresh process opens them, runs each once and prints what that took.

    python -m benchmarks._resident cifar10.bundle onnxruntime --variants w032,w128 --batch-size 1

It holds nothing but what a run needs, so it imports no other benchmark, for they import torch. Imports are part of the
figures, and therefore stand inside the functions, where the clock runs. Linux.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = argparse.ArgumentParser(prog="python -m benchmarks._resident", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("bundle", type=Path)
    p.add_argument("backend", choices=("openvino", "onnxruntime", "native"))
    p.add_argument("--variants", required=True, metavar="ID,…")
    p.add_argument("--batch-size", type=int, default=1)
    p.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    arguments = p.parse_args(argv)
    started = time.perf_counter()
    from ddsm_engine.cli import guarded

    return guarded(lambda: print(json.dumps(hold_open(arguments, started))))


def hold_open(arguments: argparse.Namespace, started: float) -> dict[str, float]:
    """Open the variants and run each once.

    Returns:
        ``import_s``, ``cold_start_s`` (until the last variant is open, imports included), ``peak_bytes`` (the process's
        largest resident memory) and ``built``, how many of the engines `ddsm build` had made.

    Raises:
        BackendError: a variant that does not open or is not finite, or a process that has torch in it.
        BundleError: a damaged bundle, or one without such a variant.
    """
    import numpy as np

    from ddsm_engine.backends import engine_target, open_engines
    from ddsm_engine.backends.engine import EngineOptions
    from ddsm_engine.bundle import Bundle
    from ddsm_engine.engine_cache import EngineCache
    from ddsm_engine.errors import BackendError, BundleError

    backend, batch = arguments.backend, arguments.batch_size
    importlib.import_module(f"ddsm_engine.backends.{backend}")
    import_s = time.perf_counter() - started

    bundle, options = Bundle.open(arguments.bundle), EngineOptions(precision=arguments.precision)
    names = arguments.variants.split(",")
    if not set(names) <= bundle.variants.keys():
        raise BundleError(f"{bundle.path} lacks one of {arguments.variants}; it has {', '.join(bundle.variants)}")
    variants = [bundle.variants[name] for name in names]
    engines = open_engines(backend, bundle, variants, batch, options)
    cold_start_s = time.perf_counter() - started

    sample = np.zeros((batch, *bundle.manifest.spec.sample_shape), np.float32)
    features = np.repeat(bundle.time_table(variants[0])[[0]], batch, axis=0)
    for name, engine in engines.items():
        out = np.full_like(sample, np.nan)
        engine.bind({"sample": sample, "time_features": features}, {"out_sample": out})
        engine.run()
        if not np.isfinite(out).all():
            raise BackendError(f"{name} on {backend} answers with values that are not finite")
    peak = peak_bytes()
    if "torch" in sys.modules:
        raise BackendError("torch was imported, and the figures would count it")
    kept = EngineCache(bundle, engine_target(backend, options, batch))
    built = sum(kept.load(variant) is not None for variant in variants)
    return {"import_s": import_s, "cold_start_s": cold_start_s, "peak_bytes": peak, "built": built}


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    # Not ru_maxrss: a new process inherits its parent's, and the parent here has torch in it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return int(status["VmHWM"].split()[0]) << 10


if __name__ == "__main__":
    sys.exit(main())
