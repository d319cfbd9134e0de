"""Is a sub-network what DDSM computes at its width? Compared with the published dynamic forward, never with itself."""

import dataclasses
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddsm_engine.errors import SpecError
from ddsm_engine.networks.slicing import empty_unet, slice_weights, subnetwork
from ddsm_engine.networks.unet import UNet
from ddsm_export.cost import count_cost
from tests.oracle.dynamic_unet import (
    CIFAR10,
    MISTAKES,
    TABLE,
    Config,
    Mistake,
    blocks_read,
    dynamic_unet,
    published_state_dict,
)
from tests.oracle.names import product_spec, product_weights
from tests.tolerances import SLICED_FORWARD

SAME_ARITHMETIC = 1e-12
"""Relative L2 in float64: only a wrong weight, shape or operation is larger (observed: 3e-15)."""

TELLS_APART = 1e-2
"""Relative L2 that every negative control must exceed."""

TINY = Config(ch=32, ch_mult=(1, 2), attn=(1,), num_res_blocks=1, groups=4, conv_multiple=4, linear_multiple=4, T=10)
GREY = dataclasses.replace(TINY, ch_mult=(1, 1, 2), attn=(), num_res_blocks=2, in_channels=1)
BASE_128_GROUPS_32 = Config(ch=128, ch_mult=(1, 2), attn=(1,), num_res_blocks=1, groups=32, T=10)
BASE_128_GROUPS_16 = dataclasses.replace(BASE_128_GROUPS_32, groups=16)

IMAGE_SIZES = {TINY: 16, GREY: 16, BASE_128_GROUPS_32: 8, BASE_128_GROUPS_16: 8, CIFAR10: 32}
EIGHTHS = {
    TINY: range(2, 9),
    GREY: range(2, 9),
    BASE_128_GROUPS_32: (2, 4, 6, 8),
    BASE_128_GROUPS_16: range(2, 9),
}
NAMES = {TINY: "tiny", GREY: "grey", BASE_128_GROUPS_32: "base128-g32", BASE_128_GROUPS_16: "base128-g16"}
CASES = [
    pytest.param(config, config.ch * k // 8, id=f"{NAMES[config]}-{k}/8") for config in NAMES for k in EIGHTHS[config]
]

# Exact integers per image of the released CIFAR-10 architecture: parameters, and multiply-accumulates of convolutions,
# linears and attention products.
CIFAR10_COSTS = {
    32: (2_258_051, 379_518_976, 192_512, 41_975_808),
    48: (5_056_707, 852_590_592, 420_864, 62_963_712),
    64: (8_968_451, 1_514_536_960, 737_280, 83_951_616),
    80: (13_993_283, 2_365_358_080, 1_141_760, 104_939_520),
    96: (20_131_203, 3_405_053_952, 1_634_304, 125_927_424),
    112: (27_382_211, 4_633_624_576, 2_214_912, 146_915_328),
    128: (35_746_307, 6_051_069_952, 2_883_584, 167_903_232),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # On a busy machine the threads of one small convolution wait for each other: fifty times slower than a single one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def state_of(config: Config) -> dict[str, Tensor]:
    """Random published weights, made once per configuration."""
    return published_state_dict(config, seed=0)


def cut(config: Config, state: dict[str, Tensor], width: int) -> UNet:
    """The product's static network."""
    return subnetwork(product_spec(config, IMAGE_SIZES.get(config, 8)), product_weights(state), width)


def inputs(config: Config, batch: int = 2) -> tuple[Tensor, Tensor]:
    """A batch of noise at different timesteps, the last one among them."""
    size = IMAGE_SIZES.get(config, 8)
    x = torch.randn(batch, config.in_channels, size, size, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(config.T - 1, 0, batch).long()


def relative_l2(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm())


def difference(config: Config, width: int, dtype: torch.dtype = torch.float32, mistake: Mistake | None = None) -> float:
    """Relative L2 between the product's static network and the dynamic one, on the same weights and time table."""
    state = {name: tensor.to(dtype) for name, tensor in state_of(config).items()}
    x, t = inputs(config)
    with torch.inference_mode():
        static = cut(config, state, width)(x.to(dtype), state[TABLE][t])
        return relative_l2(static, dynamic_unet(config, state, x.to(dtype), t, width / config.ch, mistake))


@pytest.mark.parametrize(("config", "width"), CASES)
def test_every_weight_of_a_sub_network_is_the_leading_block_of_the_supernets(config: Config, width: int) -> None:
    full = product_weights(state_of(config))
    for name, parameter in cut(config, state_of(config), width).named_parameters():
        assert torch.equal(parameter, full[name][tuple(slice(size) for size in parameter.shape)]), name
        assert parameter.is_contiguous(), name


@pytest.mark.parametrize(("config", "width"), CASES)
def test_a_sub_network_holds_what_the_dynamic_forward_reads_and_nothing_else(config: Config, width: int) -> None:
    read = product_weights(blocks_read(config, state_of(config), width / config.ch))
    held = dict(cut(config, state_of(config), width).named_parameters())
    assert held.keys() == read.keys()
    for name, block in read.items():
        assert torch.equal(held[name], block), name


@pytest.mark.parametrize(("config", "width"), CASES)
def test_a_sub_network_computes_what_the_dynamic_forward_computes(config: Config, width: int) -> None:
    assert difference(config, width, torch.float64) <= SAME_ARITHMETIC
    assert difference(config, width) <= SLICED_FORWARD


@pytest.mark.parametrize(("groups", "width"), [(32, 64), (16, 48)])
def test_the_released_cifar_10_network_computes_what_the_dynamic_forward_computes(groups: int, width: int) -> None:
    config = dataclasses.replace(CIFAR10, groups=groups)
    state = state_of(CIFAR10)
    x, t = inputs(CIFAR10)
    with torch.inference_mode():
        expected = dynamic_unet(config, state, x, t, width / 128)
        assert relative_l2(cut(config, state, width)(x, state[TABLE][t]), expected) <= SLICED_FORWARD


@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_network_of_the_right_shapes_is_told_apart(mistake: Mistake, width: int) -> None:
    assert difference(TINY, width, mistake=mistake) >= TELLS_APART


@pytest.mark.parametrize("width", [32, 64, 96])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_network_of_the_published_widths_is_told_apart(mistake: Mistake, width: int) -> None:
    assert difference(BASE_128_GROUPS_32, width, mistake=mistake) >= TELLS_APART


@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_another_group_count_loads_the_same_weights_and_is_told_apart(width: int) -> None:
    state, (x, t) = state_of(BASE_128_GROUPS_32), inputs(BASE_128_GROUPS_32)
    with torch.inference_mode():
        expected = dynamic_unet(BASE_128_GROUPS_32, state, x, t, width / 128)
        found = cut(BASE_128_GROUPS_16, state, width)(x, state[TABLE][t])
    assert relative_l2(found, expected) >= TELLS_APART


@pytest.mark.parametrize("config", [TINY, GREY], ids=["tiny", "grey"])
def test_an_image_does_not_depend_on_its_neighbours(config: Config) -> None:
    unet, table = cut(config, state_of(config), 24), state_of(config)[TABLE]
    x, t = inputs(config, batch=5)
    with torch.inference_mode():
        together = unet(x, table[t])
        for row in range(len(x)):
            alone = unet(x[row : row + 1], table[t[row : row + 1]])
            assert relative_l2(together[row : row + 1], alone) <= SLICED_FORWARD


def test_a_one_channel_image_does_not_make_the_head_depthwise() -> None:
    # The published layer takes itself for depthwise there and yields one channel, silently.
    assert cut(GREY, state_of(GREY), 24).head.weight.shape == (24, 1, 3, 3)


def test_training_a_width_reaches_only_its_leading_blocks() -> None:
    full = {name: tensor.clone().requires_grad_() for name, tensor in product_weights(state_of(TINY)).items()}
    unet = UNet(product_spec(TINY, 16), 16)
    x, t = inputs(TINY)
    args = (x, state_of(TINY)[TABLE][t])
    torch.func.functional_call(unet, slice_weights(full, unet), args).square().mean().backward()
    for name, parameter in unet.named_parameters():
        gradient = full[name].grad
        assert gradient is not None, name
        leading = gradient[tuple(slice(size) for size in parameter.shape)]
        assert 0 < leading.count_nonzero() == gradient.count_nonzero(), name


def test_a_sub_network_does_not_change_with_the_weights_it_was_cut_from() -> None:
    weights = {name: tensor.clone() for name, tensor in product_weights(state_of(TINY)).items()}
    unet = subnetwork(product_spec(TINY, 16), weights, TINY.ch)
    for tensor in weights.values():
        tensor.zero_()
    assert all(parameter.abs().sum() > 0 for parameter in unet.parameters())


def test_a_sub_network_is_ready_to_run() -> None:
    unet = cut(TINY, state_of(TINY), 16)
    assert not unet.training
    assert not any(parameter.requires_grad for parameter in unet.parameters())


@pytest.mark.parametrize("width", CIFAR10_COSTS)
def test_parameters_and_macs_of_every_width_are_the_known_integers(width: int) -> None:
    params, conv, linear, attention = CIFAR10_COSTS[width]
    cost = count_cost(product_spec(dataclasses.replace(CIFAR10, groups=16), 32), width)
    assert (cost.params, cost.conv_linear_macs, cost.macs) == (params, conv + linear, conv + linear + attention)


def test_a_width_that_cannot_be_cut_names_those_that_can() -> None:
    spec = product_spec(CIFAR10, 32)
    with pytest.raises(SpecError) as refusal:
        empty_unet(spec, 112)
    message = str(refusal.value)
    assert "112 (7/8)" in message
    assert "112 channels cannot be normalised in 32 groups" in message
    assert message.endswith("widths that work: 32 (2/8), 64 (4/8), 96 (6/8), 128 (8/8)")


def test_a_width_whose_linears_round_away_names_those_that_work() -> None:
    # Of 24, 40 and 56 channels the linears keep 32, 48 and 64, and the addition inside a block does not fit.
    spec = product_spec(dataclasses.replace(CIFAR10, ch=64, groups=16), 32)
    with pytest.raises(SpecError, match="24 channels of a convolution meet 32 of a linear") as refusal:
        empty_unet(spec, 24)
    assert str(refusal.value).endswith("widths that work: 16 (2/8), 32 (4/8), 48 (6/8), 64 (8/8)")


@pytest.mark.parametrize(
    ("base", "groups", "eighths"),
    [
        (128, 16, (2, 3, 4, 5, 6, 7, 8)),
        (128, 32, (2, 4, 6, 8)),
        (256, 16, (2, 3, 4, 5, 6, 7, 8)),
        (256, 32, (2, 3, 4, 5, 6, 7, 8)),
        (64, 16, (2, 4, 6, 8)),
        (192, 16, (2, 4, 6, 8)),
        (320, 16, (2, 4, 6, 8)),
    ],
)
def test_the_published_rounding_leaves_these_widths(base: int, groups: int, eighths: tuple[int, ...]) -> None:
    spec = product_spec(dataclasses.replace(CIFAR10, ch=base, groups=groups), 32)
    assert spec.widths() == tuple(base * k // 8 for k in eighths)


@pytest.mark.parametrize(
    "config",
    [BASE_128_GROUPS_32, dataclasses.replace(BASE_128_GROUPS_16, ch=64), dataclasses.replace(TINY, linear_multiple=16)],
    ids=["base128-g32", "base64-g16", "tiny-linear16"],
)
def test_the_dynamic_forward_breaks_at_the_eighths_that_are_refused(config: Config) -> None:
    spec, state, (x, t) = product_spec(config, 8), state_of(config), inputs(config)
    refused = [width for width in spec.eighths() if spec.why_not(width) is not None]
    assert refused
    for width in refused:
        with pytest.raises(RuntimeError):
            dynamic_unet(config, state, x, t, width / config.ch)


@st.composite
def small_configs(draw: st.DrawFn) -> Config:
    """Small architectures that exist at full width."""
    ch_mult = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    ch = draw(st.sampled_from([8, 16, 24, 32]))
    return Config(
        ch=ch,
        ch_mult=ch_mult,
        attn=tuple(sorted(draw(st.sets(st.integers(0, len(ch_mult) - 1))))),
        num_res_blocks=draw(st.integers(1, 2)),
        groups=draw(st.sampled_from([1, 2, 4, 8])),
        conv_multiple=draw(st.sampled_from([1, 2, 4, 8])),
        linear_multiple=draw(st.sampled_from([multiple for multiple in (1, 2, 4, 8, 16) if ch % multiple == 0])),
        T=10,
        in_channels=draw(st.integers(1, 4)),
    )


@st.composite
def configs_and_widths(draw: st.DrawFn) -> tuple[Config, int]:
    """A small architecture and any width that can be cut from it, eighth or not."""
    config = draw(small_configs())
    spec = product_spec(config, 8)
    return config, draw(st.sampled_from([w for w in range(1, config.ch + 1) if spec.why_not(w) is None]))


@given(small_configs())
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_slicing_to_the_full_width_is_the_identity(config: Config) -> None:
    weights = product_weights(published_state_dict(config, seed=0))
    sliced = slice_weights(weights, empty_unet(product_spec(config, 8), config.ch))
    assert sliced.keys() == weights.keys()
    assert all(torch.equal(sliced[name], weights[name]) for name in weights)


@given(configs_and_widths())
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_every_legal_width_of_any_architecture_computes_what_the_dynamic_forward_computes(
    case: tuple[Config, int],
) -> None:
    config, width = case
    state = {name: tensor.double() for name, tensor in published_state_dict(config, seed=0).items()}
    x, t = inputs(config)
    with torch.inference_mode():
        static = cut(config, state, width)(x.double(), state[TABLE][t])
        expected = dynamic_unet(config, state, x.double(), t, width / config.ch)
    assert relative_l2(static, expected) <= SAME_ARITHMETIC
