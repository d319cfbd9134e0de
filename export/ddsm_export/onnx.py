"""One static sub-network → one ONNX file with a dynamic batch and no weight larger than it needs."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ddsm_engine.bundle import denoiser_inputs, denoiser_outputs
from ddsm_engine.networks.unet import UNet

OPSETS = range(17, 22)
"""Opsets that ONNX Runtime, OpenVINO and TensorRT all take."""

DEFAULT_OPSET = 18
"""The exporter's own: every other one is a conversion of it."""


class _Float32Norm(nn.Module):
    """A group norm whose statistics and affine stay in float32 inside a half-precision network."""

    def __init__(self, norm: nn.GroupNorm, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm, self.dtype = norm, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.float()).to(self.dtype)


class ExportForm(nn.Module):
    """The sub-network as it is exported: the blocks' time projections in one product, and the precision in place.

    The time embedding and its projections (one linear a block) become three matrix products. In ``fp16`` the
    convolutions and attention compute in half; norm statistics, the time embedding and the output convolution stay in
    fp32, and so do the inputs and the output.
    """

    def __init__(self, unet: UNet, precision: Literal["fp32", "fp16"]) -> None:
        """Take over ``unet``: its modules are changed in place."""
        super().__init__()
        blocks = unet.residual_blocks()
        self.sizes = [block.time.out_features for block in blocks]
        self.projection = nn.Linear(blocks[0].time.in_features, sum(self.sizes), device="meta")
        self.projection.weight = nn.Parameter(torch.cat([block.time.weight for block in blocks]), requires_grad=False)
        self.projection.bias = nn.Parameter(torch.cat([block.time.bias for block in blocks]), requires_grad=False)
        self.time, self.unet = unet.time, unet
        self.dtype = torch.float16 if precision == "fp16" else torch.float32
        if precision == "fp16":
            self._halve()

    def _halve(self) -> None:
        output = self.unet.tail.conv
        for module in self.unet.modules():
            if isinstance(module, nn.Conv2d) and module is not output:
                module.half()
        for owner in list(self.unet.modules()):
            for name, child in list(owner.named_children()):
                if isinstance(child, nn.GroupNorm) and not isinstance(owner, _Float32Norm):
                    target = torch.float32 if owner is self.unet.tail else torch.float16
                    setattr(owner, name, _Float32Norm(child, target))

    def forward(self, sample: Tensor, time_features: Tensor) -> Tensor:
        """[B, C, H, W] and [B, features], float32 → [B, C, H, W], float32."""
        projections = self.projection(self.time(time_features)).to(self.dtype).split(self.sizes, dim=1)
        return self.unet.denoise(sample.to(self.dtype), list(projections))


def onnx_from_subnetwork(
    unet: UNet, path: Path, *, precision: Literal["fp32", "fp16"] = "fp32", opset: int = DEFAULT_OPSET
) -> None:
    """Write the ONNX file of one static sub-network.

    Args:
        unet: The sub-network; it is taken over and cannot be used afterwards.
        path: One file, weights included.
        precision: ``fp16`` keeps fp32 islands, see ``ExportForm``.
        opset: 17 to 21.
    """
    spec = unet.spec
    form = ExportForm(unet, precision).eval()
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
