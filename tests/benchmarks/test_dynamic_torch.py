from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.dynamic_torch import DynamicLoop, dynamic_unet_from_bundle
from ddsm_engine.bundle import Bundle
from tests.conftest import CONFIG, STATE
from tests.oracle.dynamic_unet import dynamic_unet
from tests.oracle.sampling import PublishedSchedule, ddim_states, ddpm_states
from tests.tolerances import SLICED_FORWARD, TRAJECTORY


def relative_l2(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_the_dynamic_module_is_the_published_network(k: int, bundle: Bundle) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(k))
    t = torch.tensor([371, 371])
    loop = DynamicLoop(dynamic_unet_from_bundle(bundle), bundle.manifest.noise_schedule, [999, 0], "fp32")
    found = loop.predict(x, t, [k / 8] * 1000)
    assert relative_l2(found, dynamic_unet(CONFIG, STATE, x, t, k / 8)) <= SLICED_FORWARD


def test_the_width_follows_the_timestep(bundle: Bundle) -> None:
    loop = DynamicLoop(dynamic_unet_from_bundle(bundle), bundle.manifest.noise_schedule, [999, 0], "fp32")
    x, mults = torch.ones(1, 3, 8, 8), [1.0] * 500 + [0.25] * 500
    for t, width_mult in ((499, 1.0), (500, 0.25), (499, 1.0)):
        found = loop.predict(x, torch.tensor([t]), mults)
        assert relative_l2(found, dynamic_unet(CONFIG, STATE, x, torch.tensor([t]), width_mult)) <= SLICED_FORWARD


def test_autocast_rounds_and_little_more(bundle: Bundle) -> None:
    network, schedule = dynamic_unet_from_bundle(bundle), bundle.manifest.noise_schedule
    x, t = torch.ones(1, 3, 8, 8), torch.tensor([500])
    exact, rounded = (DynamicLoop(network, schedule, [999, 0], p).predict(x, t, [1.0] * 1000) for p in ("fp32", "bf16"))
    assert rounded.dtype == torch.float32
    assert 1e-4 < relative_l2(rounded, exact) < 5e-2


@pytest.mark.parametrize("timesteps", [range(999, -1, -1), (750, 500, 250, 0)], ids=["ddpm", "part"])
def test_the_loop_samples_as_published(timesteps: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = DynamicLoop(dynamic_unet_from_bundle(bundle), bundle.manifest.noise_schedule, timesteps, "fp32")
    monkeypatch.setattr(loop, "predict", lambda x, t, width_mults: x * 0.5)
    generator = torch.Generator().manual_seed(0)
    x_T, *noises = torch.randn(len(timesteps) + 1, 1, 3, 8, 8, generator=generator)
    found = loop.run(x_T, [], noise=lambda like, call: noises[call])
    if len(timesteps) == 1000:
        expected = ddpm_states(lambda x, t: x * 0.5, x_T, noises, PublishedSchedule())[-1]
    else:
        expected = ddim_states(lambda x, t: x * 0.5, x_T, noises, timesteps, PublishedSchedule(), eta=1.0)[-1]
    assert relative_l2(found, expected) <= TRAJECTORY
