"""The folders of diffusers' unconditional pipelines: which ``UNet2DModel`` is in one, and what was it trained with?

``config.json`` tells the whole architecture, ``scheduler_config.json`` the noise schedule and what is predicted. A
field that our network does not model, or that is not known here, is refused: such weights load, and answer something
else.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ddsm_engine.errors import CheckpointError, DdsmError
from ddsm_engine.files import sha256_of
from ddsm_engine.networks.slicing import empty_unet
from ddsm_engine.noise_schedule import SCHEDULE_TYPES, VARIANCE_TYPES, NoiseSchedule
from ddsm_engine.samplers import PREDICTION_TYPES, PredictionType
from ddsm_engine.samplers.config import MAX_CONFIG_BYTES
from ddsm_engine.spec import UNetSpec
from ddsm_engine.untrusted import brief, open_safetensors, parse_json, read_bytes, shapes_of, words
from ddsm_export.checkpoints.ddsm import read_state_dict
from ddsm_export.checkpoints.flagfile import Facts
from ddsm_export.diffusers import diffusers_name
from ddsm_export.supernet import Supernet

UNET = "unet"
CONFIG = "config.json"
SCHEDULER = "scheduler"
SCHEDULER_CONFIG = "scheduler_config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

_MODELLED: Mapping[str, tuple[object, ...]] = {
    "_class_name": ("UNet2DModel", "SubNetworkUNet2DModel"),
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "downsample_padding": (1, 0),
    "downsample_type": ("conv",),
    "flip_sin_to_cos": (True, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2D",),
    "num_class_embeds": (None,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "upsample_type": ("conv",),
}
"""A field of a ``UNet2DModel`` and its values that our network models; diffusers takes the first where it is absent."""

_ARCHITECTURE: Mapping[str, object] = {
    "attention_head_dim": 8, "block_out_channels": None, "down_block_types": None, "dropout": 0.0, "freq_shift": 0,
    "in_channels": 3, "layers_per_block": 2, "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 3,
    "sample_size": None, "time_embedding_dim": None, "time_features": None, "up_block_types": None,
}  # fmt: skip
"""A field that our network has with other values, too, and diffusers' default; None where one must be given."""

_HARMLESS = {
    "_diffusers_version", "_name_or_path", "attn_norm_num_groups", "num_train_timesteps",
    # of diffusers' ``EMAModel``, which adds its own state to the config of the model that it averages
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
}  # fmt: skip
"""Fields that change nothing: of these, ``attn_norm_num_groups`` is compared with ``norm_num_groups``."""

_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What attention's layers are called in diffusers' first checkpoints, and since."""


@dataclass(frozen=True, slots=True)
class Expert:
    """A network that was trained by itself, at its one width.

    Attributes:
        id: What strategies call it.
        network: Its architecture, noise schedule and weights; no width but the full one makes sense.
        prediction_type: What it predicts.
        scheduler_config: The scheduler that it came with, in diffusers' words.
    """

    id: str
    network: Supernet
    prediction_type: PredictionType
    scheduler_config: Mapping[str, Any]


def read_experts(folders: Sequence[Path], facts: Facts) -> list[Expert]:
    """Read diffusers' folders; every one becomes an expert that is called as its folder.

    Args:
        folders: Pipelines (``unet/config.json``, the weights beside it, ``scheduler/scheduler_config.json``), or models
            (``config.json`` and the weights, ``scheduler_config.json`` beside them or in ``../scheduler``).
        facts: Cross-checked against what the folders tell.

    Raises:
        CheckpointError: a folder that is no such thing, that does not fit or contradicts ``facts``, one named twice, or
            two whose networks cannot meet in one run.
    """
    places = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise CheckpointError(f"{folder} is named twice: name each folder once")
    experts = [_read(*pair, facts) for pair in zip(folders, _identifiers(places), strict=True)]
    for folder, expert in zip(folders, experts, strict=True):
        _refuse_unlike((folders[0], experts[0]), (folder, expert))
    return experts


def _identifiers(places: Sequence[Path]) -> list[str]:
    """A variant's id for each folder: its name as far as an id goes, with a number behind a second one of that name."""
    found: list[str] = []
    for place in places:
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", place.name).strip("-_.")[:40]
        if not name[:1].isalpha():  # it would read as a width in ``uniform:0.5``
            name = f"expert-{name}".strip("-")
        others = chain([name], (f"{name}-{number}" for number in count(2)))
        found.append(next(identifier for identifier in others if identifier not in found))
    return found


def _refuse_unlike(one: tuple[Path, Expert], other: tuple[Path, Expert]) -> None:
    """Refuse two experts between which a run could not swap."""
    for (name, mine), (_, theirs) in zip(_common(one[1]), _common(other[1]), strict=True):
        if mine != theirs:
            raise CheckpointError(
                f"{one[0]} and {other[0]} cannot take turns in one run: {name} is {mine} in the one and {theirs} in "
                "the other; export them into two bundles"
            )


def _common(expert: Expert) -> list[tuple[str, object]]:
    """What experts of one bundle have in common."""
    spec, schedule = expert.network.spec, asdict(expert.network.noise_schedule)
    return [
        ("the sample's shape", list(spec.sample_shape)),
        *((f"{name} of the noise schedule", value) for name, value in schedule.items()),
        ("prediction_type", expert.prediction_type),
    ]


def _read(folder: Path, identifier: str, facts: Facts) -> Expert:
    try:
        model, scheduler = _find(folder)
        config, scheduler_config = _json(model / CONFIG), _json(scheduler)
        schedule, prediction_type = _schedule(scheduler_config, scheduler)
        spec = _spec(_Fields(config, model / CONFIG), schedule.timesteps, facts)
        contradictions = facts.contradictions(asdict(schedule) | asdict(spec))
        if contradictions:
            raise CheckpointError(f"it is contradicted by {'; '.join(contradictions)}: leave these out")
        weights = next((model / name for name in WEIGHTS if (model / name).is_file()), None)
        if weights is None:
            raise CheckpointError(f"expected {' or '.join(WEIGHTS)} in {model}, found neither")
        provenance = {"format": "diffusers", "source": folder.resolve().name, "sha256": sha256_of(weights)}
        tensors = _weights(weights, spec, cosines_first=config.get("flip_sin_to_cos", True))
        return Expert(identifier, Supernet(spec, schedule, tensors, provenance), prediction_type, scheduler_config)
    except (DdsmError, OSError) as error:
        raise CheckpointError(f"{folder}: {error}") from error


# --- the folder -------------------------------------------------------------------------------------------------------


def _find(folder: Path) -> tuple[Path, Path]:
    """The folder with the network and the file with the scheduler."""
    if (folder / UNET / CONFIG).is_file():
        model, schedulers = folder / UNET, [folder / SCHEDULER / SCHEDULER_CONFIG]
    elif (folder / CONFIG).is_file():
        beside = folder.resolve().parent / SCHEDULER / SCHEDULER_CONFIG
        model, schedulers = folder, [folder / SCHEDULER_CONFIG, beside]
    else:
        raise CheckpointError(
            f"expected a folder that diffusers saved, a pipeline ({UNET}/{CONFIG}) or a model ({CONFIG}); found neither"
        )
    scheduler = next((file for file in schedulers if file.is_file()), None)
    if scheduler is None:
        raise CheckpointError(
            f"expected the scheduler of its training at {' or '.join(map(str, schedulers))}, found none; the noise "
            "schedule is not in the model, and is never guessed: save the scheduler there"
        )
    return model, scheduler


def _json(file: Path) -> dict[str, Any]:
    try:
        found = parse_json(read_bytes(file, MAX_CONFIG_BYTES), infinity=True)
    except ValueError as error:
        raise CheckpointError(f"{file} is not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"expected an object in {file}, found {brief(found)}")
    return found


# --- the scheduler ----------------------------------------------------------------------------------------------------


def _schedule(config: Mapping[str, Any], file: Path) -> tuple[NoiseSchedule, PredictionType]:
    """The noise schedule, and what the network was trained to predict."""
    absent = [name for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule") if name not in config]
    if absent:
        raise CheckpointError(f"{file} lacks {', '.join(absent)}: expected a scheduler of a discrete noise schedule")
    supported: dict[str, tuple[object, ...]] = {
        "beta_schedule": SCHEDULE_TYPES,
        "prediction_type": PREDICTION_TYPES,
        "rescale_betas_zero_snr": (False,),
        "trained_betas": (None,),
        "variance_type": ("fixed_small", "fixed_small_log", *VARIANCE_TYPES),
    }
    # What an older scheduler does not say is what diffusers' DDPMScheduler assumes.
    found = {name: _one_of(config, name, values, file) for name, values in supported.items()}
    schedule = NoiseSchedule.from_json(
        {
            "type": found["beta_schedule"],
            "beta_start": config["beta_start"],
            "beta_end": config["beta_end"],
            "timesteps": config["num_train_timesteps"],
            "variance_type": found["variance_type"].removesuffix("_log"),
        }
    )
    return schedule, found["prediction_type"]


def _one_of(config: Mapping[str, Any], name: str, supported: tuple[object, ...], file: Path) -> Any:  # noqa: ANN401
    """A field whose value is among those supported; the first one where it is absent."""
    found = config.get(name, supported[0])
    # True is 1 to Python; a config that says the one where the other belongs is not diffusers'.
    if not any(found == value and isinstance(found, bool) == isinstance(value, bool) for value in supported):
        values = " or ".join(dict.fromkeys("null" if value is None else repr(value) for value in supported))
        raise CheckpointError(f"{file}: {name} is {brief(found)}; supported: {values}")
    return found


# --- the network ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fields:
    """The fields of a model's config, by diffusers' names."""

    config: Mapping[str, Any]
    file: Path

    def refuse(self, name: str, supported: str) -> CheckpointError:
        """What is wrong with a field."""
        return CheckpointError(f"{self.file}: {name} is {brief(self[name])}; supported: {supported}")

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - any JSON value
        return self.config.get(name, _ARCHITECTURE.get(name))

    def whole(self, name: str, least: int = 1) -> int:
        """A whole number."""
        value = self[name]
        if type(value) is not int or not least <= value <= 1 << 16:
            raise self.refuse(name, f"a whole number from {least} to 65536")
        return value

    def number(self, name: str) -> float:
        """A number."""
        value = self[name]
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise self.refuse(name, "a number from 0 to less than 1")
        return float(value)

    def levels(self, name: str, kind: type) -> list[Any]:
        """A list with one value per level."""
        value = self[name]
        if not isinstance(value, list) or not value or not all(type(item) is kind for item in value):
            raise self.refuse(name, f"a list, one {kind.__name__} per level")
        return value


def _spec(fields: _Fields, timesteps: int, facts: Facts) -> UNetSpec:
    """The architecture; refuse what our network does not model."""
    known = _MODELLED.keys() | _ARCHITECTURE.keys() | _HARMLESS
    if "_class_name" not in fields.config:
        raise CheckpointError(f"{fields.file} lacks _class_name; supported: 'UNet2DModel'")
    for name, values in _MODELLED.items():
        _one_of(fields.config, name, values, fields.file)
    for name, value in fields.config.items():
        if name not in known and value is not None:
            raise CheckpointError(f"{fields.file}: {brief(name)} is {brief(value)}, a field that is not known here")
    groups = fields.whole("norm_num_groups")
    if fields["attn_norm_num_groups"] not in (None, groups):
        raise fields.refuse("attn_norm_num_groups", f"null or norm_num_groups, which is {groups}")
    channels = fields.whole("in_channels")
    if fields.whole("out_channels") != channels:
        raise fields.refuse("out_channels", f"in_channels, which is {channels}: a learned variance is not modelled")
    widths, attention = _levels(fields)
    time_dim = 4 * widths[0] if fields["time_embedding_dim"] is None else fields.whole("time_embedding_dim")
    head = None if fields["attention_head_dim"] is None else fields.whole("attention_head_dim")
    attending = {widths[level] for level in (*attention, len(widths) - 1)}
    if head is not None and any(width % head for width in attending):
        raise fields.refuse("attention_head_dim", f"null or a divisor of {sorted(attending)}, the channels attended to")
    # Only a sub-network that we wrote says so; a stock model has as many as channels in its first level.
    features = widths[0] if fields["_class_name"] == "UNet2DModel" else fields.whole("time_features")
    if fields["time_features"] not in (None, features):
        raise fields.refuse("time_features", f"null or {features}, the channels of the first level")
    shift = fields.whole("freq_shift", 0)
    if shift >= features // 2:
        raise fields.refuse("freq_shift", f"less than {features // 2}, half of the time embedding's columns")
    return UNetSpec(
        image_size=_image_size(fields, facts),
        channels=channels,
        base_channels=widths[0],
        channel_mults=tuple(width // widths[0] for width in widths),
        attention_levels=attention,
        num_res_blocks=fields.whole("layers_per_block"),
        groups=groups,
        conv_multiple=1,
        linear_multiple=1,
        timesteps=timesteps,
        time_features=features,
        time_dim=time_dim,
        dropout=fields.number("dropout"),
        norm_eps=fields.number("norm_eps"),
        head_channels=head,
        asymmetric_downsample=fields.config.get("downsample_padding") == 0,
        time_freq_shift=shift,
    )


def _levels(fields: _Fields) -> tuple[list[int], tuple[int, ...]]:
    """Channels of every level, and which levels carry attention."""
    widths = fields.levels("block_out_channels", int)
    if widths[0] < 1 or any(width < 1 or width % widths[0] for width in widths):
        raise fields.refuse("block_out_channels", "whole multiples of the first")
    down, up = fields.levels("down_block_types", str), fields.levels("up_block_types", str)
    if not {*down} <= {"DownBlock2D", "AttnDownBlock2D"} or len(down) != len(widths):
        raise fields.refuse("down_block_types", f"DownBlock2D and AttnDownBlock2D, {len(widths)} of them")
    if up != [kind.replace("Down", "Up") for kind in reversed(down)]:
        raise fields.refuse("up_block_types", "UpBlock2D and AttnUpBlock2D, mirroring down_block_types")
    return widths, tuple(level for level, kind in enumerate(down) if kind == "AttnDownBlock2D")


def _image_size(fields: _Fields, facts: Facts) -> int:
    """Height and width; a model for any size does not say."""
    size = fields["sample_size"]
    if size is None:
        if facts.image_size is None:
            raise CheckpointError(f"{fields.file}: sample_size is null; give --image-size PIXELS")
        return facts.image_size
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if type(size) is not int:
        raise fields.refuse("sample_size", "one whole number, or two that are equal: images are square")
    return size


# --- the weights ------------------------------------------------------------------------------------------------------


def _weights(file: Path, spec: UNetSpec, *, cosines_first: bool) -> dict[str, Tensor]:
    """The weights by our names and in our shapes, float32."""
    try:
        if file.suffix == ".bin":
            state = read_state_dict(file)
            weights = _fit({key: tuple(tensor.shape) for key, tensor in state.items()}, state.__getitem__, spec)
        else:
            with open_safetensors(file, "pt") as opened:
                weights = _fit(shapes_of(opened), opened.get_tensor, spec)
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error
    # All sines stand before all cosines, or the other way round, where our table interleaves them.
    halves = weights["time.linear1.weight"].chunk(2, dim=1)
    weights["time.linear1.weight"] = torch.stack(halves[::-1] if cosines_first else halves, dim=2).flatten(1)
    return weights


def _fit(shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], spec: UNetSpec) -> dict[str, Tensor]:
    """Read the weights once their names and shapes are those of the architecture."""
    parameters = dict(empty_unet(spec, spec.base_channels).named_parameters())
    theirs = {diffusers_name(spec, name): name for name in parameters}
    keys = _keys(shapes, theirs)
    weights = {}
    for name, parameter in parameters.items():
        key, shape = keys[name], tuple(parameter.shape)
        # A 1x1 convolution here is a linear layer there.
        if shapes[key] not in (shape, shape[:2] if shape[2:] == (1, 1) else shape):
            raise CheckpointError(f"{brief(key)} must have the shape {shape}, found {brief(shapes[key])}")
        # A copy: the file may only be mapped, and may change or vanish later.
        weights[name] = read(key).to(torch.float32, copy=True).reshape(shape)
    return weights


def _keys(found: Collection[str], theirs: Mapping[str, str]) -> dict[str, str]:
    """Our name of a parameter → the file's; ``theirs`` maps diffusers' name to ours."""
    modern = {_modern(key): key for key in found}
    missing = sorted(theirs.keys() - modern.keys())
    unknown = sorted(key for key in found if _modern(key) not in theirs or modern[_modern(key)] != key)
    if missing or unknown:
        raise CheckpointError(
            f"the weights are not those of its {CONFIG}: missing {words(missing)}, unexpected {words(unknown)}"
        )
    return {ours: modern[name] for name, ours in theirs.items()}


def _modern(key: str) -> str:
    layer, _, kind = key.rpartition(".")
    holder, _, last = layer.rpartition(".")
    return f"{holder}.{_ATTENTION[last]}.{kind}" if ".attentions." in layer and last in _ATTENTION else key
