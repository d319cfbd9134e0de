"""What can a checkpoint not tell, and how does the training run's ``flagfile.txt`` tell it?"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from ddsm_engine.errors import CheckpointError
from ddsm_engine.noise_schedule import VarianceType
from ddsm_engine.untrusted import brief, read_bytes

VAR_TYPES: Mapping[str, VarianceType] = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}
"""The published words for the reverse-process variance, and ours."""

_OPTIONS = {
    "groups": "--groups",
    "image_size": "--image-size",
    "beta_start": "--beta-1",
    "beta_end": "--beta-T",
    "variance_type": "--var-type",
    "conv_multiple": "--conv-multiple",
    "linear_multiple": "--linear-multiple",
    "dropout": "--dropout",
    "base_channels": "--ch",
    "channel_mults": "--ch_mult",
    "attention_levels": "--attn",
    "num_res_blocks": "--num_res_blocks",
    "timesteps": "--T",
}
"""A fact and the option or published flag that states it, for messages."""

_MANDATORY = {
    "groups": ("the groups of its norms", "--groups N"),
    "image_size": ("its image size", "--image-size PIXELS"),
    "beta_start": ("its first beta", "--beta-1 BETA"),
    "beta_end": ("its last beta", "--beta-T BETA"),
    "variance_type": ("its sampling variance", "--var-type fixedlarge|fixedsmall"),
}

_SWITCHES = ("slimmable_g16", "slimmable_unet")
_NUMBERS = ("T", "attn", "beta_1", "beta_T", "ch", "ch_mult", "dropout", "img_size", "num_res_blocks")
_WORDS = ("flagfile", "mean_type", "var_type")
_LINE = re.compile(r"--?([A-Za-z][\w-]*)(?:=(.*))?")
_MOST_BYTES = 1 << 16  # the published one has 1.1 kB

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known about a checkpoint beside its keys and shapes; None is unknown.

    Attributes:
        groups: Groups of every group norm. The same weights load with any count and denoise with one.
        image_size: Height and width of a sample, pixels.
        beta_start: β of the clean end.
        beta_end: β of the noisy end.
        variance_type: Reverse-process variance of DDPM.
        conv_multiple: Sliced convolutions round to a multiple of this.
        linear_multiple: Sliced linears round to a multiple of this.
        dropout: Dropout probability, used in training only.
        base_channels: Claimed channels of the first level; from here on the keys and shapes tell, and a claim that
            differs is refused.
        channel_mults: Claimed multiplier per level.
        attention_levels: Claimed levels with attention, sorted.
        num_res_blocks: Claimed residual blocks per level.
        timesteps: Claimed length of the noise schedule.
    """

    groups: int | None = None
    image_size: int | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    variance_type: VarianceType | None = None
    conv_multiple: int | None = None
    linear_multiple: int | None = None
    dropout: float | None = None
    base_channels: int | None = None
    channel_mults: tuple[int, ...] | None = None
    attention_levels: tuple[int, ...] | None = None
    num_res_blocks: int | None = None
    timesteps: int | None = None

    def over(self, other: "Facts") -> "Facts":
        """These facts, completed by ``other`` where they are unknown: ``options.over(flagfile)``."""
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        return Facts(**{name: getattr(other, name) if value is None else value for name, value in mine.items()})

    def missing(self) -> str | None:
        """Name every mandatory fact that is unknown and how to give it, or None if all are known."""
        unknown = [words for name, words in _MANDATORY.items() if getattr(self, name) is None]
        if not unknown:
            return None
        return (
            f"a checkpoint does not record {', '.join(what for what, _ in unknown)}: "
            f"give {' '.join(option for _, option in unknown)}, or --flagfile with the flagfile.txt of its training run"
        )

    def contradictions(self, recorded: Mapping[str, object]) -> list[str]:
        """The known facts that differ from ``recorded`` (fact → value), in words."""
        return [
            f"{_OPTIONS[name]} {brief(getattr(self, name))} (the file says {brief(value)})"
            for name, value in recorded.items()
            if name in _OPTIONS and getattr(self, name) is not None and getattr(self, name) != value
        ]


def facts_from_flagfile(path: Path) -> Facts:
    """Read the flags that the published training code writes beside its checkpoints (absl's ``flagfile.txt``).

    Flags of other concern are ignored, an absent one stays unknown, and of a repeated one the last counts, as in absl.
    ``--slimmable_g16`` means 16 groups; 32 is understood only where the file shows that the published slimmable
    network was trained without it, by ``--noslimmable_g16`` or by ``--slimmable_unet`` alone.

    Raises:
        CheckpointError: a file that cannot be read or is no flagfile, a value of the wrong kind, or a run whose
            network is no supernet or does not predict the noise.
    """
    flags = _Flags(path, _flags(path))
    if flags.switch("slimmable_unet") is False:
        raise CheckpointError(
            f"{path} says --noslimmable_unet: that run trained one dense network, from which no width can be cut; "
            "give the checkpoint of a run with --slimmable_unet"
        )
    mean_type = flags.last("mean_type", str, "a word")
    if mean_type not in {None, "epsilon"}:
        raise CheckpointError(
            f"{path} says --mean_type={brief(mean_type)}: expected epsilon, a network that predicts the noise"
        )
    attention = flags.whole_numbers("attn")
    return Facts(
        groups=_groups(flags),
        image_size=flags.last("img_size", int, "a whole number"),
        beta_start=flags.last("beta_1", float, "a number"),
        beta_end=flags.last("beta_T", float, "a number"),
        variance_type=flags.last("var_type", VAR_TYPES.__getitem__, " or ".join(VAR_TYPES)),
        dropout=flags.last("dropout", float, "a number"),
        base_channels=flags.last("ch", int, "a whole number"),
        channel_mults=flags.whole_numbers("ch_mult"),
        attention_levels=None if attention is None else tuple(sorted(set(attention))),
        num_res_blocks=flags.last("num_res_blocks", int, "a whole number"),
        timesteps=flags.last("T", int, "a whole number"),
    )


@dataclass(frozen=True, slots=True)
class _Flags:
    """The values of each flag in the order of their lines."""

    path: Path
    values: Mapping[str, list[str]]

    def last(self, name: str, convert: Callable[[str], T], expected: str) -> T | None:
        return self._convert(name, self.values[name][-1], convert, expected) if name in self.values else None

    def whole_numbers(self, name: str) -> tuple[int, ...] | None:
        """One number a line (as absl writes them), or several with commas between."""
        if name not in self.values:
            return None
        items = ",".join(self.values[name]).split(",")
        return tuple(self._convert(name, item, int, "whole numbers") for item in items)

    def switch(self, name: str) -> bool | None:
        words = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
        return self.last(name, lambda value: words[value.lower()], "True or False")

    def _convert(self, name: str, value: str, convert: Callable[[str], T], expected: str) -> T:
        try:
            return convert(value)
        except (ValueError, KeyError) as error:
            message = f"{self.path}: expected {expected} for --{name}, found {value[:40]!r}; correct it"
            raise CheckpointError(message) from error


def _groups(flags: _Flags) -> int | None:
    in_sixteen = flags.switch("slimmable_g16")
    if in_sixteen is None:
        return 32 if flags.switch("slimmable_unet") else None
    return 16 if in_sixteen else 32


def _flags(path: Path) -> dict[str, list[str]]:
    flags: dict[str, list[str]] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith(("#", "//")):
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise CheckpointError(
                f"{path}, line {number}: expected --flag=value, --flag or --noflag, found {text[:60]!r}; "
                "give the flagfile.txt that the training run wrote"
            )
        name, value = match.groups()
        if value is None and name.removeprefix("no") in _SWITCHES:
            name, value = name.removeprefix("no"), str(not name.startswith("no"))
        if value is None and name in (*_NUMBERS, *_WORDS):
            raise CheckpointError(f"{path}, line {number}: expected --{name}=value, found --{name} without a value")
        if value is not None:
            flags.setdefault(name, []).append(value)
    if any(flags.get("flagfile", ())):
        raise CheckpointError(
            f"{path} includes another file (--flagfile={brief(flags['flagfile'][-1])}): copy its lines here"
        )
    return flags


def _text(path: Path) -> str:
    try:
        return read_bytes(path, _MOST_BYTES).decode()
    except OSError as error:
        raise CheckpointError(f"expected a flagfile at {path}, which cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is no flagfile: expected text, found bytes that are no UTF-8") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no flagfile: {error}") from error
