"""The rewritten group norm against float64, and against graphs that only look like one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray
from openvino import opset13 as ops

from ddsm_engine.backends.openvino import choose_streams, core
from ddsm_engine.backends.openvino_norms import channels_last_norms
from tests.conftest import TINY

B, C, SIDE, GROUPS, EPSILON = 2, 12, 6, 3, 1e-5
SCALE = np.linspace(0.5, 2.0, C, dtype=np.float32).reshape(1, C, 1, 1)
SHIFT = np.linspace(-1.0, 1.0, C, dtype=np.float32).reshape(1, C, 1, 1)
GROUPED = [B, GROUPS, C // GROUPS * SIDE * SIDE]

Array = NDArray[np.float32]


def graph(
    *,
    grouped: list[int] = GROUPED,
    axes: tuple[int, ...] = (2,),
    outside: bool = False,
    variance: bool = True,
    scale: Array = SCALE,
    read_twice: bool = False,
) -> ov.Model:
    """A group norm as ONNX spells it, with an inner scale and shift per group, and its variations."""
    x = ops.parameter([B, C, SIDE, SIDE], np.float32)
    flat = ops.reshape(x, np.array(grouped), special_zero=False)
    mode = "OUTSIDE_SQRT" if outside else "INSIDE_SQRT"
    normed = ops.mvn(flat, np.array(axes), variance, EPSILON, mode)
    inner = np.full((1, grouped[1], 1), 2.0, np.float32)
    whole = ops.reshape(ops.add(ops.multiply(normed, inner), inner), np.array([B, C, SIDE, SIDE]), special_zero=False)
    out = ops.add(ops.multiply(whole, scale), SHIFT)
    return ov.Model([out, *([normed] if read_twice else [])], [x])


def group_norm(x: Array) -> NDArray[np.float64]:
    """In float64, from the definition."""
    grouped = x.astype(np.float64).reshape(B, GROUPS, -1)
    spread = np.sqrt(grouped.var(axis=2, keepdims=True) + EPSILON)
    normed = (2 * (grouped - grouped.mean(axis=2, keepdims=True)) / spread + 2).reshape(x.shape)
    return np.asarray(normed * SCALE + SHIFT, np.float64)


def run(network: ov.Model, x: Array) -> Array:
    compiled = core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": ov.Type.f32})
    return np.array(compiled(x)[0])


def samples(offset: float) -> Array:
    rng = np.random.default_rng(0)
    centre = offset * rng.standard_normal((1, C, 1, 1))
    return (rng.standard_normal((B, C, SIDE, SIDE)) + centre).astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, 3.0, 300.0])
def test_a_rewritten_norm_is_the_same_function(offset: float) -> None:
    network, x = graph(), samples(offset)
    assert channels_last_norms(network) == 1
    assert not [node for node in network.get_ops() if node.get_type_name() == "MVN"]
    assert np.abs(run(network, x) - group_norm(x)).max() <= 3e-6 * max(1.0, offset)


def test_a_norm_of_a_channel_far_from_zero_keeps_its_digits() -> None:
    x = samples(0.0) + np.float32(1000)
    network = graph()
    channels_last_norms(network)
    assert np.abs(run(network, x) - group_norm(x)).max() <= 2e-3, "what x itself has lost at 1000"
    # The one-pass formula is the control: it is not even near.
    grouped = x.reshape(B, GROUPS, -1)
    one_pass = (grouped**2).mean(axis=2) - grouped.mean(axis=2) ** 2
    assert np.abs(one_pass - grouped.astype(np.float64).var(axis=2)).max() > 0.02


LOOKALIKES: dict[str, Callable[[], ov.Model]] = {
    "over the groups as well": lambda: graph(axes=(1, 2)),
    "epsilon outside of the root": lambda: graph(outside=True),
    "only the mean is taken off": lambda: graph(variance=False),
    "another use of what is normalised": lambda: graph(read_twice=True),
    "over the batch": lambda: graph(grouped=[1, GROUPS * B, GROUPED[2]]),
}


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_what_only_looks_like_a_group_norm_is_left_alone(kind: str) -> None:
    network, x = LOOKALIKES[kind](), samples(1.0)
    expected = run(network, x)
    assert channels_last_norms(network) == 0
    assert np.array_equal(run(network, x), expected)


def test_a_scale_per_pixel_is_not_taken_for_one_per_channel() -> None:
    scale = np.random.default_rng(1).standard_normal((1, C, SIDE, SIDE)).astype(np.float32)
    network, x = graph(scale=scale), samples(1.0)
    expected = run(network, x)
    assert channels_last_norms(network) == 1, "the norm before it is one"
    assert np.abs(run(network, x) - expected).max() <= 1e-5


def test_every_norm_of_every_variant_is_rewritten(bundle_path: Path) -> None:
    for model in sorted(bundle_path.glob("variants/*/model.onnx")):
        network = core().read_model(model)
        network.reshape({"sample": [2, *TINY.sample_shape], "time_features": [2, TINY.time_features]})
        before = [node.get_type_name() for node in network.get_ops()].count("MVN")
        assert channels_last_norms(network) == before > 0


@pytest.mark.parametrize("batch", range(1, 20))
@pytest.mark.parametrize("threads", [1, 2, 3, 8, 64])
def test_a_batch_is_split_evenly_over_as_many_streams_as_have_threads(batch: int, threads: int) -> None:
    streams = choose_streams(batch, threads)
    assert batch % streams == 0
    assert 1 <= streams <= threads
    assert not [more for more in range(streams + 1, min(batch, threads) + 1) if batch % more == 0]
