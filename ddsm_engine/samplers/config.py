"""What may a sampler be? A name of ours, or the ``scheduler_config.json`` of a diffusers scheduler."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from ddsm_engine.errors import SamplerError
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.untrusted import brief, parse_json, read_bytes

Config = dict[str, Any]
"""Every field of a diffusers scheduler class that its numerics depend on, and ``_class_name``."""

MAX_CONFIG_BYTES: Final = 1 << 20

MOST: Final = 1e6
"""Of a number in a config."""

FLAG: Final = (False, True)
NEVER: Final = (False, None)
SPACINGS: Final = ("linspace", "leading", "trailing")
FINAL: Final = ("zero", "sigma_min")
NOT_LEARNED: Final = (None, "fixed_small", "fixed_small_log", "fixed_large")
"""DPM-Solver has no variance of its own: a config that was DDPM's brings one along."""

WHOLE: Final = "a whole number"
NUMBER: Final = "a number"
POSITIVE: Final = "a positive number"
SHARE: Final = "a number within 0 … 1"
INDICES: Final = "a list of whole numbers"

Field = tuple[Any, tuple[Any, ...] | str]
"""A field's default, and the values it may have: these, or all of a kind."""

_THRESHOLDING: Final[Mapping[str, Field]] = {
    "thresholding": (False, FLAG),
    "dynamic_thresholding_ratio": (0.995, SHARE),
    "sample_max_value": (1.0, POSITIVE),
}
_LEVELS: Final[Mapping[str, Field]] = {
    "use_karras_sigmas": (False, (*FLAG, None)),
    "use_exponential_sigmas": (False, (*FLAG, None)),
    "use_beta_sigmas": (False, NEVER),
}
_NO_FLOW: Final[Mapping[str, Field]] = {"use_flow_sigmas": (False, NEVER), "use_dynamic_shifting": (False, NEVER)}


def _spacing(default: str) -> Mapping[str, Field]:
    return {"timestep_spacing": (default, SPACINGS), "steps_offset": (0, WHOLE)}


def _clip(*, default: bool) -> Mapping[str, Field]:
    return {"clip_sample": (default, FLAG), "clip_sample_range": (1.0, POSITIVE)}


CLASSES: Final[Mapping[str, Mapping[str, Field]]] = {
    "DDPMScheduler": {
        "variance_type": ("fixed_small", ("fixed_small", "fixed_small_log", "fixed_large")),
        **_spacing("leading"), **_clip(default=True), **_THRESHOLDING, "rescale_betas_zero_snr": (False, NEVER),
    },
    "DDIMScheduler": {
        "set_alpha_to_one": (True, FLAG),
        **_spacing("leading"), **_clip(default=True), **_THRESHOLDING, "rescale_betas_zero_snr": (False, NEVER),
    },
    "EulerDiscreteScheduler": {
        "interpolation_type": ("linear", ("linear", "log_linear")), "timestep_type": ("discrete", ("discrete",)),
        "final_sigmas_type": ("zero", FINAL), "sigma_min": (None, POSITIVE), "sigma_max": (None, POSITIVE),
        **_spacing("linspace"), **_LEVELS, "rescale_betas_zero_snr": (False, NEVER),
    },
    "HeunDiscreteScheduler": {**_spacing("linspace"), **_LEVELS, **_clip(default=False)},
    "DPMSolverMultistepScheduler": {
        "solver_order": (2, (1, 2, 3)), "solver_type": ("midpoint", ("midpoint", "heun")),
        "algorithm_type": ("dpmsolver++", ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")),
        "lower_order_final": (True, FLAG), "euler_at_final": (False, FLAG), "final_sigmas_type": ("zero", FINAL),
        "lambda_min_clipped": (-math.inf, NUMBER), "variance_type": (None, NOT_LEARNED),
        **_spacing("linspace"), **_LEVELS, "use_lu_lambdas": (False, FLAG), **_THRESHOLDING, **_NO_FLOW,
        "rescale_betas_zero_snr": (False, NEVER),
    },
    "DPMSolverSinglestepScheduler": {
        "solver_order": (2, (1, 2, 3)), "solver_type": ("midpoint", ("midpoint", "heun")),
        "algorithm_type": ("dpmsolver++", ("dpmsolver", "dpmsolver++", "sde-dpmsolver++")),
        "lower_order_final": (False, FLAG), "final_sigmas_type": ("zero", FINAL),
        "lambda_min_clipped": (-math.inf, NUMBER), "variance_type": (None, NOT_LEARNED),
        **_LEVELS, **_THRESHOLDING, **_NO_FLOW,
    },
    "UniPCMultistepScheduler": {
        "solver_order": (2, (1, 2, 3, 4)), "solver_type": ("bh2", ("bh1", "bh2")), "predict_x0": (True, FLAG),
        "lower_order_final": (True, FLAG), "disable_corrector": ([], INDICES), "solver_p": (None, (None,)),
        "final_sigmas_type": ("zero", FINAL), "sigma_min": (None, POSITIVE), "sigma_max": (None, POSITIVE),
        **_spacing("linspace"), **_LEVELS, **_THRESHOLDING, **_NO_FLOW, "rescale_betas_zero_snr": (False, NEVER),
    },
}  # fmt: skip
"""The classes of diffusers whose schedulers become tables, with their defaults. What else a config holds is of no
consequence to its class: diffusers carries the fields of one class along into the config of another."""

NAMES: Final[Mapping[str, Config]] = {
    "ddpm": {"_class_name": "DDPMScheduler"},
    "ddim": {"_class_name": "DDIMScheduler"},
    "euler": {"_class_name": "EulerDiscreteScheduler"},
    "heun": {"_class_name": "HeunDiscreteScheduler"},
    "dpm++2m": {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 2},
    "dpm++3m": {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3},
    "dpm++2s": {"_class_name": "DPMSolverSinglestepScheduler", "solver_order": 2},
    "unipc": {"_class_name": "UniPCMultistepScheduler"},
}
"""Samplers by name: diffusers' classes with their defaults, but for the clip, which DDSM was published without."""

_RARER: Final[Mapping[str, Config]] = {
    f"{algorithm.replace('dpmsolver', 'dpm')}{order}{step[0].lower()}": {
        "_class_name": f"DPMSolver{step}Scheduler",
        "solver_order": order,
        "algorithm_type": algorithm,
        "final_sigmas_type": "zero" if "++" in algorithm else "sigma_min",
    }
    for step in ("Multistep", "Singlestep")
    for algorithm in CLASSES[f"DPMSolver{step}Scheduler"]["algorithm_type"][1]
    for order in (1, 2, 3)
} | {f"unipc{order}": {"_class_name": "UniPCMultistepScheduler", "solver_order": order} for order in (1, 3, 4)}
"""The other orders and forms of the same solvers: ``sde-dpm++2m``, ``dpm3s``, ``unipc3``."""

GRIDS: Final[Mapping[str, Config]] = {
    **{spacing: {"timestep_spacing": spacing} for spacing in SPACINGS},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "logsnr": {"use_lu_lambdas": True},
}
"""Grids by name, as a suffix: ``heun:karras``."""


def named_config(name: str, schedule: NoiseSchedule) -> Config:
    """The config of a sampler by name, with its grid behind a colon where it is not the default.

    Raises:
        SamplerError: an unknown name, or a grid that the sampler does not have.
    """
    sampler, _, grid = name.partition(":")
    known = {**_RARER, **NAMES}
    if sampler not in known:
        raise SamplerError(
            f"unknown sampler {brief(name)}; expected one of {', '.join(NAMES)}, with a grid behind a colon where "
            f"wanted (heun:karras), or the scheduler_config.json of a diffusers scheduler"
        )
    config = known[sampler]
    if ":" in name:
        fields = CLASSES[config["_class_name"]]
        possible = [own for own, setting in GRIDS.items() if setting.keys() <= fields.keys()]
        if grid not in possible:
            raise SamplerError(f"{sampler} has no grid {brief(grid)}; expected one of {', '.join(possible)}")
        config = config | GRIDS[grid]
    if sampler == "ddpm":
        config = config | {"variance_type": schedule.variance_type}
    return _completed(config | {"clip_sample": False})


def read_config(path: Path) -> Config:
    """Read a ``scheduler_config.json``.

    Raises:
        SamplerError: not one.
    """
    try:
        data = parse_json(read_bytes(path, MAX_CONFIG_BYTES), infinity=True)
    except (OSError, ValueError) as error:
        raise SamplerError(f"{path} could not be read as a diffusers scheduler config: {error}") from error
    if not isinstance(data, dict):
        raise SamplerError(f"{path} is not the config of a diffusers scheduler: expected an object with _class_name")
    return data


def checked_config(found: Mapping[str, Any], schedule: NoiseSchedule, prediction_type: str) -> Config:
    """The complete config of a diffusers scheduler, once it is known to fit the bundle.

    Raises:
        SamplerError: a class that is not supported, a value that a table cannot be made of, or another noise schedule
            or prediction type than the network was trained with.
    """
    _check_training(found, schedule, prediction_type)
    return _completed(found)


def _completed(found: Mapping[str, Any]) -> Config:
    name = found.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        raise SamplerError(
            f"the scheduler class {brief(name)} is not supported; expected one of {', '.join(CLASSES)}, or a sampler "
            f"by name: {', '.join(NAMES)}"
        )
    config: Config = {"_class_name": name}
    for field, (default, allowed) in CLASSES[name].items():
        value = config[field] = found.get(field, default)
        if not _is_allowed(value, default, allowed):
            words = f"one of {list(allowed)}" if isinstance(allowed, tuple) else allowed
            raise SamplerError(f"{name} with {field} {brief(value)} is not supported; expected {words}")
    if config.get("use_karras_sigmas") and config.get("use_exponential_sigmas"):
        raise SamplerError(f"{name}: use_karras_sigmas and use_exponential_sigmas exclude each other; leave one out")
    return config


def _is_allowed(value: object, default: object, allowed: tuple[Any, ...] | str) -> bool:
    if isinstance(allowed, tuple):
        return any(type(value) is type(choice) and value == choice for choice in allowed)
    if value is None or allowed == INDICES:
        return value is default or (isinstance(value, list) and all(type(item) is int for item in value))
    if isinstance(value, bool) or not isinstance(value, int if allowed == WHOLE else int | float):
        return False
    if allowed == SHARE:
        return 0 <= value <= 1
    # Only lambda_min_clipped may be infinite, and is by default.
    return (abs(value) <= MOST or value == default) and (value > 0 or allowed != POSITIVE)


def _check_training(found: Mapping[str, Any], schedule: NoiseSchedule, prediction_type: str) -> None:
    """Refuse a config whose noise schedule or prediction type is another than the network's."""
    own: dict[str, object] = {
        "num_train_timesteps": schedule.timesteps,
        "beta_schedule": schedule.type,
        "prediction_type": prediction_type,
    }
    if found.get("trained_betas") is not None:
        betas = found["trained_betas"]
        values = list(betas) if isinstance(betas, list | tuple | np.ndarray) else []
        fits = len(values) == schedule.timesteps and all(isinstance(b, float | np.floating) for b in values)
        if not fits or not np.allclose(np.array(values), schedule.betas, rtol=1e-5, atol=0):
            raise SamplerError("the config's trained_betas are not those that this network was trained with")
        del own["beta_schedule"]
    elif schedule.type != "squaredcos_cap_v2":
        own |= {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    for field, expected in own.items():
        value = found.get(field, expected)
        if value != expected:
            raise SamplerError(
                f"the config's {field} is {brief(value)}, and this network was trained with {expected!r}; take a "
                f"config that belongs to it"
            )


def name_of(config: Config) -> str:
    """What to call a complete config: the name that ``named_config`` takes, where it has one."""
    kind = config["_class_name"]
    match kind:
        case "DPMSolverMultistepScheduler" | "DPMSolverSinglestepScheduler":
            step = "m" if kind == "DPMSolverMultistepScheduler" else "s"
            name = f"{config['algorithm_type'].replace('dpmsolver', 'dpm')}{config['solver_order']}{step}"
        case "UniPCMultistepScheduler":
            name = "unipc" if config["solver_order"] == 2 else f"unipc{config['solver_order']}"
        case _:
            name = next(own for own, fields in NAMES.items() if fields["_class_name"] == kind)
    default = CLASSES[kind].get("timestep_spacing", ("linspace",))[0]
    grids = [grid for grid, setting in GRIDS.items() if setting.items() <= config.items()]
    return ":".join([name, *(grid for grid in grids if grid != default)])


def unnamed(config: Config, schedule: NoiseSchedule) -> Config | None:
    """What a complete config says beyond its class's defaults; None where its name says it all."""
    try:
        if config == named_config(name_of(config), schedule):
            return None
    except SamplerError:
        pass  # a combination that has no name
    fields = CLASSES[config["_class_name"]]
    return {field: value for field, value in config.items() if field not in fields or value != fields[field][0]}
