"""Published parameter names and constructor arguments → the product's, stated a second time and on purpose.

The product has its own reader of published checkpoints; a slip there must not be repeated by what checks it.
"""

from collections.abc import Mapping

from torch import Tensor

from ddsm_engine.spec import UNetSpec
from tests.oracle.dynamic_unet import TABLE, Config

TOP = {
    "time_embedding.timembedding.1": "time.linear1",
    "time_embedding.timembedding.3": "time.linear2",
    "head": "head",
    "tail.0": "tail.norm",
    "tail.2": "tail.conv",
}
LISTS = {"downblocks": "down", "middleblocks": "middle", "upblocks": "up"}
IN_A_BLOCK = {
    "block1.0": "norm1",
    "block1.2": "conv1",
    "temb_proj.1": "time",
    "block2.0": "norm2",
    "block2.3": "conv2",
    "shortcut": "shortcut",
    "attn.group_norm": "attention.norm",
    "attn.proj_q": "attention.q",
    "attn.proj_k": "attention.k",
    "attn.proj_v": "attention.v",
    "attn.proj": "attention.out",
    "main": "conv",
}


def product_name(published: str) -> str:
    """The product's name of a published parameter: ``downblocks.3.block1.2.bias`` → ``down.3.conv1.bias``."""
    module, _, kind = published.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    blocks, index, inside = module.split(".", 2)
    return f"{LISTS[blocks]}.{index}.{IN_A_BLOCK[inside]}.{kind}"


def product_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under the product's names; the time table is not a weight there."""
    return {product_name(name): tensor for name, tensor in state.items() if name != TABLE}


def product_spec(config: Config, image_size: int) -> UNetSpec:
    """The product's spec of a published configuration."""
    return UNetSpec(
        image_size=image_size,
        channels=config.in_channels,
        base_channels=config.ch,
        channel_mults=config.ch_mult,
        attention_levels=config.attn,
        num_res_blocks=config.num_res_blocks,
        groups=config.groups,
        conv_multiple=config.conv_multiple,
        linear_multiple=config.linear_multiple,
        timesteps=config.T,
        time_features=config.ch,
        time_dim=4 * config.ch,
    )
