"""What does a step cost when the supernet is sliced at run time, as DDSM was published?

The peer of the static engines, written from the description of the published run time (arXiv 2310.03337): one module
tree at full width; before every call all modules are walked to set a mutable width; every layer cuts its weights again
in every forward; the width is looked up by reading the timestep back from its tensor; and the update gathers its
coefficients from tables of the whole schedule. Parameters carry the names of ``ddsm_engine.networks.unet``, so that a
bundle's weights load into it. It has no modules for the published containers, which makes its walk a little shorter.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ddsm_engine.bundle import TIME_TABLE_KEY, Bundle
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.spec import UNetSpec, make_divisible
from ddsm_engine.untrusted import open_safetensors

PeerPrecision = Literal["fp32", "bf16"]

DrawNoise = Callable[[Tensor, int], Tensor]
"""(a tensor of the wanted shape, number of the call) → standard normals."""


class SlimmableConv(nn.Conv2d):
    """A convolution that keeps its leading filters; how many inputs it reads follows from what arrives."""

    width_mult: float = 1.0

    def __init__(self, into: int, out: int, size: int, *, multiple: int, stride: int = 1, sliced: bool = True) -> None:
        super().__init__(into, out, size, stride=stride, padding=size // 2)
        self.multiple, self.sliced = multiple, sliced

    def block(self, arriving: int) -> tuple[Tensor, Tensor | None]:
        """The weight and bias in use when ``arriving`` channels come in."""
        out = make_divisible(self.out_channels * self.width_mult, self.multiple) if self.sliced else self.out_channels
        return self.weight[:out, :arriving], None if self.bias is None else self.bias[:out]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] → [B, C_out, H, W] at the width that is set."""
        weight, bias = self.block(x.shape[1])
        return F.conv2d(x, weight, bias, self.stride, self.padding)


class SlimmableLinear(nn.Linear):
    """A linear layer that keeps its leading outputs and reads as many inputs as arrive."""

    width_mult: float = 1.0

    def __init__(self, into: int, out: int, *, multiple: int) -> None:
        super().__init__(into, out)
        self.multiple = multiple

    def forward(self, x: Tensor) -> Tensor:
        """[B, in] → [B, out] at the width that is set."""
        out = make_divisible(self.out_features * self.width_mult, self.multiple)
        return F.linear(x, self.weight[:out, : x.shape[1]], self.bias[:out])


class SlimmableNorm(nn.GroupNorm):
    """A group norm with the same number of groups at every width."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, H, W]; the affine's leading part is used."""
        channels = x.shape[1]
        return F.group_norm(x, self.num_groups, self.weight[:channels], self.bias[:channels], self.eps)


class Swish(nn.Module):
    """x · sigmoid(x) in two operations; a module of its own, as published, and so a stop of every walk."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * torch.sigmoid(x)


class DynamicAttention(nn.Module):
    """Single-head self-attention over the pixels."""

    def __init__(self, channels: int, spec: UNetSpec) -> None:
        super().__init__()
        self.norm = SlimmableNorm(spec.groups, channels)
        self.q = SlimmableConv(channels, channels, 1, multiple=1)
        self.k = SlimmableConv(channels, channels, 1, multiple=1)
        self.v = SlimmableConv(channels, channels, 1, multiple=1)
        self.out = SlimmableConv(channels, channels, 1, multiple=spec.conv_multiple)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → the same, the input added."""
        batch, channels, height, width = x.shape
        h = self.norm(x)
        queries = self.q(h).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        keys = self.k(h).reshape(batch, channels, height * width)
        values = self.v(h).permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        weights = torch.softmax(torch.bmm(queries, keys) * channels**-0.5, dim=-1)
        mixed = torch.bmm(weights, values).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        added: Tensor = x + self.out(mixed)
        return added


class DynamicBlock(nn.Module):
    """A residual block; whether it has a shortcut is decided at full width."""

    def __init__(self, into: int, out: int, spec: UNetSpec, *, attention: bool) -> None:
        super().__init__()
        self.norm1, self.swish1 = SlimmableNorm(spec.groups, into), Swish()
        self.conv1 = SlimmableConv(into, out, 3, multiple=spec.conv_multiple)
        self.swish_time, self.time = Swish(), SlimmableLinear(spec.time_dim, out, multiple=spec.linear_multiple)
        self.norm2, self.swish2, self.dropout = SlimmableNorm(spec.groups, out), Swish(), nn.Dropout(spec.dropout)
        self.conv2 = SlimmableConv(out, out, 3, multiple=spec.conv_multiple)
        self.shortcut = SlimmableConv(into, out, 1, multiple=spec.conv_multiple) if into != out else nn.Identity()
        self.attention = DynamicAttention(out, spec) if attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[B, C_in, H, W] and the time embedding [B, D] → [B, C_out, H, W]."""
        h = self.conv1(self.swish1(self.norm1(x)))
        h = h + self.time(self.swish_time(time))[:, :, None, None]
        h = self.conv2(self.dropout(self.swish2(self.norm2(h))))
        out: Tensor = self.attention(h + self.shortcut(x))
        return out


class Resample(nn.Module):
    """Halve the image with a strided convolution, or double it before a convolution."""

    def __init__(self, channels: int, spec: UNetSpec, *, up: bool) -> None:
        super().__init__()
        self.conv = SlimmableConv(channels, channels, 3, multiple=spec.conv_multiple, stride=1 if up else 2)
        self.up = up

    def forward(self, x: Tensor, _time: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H/2, W/2] or [B, C, 2H, 2W]."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)
        return out


class DynamicTime(nn.Module):
    """Timestep → embedding, by a frozen table whose columns no width slices."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.table = nn.Embedding(spec.timesteps, spec.time_features)
        self.linear1 = SlimmableLinear(spec.time_features, spec.time_dim, multiple=spec.linear_multiple)
        self.swish = Swish()
        self.linear2 = SlimmableLinear(spec.time_dim, spec.time_dim, multiple=spec.linear_multiple)

    def forward(self, t: Tensor) -> Tensor:
        """[B], int64 → [B, D]."""
        embedding: Tensor = self.linear2(self.swish(self.linear1(self.table(t))))
        return embedding


class DynamicTail(nn.Module):
    """The output convolution, which always yields every channel of the image."""

    def __init__(self, channels: int, spec: UNetSpec) -> None:
        super().__init__()
        self.norm, self.swish = SlimmableNorm(spec.groups, channels), Swish()
        self.conv = SlimmableConv(channels, spec.channels, 3, multiple=1, sliced=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, channels of an image, H, W]."""
        image: Tensor = self.conv(self.swish(self.norm(x)))
        return image


class DynamicUNet(nn.Module):
    """The U-Net at full width, narrowed by a mutable attribute of its modules."""

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        channels, skips = spec.base_channels, [spec.base_channels]
        self.time = DynamicTime(spec)
        self.head = SlimmableConv(spec.channels, channels, 3, multiple=spec.conv_multiple)
        self.down, self.middle, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        levels = [(level, spec.base_channels * mult) for level, mult in enumerate(spec.channel_mults)]
        for level, out in levels:
            for _ in range(spec.num_res_blocks):
                self.down.append(DynamicBlock(channels, out, spec, attention=level in spec.attention_levels))
                channels = out
                skips.append(out)
            if level + 1 < len(levels):
                self.down.append(Resample(out, spec, up=False))
                skips.append(out)
        self.middle.append(DynamicBlock(channels, channels, spec, attention=True))
        self.middle.append(DynamicBlock(channels, channels, spec, attention=False))
        for level, out in reversed(levels):
            for _ in range(spec.num_res_blocks + 1):
                into = channels + skips.pop()
                self.up.append(DynamicBlock(into, out, spec, attention=level in spec.attention_levels))
                channels = out
            if level:
                self.up.append(Resample(out, spec, up=True))
        self.tail = DynamicTail(channels, spec)

    def set_width(self, width_mult: float) -> None:
        """Walk all modules and set their width: a share of the full width, in (0, 1]."""

        def assign(module: nn.Module) -> None:
            setattr(module, "width_mult", width_mult)  # noqa: B010 - through nn.Module's own, as published

        self.apply(assign)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise of x [B, C, H, W] at the timesteps t [B], int64, at the width that is set."""
        time = self.time(t)
        h = self.head(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, time)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, time)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1) if isinstance(layer, DynamicBlock) else h, time)
        eps: Tensor = self.tail(h)
        return eps


def dynamic_unet_from_bundle(bundle: Bundle) -> DynamicUNet:
    """The dynamic network with the weights and the time table of a bundle."""
    spec = bundle.manifest.spec
    with torch.device("meta"):
        network = DynamicUNet(spec)
    with open_safetensors(bundle.weights(bundle.full), "pt") as opened:
        weights = {name: opened.get_tensor(name) for name in opened.keys() if name != TIME_TABLE_KEY}  # noqa: SIM118
    weights["time.table.weight"] = torch.from_numpy(bundle.time_table(bundle.full)[range(spec.timesteps)])
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(requires_grad=False)


def draw_noise(like: Tensor, _call: int) -> Tensor:
    """Fresh noise as the published loop draws it."""
    return torch.randn_like(like)


class DynamicLoop:
    """Ancestral sampling as published, over all timesteps or over an even part of them.

    Over a part of the timesteps the tables are those of the shorter chain (Nichol and Dhariwal 2021, section 4) with
    the posterior's variance, which is DDIM with η = 1; they keep the length of the schedule, and so does their cost.
    """

    def __init__(
        self, network: DynamicUNet, schedule: NoiseSchedule, timesteps: Sequence[int], precision: PeerPrecision
    ) -> None:
        """Make the tables.

        Args:
            network: The dynamic network.
            schedule: What it was trained with.
            timesteps: Those visited, noisiest first; two at least.
            precision: ``bf16`` runs the network under torch's CPU autocast.
        """
        self.network, self.timesteps, self.precision = network, tuple(timesteps), precision
        visited = np.sort(np.asarray(timesteps))
        here = schedule.alphas_cumprod[visited]
        cleaner = np.append(1.0, here[:-1])
        betas = 1 - here / cleaner
        posterior = betas * (1 - cleaner) / (1 - here)
        large = schedule.variance_type == "fixed_large" and len(visited) == schedule.timesteps

        def table(values: NDArray[np.float64]) -> Tensor:
            whole = np.ones(schedule.timesteps)
            whole[visited] = values
            return torch.from_numpy(whole)

        self.of_x_in_x_0, self.of_eps_in_x_0 = table(np.sqrt(1 / here)), table(np.sqrt(1 / here - 1))
        self.of_x_0 = table(np.sqrt(cleaner) * betas / (1 - here))
        self.of_x = table(np.sqrt(1 - betas) * (1 - cleaner) / (1 - here))
        # The variance of timestep 0 is never used, and 0 has no logarithm.
        self.variance = table(np.append(posterior[1], (betas if large else posterior)[1:]))

    def predict(self, x: Tensor, t: Tensor, width_mults: Sequence[float]) -> Tensor:
        """Predicted noise, float32, at the width that the timestep asks for.

        Args:
            x: [B, C, H, W], float32.
            t: [B], int64, one timestep for the whole batch.
            width_mults: Share of the full width for every timestep of the schedule.
        """
        self.network.set_width(width_mults[int(t[0])])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            eps: Tensor = self.network(x, t).float()
        return eps

    def step(
        self, x: Tensor, t: Tensor, width_mults: Sequence[float], call: int = 0, noise: DrawNoise = draw_noise
    ) -> Tensor:
        """One step: the network, then the update; the arguments are those of ``predict``."""
        eps = self.predict(x, t, width_mults)
        x_0 = _gather(self.of_x_in_x_0, t, x) * x - _gather(self.of_eps_in_x_0, t, x) * eps
        mean = _gather(self.of_x_0, t, x) * x_0 + _gather(self.of_x, t, x) * x
        log_variance = torch.log(torch.cat([self.variance[:1], self.variance[1:]]))
        if int(t[0]) == 0:
            return mean
        return mean + torch.exp(0.5 * _gather(log_variance, t, x)) * noise(x, call)

    def run(
        self,
        x_T: Tensor,
        width_mults: Sequence[float],
        timesteps: Sequence[int] | None = None,
        noise: DrawNoise = draw_noise,
    ) -> Tensor:
        """Walk the timesteps (all of the loop's unless some of them are named); the final state, unclipped."""
        x = x_T
        for call, t in enumerate(self.timesteps if timesteps is None else timesteps):
            x = self.step(x, x.new_full((len(x),), t, dtype=torch.int64), width_mults, call, noise)
        return x


def _gather(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return torch.gather(table, 0, t).float().reshape(-1, *(1 for _ in like.shape[1:]))
