"""How does a width read the supernet's weights? By their leading block, whatever the layer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ddsm_engine.networks.unet import UNet
from ddsm_engine.spec import UNetSpec


def empty_unet(spec: UNetSpec, width: int) -> UNet:
    """The static network of ``width`` without weights: it knows the shape of every parameter."""
    with torch.device("meta"):
        return UNet(spec, width)


def narrow_to(full: Tensor, shape: torch.Size) -> Tensor:
    """The leading block of ``full``: a view, differentiable."""
    for axis, size in enumerate(shape):
        full = full.narrow(axis, 0, size)
    return full


def slice_weights(weights: Mapping[str, Tensor], unet: UNet) -> dict[str, Tensor]:
    """The supernet's weights as ``unet`` sees them: views, keyed like its parameters."""
    return {name: narrow_to(weights[name], parameter.shape) for name, parameter in unet.named_parameters()}


def subnetwork(spec: UNetSpec, weights: Mapping[str, Tensor], width: int) -> UNet:
    """Cut one static sub-network: its weights are copies, in evaluation mode."""
    unet = empty_unet(spec, width)
    cut = {
        name: block.clone(memory_format=torch.contiguous_format) for name, block in slice_weights(weights, unet).items()
    }
    unet.load_state_dict(cut, strict=True, assign=True)
    return unet.eval().requires_grad_(requires_grad=False)
