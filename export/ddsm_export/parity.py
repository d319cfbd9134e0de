"""Is an exported file the network it was made from? Asked before the bundle that holds it is written."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ddsm_engine import parity
from ddsm_engine.backends import installed_backends
from ddsm_engine.backends.engine import Engine, EngineOptions
from ddsm_engine.backends.torch import TorchEngine
from ddsm_engine.bundle import Parity, denoiser_inputs
from ddsm_engine.errors import BackendError
from ddsm_engine.networks.unet import UNet
from ddsm_engine.time_table import TimeTable

FP32 = EngineOptions(precision="fp32")

CHECKED_BY: Final[Mapping[str, tuple[str, ...]]] = {
    "fp32": ("onnxruntime", "openvino"),
    "fp16": ("onnxruntime", "openvino"),
    "bf16": ("openvino",),
}
"""By an artefact's precision, the backends that run it on a CPU. ONNX Runtime has no kernels for bf16 there; OpenVINO
computes with the file's bf16 weights in fp32, which shows what rounding the weights does."""


def measure_parity(artefact: Path, reference: UNet, table: TimeTable, precision: str) -> Parity:
    """Compare an ONNX file with the sliced torch network.

    Args:
        artefact: The ONNX file.
        reference: The sub-network in fp32.
        table: Its time features.
        precision: The artefact's.

    Returns:
        The worst figures over the probes of ``ddsm_engine.parity``.

    Raises:
        BackendError: no backend installed that runs it, or a difference beyond the tolerance.
    """
    backend = next((b for b in CHECKED_BY[precision] if b in installed_backends()), None)
    if backend is None:
        raise BackendError(
            f"an exported file must be compared before it is used, and one in {precision} runs on "
            f"{' or '.join(CHECKED_BY[precision])}: pip install 'ddsm-engine[cpu]'"
        )
    probes = parity.make_probes(reference.spec, table)
    expected = parity.answer(lambda batch: TorchEngine(reference, FP32), probes)
    found = parity.answer(lambda batch: _open(backend, artefact, reference, batch), probes)
    measured = parity.compare(found, expected, precision=precision, backend=backend)
    if not math.isfinite(measured.relative_l2):
        raise BackendError(f"{artefact.name} answers with values that are not finite. The bundle was not written")
    if measured.relative_l2 > measured.tolerance:
        raise BackendError(
            f"{artefact.name} differs from the sliced network by {measured.relative_l2:.2e} (relative L2, {backend}); "
            f"{precision} must stay within {measured.tolerance:.0e}. The bundle was not written"
        )
    return measured


def _open(backend: str, artefact: Path, reference: UNet, batch: int) -> Engine:
    if backend == "onnxruntime":
        from ddsm_engine.backends.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(artefact, FP32)
    from ddsm_engine.backends.openvino import OpenVINOEngine

    return OpenVINOEngine(
        artefact, {tensor.name: tensor.at_batch(batch) for tensor in denoiser_inputs(reference.spec)}, FP32
    )
