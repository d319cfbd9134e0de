"""Does a spec survive its file, and refuse what no network can be built from?"""

import dataclasses
import json
from typing import Any

import pytest

from ddsm_engine.errors import SpecError
from ddsm_engine.spec import UNetSpec, make_divisible

CIFAR10 = UNetSpec(
    image_size=32,
    channels=3,
    base_channels=128,
    channel_mults=(1, 2, 2, 2),
    attention_levels=(1,),
    num_res_blocks=2,
    groups=32,
    time_features=128,
    time_dim=512,
    dropout=0.1,
)
VALID: dict[str, Any] = CIFAR10.to_json()
OTHERS: dict[str, Any] = {
    "norm_eps": 1e-6, "head_channels": 8, "asymmetric_downsample": True, "time_freq_shift": 1,
}  # fmt: skip
"""What DDSM's networks never have."""


@pytest.mark.parametrize(
    "spec",
    [
        CIFAR10,
        dataclasses.replace(CIFAR10, groups=16, dropout=0.0, timesteps=10),
        dataclasses.replace(CIFAR10, **OTHERS),
        *(dataclasses.replace(CIFAR10, **{name: value}) for name, value in OTHERS.items()),
        dataclasses.replace(CIFAR10, channels=1, attention_levels=(), conv_multiple=4, linear_multiple=4),
    ],
)
def test_a_spec_survives_json(spec: UNetSpec) -> None:
    assert UNetSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_spec_can_be_compared_and_is_a_key() -> None:
    assert {CIFAR10: "full"}[UNetSpec.from_json(VALID)] == "full"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 0}, "image_size must be a whole number from 1 to 65536, found 0"),
        ({"base_channels": -8}, "base_channels must be a whole number"),
        ({"base_channels": 128.0}, "base_channels must be a whole number .* found 128.0"),
        ({"groups": True}, "groups must be a whole number"),
        ({"groups": None}, "groups must be a whole number .* found None"),
        ({"timesteps": 1 << 20}, "timesteps must be a whole number"),
        ({"channel_mults": []}, "channel_mults must be whole numbers"),
        ({"channel_mults": [1, 0]}, "channel_mults must be whole numbers"),
        ({"channel_mults": [1, 1.5]}, "channel_mults must be whole numbers"),
        ({"channel_mults": "12"}, "channel_mults must be whole numbers"),
        ({"channel_mults": 2}, "wrong kind"),
        ({"attention_levels": [4]}, "attention_levels must lie in 0…3, found \\(4,\\)"),
        ({"attention_levels": [-1]}, "attention_levels must lie in 0…3"),
        ({"image_size": 36}, "image_size 36 cannot be halved 3 times"),
        ({"time_features": 127}, "time_features must be even"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"dropout": float("nan")}, "dropout must lie in"),
        ({"dropout": "none"}, "wrong kind"),
        ({"norm_eps": 0.0}, r"norm_eps must lie in \(0, 1\), found 0.0"),
        ({"norm_eps": 1}, "norm_eps must lie in"),
        ({"norm_eps": "1e-5"}, "norm_eps must lie in"),
        ({"norm_eps": float("nan")}, "norm_eps must lie in"),
        ({"head_channels": 0}, "head_channels must be a whole number from 1 to 65536, found 0"),
        ({"head_channels": 8.0}, "head_channels must be a whole number"),
        ({"head_channels": True}, "head_channels must be a whole number"),
        ({"asymmetric_downsample": 1}, "asymmetric_downsample must be true or false, found 1"),
        ({"time_freq_shift": 64}, "time_freq_shift must be from 0 to 63, found 64"),
        ({"time_freq_shift": -1}, "time_freq_shift must be from 0 to 63"),
        ({"time_freq_shift": 0.5}, "time_freq_shift must be from 0 to 63"),
        ({"image_size": 256, "head_channels": 1, "groups": 1}, "attention scores a sample, expected at most"),
    ],
)
def test_a_spec_that_no_network_can_be_built_from_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        UNetSpec.from_json(VALID | change)


@pytest.mark.parametrize("name", sorted(VALID))
def test_a_missing_field_is_named(name: str) -> None:
    # Even one with a default: a file that leaves out the rounding or the groups leaves out what the weights mean.
    with pytest.raises(SpecError, match=f"lacks \\['{name}'\\]"):
        UNetSpec.from_json({key: value for key, value in VALID.items() if key != name})


def test_the_file_of_a_supernet_is_what_it_was_before_other_networks_came() -> None:
    assert not OTHERS.keys() & VALID.keys()
    assert json.dumps(VALID) == (
        '{"image_size": 32, "channels": 3, "base_channels": 128, "channel_mults": [1, 2, 2, 2], '
        '"attention_levels": [1], "num_res_blocks": 2, "groups": 32, "conv_multiple": 8, "linear_multiple": 16, '
        '"timesteps": 1000, "time_features": 128, "time_dim": 512, "dropout": 0.1}'
    )
    assert dataclasses.replace(CIFAR10, **OTHERS).to_json() == VALID | OTHERS


def test_a_width_whose_heads_do_not_come_out_even_is_refused() -> None:
    spec = dataclasses.replace(CIFAR10, groups=16, head_channels=64)
    assert spec.why_not(96) is None
    assert spec.why_not(112) == "224 channels cannot be attended to by heads of 64"
    assert dataclasses.replace(spec, head_channels=None).why_not(112) is None


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(SpecError, match=r"unknown \['heads'\]"):
        UNetSpec.from_json(VALID | {"heads": 8})


@pytest.mark.parametrize("data", [None, [], "unet", 3])
def test_a_spec_that_is_no_object_is_refused(data: object) -> None:
    with pytest.raises(SpecError, match=f"must be an object, found {type(data).__name__}"):
        UNetSpec.from_json(data)


@pytest.mark.parametrize(
    ("channels", "multiple", "expected"),
    [(112, 8, 112), (24, 16, 32), (40, 16, 48), (20, 8, 24), (10, 8, 16), (7.5, 8, 8), (90, 1, 90), (44.8, 8, 48)],
)
def test_channels_round_to_a_multiple_and_never_lose_a_tenth(channels: float, multiple: int, expected: int) -> None:
    assert make_divisible(channels, multiple) == expected


@pytest.mark.parametrize("width", [0, -32, 129])
def test_a_width_outside_the_base_is_refused(width: int) -> None:
    with pytest.raises(SpecError, match="is not within 1…128; widths that work: 32"):
        CIFAR10.check_width(width)


def test_the_first_convolution_limits_the_widths_where_no_level_has_its_channels() -> None:
    # At a width of 32 every level keeps 64 channels, which 64 groups divide, but the head keeps 32.
    spec = dataclasses.replace(CIFAR10, channel_mults=(2, 2), groups=64)
    assert spec.why_not(64) is None
    assert spec.why_not(32) == "32 channels cannot be normalised in 64 groups"


def test_a_width_is_written_with_its_fraction() -> None:
    assert CIFAR10.label(48) == "48 (3/8)"
    assert CIFAR10.label(20) == "20 (5/32)"


def test_the_eighths_of_a_small_base_are_listed_once() -> None:
    assert dataclasses.replace(CIFAR10, base_channels=4).eighths() == (1, 2, 3, 4)
