"""One static sub-network → one ONNX file with a dynamic batch and no weight larger than it needs."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ddsm_engine.bundle import denoiser_inputs, denoiser_outputs
from ddsm_engine.errors import OutputError
from ddsm_engine.networks.inference_form import DTYPES, InferenceForm
from ddsm_engine.networks.unet import UNet

OPSETS = range(17, 22)
"""Opsets that ONNX Runtime, OpenVINO and TensorRT all take."""

DEFAULT_OPSET = 18
"""The exporter's own: every other one is a conversion of it."""

BF16_OPSET = 22
"""The first in which a convolution may compute in bf16, and the only one that artefacts in bf16 are written in."""

ArtefactPrecision = Literal["fp32", "fp16", "bf16"]


def choose_opset(precision: ArtefactPrecision, wanted: int | None) -> int:
    """The opset of an artefact; None takes the one that fits its precision.

    Raises:
        OutputError: one in which ONNX does not allow this precision, or that not every backend takes.
    """
    allowed = range(BF16_OPSET, BF16_OPSET + 1) if precision == "bf16" else OPSETS
    if wanted is None:
        return BF16_OPSET if precision == "bf16" else DEFAULT_OPSET
    if wanted not in allowed:
        found = " to ".join(str(opset) for opset in sorted({allowed[0], allowed[-1]}))
        raise OutputError(f"files in {precision} are written in opset {found}, found {wanted}: leave --opset out")
    return wanted


def onnx_from_subnetwork(
    unet: UNet, path: Path, *, precision: ArtefactPrecision = "fp32", opset: int = DEFAULT_OPSET
) -> None:
    """Write the ONNX file of one static sub-network.

    Args:
        unet: The sub-network; it is taken over and cannot be used afterwards.
        path: One file, weights included.
        precision: ``fp16`` and ``bf16`` keep fp32 islands, see ``InferenceForm``.
        opset: See ``choose_opset``.
    """
    spec = unet.spec
    form = InferenceForm(unet, DTYPES[precision]).eval()
    write_onnx(
        form,
        (torch.zeros(2, *spec.sample_shape), torch.zeros(2, spec.time_features)),
        path,
        inputs=[tensor.name for tensor in denoiser_inputs(spec)],
        outputs=[tensor.name for tensor in denoiser_outputs(spec)],
        opset=opset,
    )


def write_onnx(
    module: nn.Module,
    example: tuple[Tensor, ...],
    path: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int = DEFAULT_OPSET,
) -> None:
    """Write one ONNX file, weights inside, with a dynamic first dimension of every input.

    Args:
        module: What is exported, in the mode that it is in.
        example: Its inputs at a batch of two: the exporter takes one for a constant.
        path: The file.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        opset: 17 to 21.
    """
    batch = torch.export.Dim("batch")
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # The exporter warns of its own internals on every call; whether the file is right is measured afterwards.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                example,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=[{0: batch} for _ in example],
            )
    finally:
        exporter_log.setLevel(level)
    assert program is not None  # it is None for the legacy exporter alone
    for node in program.model.graph:
        node.metadata_props.clear()  # the exporter's stack traces, with the paths of the machine that ran it
    program.save(path, external_data=False)
