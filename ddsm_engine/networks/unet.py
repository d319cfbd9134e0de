"""The static U-Net of one width: an ordinary network that knows nothing of the supernet it was cut from.

The topology is pytorch-ddpm's (Ho et al. 2020, appendix B) as DDSM slims it: the shortcut of a residual block exists
where the *full* width changes channels, and the number of groups is the same at every width. What diffusers'
``UNet2DModel`` varies beside that (epsilon, heads, padding, frequencies) are fields of the spec.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddsm_engine.spec import UNetSpec


def swish(x: Tensor) -> Tensor:
    """X · sigmoid(x), written as the published network computes it: ``F.silu`` rounds differently."""
    return x * torch.sigmoid(x)


class NormSwish(nn.GroupNorm):
    """A group norm and the activation behind it: together, so that one kernel can take their place."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        return swish(super().forward(x))


class Attention(nn.Module):
    """Self-attention over the pixels, scaled by the square root of a head's channels; DDSM's has a single head."""

    def __init__(self, channels: int, spec: UNetSpec) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(spec.groups, channels, eps=spec.norm_eps)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        head = spec.head_channels or channels
        self.heads, self.scale = channels // head, head**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W], the input added."""
        h = self.norm(x)
        # [B * heads, channels of a head, pixels]
        q, k, v = self._per_head(self.q(h)), self._per_head(self.k(h)), self._per_head(self.v(h))
        weights = torch.softmax(torch.bmm(q.transpose(1, 2), k) * self.scale, dim=-1)  # [B * heads, queries, keys]
        attended = torch.bmm(weights, v.transpose(1, 2))  # [B * heads, queries, channels of a head]
        return x + self.out(attended.transpose(1, 2).reshape(x.shape))

    def _per_head(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B * heads, channels of a head, pixels]."""
        x = x.flatten(2)
        return x if self.heads == 1 else x.reshape(-1, x.shape[1] // self.heads, x.shape[2])


class ResidualBlock(nn.Module):
    """Two convolutions around the addition of the time projection, then attention where the level has it."""

    def __init__(self, channels_in: int, channels_out: int, time_dim: int, spec: UNetSpec, *, attention: bool) -> None:
        super().__init__()
        self.norm1 = NormSwish(spec.groups, channels_in, eps=spec.norm_eps)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time = nn.Linear(time_dim, channels_out)
        self.norm2 = NormSwish(spec.groups, channels_out, eps=spec.norm_eps)
        self.dropout = nn.Dropout(spec.dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        self.attention = Attention(channels_out, spec) if attention else nn.Identity()

    def forward(self, x: Tensor, time_projection: Tensor) -> Tensor:
        """[B, C_in, H, W] and the block's own time projection [B, C_out] → [B, C_out, H, W]."""
        h = self.conv1(self.norm1(x)) + time_projection[:, :, None, None]
        h = self.conv2(self.dropout(self.norm2(h)))
        return self.attention(h + self.shortcut(x))


class Downsample(nn.Module):
    """Halve the image with a strided convolution."""

    def __init__(self, channels: int, spec: UNetSpec) -> None:
        super().__init__()
        self.is_asymmetric = spec.asymmetric_downsample
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if self.is_asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H/2, W/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.is_asymmetric else x)


class Upsample(nn.Module):
    """Double the image by repeating pixels, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class TimeEmbedding(nn.Module):
    """From a row of the time table to the vector that every residual block projects."""

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(features, dim)
        self.linear2 = nn.Linear(dim, dim)

    def forward(self, time_features: Tensor) -> Tensor:
        """[B, features] → [B, dim]; the activation that precedes every projection is applied once, here."""
        return swish(self.linear2(swish(self.linear1(time_features))))


class Tail(nn.Module):
    """The output convolution, which no width slices on its outputs."""

    def __init__(self, channels: int, spec: UNetSpec) -> None:
        super().__init__()
        self.norm = NormSwish(spec.groups, channels, eps=spec.norm_eps)
        self.conv = nn.Conv2d(channels, spec.channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, the sample's channels, H, W]."""
        return self.conv(self.norm(x))


class UNet(nn.Module):
    """The network of ``spec`` at one ``width``: predicts the noise in a batch of samples.

    Raises:
        SpecError: the width cannot be cut from the spec.
    """

    def __init__(self, spec: UNetSpec, width: int) -> None:
        super().__init__()
        spec.check_width(width)
        self.spec, self.width = spec, width
        time_dim = spec.linear_channels(spec.time_dim, width)

        def block(channels_in: int, channels_out: int, *, attention: bool) -> ResidualBlock:
            return ResidualBlock(channels_in, channels_out, time_dim, spec, attention=attention)

        channels = spec.conv_channels(spec.base_channels, width)
        self.time = TimeEmbedding(spec.time_features, time_dim)
        self.head = nn.Conv2d(spec.channels, channels, 3, padding=1)
        skips = [channels]
        self.down = nn.ModuleList()
        last = len(spec.channel_mults) - 1
        for level, mult in enumerate(spec.channel_mults):
            level_channels = spec.conv_channels(spec.base_channels * mult, width)
            for _ in range(spec.num_res_blocks):
                self.down.append(block(channels, level_channels, attention=level in spec.attention_levels))
                channels = level_channels
                skips.append(channels)
            if level != last:
                self.down.append(Downsample(channels, spec))
                skips.append(channels)
        self.middle = nn.ModuleList(
            [block(channels, channels, attention=True), block(channels, channels, attention=False)]
        )
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(spec.channel_mults))):
            level_channels = spec.conv_channels(spec.base_channels * mult, width)
            for _ in range(spec.num_res_blocks + 1):
                attention = level in spec.attention_levels
                self.up.append(block(channels + skips.pop(), level_channels, attention=attention))
                channels = level_channels
            if level != 0:
                self.up.append(Upsample(channels))
        self.tail = Tail(channels, spec)

    def residual_blocks(self) -> list[ResidualBlock]:
        """The residual blocks in the order in which they run."""
        return [block for block in [*self.down, *self.middle, *self.up] if isinstance(block, ResidualBlock)]

    def project_time(self, time_features: Tensor) -> list[Tensor]:
        """[B, time_features] → one [B, C_out] per residual block, in running order."""
        embedding = self.time(time_features)
        return [block.time(embedding) for block in self.residual_blocks()]

    def denoise(self, sample: Tensor, time_projections: list[Tensor]) -> Tensor:
        """Predict the noise from a batch and the projections that ``project_time`` makes."""
        projections = iter(time_projections)
        h = self.head(sample)
        skips = [h]
        for layer in self.down:
            h = layer(h, next(projections)) if isinstance(layer, ResidualBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, next(projections))
        for layer in self.up:
            # The skip is appended behind the running channels, and a narrow width keeps the *leading* channels of the
            # trained weight: columns that belong to the running channels at full width here meet the skip. That is
            # how DDSM trains, so it is how the weights must be read.
            if isinstance(layer, ResidualBlock):
                h = layer(torch.cat([h, skips.pop()], dim=1), next(projections))
            else:
                h = layer(h)
        return self.tail(h)

    def forward(self, sample: Tensor, time_features: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            sample: [B, C, H, W], float32.
            time_features: [B, time_features], rows of the time table (``ddsm_engine.time_table``).

        Returns:
            [B, C, H, W], the predicted noise.
        """
        return self.denoise(sample, self.project_time(time_features))
