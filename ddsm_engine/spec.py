"""What does the supernet look like, and which widths can be cut from it?"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from ddsm_engine.errors import SpecError
from ddsm_engine.untrusted import brief

EIGHTHS = tuple(range(2, 9))
"""The paper's search space: 2/8 … 8/8 of the channels."""


_COUNTS = (
    "image_size",
    "channels",
    "base_channels",
    "num_res_blocks",
    "groups",
    "conv_multiple",
    "linear_multiple",
    "timesteps",
    "time_features",
    "time_dim",
)

_NOT_DDSM = ("norm_eps", "head_channels", "asymmetric_downsample", "time_freq_shift")
"""What DDSM's networks have as by default; older files do not name these fields, and their bytes stay as they were."""

MOST_LEVELS = 17
MOST_BLOCKS = 256
"""Residual blocks on the way down, all levels together."""
MOST_PARAMETERS = 1 << 29
"""Of the layers that ``_main_parameters`` counts, about half of all: a network stays below 8 GiB as float32, which
bounds what reading any supernet or checkpoint takes. CIFAR-10's has 35.9e6 in all."""
MOST_SAMPLE_VALUES = 1 << 24
"""Of one sample, and of the time table: 64 MiB as float32; 3 x 2048 x 2048 is less."""
MOST_ATTENTION_SCORES = 1 << 28
"""Of one sample in one attention, all heads together: 1 GiB as float32, 128 x 128 pixels."""


def make_divisible(channels: float, multiple: int) -> int:
    """Round to a multiple, never losing more than a tenth (the rounding of slimmable networks and MobileNet)."""
    rounded = max(1, int(channels + multiple / 2) // multiple * multiple)
    return rounded if rounded >= 0.9 * channels else rounded + multiple


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetSpec:
    """The U-Net of DDPM as DDSM slims it. All channel counts are those of the full width.

    Attributes:
        image_size: Height and width of a sample, pixels.
        channels: Channels of a sample (1 grey, 3 colour).
        base_channels: Channels of the first level at full width; every other count is a multiple of it.
        channel_mults: One multiplier per level, finest first.
        attention_levels: Levels whose residual blocks carry attention; the middle always does.
        num_res_blocks: Residual blocks per level on the way down (one more on the way up).
        groups: Groups of every group norm, the same at every width. A checkpoint does not record it.
        conv_multiple: Sliced convolutions round to a multiple of this (published: 8).
        linear_multiple: Sliced linears round to a multiple of this (published: 16).
        timesteps: Length of the training noise schedule.
        time_features: Columns of the sinusoidal time table, never sliced (published: ``base_channels``).
        time_dim: Hidden width of the time embedding at full width (published: ``4 * base_channels``).
        dropout: Dropout probability, used in training only.
        norm_eps: Added to the variance in every group norm.
        head_channels: Channels of each attention head; None is one head over all channels, as DDSM's.
        asymmetric_downsample: Whether the convolutions that halve the image pad it by one pixel on the right and below
            only, as Ho et al.'s published networks do, and not on every side.
        time_freq_shift: See ``ddsm_engine.time_table.sinusoid``; DDSM has 0, Ho et al. 1.
    """

    image_size: int
    channels: int
    base_channels: int
    channel_mults: tuple[int, ...]
    attention_levels: tuple[int, ...]
    num_res_blocks: int
    groups: int
    conv_multiple: int = 8
    linear_multiple: int = 16
    timesteps: int = 1000
    time_features: int
    time_dim: int
    dropout: float = 0.0
    norm_eps: float = 1e-5
    head_channels: int | None = None
    asymmetric_downsample: bool = False
    time_freq_shift: int = 0

    def __post_init__(self) -> None:
        """Refuse what no network can be built from."""
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 16:
                raise SpecError(f"{name} must be a whole number from 1 to 65536, found {brief(value)}")
        if not self.channel_mults or not all(type(m) is int and 1 <= m <= 64 for m in self.channel_mults):
            raise SpecError(f"channel_mults must be whole numbers from 1 to 64, found {brief(self.channel_mults)}")
        levels = len(self.channel_mults)
        if levels > MOST_LEVELS:
            raise SpecError(f"channel_mults must name at most {MOST_LEVELS} levels, found {levels}")
        if not all(type(level) is int and 0 <= level < levels for level in self.attention_levels):
            raise SpecError(f"attention_levels must lie in 0…{levels - 1}, found {brief(self.attention_levels)}")
        if self.image_size % (1 << (levels - 1)):
            raise SpecError(f"image_size {self.image_size} cannot be halved {levels - 1} times ({levels} levels)")
        if self.time_features % 2:
            raise SpecError(f"time_features must be even (sine and cosine pairs), found {self.time_features}")
        if not 0.0 <= self.dropout < 1.0:
            raise SpecError(f"dropout must lie in [0, 1), found {brief(self.dropout)}")
        self._check_not_ddsm()
        self._check_sizes()

    def _check_not_ddsm(self) -> None:
        """Refuse impossible values of what DDSM's networks never set."""
        if type(self.norm_eps) is not float or not 0.0 < self.norm_eps < 1.0:
            raise SpecError(f"norm_eps must lie in (0, 1), found {brief(self.norm_eps)}")
        head = self.head_channels
        if head is not None and (type(head) is not int or not 1 <= head <= 1 << 16):
            raise SpecError(f"head_channels must be a whole number from 1 to 65536, found {brief(head)}")
        if type(self.asymmetric_downsample) is not bool:
            raise SpecError(f"asymmetric_downsample must be true or false, found {brief(self.asymmetric_downsample)}")
        if type(self.time_freq_shift) is not int or not 0 <= self.time_freq_shift < self.time_features // 2:
            most = self.time_features // 2 - 1
            raise SpecError(f"time_freq_shift must be from 0 to {most}, found {brief(self.time_freq_shift)}")

    def _check_sizes(self) -> None:
        """Refuse a network that would fill the memory of any machine before it drew a pixel."""
        levels = len(self.channel_mults)
        scores = max(self._attention_scores(level) for level in (*self.attention_levels, levels - 1))
        for what, size, most in (
            ("residual blocks on the way down", self.num_res_blocks * levels, MOST_BLOCKS),
            ("values a sample", self.channels * self.image_size**2, MOST_SAMPLE_VALUES),
            ("values in its time table", self.timesteps * self.time_features, MOST_SAMPLE_VALUES),
            ("attention scores a sample", scores, MOST_ATTENTION_SCORES),
            ("parameters in its main layers", self._main_parameters(), MOST_PARAMETERS),
        ):
            if size > most:
                raise SpecError(f"this architecture has {size} {what}, expected at most {most}")

    def _attention_scores(self, level: int) -> int:
        """Of one sample in one attention of a level, all heads together."""
        pixels, channels = (self.image_size >> level) ** 2, self.base_channels * self.channel_mults[level]
        return pixels**2 * (1 if self.head_channels is None else max(1, channels // self.head_channels))

    def _main_parameters(self) -> int:
        """Weights of the time embedding, the head, and the two convolutions and the projection of every block."""
        channels = [self.base_channels * mult for mult in self.channel_mults]
        blocks = [*(c for c in channels for _ in range(2)), channels[-1]]
        of_blocks = sum(c * (18 * c + self.time_dim) for c in blocks)
        of_ends = self.time_dim * (self.time_features + self.time_dim) + 18 * self.channels * self.base_channels
        return of_ends + self.num_res_blocks * of_blocks

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of one sample, [C, H, W]."""
        return self.channels, self.image_size, self.image_size

    def conv_channels(self, full: int, width: int) -> int:
        """Channels that a convolution of ``full`` output channels keeps at ``width``."""
        return make_divisible(full * width / self.base_channels, self.conv_multiple)

    def linear_channels(self, full: int, width: int) -> int:
        """Features that a linear layer of ``full`` outputs keeps at ``width``."""
        return make_divisible(full * width / self.base_channels, self.linear_multiple)

    def why_not(self, width: int) -> str | None:
        """Say why ``width`` cannot be cut, or None if it can.

        The layers of a block meet in additions, so the convolution's, the linear's and the attention's rounding must
        agree, and the groups must divide the channels of every norm, as the heads those of every attention.
        """
        if not 1 <= width <= self.base_channels:
            return f"width {width} is not within 1…{self.base_channels}"
        for full in sorted({self.base_channels * mult for mult in (1, *self.channel_mults)}):
            exact = full * width / self.base_channels
            conv, linear = self.conv_channels(full, width), self.linear_channels(full, width)
            if conv != exact:
                return f"{exact:g} channels are not a multiple of {self.conv_multiple} (convolutions)"
            if linear != conv:
                return f"{conv} channels of a convolution meet {linear} of a linear (multiple {self.linear_multiple})"
            if conv % self.groups:
                return f"{conv} channels cannot be normalised in {self.groups} groups"
        for level in (*self.attention_levels, len(self.channel_mults) - 1):
            channels = self.conv_channels(self.base_channels * self.channel_mults[level], width)
            if self.head_channels is not None and channels % self.head_channels:
                return f"{channels} channels cannot be attended to by heads of {self.head_channels}"
        return None

    def widths(self) -> tuple[int, ...]:
        """The widths among 2/8 … 8/8 that can be cut, narrowest first."""
        return tuple(w for w in self.eighths() if self.why_not(w) is None)

    def eighths(self) -> tuple[int, ...]:
        """The widths 2/8 … 8/8 of the base, whether or not they can be cut."""
        return tuple(sorted({round(self.base_channels * k / 8) for k in EIGHTHS}))

    def check_width(self, width: int) -> None:
        """Refuse a width that cannot be cut.

        Raises:
            SpecError: naming the reason and the widths that would work.
        """
        reason = self.why_not(width)
        if reason is not None:
            possible = ", ".join(self.label(w) for w in self.widths()) or "none of 2/8 … 8/8"
            raise SpecError(f"width {self.label(width)} cannot be cut: {reason}; widths that work: {possible}")

    def label(self, width: int) -> str:
        """A width as people write it: ``48 (3/8)``."""
        divisor = math.gcd(width, self.base_channels)
        fraction = (
            f"{8 * width // self.base_channels}/8"
            if 8 * width % self.base_channels == 0
            else f"{width // divisor}/{self.base_channels // divisor}"
        )
        return f"{width} ({fraction})"

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON values; fields that DDSM never sets are left out where they have their default."""
        default = {f.name: f.default for f in fields(self) if f.name in _NOT_DDSM}
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {k: v for k, v in values.items() if k not in default or v != default[k]}

    @classmethod
    def from_json(cls, data: object) -> "UNetSpec":
        """Read what ``to_json`` wrote.

        Raises:
            SpecError: not an object, a missing or an unknown field, or a value that cannot be.
        """
        if not isinstance(data, dict):
            raise SpecError(f"an architecture spec must be an object, found {type(data).__name__}")
        names = {f.name for f in fields(cls)}
        _same_names(names, {*_NOT_DDSM, *data.keys()})
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        try:
            return cls(**values)
        except TypeError as error:
            raise SpecError(f"the architecture spec has a value of the wrong kind: {error}") from error


def _same_names(expected: set[str], found: Iterable[str]) -> None:
    missing, unknown = sorted(expected - set(found)), sorted(set(found) - expected)
    if missing or unknown:
        unknown_words = brief(unknown) if unknown else "nothing"
        raise SpecError(f"the architecture spec lacks {missing or 'nothing'} and has unknown {unknown_words}")
