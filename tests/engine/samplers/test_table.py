"""What the tables of the published samplers hold, against the papers' own formulas."""

import numpy as np
import pytest

from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.samplers import Clip, DynamicThreshold, make_sampler

SCHEDULE = NoiseSchedule(1e-4, 0.02, 1000)


def test_ddpm_without_a_clip_is_the_published_mean() -> None:
    table = make_sampler("ddpm", SCHEDULE)
    betas, alphas_cumprod = SCHEDULE.betas[::-1], SCHEDULE.alphas_cumprod[::-1]
    of_x, of_eps, of_noise = table.update[:, 0, 0], table.update[:, 0, 1], table.update[:, 0, 3]
    # (x - beta / sqrt(1 - abar) eps) / sqrt(1 - beta): equation 11 of Ho et al., written out without x_0.
    np.testing.assert_allclose(of_x, 1 / np.sqrt(1 - betas), rtol=1e-12)
    np.testing.assert_allclose(of_eps, -betas / np.sqrt(1 - alphas_cumprod) / np.sqrt(1 - betas), rtol=1e-9)
    assert of_noise[0] == pytest.approx(0.02**0.5)
    assert of_noise[-2] == pytest.approx(0.01095, abs=1e-5)
    assert of_noise[-1] == 0, "no noise at t = 0"


def test_the_small_variance_is_the_posterior_s() -> None:
    sigma = make_sampler("ddpm", NoiseSchedule(1e-4, 0.02, 1000, "fixed_small")).update[::-1, 0, 3]
    cumprod = SCHEDULE.alphas_cumprod
    expected = SCHEDULE.betas[1:] * (1 - cumprod[:-1]) / (1 - cumprod[1:])
    # beta is recovered from a ratio near 1, which costs it four digits.
    np.testing.assert_allclose(sigma[1:] ** 2, expected, rtol=1e-11)


def test_ddpm_over_some_timesteps_is_respaced() -> None:
    table = make_sampler("ddpm", SCHEDULE, 100)
    assert table.timesteps.tolist() == list(range(990, -1, -10))
    cumprod = SCHEDULE.alphas_cumprod
    assert table.update[0, 0, 3] ** 2 == pytest.approx(1 - cumprod[990] / cumprod[980]), "fixed_large: the longer beta"


def test_ddim_visits_the_strided_timesteps_and_ends_clean() -> None:
    table = make_sampler("ddim", SCHEDULE, 50)
    assert table.timesteps.tolist() == list(range(980, -1, -20))
    assert not table.update[:, 0, 3].any(), "eta 0 adds no noise"
    x_0, eps = 0.3, -1.2
    cumprod = SCHEDULE.alphas_cumprod[0]
    of_x, of_eps = table.update[-1, 0, :2]
    last = of_x * (np.sqrt(cumprod) * x_0 + np.sqrt(1 - cumprod) * eps) + of_eps * eps
    assert last == pytest.approx(x_0), "the last call lands on the predicted clean image"


@pytest.mark.parametrize(
    ("name", "calls", "slots"),
    [("ddpm", 10, 1), ("ddim", 10, 1), ("euler", 10, 1), ("heun", 19, 2), ("dpm++2m", 10, 2), ("dpm++3m", 10, 3),
     ("dpm++2s", 10, 3), ("unipc", 10, 4)],
)  # fmt: skip
def test_ten_steps_take_these_calls_and_slots(name: str, calls: int, slots: int) -> None:
    table = make_sampler(name, SCHEDULE, 10)
    assert (table.steps, table.calls, table.slots) == (10, calls, slots)
    assert table.update.shape == (calls, slots, slots + 3)


def test_heun_asks_at_fractional_timesteps_and_twice_at_each_but_the_first() -> None:
    table = make_sampler("heun", SCHEDULE, 4)
    assert table.timesteps.tolist() == [999, 666, 666, 333, 333, 0, 0]
    assert any(not t.is_integer() for t in make_sampler("heun:karras", SCHEDULE, 10).timesteps.tolist())


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpm++2m", "dpm++3m", "dpm++2s", "unipc"])
def test_where_the_network_is_exact_every_sampler_lands_on_the_image(name: str) -> None:
    """The data is one image: the ODE is then solved exactly, so every sampler must end on that image."""
    table = make_sampler(name, SCHEDULE, 20)
    image, noise = 0.4, 1.3
    cumprod = SCHEDULE.alphas_cumprod
    slots = [table.start * noise, *[0.0] * (table.slots - 1)]
    for t, (to_x, to_out), update in zip(table.timesteps, table.to_x_0, table.update, strict=True):
        del to_x, to_out
        ratio = np.interp(t, np.arange(1000), np.sqrt((1 - cumprod) / cumprod))
        alpha = 1 / np.hypot(1, ratio)
        eps = (slots[0] - alpha * image) / (ratio * alpha)
        slots = list(update @ [*slots, eps, 0.0, 0.0])
    assert slots[0] == pytest.approx(image, abs=1e-9)


def test_dynamic_thresholding_bounds_each_image_by_its_own_quantile() -> None:
    batch = np.stack([np.linspace(-4, 4, 12), np.linspace(-0.5, 0.5, 12)]).astype(np.float32).reshape(2, 3, 2, 2)
    bounded = batch.copy()
    DynamicThreshold(quantile=0.5, largest=3.0).apply(bounded)
    most = np.quantile(np.abs(batch[0]), 0.5)
    np.testing.assert_allclose(bounded[0], np.clip(batch[0], -most, most) / most, rtol=1e-6)
    np.testing.assert_array_equal(bounded[1], batch[1], "an image within ± 1 is left alone")
    capped = batch.copy()
    DynamicThreshold(quantile=1.0, largest=2.0).apply(capped)
    np.testing.assert_allclose(capped[0], np.clip(batch[0], -2, 2) / 2, rtol=1e-6)


def test_a_largest_bound_below_1_goes_before_the_least() -> None:
    batch = np.array([-0.2, 0.4, 0.9, 3.0], np.float32).reshape(1, 1, 2, 2)
    DynamicThreshold(quantile=0.9, largest=0.5).apply(batch)
    np.testing.assert_allclose(batch.ravel(), [-0.4, 0.8, 1.0, 1.0], rtol=1e-6)


def test_a_clip_bounds_in_place() -> None:
    batch = np.array([[-3.0, 0.2, 3.0]], np.float32)
    Clip(0.5).apply(batch)
    assert batch.tolist() == [[-0.5, pytest.approx(0.2), 0.5]]
