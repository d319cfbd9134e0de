from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import StrategyError
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.plan import compile_plan, nearest_timestep
from ddsm_engine.samplers import make_sampler
from ddsm_engine.strategy import Strategy
from tests.engine.test_strategy import PUBLISHED

SCHEDULE = NoiseSchedule(1e-4, 0.02, 1000)


def test_the_published_strategy_runs_from_the_noisy_end(bundle: Bundle) -> None:
    plan = compile_plan(
        Strategy.load(PUBLISHED), make_sampler("ddpm", SCHEDULE), bundle.manifest.variants, bundle.time_tables()
    )
    assert plan.variants[0] == "w016", "t = 999 uses 4/8"
    assert plan.variants[-1] == "w032", "t = 0 uses the full width"
    lengths = [segment.calls for segment in plan.segments]
    assert (lengths[0], lengths[-2], lengths[-1], len(lengths)) == (530, 163, 266, 29)
    assert str(plan).startswith("w016×530, ")
    assert str(plan).endswith("w024×163, w032×266; 1000 calls, 28 swaps")


@pytest.mark.parametrize(("steps", "swaps"), [(10, 2), (50, 4), (100, 5)])
def test_a_timestep_strategy_is_looked_up_at_the_visited_timesteps(bundle: Bundle, steps: int, swaps: int) -> None:
    strategy = Strategy.load(PUBLISHED)
    sampler = make_sampler("ddim", SCHEDULE, steps)
    plan = compile_plan(strategy, sampler, bundle.manifest.variants, bundle.time_tables())
    expected: dict[Fraction | str, str] = {
        Fraction(1): "w032",
        Fraction(3, 4): "w024",
        Fraction(1, 2): "w016",
        Fraction(1, 4): "w008",
    }
    assert list(plan.variants) == [expected[strategy.choices[int(t)]] for t in sampler.timesteps]
    assert len(plan.segments) - 1 == swaps


@given(st.lists(st.sampled_from(range(2, 9)), min_size=20, max_size=20))
def test_a_plan_makes_every_call_once_and_in_order(bundle: Bundle, eighths: list[int]) -> None:
    strategy = Strategy(tuple(Fraction(k, 8) for k in eighths), axis="call", sampler="ddim", steps=20)
    plan = compile_plan(strategy, make_sampler("ddim", SCHEDULE, 20), bundle.manifest.variants, bundle.time_tables())
    assert list(plan.variants) == [f"w{4 * k:03d}" for k in eighths], "entry 0 is the first executed call"
    covered = [call for s in plan.segments for call in range(s.first_call, s.first_call + s.calls)]
    assert covered == list(range(20))
    assert all(a.variant != b.variant for a, b in zip(plan.segments, plan.segments[1:], strict=False))
    assert np.all(np.diff(plan.timesteps) < 0)


def test_a_strategy_of_the_wrong_length_is_refused(bundle: Bundle) -> None:
    with pytest.raises(StrategyError, match="has 999 entries; this supernet has 1000 timesteps"):
        compile_plan(
            Strategy.uniform(1.0, 999), make_sampler("ddpm", SCHEDULE), bundle.manifest.variants, bundle.time_tables()
        )


def test_a_call_strategy_of_another_sampler_is_refused(bundle: Bundle) -> None:
    strategy = Strategy((Fraction(1),) * 10, axis="call", sampler="ddim", steps=10)
    with pytest.raises(StrategyError, match="belongs to ddim with 10 steps"):
        compile_plan(strategy, make_sampler("ddim", SCHEDULE, 20), bundle.manifest.variants, bundle.time_tables())


@pytest.mark.parametrize(
    ("t", "entry"), [(0.0, 0), (0.4, 0), (0.5, 0), (0.6, 1), (998.5, 998), (999.4, 999), (1500.0, 999)]
)
def test_a_fractional_timestep_takes_the_nearest_entry(t: float, entry: int) -> None:
    assert nearest_timestep(t, 1000) == entry
