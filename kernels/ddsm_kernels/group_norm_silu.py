"""Group norm and SiLU in one pass over channels-last images: reference, Triton kernels, public function.

torch's own group norm on a GPU takes planar channels: between two channels-last convolutions each norm and activation
is two changes of layout, the norm and two more passes (``traffic_bytes`` counts them). Here it is one kernel where a
group of an image fits into one program, two where it does not.

Statistics are taken in float32, the mean off before squares are summed: E[x²] - E[x]² loses all digits of the variance
of channels whose mean is much larger than their spread. Where a group is spread over programs, their means and sums of
squares are merged by Chan, Golub and LeVeque's formula (1979), which keeps that.

With ``TRITON_INTERPRET=1`` in the environment before this module is imported, the kernels run on a CPU.

Not measured yet, on any GPU: all of it. What the choices below follow from is arithmetic:

- At 32 × 32 and 16 groups, a batch of one is 16 programs, on a GPU of 132 multiprocessors. They read 256 KiB at 128
  channels in bf16, which sixteen of them do in less time than a launch takes; there, one launch a norm is what counts.
- Narrow widths use 4 of the 32 bytes that memory hands out at once (two bf16 channels a group). The other groups'
  programs read the same lines at the same time, so they come from the L2 cache, which holds these images whole.
- Larger images take a second launch to use the whole GPU: up to ``SPLITS`` programs an image, all channels of a pixel
  at once.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

GROUP_VALUES = 16384
"""Largest group that one program holds: 16 values in each of 1024 threads; twice as many spill, by what ptxas says."""

TILE_VALUES = 8192
"""Of all channels of some pixels, where a group is spread over programs."""

SPLITS = 64
"""Most programs an image is spread over: each reads the statistics of all others of its image."""


def group_norm_silu_reference(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool = True
) -> Tensor:
    """The same by its definition, in float64; see ``group_norm_silu``."""
    grouped = x.double().reshape(x.shape[0], groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, keepdim=True, correction=0)
    normed = ((grouped - mean) / torch.sqrt(variance + eps)).reshape(x.shape)
    y = normed * weight.double()[None, :, None, None] + bias.double()[None, :, None, None]
    return (y * torch.sigmoid(y) if silu else y).to(x.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _whole_groups(
    x: tl.tensor,  # [B, pixels, channels]
    y: tl.tensor,  # as x
    weight: tl.tensor,  # [channels]
    bias: tl.tensor,  # [channels]
    pixels: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    GROUP: tl.constexpr,  # channels of a group
    PIXELS: tl.constexpr,  # a power of two from ``pixels`` on
    LANES: tl.constexpr,  # a power of two from ``GROUP`` on
    SILU: tl.constexpr,
) -> None:
    """One program normalises one group of one image."""
    group = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.arange(0, PIXELS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    inside = (pixel < pixels) & (lane < GROUP)
    channel = group * GROUP + lane
    place = image * pixels * channels + pixel * channels + channel
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    count = pixels * GROUP
    mean = tl.sum(tl.sum(value, axis=1), axis=0) / count
    centred = tl.where(inside, value - mean, 0.0)
    variance = tl.sum(tl.sum(centred * centred, axis=1), axis=0) / count
    scale = tl.load(weight + channel, mask=lane < GROUP, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=lane < GROUP, other=0.0).to(tl.float32)
    out = centred / tl.sqrt(variance + eps) * scale + shift
    if SILU:
        out = out * tl.sigmoid(out)
    tl.store(y + place, out.to(y.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _partial_statistics(
    x: tl.tensor,  # [B, pixels, GROUPS * GROUP]
    statistics: tl.tensor,  # [B, programs of an image, 2, GROUPS], float32: means and sums of squares about them
    pixels: tl.tensor,
    share: tl.tensor,  # pixels of a program, a multiple of ``TILE``
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_LANES: tl.constexpr,  # a power of two from ``GROUPS`` on
    LANES: tl.constexpr,  # a power of two from ``GROUP`` on
    TILE: tl.constexpr,  # pixels at a time, a power of two
) -> None:
    """One program summarises some pixels of one image, all groups."""
    part = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    group = tl.arange(0, GROUP_LANES)[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    first = part * share
    last = tl.minimum(first + share, pixels)
    mean = tl.zeros([GROUP_LANES], tl.float32)
    squares = tl.zeros([GROUP_LANES], tl.float32)
    for start in range(first, last, TILE):
        pixel = start + tl.arange(0, TILE)[:, None, None]
        inside = (pixel < last) & (group < GROUPS) & (lane < GROUP)
        place = (image * pixels + pixel) * (GROUPS * GROUP) + group * GROUP + lane
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        seen = ((start - first) * GROUP).to(tl.float32)
        new = (tl.minimum(last - start, TILE) * GROUP).to(tl.float32)
        tile_mean = tl.sum(tl.sum(value, axis=2), axis=0) / new
        centred = tl.where(inside, value - tile_mean[None, :, None], 0.0)
        tile_squares = tl.sum(tl.sum(centred * centred, axis=2), axis=0)
        apart = tile_mean - mean
        mean += apart * (new / (seen + new))
        squares += tile_squares + apart * apart * (seen * new / (seen + new))
    row = (image * tl.num_programs(0) + part) * 2 * GROUPS + tl.arange(0, GROUP_LANES)
    kept = tl.arange(0, GROUP_LANES) < GROUPS
    tl.store(statistics + row, mean, mask=kept)
    tl.store(statistics + row + GROUPS, squares, mask=kept)


@triton.jit  # type: ignore[untyped-decorator]
def _normalise(
    x: tl.tensor,  # [B, pixels, GROUPS * GROUP]
    y: tl.tensor,  # as x
    weight: tl.tensor,  # [GROUPS * GROUP]
    bias: tl.tensor,  # [GROUPS * GROUP]
    statistics: tl.tensor,  # as ``_partial_statistics`` leaves them
    pixels: tl.tensor,
    share: tl.tensor,
    parts: tl.tensor,  # programs of an image
    eps: tl.tensor,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_LANES: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,  # a power of two from ``parts`` on
    SILU: tl.constexpr,
) -> None:
    """One program merges the statistics of its image and normalises the pixels that it summarised before."""
    part = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    other = tl.arange(0, PARTS)[:, None]
    column = tl.arange(0, GROUP_LANES)[None, :]
    known = (other < parts) & (column < GROUPS)
    row = (image * parts + other) * 2 * GROUPS + column
    means = tl.load(statistics + row, mask=known, other=0.0)
    squares = tl.load(statistics + row + GROUPS, mask=known, other=0.0)
    held = tl.minimum(tl.maximum(pixels - other * share, 0), share)
    counts = tl.where(known, held * GROUP, 0).to(tl.float32)
    count = pixels * (GROUP * 1.0)
    mean = tl.sum(means * (counts / count), axis=0)
    apart = tl.where(known, means - mean[None, :], 0.0)
    variance = tl.sum(squares + apart * apart * counts, axis=0) / count
    spread = tl.sqrt(variance + eps)[None, :, None]

    group = tl.arange(0, GROUP_LANES)[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    channel = group * GROUP + lane
    real = (group < GROUPS) & (lane < GROUP)
    scale = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    first = part * share
    last = tl.minimum(first + share, pixels)
    for start in range(first, last, TILE):
        pixel = start + tl.arange(0, TILE)[:, None, None]
        inside = (pixel < last) & real
        place = (image * pixels + pixel) * (GROUPS * GROUP) + channel
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        out = (value - mean[None, :, None]) / spread * scale + shift
        if SILU:
            out = out * tl.sigmoid(out)
        tl.store(y + place, out.to(y.dtype.element_ty), mask=inside)


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool = True) -> Tensor:
    """Group norm and SiLU of channels-last images.

    Args:
        x: [B, C, H, W], float32, float16 or bfloat16, contiguous in ``torch.channels_last``.
        groups: Divides C.
        weight: [C], of any of these types.
        bias: [C], as ``weight``.
        eps: Added to the variance.
        silu: Without it, the norm alone.

    Returns:
        As ``x``: same shape, type and layout.

    Raises:
        ValueError: another type, layout or shape.
    """
    batch, channels, height, width = x.shape
    if x.dtype not in DTYPES or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"expected channels-last float32, float16 or bfloat16, found {x.dtype} {x.stride()}")
    if channels % groups or weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"expected {channels} channels in equal groups, each with a weight and a bias, found {groups} groups, "
            f"{list(weight.shape)} and {list(bias.shape)}"
        )
    group, pixels = channels // groups, height * width
    lanes, padded = _power_of_two(group), _power_of_two(pixels)
    y = torch.empty_like(x)
    if padded * lanes <= GROUP_VALUES:
        warps = _warps(padded * lanes)
        _whole_groups[groups, batch](
            x, y, weight, bias, pixels, channels, eps, group, padded, lanes, silu, num_warps=warps
        )
        return y
    group_lanes = _power_of_two(groups)
    tile = max(1, min(padded, TILE_VALUES // (group_lanes * lanes)))
    share = math.ceil(pixels / SPLITS / tile) * tile
    parts = math.ceil(pixels / share)
    warps = _warps(tile * group_lanes * lanes)
    statistics = torch.empty(batch, parts, 2, groups, dtype=torch.float32, device=x.device)
    _partial_statistics[parts, batch](
        x, statistics, pixels, share, groups, group, group_lanes, lanes, tile, num_warps=warps
    )
    _normalise[parts, batch](
        x, y, weight, bias, statistics, pixels, share, parts, eps, groups, group, group_lanes, lanes, tile,
        _power_of_two(parts), silu, num_warps=warps,
    )  # fmt: skip
    return y


def _power_of_two(size: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (size - 1).bit_length()


def _warps(values: int) -> int:
    """Of 32 threads with 16 values each, within what a multiprocessor takes."""
    return min(32, max(1, values // 512))


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one norm and its SiLU move from and to memory, by the sizes of the tensors; caches are not counted.

    Attributes:
        fused: One read and one write: what ``group_norm_silu`` needs at least.
        unfused: What torch moves between two channels-last convolutions on a GPU.
    """

    fused: int
    unfused: int


def traffic_bytes(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Traffic:
    """Of one tensor [B, C, H, W]."""
    size = math.prod(shape) * dtype.itemsize
    # To planar channels (2), statistics (1), norm (2), sigmoid (2), product (3), back to channels-last (2).
    return Traffic(fused=2 * size, unfused=12 * size)
