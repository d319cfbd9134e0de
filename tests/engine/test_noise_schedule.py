"""Are the schedule and the time table those that the published networks were trained with?"""

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.embeddings import get_timestep_embedding

from ddsm_engine.errors import SamplerError
from ddsm_engine.noise_schedule import SCHEDULE_TYPES, NoiseSchedule, ScheduleType, VarianceType
from ddsm_engine.time_table import TimeTable, sinusoid
from tests.oracle.dynamic_unet import time_table
from tests.oracle.sampling import PublishedSchedule

RANGES = [
    (1e-4, 0.02, 1000),
    (1e-4, 0.02, 2),
    (1e-4, 0.02, 3),
    (1e-4, 0.02, 10),
    (1e-4, 0.02, 999),
    (1e-4, 0.02, 4000),
    (0.0015, 0.0195, 1000),
    (1e-6, 0.5, 100),
    (0.01, 0.01, 17),
]
VALID: dict[str, Any] = NoiseSchedule(1e-4, 0.02, 1000).to_json()


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="without vector instructions torch spaces by a product and a sum, and rounds twice",
)
@pytest.mark.parametrize(("start", "end", "timesteps"), RANGES)
def test_betas_are_those_of_a_float32_linspace_bit_for_bit(start: float, end: float, timesteps: int) -> None:
    expected = torch.linspace(start, end, timesteps, dtype=torch.float32).double().numpy()
    np.testing.assert_array_equal(NoiseSchedule(start, end, timesteps).betas, expected, strict=True)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="without vector instructions torch spaces by a product and a sum, and rounds twice",
)
@pytest.mark.parametrize(("start", "end", "timesteps"), [*RANGES, (0.00085, 0.012, 1000)])
@pytest.mark.parametrize("kind", SCHEDULE_TYPES)
def test_betas_of_every_type_are_diffusers_bit_for_bit(
    kind: ScheduleType, start: float, end: float, timesteps: int
) -> None:
    theirs = DDPMScheduler(
        num_train_timesteps=timesteps, beta_start=start, beta_end=end, beta_schedule=kind
    ).betas.double()
    found = NoiseSchedule(start, end, timesteps, type=kind).betas
    np.testing.assert_array_equal(found, theirs.numpy(), strict=True)


def test_the_types_of_a_schedule_differ_inside_and_meet_at_the_ends_of_a_line() -> None:
    line, square, cosine = (NoiseSchedule(1e-4, 0.02, 1000, type=kind).betas for kind in SCHEDULE_TYPES)
    assert line[[0, -1]] == pytest.approx(square[[0, -1]], rel=1e-6)
    assert (square[1:-1] < line[1:-1]).all()
    assert cosine[-1] == np.float32(0.999)


def test_betas_of_the_published_schedule_are_these_on_every_machine() -> None:
    # Float32 bits; 7 and 14 are among those that a product rounded before the sum would miss.
    expected = {
        0: 0x38D1B717,
        1: 0x38FB7D84,
        7: 0x397B1209,
        14: 0x39C6A443,
        499: 0x3C247EFB,
        500: 0x3C24D287,
        999: 0x3CA3D70A,
    }
    bits = NoiseSchedule(1e-4, 0.02, 1000).betas.astype(np.float32).view(np.uint32)
    assert {t: int(bits[t]) for t in expected} == expected


def test_alphas_cumprod_are_the_published_ones() -> None:
    found = NoiseSchedule(1e-4, 0.02, 1000).alphas_cumprod
    np.testing.assert_allclose(found, PublishedSchedule().alphas_bar.numpy(), rtol=1e-14)
    assert found[0] > found[-1] == pytest.approx(4.0358e-5, rel=1e-4)


@pytest.mark.parametrize(("timesteps", "features"), [(1000, 128), (1000, 256), (1000, 32), (10, 32), (4000, 64)])
def test_time_features_are_the_published_table_to_the_resolution_of_its_angles(timesteps: int, features: int) -> None:
    # exp differs in its last bit between libraries, which moves an angle by its last bits: 6e-5 near timestep 1000.
    pair = np.arange(features) // 2
    angles = np.arange(timesteps)[:, None] * 10_000.0 ** (-2 * pair / features)
    last_bit = np.spacing(np.maximum(angles, 1.0).astype(np.float32))
    error = np.abs(sinusoid(range(timesteps), features) - time_table(timesteps, features).numpy())
    assert (error <= 4 * last_bit).all()


@pytest.mark.parametrize(("timesteps", "features"), [(10, 32), (10, 128)])
def test_time_features_of_a_short_schedule_are_the_published_table(timesteps: int, features: int) -> None:
    error = np.abs(sinusoid(range(timesteps), features) - time_table(timesteps, features).numpy())
    assert error.max() <= 2e-6


def test_time_features_alternate_sine_and_cosine() -> None:
    row = sinusoid([1], 4)
    np.testing.assert_allclose(row, [[np.sin(1.0), np.cos(1.0), np.sin(0.01), np.cos(0.01)]], rtol=1e-6)
    assert row.dtype == np.float32


def test_a_fractional_timestep_lies_between_its_neighbours() -> None:
    before, between, after = sinusoid([499.0, 499.5, 500.0], 32)[:, -2]  # the slowest sine, rising there
    assert before < between < after


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize("features", [16, 128, 224])
def test_shifted_frequencies_are_diffusers(features: int, shift: int) -> None:
    timesteps = [0.0, 1.0, 7.25, 412.0, 998.5, 999.0]
    sines, cosines = get_timestep_embedding(torch.tensor(timesteps), features, downscale_freq_shift=shift).chunk(2, 1)
    expected = torch.stack([sines, cosines], dim=2).flatten(1).numpy()
    # An exponential's last bit, times the timestep.
    np.testing.assert_allclose(sinusoid(timesteps, features, shift), expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(sinusoid(timesteps, features, 0), sinusoid(timesteps, features))
    assert np.abs(sinusoid(timesteps, features) - expected).max() > 0.1


def test_a_table_knows_its_shift_between_its_rows() -> None:
    table = TimeTable.sinusoidal(1000, 16, 1)
    np.testing.assert_array_equal(table[[3, 3.5, 1000]], sinusoid([3, 3.5, 1000], 16, 1))
    assert table.features == 16


def test_a_carried_table_serves_whole_timesteps_bit_for_bit() -> None:
    published = time_table(1000, 128).numpy()
    table = TimeTable(published)
    assert np.array_equal(table[[0, 7, 999]], published[[0, 7, 999]])
    assert np.array_equal(table[[7.5, 1000.0]], sinusoid([7.5, 1000.0], 128)), "the formula elsewhere"
    assert not np.array_equal(published, sinusoid(range(1000), 128)), "or the table would not be needed"


@pytest.mark.parametrize("kind", SCHEDULE_TYPES)
@pytest.mark.parametrize("variance_type", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize(("start", "end", "timesteps"), RANGES)
def test_a_schedule_survives_json(
    start: float, end: float, timesteps: int, variance_type: VarianceType, kind: ScheduleType
) -> None:
    schedule = NoiseSchedule(start, end, timesteps, variance_type, kind)
    assert NoiseSchedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_start": 0.0}, "0 < start ≤ end < 1"),
        ({"beta_start": 0.03}, "0 < start ≤ end < 1"),
        ({"beta_end": 1.0}, "0 < start ≤ end < 1"),
        ({"beta_end": float("nan")}, "0 < start ≤ end < 1"),
        ({"beta_start": -(10**400)}, "0 < start ≤ end < 1"),
        ({"beta_start": -(10**400), "beta_end": 10**400}, "0 < start ≤ end < 1"),
        ({"timesteps": 1}, "timesteps must be from 2"),
        ({"timesteps": 1 << 17}, "timesteps must be from 2"),
        ({"variance_type": "learned"}, "variance_type must be one of .* found 'learned'"),
        ({"type": "cosine"}, "its type one of .*'scaled_linear', 'squaredcos_cap_v2'"),
        ({"type": ["linear"]}, "its type one of"),
        ({"shift": 3.0}, "a noise schedule must have"),
        ({"beta_start": "low"}, "must be numbers"),
        ({"beta_start": None}, "must be numbers"),
        ({"timesteps": [1000]}, "must be numbers"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        NoiseSchedule.from_json(VALID | change)


@pytest.mark.parametrize("name", sorted(VALID))
def test_a_schedule_with_a_missing_value_is_refused(name: str) -> None:
    with pytest.raises(SamplerError, match=name):
        NoiseSchedule.from_json({key: value for key, value in VALID.items() if key != name})


@pytest.mark.parametrize("data", [None, [], "linear", 3])
def test_a_schedule_that_is_no_object_is_refused(data: object) -> None:
    with pytest.raises(SamplerError, match="a noise schedule must have"):
        NoiseSchedule.from_json(data)
