"""How does the published code run one width? It keeps the full weights and cuts them again in every layer, every call.

An independent statement of DDSM's slicing rules (arXiv 2310.03337, EnVision-Research/DDSM at 9e15f46), the truth that
the static sub-networks are compared with. It knows nothing of the product: parameters carry the published names, the
channels of a layer follow from what arrives in it, and time is an integer looked up in the frozen table.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import conv2d, group_norm, interpolate, linear

Mistake = Literal["aligned_concat", "scaled_groups", "sliced_time_table", "multi_head"]
"""Ways to be wrong that have the right shapes; the fifth, another group count, is another ``Config``."""

MISTAKES: tuple[Mistake, ...] = ("aligned_concat", "scaled_groups", "sliced_time_table", "multi_head")

TABLE = "time_embedding.timembedding.0.weight"
HEAD_DIM = 8
"""Channels per head of the ``multi_head`` mistake: what diffusers assumes when it is not told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The published constructor arguments, and the constants that its layers hide.

    Attributes:
        ch: Channels of the first level at full width; the time table has as many columns.
        ch_mult: Multiplier of each level.
        attn: Levels with attention.
        num_res_blocks: Residual blocks per level on the way down.
        groups: Groups of every norm at every width.
        conv_multiple: Convolutions keep a multiple of this.
        linear_multiple: Linears keep a multiple of this.
        T: Rows of the time table.
        in_channels: Channels of the image. At 1 the published head takes itself for a depthwise convolution and
            yields a single channel; here it is an ordinary convolution.
    """

    ch: int
    ch_mult: tuple[int, ...]
    attn: tuple[int, ...]
    num_res_blocks: int
    groups: int
    conv_multiple: int = 8
    linear_multiple: int = 16
    T: int = 1000
    in_channels: int = 3


CIFAR10 = Config(ch=128, ch_mult=(1, 2, 2, 2), attn=(1,), num_res_blocks=2, groups=32)
"""The only released configuration."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One entry of the published module lists; channel counts are those of the full width.

    Attributes:
        name: Prefix of its parameters, ``downblocks.3``.
        kind: What it does.
        running: Channels that arrive from the layer before.
        skip: Channels concatenated behind them.
        out: Channels that leave.
        attention: Whether a residual block ends in attention.
    """

    name: str
    kind: Literal["residual", "down", "up"]
    running: int
    skip: int
    out: int
    attention: bool


def round_channels(exact: float, multiple: int) -> int:
    """The nearest multiple, half upwards, at least 1; one multiple more where that loses over a tenth."""
    nearest = max(1, math.floor(exact + multiple / 2) // multiple * multiple)
    return nearest + multiple if nearest < 0.9 * exact else nearest


def time_table(timesteps: int, features: int) -> Tensor:
    """Sinusoids of the integer timesteps in float32, [timesteps, features], sine and cosine alternating."""
    frequencies = torch.exp(-(torch.arange(0, features, 2) / features * math.log(10000)))
    angles = torch.outer(torch.arange(timesteps, dtype=torch.float32), frequencies)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def down_layers(config: Config) -> list[Layer]:
    """The way down."""
    layers: list[Layer] = []
    channels = config.ch
    for level, mult in enumerate(config.ch_mult):
        for _ in range(config.num_res_blocks):
            name = f"downblocks.{len(layers)}"
            layers.append(Layer(name, "residual", channels, 0, config.ch * mult, level in config.attn))
            channels = config.ch * mult
        if level + 1 < len(config.ch_mult):
            layers.append(Layer(f"downblocks.{len(layers)}", "down", channels, 0, channels, attention=False))
    return layers


def middle_layers(config: Config) -> list[Layer]:
    """The two blocks at the bottom."""
    channels = config.ch * config.ch_mult[-1]
    return [
        Layer("middleblocks.0", "residual", channels, 0, channels, attention=True),
        Layer("middleblocks.1", "residual", channels, 0, channels, attention=False),
    ]


def up_layers(config: Config) -> list[Layer]:
    """The way up: every residual block takes the latest skip that is left."""
    skips = [config.ch, *(layer.out for layer in down_layers(config))]
    layers: list[Layer] = []
    channels = config.ch * config.ch_mult[-1]
    for level in range(len(config.ch_mult) - 1, -1, -1):
        out = config.ch * config.ch_mult[level]
        for _ in range(config.num_res_blocks + 1):
            name = f"upblocks.{len(layers)}"
            layers.append(Layer(name, "residual", channels, skips.pop(), out, level in config.attn))
            channels = out
        if level > 0:
            layers.append(Layer(f"upblocks.{len(layers)}", "up", channels, 0, channels, attention=False))
    return layers


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Published name of every trained weight → its shape at full width; each has a bias as long as its first axis."""
    shapes: dict[str, tuple[int, ...]] = {
        "time_embedding.timembedding.1": (4 * config.ch, config.ch),
        "time_embedding.timembedding.3": (4 * config.ch, 4 * config.ch),
        "head": (config.ch, config.in_channels, 3, 3),
    }
    for layer in [*down_layers(config), *middle_layers(config), *up_layers(config)]:
        shapes |= {f"{layer.name}.{name}": shape for name, shape in _layer_shapes(layer, 4 * config.ch).items()}
    tail = config.ch * config.ch_mult[0]
    return shapes | {"tail.0": (tail,), "tail.2": (config.in_channels, tail, 3, 3)}


def _layer_shapes(layer: Layer, time_dim: int) -> dict[str, tuple[int, ...]]:
    out, into = layer.out, layer.running + layer.skip
    if layer.kind != "residual":
        return {"main": (out, into, 3, 3)}
    shapes: dict[str, tuple[int, ...]] = {
        "block1.0": (into,),
        "block1.2": (out, into, 3, 3),
        "temb_proj.1": (out, time_dim),
        "block2.0": (out,),
        "block2.3": (out, out, 3, 3),
    }
    if into != out:
        shapes["shortcut"] = (out, into, 1, 1)
    if layer.attention:
        shapes["attn.group_norm"] = (out,)
        shapes |= {f"attn.{name}": (out, out, 1, 1) for name in ("proj_q", "proj_k", "proj_v", "proj")}
    return shapes


def published_state_dict(config: Config, seed: int) -> dict[str, Tensor]:
    """Random weights under the published names, the frozen time table among them.

    Never the default initialisation: it scales the last layers by 1e-5, so that every wrong network passes.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {TABLE: time_table(config.T, config.ch)}
    for name, shape in weight_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        state[f"{name}.weight"] = 1 + 0.3 * noise if len(shape) == 1 else noise / math.sqrt(math.prod(shape[1:]))
        state[f"{name}.bias"] = 0.2 * torch.randn(shape[0], generator=generator)
    return state


def dynamic_unet(
    config: Config,
    state: Mapping[str, Tensor],
    x: Tensor,
    t: Tensor,
    width_mult: float,
    mistake: Mistake | None = None,
) -> Tensor:
    """Predict the noise as the published code does at one width.

    Args:
        config: The architecture.
        state: Full-width weights under the published names; their dtype is the computation's.
        x: [B, in_channels, H, W].
        t: [B], int64.
        width_mult: Part of the channels, in (0, 1].
        mistake: Compute a wrong network on purpose: a negative control, which a test must be able to tell apart.

    Returns:
        [B, in_channels, H, W].

    Raises:
        RuntimeError: (torch's) the roundings of the width do not meet, or the groups do not divide the channels.
    """
    return _Call(config, state, width_mult, mistake).run(x, t)


def blocks_read(config: Config, state: Mapping[str, Tensor], width_mult: float) -> dict[str, Tensor]:
    """The part of every trained tensor that a forward at this width reads, under the published names."""
    call = _Call(config, state, width_mult, None)
    size = 2 << (len(config.ch_mult) - 1)  # 2 × 2 at the bottom: torch refuses to normalise a single value
    x = torch.zeros(1, config.in_channels, size, size).to(state[TABLE])
    call.run(x, torch.zeros(1, dtype=torch.int64))
    return call.read


@dataclass(slots=True)
class _Call:
    config: Config
    state: Mapping[str, Tensor]
    width_mult: float
    mistake: Mistake | None
    read: dict[str, Tensor] = field(default_factory=dict)

    def run(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.embed_time(t)
        h = self.conv("head", x)
        skips = [h]
        for layer in down_layers(self.config):
            h = self.apply(layer, h, time)
            skips.append(h)
        for layer in middle_layers(self.config):
            h = self.apply(layer, h, time)
        for layer in up_layers(self.config):
            if layer.kind == "residual":
                h = torch.cat([h, skips.pop()], dim=1)
            h = self.apply(layer, h, time)
        return self.conv("tail.2", swish(self.norm("tail.0", h)), keep_outputs=True)

    def embed_time(self, t: Tensor) -> Tensor:
        table = self.state[TABLE]
        if self.mistake == "sliced_time_table":
            # What a dense network of the narrow width builds for itself.
            table = time_table(self.config.T, round(self.config.ch * self.width_mult)).to(table)
        hidden = swish(self.linear("time_embedding.timembedding.1", table[t]))
        return self.linear("time_embedding.timembedding.3", hidden)

    def apply(self, layer: Layer, h: Tensor, time: Tensor) -> Tensor:
        match layer.kind:
            case "residual":
                return self.residual(layer, h, time)
            case "down":
                return self.conv(f"{layer.name}.main", h, stride=2)
            case "up":
                return self.conv(f"{layer.name}.main", interpolate(h, scale_factor=2, mode="nearest"))

    def residual(self, layer: Layer, x: Tensor, time: Tensor) -> Tensor:
        name = layer.name
        h = self.conv(f"{name}.block1.2", swish(self.norm(f"{name}.block1.0", x, layer)), layer)
        h = h + self.linear(f"{name}.temb_proj.1", swish(time))[:, :, None, None]
        h = self.conv(f"{name}.block2.3", swish(self.norm(f"{name}.block2.0", h)))
        # Whether there is a shortcut was decided when the full network was built.
        has_shortcut = layer.running + layer.skip != layer.out
        h = h + (self.conv(f"{name}.shortcut", x, layer) if has_shortcut else x)
        return self.attention(f"{name}.attn", h) if layer.attention else h

    def attention(self, name: str, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        heads = channels // HEAD_DIM if self.mistake == "multi_head" else 1
        h = self.norm(f"{name}.group_norm", x)

        def project(which: str) -> Tensor:
            projected = self.conv(f"{name}.proj_{which}", h, multiple=1)
            return projected.reshape(batch * heads, channels // heads, height * width)

        q, k, v = project("q"), project("k"), project("v")
        scores = torch.bmm(q.transpose(1, 2), k) * (channels // heads) ** -0.5
        mixed = torch.bmm(scores.softmax(dim=-1), v.transpose(1, 2))  # [B·heads, pixels, channels of a head]
        return x + self.conv(f"{name}.proj", mixed.transpose(1, 2).reshape(batch, channels, height, width))

    def norm(self, name: str, x: Tensor, layer: Layer | None = None) -> Tensor:
        groups = self.config.groups
        if self.mistake == "scaled_groups":
            groups = max(1, int(groups * self.width_mult))
        columns = self.columns(x.shape[1], layer)
        weight = self.cut(f"{name}.weight", self.state[f"{name}.weight"][columns])
        bias = self.cut(f"{name}.bias", self.state[f"{name}.bias"][columns])
        return group_norm(x, groups, weight, bias, eps=1e-5)

    def conv(
        self,
        name: str,
        x: Tensor,
        layer: Layer | None = None,
        *,
        multiple: int | None = None,
        stride: int = 1,
        keep_outputs: bool = False,
    ) -> Tensor:
        full = self.state[f"{name}.weight"]
        rounded = round_channels(full.shape[0] * self.width_mult, multiple or self.config.conv_multiple)
        out = full.shape[0] if keep_outputs else rounded
        weight = self.cut(f"{name}.weight", full[:out, self.columns(x.shape[1], layer)])
        bias = self.cut(f"{name}.bias", self.state[f"{name}.bias"][:out])
        return conv2d(x, weight, bias, stride, padding=full.shape[-1] // 2)

    def linear(self, name: str, x: Tensor) -> Tensor:
        full = self.state[f"{name}.weight"]
        out = round_channels(full.shape[0] * self.width_mult, self.config.linear_multiple)
        weight = self.cut(f"{name}.weight", full[:out, : x.shape[1]])
        return linear(x, weight, self.cut(f"{name}.bias", self.state[f"{name}.bias"][:out]))

    def columns(self, arriving: int, layer: Layer | None) -> slice | Tensor:
        """Which of the full inputs meet the channels that arrive: the leading ones, across the concatenation too."""
        if self.mistake != "aligned_concat" or layer is None or layer.skip == 0:
            return slice(arriving)
        skip = round_channels(layer.skip * self.width_mult, self.config.conv_multiple)
        return torch.cat([torch.arange(arriving - skip), layer.running + torch.arange(skip)])

    def cut(self, name: str, block: Tensor) -> Tensor:
        self.read[name] = block
        return block


def swish(x: Tensor) -> Tensor:
    """x·σ(x), in two operations as published (a fused SiLU may round differently)."""
    return x * torch.sigmoid(x)
