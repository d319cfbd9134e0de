"""Which samplers there are, which files name them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from ddsm_engine.errors import SamplerError
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.samplers import NAMES, Clip, DynamicThreshold, make_sampler
from ddsm_engine.samplers.config import _RARER, CLASSES, GRIDS

SCHEDULE = NoiseSchedule(1e-4, 0.02, 1000)
TRAINING = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}


def config(kind: str, **fields: Any) -> dict[str, Any]:
    return {"_class_name": kind, **TRAINING, **fields}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_class_with_diffusers_defaults_but_without_a_clip(name: str) -> None:
    fields = {key: value for key, value in NAMES[name].items() if key != "_class_name"}
    if name == "ddpm":
        fields["variance_type"] = "fixed_large"
    scheduler = getattr(diffusers, NAMES[name]["_class_name"])(**TRAINING, **fields)
    theirs = {**scheduler.config, "_class_name": type(scheduler).__name__, "clip_sample": False}
    ours, other = make_sampler(name, SCHEDULE, 20), make_sampler(theirs, SCHEDULE, 20)
    assert ours.name == other.name == name
    np.testing.assert_array_equal(ours.update, other.update)
    np.testing.assert_array_equal(ours.timesteps, other.timesteps)
    assert ours.bound is None


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("heun:karras", {"use_karras_sigmas": True}),
        ("unipc:exponential", {"use_exponential_sigmas": True}),
        ("dpm++2m:logsnr", {"use_lu_lambdas": True}),
        ("dpm++3m:trailing", {"timestep_spacing": "trailing"}),
        ("euler:leading", {"timestep_spacing": "leading"}),
        ("ddim:trailing", {"timestep_spacing": "trailing"}),
    ],
)
def test_a_grid_behind_a_colon_is_the_option_of_its_class(name: str, field: dict[str, Any]) -> None:
    by_name = make_sampler(name, SCHEDULE, 12)
    by_config = make_sampler(config(**field, **_class_of(name), clip_sample=False), SCHEDULE, 12)
    assert by_name.name == by_config.name == name
    np.testing.assert_array_equal(by_name.update, by_config.update)


@pytest.mark.parametrize(
    "name", ["sde-dpm++2m", "sde-dpm++3m:karras", "dpm3s", "dpm++3s", "dpm2m", "unipc3", "dpm++1m"]
)
def test_the_other_orders_and_forms_have_names_too(name: str) -> None:
    assert make_sampler(name, SCHEDULE, 12).name == name


def names_with_grids() -> list[str]:
    """Every name, by itself and with each of the grids that its class has."""
    grids: dict[str, dict[str, Any]] = {"": {}} | {f":{grid}": setting for grid, setting in GRIDS.items()}
    return [
        name + grid
        for name, own in {**NAMES, **_RARER}.items()
        for grid, setting in grids.items()
        if setting.keys() <= CLASSES[own["_class_name"]].keys()
    ]


@pytest.mark.parametrize("name", names_with_grids())
def test_every_name_with_every_grid_is_a_table_of_finite_numbers(name: str) -> None:
    # The older form with noise has no third order, which runs of up to 4 steps do without.
    for steps in (1, 2, 3, 4) if name.startswith("sde-dpm3m") else (1, 2, 3, 4, 5, 10, 15, 25):
        table = make_sampler(name, SCHEDULE, steps)
        assert table.calls >= steps
        assert np.isfinite(table.update).all(), steps


def _class_of(name: str) -> dict[str, Any]:
    own = NAMES[name.partition(":")[0]]
    return {"kind": own["_class_name"], **{key: value for key, value in own.items() if key != "_class_name"}}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_config_that_diffusers_writes_is_read(kind: str, tmp_path: Path) -> None:
    scheduler = getattr(diffusers, kind)(**TRAINING)
    scheduler.save_pretrained(tmp_path)
    found = make_sampler(tmp_path / "scheduler_config.json", SCHEDULE, 10)
    expected = make_sampler({**scheduler.config, "_class_name": kind}, SCHEDULE, 10)
    np.testing.assert_array_equal(found.update, expected.update)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("origin", ["DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"])
def test_a_config_that_came_from_another_class_is_read(kind: str, origin: str, tmp_path: Path) -> None:
    first = getattr(diffusers, origin)(**TRAINING)
    scheduler = getattr(diffusers, kind).from_config(first.config)
    scheduler.save_pretrained(tmp_path)
    assert make_sampler(str(tmp_path / "scheduler_config.json"), SCHEDULE, 10).calls >= 10


def test_a_bound_is_what_the_config_says_unless_the_caller_says_otherwise() -> None:
    clipped = config("DDIMScheduler", clip_sample_range=0.8)
    assert make_sampler(clipped, SCHEDULE, 5).bound == Clip(0.8)
    assert make_sampler(clipped, SCHEDULE, 5, clip_sample=2.0).bound == Clip(2.0)
    assert make_sampler(clipped | {"clip_sample": False}, SCHEDULE, 5).bound is None
    thresholded = config("DDIMScheduler", thresholding=True, sample_max_value=3.0)
    assert make_sampler(thresholded, SCHEDULE, 5).bound == DynamicThreshold(0.995, 3.0)
    assert make_sampler("unipc", SCHEDULE, 5, clip_sample=1.0).bound == Clip(1.0)


def test_steps_may_be_numpy_s() -> None:
    table = make_sampler("unipc", SCHEDULE, np.uint8(200))  # type: ignore[arg-type]
    assert type(table.steps) is int
    np.testing.assert_array_equal(table.update, make_sampler("unipc", SCHEDULE, 200).update)


def test_a_config_over_the_same_betas_in_a_list_is_read() -> None:
    same = config("DDIMScheduler", trained_betas=SCHEDULE.betas.tolist(), beta_start=0.5)
    assert make_sampler(same, SCHEDULE, 5).calls == 5


REFUSED: list[tuple[object, dict[str, Any], str]] = [
    ("dpm", {}, "unknown sampler 'dpm'; expected one of ddpm, ddim, euler, heun, dpm"),
    ("heun:logsnr", {"steps": 10}, "heun has no grid 'logsnr'; expected one of linspace, leading, trailing, karras"),
    ("ddim:", {}, "ddim has no grid ''"),
    ("ddpm", {"eta": 0.5}, "ddpm takes no eta; use --sampler ddim --eta"),
    ("heun", {"eta": 0.0, "steps": 5}, "heun takes no eta"),
    ("ddim", {"steps": 0}, "ddim takes 1 to 1000 steps, found 0"),
    ("ddim", {"steps": 1001}, "ddim takes 1 to 1000 steps, found 1001"),
    ("ddim", {"steps": 4.0}, "ddim takes 1 to 1000 steps, found 4.0"),
    ("ddim", {"steps": "4"}, "ddim takes 1 to 1000 steps, found '4'"),
    ("ddim", {"eta": 1.5}, "eta must lie in"),
    ("ddim", {"clip_sample": 0.0}, "must be positive"),
    ("heun", {}, "heun needs a number of steps"),
    ("dpm++2m", {"steps": 1000}, "make two calls at one noise level"),
    ("dpm++2m:leading", {"steps": 1000}, "make two calls at one noise level"),
    (config("PNDMScheduler"), {}, "class 'PNDMScheduler' is not supported; expected one of DDPMScheduler, DDIM"),
    ({}, {}, "class None is not supported"),
    (config("DDPMScheduler", variance_type="learned_range"), {}, "variance_type 'learned_range' is not supported"),
    (config("DDIMScheduler", rescale_betas_zero_snr=True), {}, "rescale_betas_zero_snr True is not supported"),
    (config("EulerDiscreteScheduler", use_beta_sigmas=True), {"steps": 5}, "use_beta_sigmas True is not supported"),
    (config("DPMSolverMultistepScheduler", use_flow_sigmas=True), {"steps": 5}, "use_flow_sigmas True"),
    (config("UniPCMultistepScheduler", solver_order=9), {"steps": 5}, "solver_order 9 is not supported"),
    (config("UniPCMultistepScheduler", solver_order="2"), {"steps": 5}, "solver_order '2' is not supported"),
    (config("UniPCMultistepScheduler", disable_corrector=["a"]), {"steps": 5}, "disable_corrector"),
    (config("DDIMScheduler", clip_sample=1), {}, "clip_sample 1 is not supported"),
    (config("DDIMScheduler", clip_sample_range=float("inf")), {}, "clip_sample_range inf is not supported"),
    (
        config("DDIMScheduler", clip_sample_range=-1.0),
        {},
        "clip_sample_range -1.0 is not supported; expected a positive",
    ),
    (config("DDIMScheduler", dynamic_thresholding_ratio=1.5), {}, "expected a number within 0 … 1"),
    (config("DDIMScheduler", steps_offset=0.5), {}, "steps_offset 0.5 is not supported; expected a whole number"),
    (config("DDIMScheduler", steps_offset=True), {}, "steps_offset True"),
    (config("EulerDiscreteScheduler", use_karras_sigmas=True, sigma_min=50, sigma_max=2), {"steps": 9}, "do not fall"),
    (config("DPMSolverMultistepScheduler", lambda_min_clipped=4.5), {"steps": 9}, "leaves 1; take fewer"),
    (config("DDIMScheduler", steps_offset=500), {"steps": 2}, "do not visit different timesteps"),
    (config("EulerDiscreteScheduler", timestep_spacing="leading", steps_offset=900), {"steps": 5}, "within 0 … 999"),
    (config("DPMSolverMultistepScheduler", algorithm_type="dpmsolver"), {"steps": 5}, "no finite coefficients"),
    (config("UniPCMultistepScheduler", predict_x0=False), {"steps": 5}, "no finite coefficients"),
    (
        config("UniPCMultistepScheduler", solver_order=3, lower_order_final=False),
        {"steps": 5},
        "unipc3 with 5 .* cannot",
    ),
    (
        config(
            "DPMSolverMultistepScheduler", solver_order=3, algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min"
        ),
        {"steps": 20},
        "no finite coefficients",
    ),
    (config("HeunDiscreteScheduler", use_karras_sigmas=True, use_exponential_sigmas=True), {"steps": 5}, "exclude"),
    (config("DDIMScheduler") | {"beta_end": 0.012}, {}, "beta_end is 0.012, and this network was trained with 0.02"),
    (config("DDIMScheduler", beta_schedule="scaled_linear"), {}, "beta_schedule is 'scaled_linear'"),
    (config("DDIMScheduler") | {"num_train_timesteps": 500}, {}, "num_train_timesteps is 500"),
    (config("DDIMScheduler", prediction_type="v_prediction"), {}, "prediction_type is 'v_prediction'"),
    (config("DDIMScheduler", trained_betas=[0.1] * 1000), {}, "trained_betas are not those"),
    (config("DDIMScheduler", trained_betas="x" * 1000), {}, "trained_betas are not those"),
]


@pytest.mark.parametrize(("sampler", "options", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_a_sampler_cannot_be_is_refused(sampler: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        make_sampler(sampler, SCHEDULE, **options)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"_class_name": NaN}', '{"_class_name": ["a"]}'])
def test_a_file_that_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "scheduler_config.json"
    file.write_text(text)
    with pytest.raises(SamplerError):
        make_sampler(file, SCHEDULE, 5)
    with pytest.raises(SamplerError, match="could not be read"):
        make_sampler(tmp_path / "absent.json", SCHEDULE, 5)


def test_an_infinite_bound_in_a_file_is_what_diffusers_writes(tmp_path: Path) -> None:
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps(config("DPMSolverMultistepScheduler", lambda_min_clipped=float("-inf"))))
    assert "-Infinity" in file.read_text()
    assert make_sampler(file, SCHEDULE, 5).calls == 5
