"""Every sampler against the diffusers scheduler of its class: whole trajectories, same noise, same network."""

from typing import Any

import numpy as np
import pytest

from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.samplers import make_sampler
from ddsm_engine.samplers.config import CLASSES
from tests.engine.samplers.replay import (
    config_of,
    diffusers_in_double,
    make_scheduler,
    network,
    walk_diffusers,
    walk_scheduler,
    walk_table,
)
from tests.tolerances import SAMPLER_DOUBLE, SAMPLER_SINGLE

SCHEDULE = NoiseSchedule(1e-4, 0.02, 1000)
SHAPE = (2, 3, 4, 4)

UNSTABLE = {"solver_order": 3, "solver_type": "heun", "algorithm_type": "sde-dpmsolver++"}
"""The single-step form of this amplifies rounding beyond any use, and no less in diffusers itself."""

Case = tuple[str, dict[str, Any]]


def cases() -> list[Case]:
    """Every option of every class, one at a time and in the pairs that interact."""
    spacings = [{"timestep_spacing": s} for s in ("linspace", "leading", "trailing")]
    levels = [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}]
    threshold = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
    low = {"thresholding": True, "sample_max_value": 0.5}
    found: list[Case] = []

    def add(kind: str, *options: dict[str, Any]) -> None:
        found.extend((kind, option) for option in options)

    add("DDPMScheduler", *spacings, {"clip_sample": False}, threshold, low, {"steps_offset": 1})
    add("DDPMScheduler", *({"variance_type": v, "clip_sample": False} for v in ("fixed_small_log", "fixed_large")))
    add("DDIMScheduler", *spacings, {"clip_sample": False}, threshold, {"steps_offset": 1})
    add("DDIMScheduler", {"set_alpha_to_one": False}, {"clip_sample_range": 0.7})
    add("EulerDiscreteScheduler", *spacings, *levels, {"final_sigmas_type": "sigma_min"}, {"steps_offset": 1})
    add("EulerDiscreteScheduler", {"interpolation_type": "log_linear"})
    add("EulerDiscreteScheduler", {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 40.0})
    add("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading"})
    add("HeunDiscreteScheduler", *spacings, *levels, {"clip_sample": True}, {"steps_offset": 1})
    for order in (1, 2, 3):
        for solver in ("midpoint", "heun"):
            for algorithm in ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"):
                final = "zero" if "++" in algorithm else "sigma_min"
                option = {"solver_order": order, "solver_type": solver, "algorithm_type": algorithm}
                if (algorithm, order) != ("sde-dpmsolver", 3):
                    add("DPMSolverMultistepScheduler", option | {"final_sigmas_type": final})
                if algorithm != "sde-dpmsolver":
                    add(
                        "DPMSolverSinglestepScheduler", option | {"final_sigmas_type": final, "lower_order_final": True}
                    )
                    add("DPMSolverSinglestepScheduler", option | {"final_sigmas_type": "sigma_min"})
    add("DPMSolverMultistepScheduler", *spacings, *levels, {"use_lu_lambdas": True}, threshold, {"steps_offset": 1})
    add("DPMSolverMultistepScheduler", {"euler_at_final": True, "final_sigmas_type": "sigma_min"})
    add("DPMSolverMultistepScheduler", {"lower_order_final": False, "final_sigmas_type": "sigma_min"})
    add("DPMSolverMultistepScheduler", {"lambda_min_clipped": -4.0}, {"solver_order": 3, "use_karras_sigmas": True})
    add("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"} | threshold)
    add("DPMSolverSinglestepScheduler", *levels, threshold, {"lambda_min_clipped": -4.0})
    add("UniPCMultistepScheduler", *spacings, *levels, {"steps_offset": 1}, threshold)
    add("UniPCMultistepScheduler", *({"solver_order": order} for order in (1, 3, 4)), {"disable_corrector": [0, 2]})
    add("UniPCMultistepScheduler", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"})
    add("UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min", "solver_order": 3})
    add("UniPCMultistepScheduler", {"lower_order_final": False, "final_sigmas_type": "sigma_min"})
    return found


def name(case: object) -> str:
    if isinstance(case, dict):
        return ",".join(f"{key}={value}" for key, value in case.items())
    return str(case)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize(("kind", "fields"), cases(), ids=name)
def test_whole_trajectories_equal_diffusers_in_float64(
    kind: str, fields: dict[str, Any], steps: int, prediction_type: Any
) -> None:
    rng = np.random.default_rng(steps)
    start = rng.standard_normal(SHAPE)
    noises = [rng.standard_normal(SHAPE) for _ in range(2 * steps)]
    answer = network(SCHEDULE, prediction_type)
    with diffusers_in_double(kind):
        scheduler = make_scheduler(kind, SCHEDULE, prediction_type, **fields)
        timesteps, theirs = walk_diffusers(scheduler, steps, start, noises, answer, {})
    table = make_sampler(config_of(scheduler), SCHEDULE, steps, prediction_type=prediction_type)
    assert table.timesteps.tolist() == pytest.approx(timesteps, abs=1e-9)
    ours = walk_table(table, start, noises, answer)
    for call, (mine, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert np.abs(mine - expected).max() <= SAMPLER_DOUBLE * max(1.0, np.abs(expected).max()), (
            call,
            timesteps[call],
        )


def ends_without_length() -> list[Case]:
    """Grids of levels down to the last trained one, which is also where the run ends: its last step has no length."""
    levels = ["use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"]
    found: list[Case] = []
    for kind, field in (
        ("DPMSolverMultistepScheduler", "algorithm_type"),
        ("DPMSolverSinglestepScheduler", "algorithm_type"),
        ("UniPCMultistepScheduler", "predict_x0"),
    ):
        options = CLASSES[kind]
        found.extend(
            (kind, {grid: True, "final_sigmas_type": "sigma_min", "solver_order": order, field: form})
            for grid in levels
            if grid in options
            for order in options["solver_order"][1]
            for form in options[field][1]
            if (form, order) != ("sde-dpmsolver", 3)
        )
    return found


@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize(("kind", "fields"), ends_without_length(), ids=name)
def test_a_last_step_of_no_length_ends_where_diffusers_does(kind: str, fields: dict[str, Any], steps: int) -> None:
    rng = np.random.default_rng(steps)
    start = rng.standard_normal(SHAPE)
    noises = [rng.standard_normal(SHAPE) for _ in range(steps)]
    answer = network(SCHEDULE, "epsilon")
    with diffusers_in_double(kind):
        scheduler = make_scheduler(kind, SCHEDULE, "epsilon", **fields)
        timesteps, theirs = walk_diffusers(scheduler, steps, start, noises, answer, {})
    assert float(scheduler.sigmas[-1]) == pytest.approx(float(scheduler.sigmas[-2]))
    table = make_sampler(config_of(scheduler), SCHEDULE, steps)
    assert table.timesteps.tolist() == pytest.approx(timesteps, abs=1e-9)
    ours = walk_table(table, start, noises, answer)
    if not np.isfinite(theirs[-1]).all():
        # Theirs divides nothing by nothing, for which all other orders' step of no length stays where it is.
        assert (kind, fields["solver_order"], steps) == ("DPMSolverMultistepScheduler", 3, 25)
        theirs[-1] = theirs[-2]
    for mine, expected in zip(ours, theirs, strict=True):
        # In float64 their two levels differ by a rounding error, whose root is a share of noise.
        assert np.abs(mine - expected).max() <= 10 * SAMPLER_DOUBLE * max(1.0, np.abs(expected).max())


def is_stable(case: Case) -> bool:
    kind, fields = case
    return kind != "DPMSolverSinglestepScheduler" or not fields.items() >= UNSTABLE.items()


@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize(("kind", "fields"), [case for case in cases() if is_stable(case)], ids=name)
def test_the_scheduler_s_own_loop_equals_diffusers_in_float32(kind: str, fields: dict[str, Any], steps: int) -> None:
    rng = np.random.default_rng(steps)
    start = rng.standard_normal(SHAPE, np.float32)
    noises = [rng.standard_normal(SHAPE, np.float32) for _ in range(2 * steps)]
    answer = network(SCHEDULE, "epsilon")
    scheduler = make_scheduler(kind, SCHEDULE, "epsilon", **fields)
    timesteps, theirs = walk_diffusers(scheduler, steps, start, noises, answer, {})
    ours = walk_scheduler(make_sampler(config_of(scheduler), SCHEDULE, steps), start, noises, answer)
    for call, (mine, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert np.abs(mine - expected).max() <= SAMPLER_SINGLE * max(1.0, np.abs(expected).max()), (
            call,
            timesteps[call],
        )


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 200])
def test_ddim_s_fresh_noise_equals_diffusers(steps: int, eta: float) -> None:
    rng = np.random.default_rng(steps)
    start, noises = rng.standard_normal(SHAPE), [rng.standard_normal(SHAPE) for _ in range(steps)]
    answer = network(SCHEDULE, "epsilon")
    with diffusers_in_double("DDIMScheduler"):
        scheduler = make_scheduler("DDIMScheduler", SCHEDULE, "epsilon", clip_sample=False)
        _, theirs = walk_diffusers(scheduler, steps, start, noises, answer, {"eta": eta})
    ours = walk_table(make_sampler("ddim", SCHEDULE, steps, eta=eta), start, noises, answer)
    for mine, expected in zip(ours, theirs, strict=True):
        assert np.abs(mine - expected).max() <= SAMPLER_DOUBLE * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"timestep_spacing": "leading"}, {"timestep_spacing": "linspace"}),
        ({"solver_order": 3}, {"solver_order": 2}),
        ({"final_sigmas_type": "sigma_min"}, {"final_sigmas_type": "zero"}),
        ({"use_karras_sigmas": True}, {"use_karras_sigmas": False}),
        ({"solver_type": "heun"}, {"solver_type": "midpoint"}),
    ],
    ids=name,
)
def test_a_wrong_option_leaves_the_trajectory(wrong: dict[str, Any], right: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    start, noises = rng.standard_normal(SHAPE), [np.zeros(SHAPE)] * 20
    answer = network(SCHEDULE, "epsilon")
    kind = "DPMSolverMultistepScheduler"
    one, other = (
        walk_table(make_sampler({"_class_name": kind} | fields, SCHEDULE, 20), start, noises, answer)[-1]
        for fields in (wrong, right)
    )
    assert np.abs(one - other).max() > 1e3 * SAMPLER_DOUBLE
