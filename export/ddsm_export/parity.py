"""Is the artefact the network it was made from? Both are run on the same random inputs and compared."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ddsm_engine.backends import installed_backends
from ddsm_engine.backends.engine import Engine, EngineOptions
from ddsm_engine.bundle import Parity
from ddsm_engine.errors import BackendError
from ddsm_engine.networks.unet import UNet
from ddsm_engine.time_table import TimeTable
from ddsm_export.onnx import input_infos

TOLERANCES = {"fp32": 5e-6, "fp16": 1e-2}
"""Relative L2 by the artefact's precision. fp32 differs by the order of sums only (observed 4e-7 to 1e-6); fp16 rounds
every activation to 11 bits some fifty times in a row (observed 1e-3 to 3e-3)."""

BATCHES = (1, 3)
"""Batch sizes tried: a file that froze the example's batch fails on one of them."""

SEED = 20231005


def measure_parity(artefact: Path, reference: UNet, table: TimeTable, precision: str) -> Parity:
    """Compare an ONNX file with the sliced torch network.

    Args:
        artefact: The ONNX file.
        reference: The sub-network in fp32.
        table: Its time features.
        precision: The artefact's.

    Returns:
        The worst figures over batch sizes and over timesteps from both ends of the schedule.

    Raises:
        BackendError: no backend installed that runs ONNX, or a difference beyond the tolerance.
    """
    backend = next((b for b in ("onnxruntime", "openvino") if b in installed_backends()), None)
    if backend is None:
        raise BackendError("an exported file must be compared before it is used: pip install 'ddsm-engine[cpu]'")
    generator = np.random.default_rng(SEED)
    relative_l2 = max_abs = 0.0
    for batch in BATCHES:
        shapes = {tensor.name: tensor.at_batch(batch) for tensor in input_infos(reference.spec)}
        sample = generator.standard_normal(shapes["sample"], dtype=np.float32)
        timesteps = generator.integers(0, table.timesteps, batch)
        timesteps[0] = 0 if batch == 1 else table.timesteps - 1
        features = table[timesteps]
        expected = forward_torch(reference, sample, features)
        found = forward_engine(_open(backend, artefact, shapes), sample, features)
        if not np.isfinite(found).all():
            raise BackendError(f"{artefact.name} answers with values that are not finite. The bundle was not written")
        difference = np.abs(found.astype(np.float64) - expected)
        max_abs = max(max_abs, float(difference.max()))
        relative_l2 = max(relative_l2, float(np.linalg.norm(difference) / np.linalg.norm(expected)))
    tolerance = TOLERANCES[precision]
    if relative_l2 > tolerance:
        raise BackendError(
            f"{artefact.name} differs from the sliced network by {relative_l2:.2e} (relative L2, {backend}); "
            f"{precision} must stay within {tolerance:.0e}. The bundle was not written"
        )
    return Parity(relative_l2=relative_l2, max_abs=max_abs, tolerance=tolerance, backend=backend)


def _open(backend: str, artefact: Path, shapes: dict[str, tuple[int, ...]]) -> Engine:
    options = EngineOptions(precision="fp32")
    if backend == "onnxruntime":
        from ddsm_engine.backends.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(artefact, options)
    from ddsm_engine.backends.openvino import OpenVINOEngine

    return OpenVINOEngine(artefact, shapes, options)


def forward_torch(network: UNet, sample: NDArray[np.float32], features: NDArray[np.float32]) -> NDArray[np.float32]:
    """One forward of the torch network."""
    with torch.inference_mode():
        return network(torch.from_numpy(sample), torch.from_numpy(features)).numpy()


def forward_engine(engine: Engine, sample: NDArray[np.float32], features: NDArray[np.float32]) -> NDArray[np.float32]:
    """One forward of an engine, which is closed afterwards."""
    output = np.full_like(sample, np.nan)
    engine.bind({"sample": sample, "time_features": features}, {"out_sample": output})
    engine.run()
    engine.close()
    return output
