"""A sub-network as it is run where speed counts: the time projections in one product, the precision in place."""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from ddsm_engine.networks.unet import NormSwish, UNet, swish

DTYPES: Final[Mapping[str, torch.dtype]] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Precision → what convolutions and attention compute in."""


class Float32Norm(nn.Module):
    """A group norm whose statistics and affine stay in float32 inside a half-precision network."""

    def __init__(self, norm: nn.GroupNorm, dtype: torch.dtype) -> None:
        """Normalise as ``norm`` does; the output, and the activation that may follow, are of ``dtype``."""
        super().__init__()
        self.norm, self.dtype, self.is_activated = norm, dtype, isinstance(norm, NormSwish)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        normed = nn.GroupNorm.forward(self.norm, x.float()).to(self.dtype)
        return swish(normed) if self.is_activated else normed


class InferenceForm(nn.Module):
    """The sub-network as it is exported, and as torch runs it on a GPU.

    The time embedding and its projections (one linear a block) become three matrix products. In float16 and bfloat16
    the convolutions and attention compute in it; norm statistics, the time embedding and the output convolution stay in
    float32, and so do the inputs and the output.
    """

    def __init__(
        self, unet: UNet, dtype: torch.dtype, norm: Callable[[nn.GroupNorm, torch.dtype], nn.Module] | None = None
    ) -> None:
        """Take over ``unet``: its modules are changed in place.

        Args:
            unet: The sub-network.
            dtype: What the convolutions and attention compute in.
            norm: What takes each norm's place, given it and the type of its output; by default ``Float32Norm`` where
                ``dtype`` is another than float32.
        """
        super().__init__()
        blocks = unet.residual_blocks()
        self.sizes = [block.time.out_features for block in blocks]
        self.projection = nn.Linear(blocks[0].time.in_features, sum(self.sizes), device="meta")
        self.projection.weight = nn.Parameter(torch.cat([block.time.weight for block in blocks]), requires_grad=False)
        self.projection.bias = nn.Parameter(torch.cat([block.time.bias for block in blocks]), requires_grad=False)
        self.time, self.unet = unet.time, unet
        self.dtype = dtype
        if dtype != torch.float32:
            for module in unet.modules():
                if isinstance(module, nn.Conv2d) and module is not unet.tail.conv:
                    module.to(dtype)
            norm = norm or Float32Norm
        if norm is not None:
            self._replace_norms(norm)

    def _replace_norms(self, norm: Callable[[nn.GroupNorm, torch.dtype], nn.Module]) -> None:
        found = [
            (owner, name, child)
            for owner in self.unet.modules()
            for name, child in owner.named_children()
            if isinstance(child, nn.GroupNorm)
        ]
        for owner, name, child in found:
            setattr(owner, name, norm(child, torch.float32 if owner is self.unet.tail else self.dtype))

    def forward(self, sample: Tensor, time_features: Tensor) -> Tensor:
        """[B, C, H, W] and [B, features], float32 → [B, C, H, W], float32."""
        projections = self.projection(self.time(time_features)).to(self.dtype).split(self.sizes, dim=1)
        return self.unet.denoise(sample.to(self.dtype), list(projections))
