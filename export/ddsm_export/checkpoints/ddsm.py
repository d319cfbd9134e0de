"""The checkpoints of DDSM's training code (EnVision-Research/DDSM): what is in one, and how is it read safely?

The file is a pickle of tensors without any configuration. Keys and shapes tell the topology; ``Facts`` tell the rest.
"""

import io
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from pickle import UnpicklingError  # the name of an error, nothing that loads
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from ddsm_engine.errors import CheckpointError, SamplerError, SpecError
from ddsm_engine.files import sha256_of
from ddsm_engine.networks.slicing import empty_unet
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.spec import UNetSpec
from ddsm_engine.time_table import sinusoid
from ddsm_engine.untrusted import UNREADABLE, ArchiveFile, brief, open_archive, word, words
from ddsm_export.checkpoints.flagfile import Facts
from ddsm_export.checkpoints.instructions import MAX_PICKLE_BYTES, check_instructions
from ddsm_export.supernet import Supernet

Weights = Literal["ema", "net"]

_SETS: Mapping[Weights, str] = {"ema": "ema_model", "net": "net_model"}

_TIME_TABLE = "time_embedding.timembedding.0.weight"

_PUBLISHED_NAMES = (
    (r"^time\.linear1\.", "time_embedding.timembedding.1."),
    (r"^time\.linear2\.", "time_embedding.timembedding.3."),
    (r"^tail\.norm\.", "tail.0."),
    (r"^tail\.conv\.", "tail.2."),
    (r"^(down|middle|up)\.", r"\1blocks."),
    (r"\.norm1\.", ".block1.0."),
    (r"\.conv1\.", ".block1.2."),
    (r"\.time\.", ".temb_proj.1."),
    (r"\.norm2\.", ".block2.0."),
    (r"\.conv2\.", ".block2.3."),
    (r"\.attention\.norm\.", ".attn.group_norm."),
    (r"\.attention\.([qkv])\.", r".attn.proj_\1."),
    (r"\.attention\.out\.", ".attn.proj."),
    (r"\.conv\.", ".main."),
)
"""Part of a parameter's name (of ``UNet``) → the published name."""

_MOST_KEYS = 1 << 14  # CIFAR-10's network has 329
_MOST_BYTES = 1 << 35  # four sets of weights of the largest network, float32
_STORAGE = re.compile(r"data/\d+")
_PICKLES_OF_OLD_FORMAT = 5  # a number, the version, the machine, the content, the storages' names

_UNREADABLE = (*UNREADABLE, UnpicklingError, SafetensorError, AttributeError, AssertionError, ImportError)


def read_checkpoint(path: Path, facts: Facts, weights: Weights = "ema") -> Supernet:
    """Read a training checkpoint of the published code, or a bare state dict of its network.

    No code in the file is run: only tensors and plain containers are unpickled. Prefixes of ``DataParallel`` are
    stripped, weights become float32 copies, and the time table is kept where it is the sinusoidal one. Unless
    ``facts`` say otherwise, sliced convolutions round to multiples of 8 and linears of 16: constants of the published
    code, which no checkpoint and no flag records.

    Args:
        path: A dict with ``ema_model``, ``net_model``, ``step`` … or one state dict, as ``torch.save`` wrote it.
        facts: Groups, image size, betas and variance are mandatory; claims about the topology are cross-checked.
        weights: The moving average (what the paper samples with) or the raw network. A bare state dict has one set.

    Raises:
        CheckpointError: a file that is damaged, foreign or holds code; another architecture; weights that do not fit
            or are not finite; a mandatory fact that is missing; or a fact that the file contradicts.
    """
    try:
        content = _load(path)
        state, chosen = _choose(content, weights)
        _check_stored(state, path)
        topology = _topology(state)
        spec, schedule = _spec_and_schedule(topology, facts)
        provenance: dict[str, Any] = {"format": "ddsm-checkpoint", "source": path.name, "weights": chosen}
        if chosen != "bare":
            _check_sample(content.get("x_T"), spec)
            provenance |= _step(content.get("step"))
        table = _time_table(state[_TIME_TABLE], spec)
        fitted = _fit(state, spec)
        return Supernet(spec, schedule, fitted, provenance | {"sha256": sha256_of(path)}, table)
    except (CheckpointError, SpecError, SamplerError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a bare state dict that ``torch.save`` wrote, as carefully as a checkpoint; the file stays mapped.

    Raises:
        CheckpointError: a file that is damaged or foreign, holds code, or claims more than it stores.
    """
    state = _state_dict(_load(path), "the state dict")
    _check_stored(state, path)
    return state


def _step(step: object) -> dict[str, int]:
    return {"step": step} if type(step) is int and 0 <= step < 1 << 53 else {}


def _load(path: Path) -> Mapping[Any, Any]:
    if not path.is_file():
        raise CheckpointError("expected a training checkpoint, found no such file")
    try:
        is_archive = _is_archive(path)
        with warnings.catch_warnings():
            # On a foreign file the readers warn of their own internals, beside the one line that says what is wrong.
            warnings.simplefilter("ignore")
            check_instructions(*_pickles(path, is_archive=is_archive))
            # Mapping the file leaves the optimiser's state, half of it, on the disk.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except _UNREADABLE as error:
        raise CheckpointError(_why_unreadable(error)) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"it holds a {type(content).__name__}; expected a training checkpoint (a dict with ema_model or "
            "net_model) or a state dict"
        )
    return content


def _pickles(path: Path, *, is_archive: bool) -> tuple[bytes, int]:
    """The pickles of a checkpoint as torch finds them, and how many they are."""
    if not is_archive:
        with path.open("rb") as file:
            return file.read(MAX_PICKLE_BYTES), _PICKLES_OF_OLD_FORMAT
    with ArchiveFile(io.FileIO(path)) as file:
        archive = torch._C.PyTorchFileReader(file)
        records = archive.get_all_records()
        for name in records:
            # What torch reads whole beside the tensors, which it maps.
            if not _STORAGE.fullmatch(name) and archive.get_record_size(name) > MAX_PICKLE_BYTES:
                raise CheckpointError(f"refused: its record {word(name)} has more than {MAX_PICKLE_BYTES} bytes")
        # Without a pickle torch says what it is instead.
        return (archive.get_record("data.pkl"), 1) if "data.pkl" in records else (b"", 0)


def _is_archive(path: Path) -> bool:
    """Whether ``torch.save`` wrote a zip archive (since torch 1.6) and not a bare pickle; refuse what is neither."""
    size = path.stat().st_size
    if not 0 < size <= _MOST_BYTES:
        raise CheckpointError(f"it has {size} bytes; expected a training checkpoint of at most {_MOST_BYTES}")
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        with open_archive(path) as archive:
            if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
                raise CheckpointError(
                    "it is a compressed archive; expected a checkpoint as torch.save writes it: unpack and "
                    "save it again"
                )
        return True
    if start[:1] != b"\x80":
        raise CheckpointError(
            f"it is not a training checkpoint: expected a file of torch.save, found {start!r} at its start"
        )
    if start[1:2] != b"\x02":
        raise CheckpointError(
            "it is a pickle that torch.save did not write; such a file can hold code and was refused: give the "
            "training checkpoint"
        )
    return False


def _why_unreadable(error: BaseException) -> str:
    text = str(error)
    # torch's own advice (several lines) is to trust the file, which is not ours to give.
    found = re.search(r"GLOBAL (\S+)|unrecognized function (.+)|but got (<class .+>)", text)
    if isinstance(error, UnpicklingError) and found is not None:
        name = next(group for group in found.groups() if group)
        return (
            f"refused: it holds code or objects other than tensors ({name[:80]}), which are never run; save the "
            "state dict alone"
        )
    if "TorchScript" in text:
        return "refused: it is a TorchScript program, not weights; give the training checkpoint"
    # What the unpickler says of damage is advice, too; an archive reader names the damage in its first sentence.
    detail = type(error).__name__
    if text and not isinstance(error, UnpicklingError):
        sentence = re.split(r"[.] |\n", text)[0]
        detail += f": {sentence[:160]}"
    return f"it is truncated, damaged or no checkpoint of torch.save ({detail}); copy it again"


def _choose(content: Mapping[Any, Any], weights: Weights) -> tuple[dict[str, Tensor], Weights | Literal["bare"]]:
    """The state dict to read and what it is: the moving average, the raw network, or the only one."""
    wanted, other = _SETS[weights], _SETS["net" if weights == "ema" else "ema"]
    if wanted in content:
        return _state_dict(content[wanted], wanted), weights
    if other in content:
        flag = "net" if weights == "ema" else "ema"
        raise CheckpointError(f"expected {wanted}, found only {other}: add --weights {flag} to take that instead")
    if not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"expected a dict with ema_model or net_model, or a state dict of tensors; found {words(content)}"
        )
    if weights == "net":
        raise CheckpointError("this is a bare state dict with one set of weights: leave out --weights net")
    return _state_dict(content, "the state dict"), "bare"


def _state_dict(content: object, name: str) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"expected {name} to be a dict of tensors, found {type(content).__name__}")
    if len(content) > _MOST_KEYS:
        raise CheckpointError(f"expected {name} to have at most {_MOST_KEYS} keys, found {len(content)}")
    for key, value in content.items():
        if not isinstance(key, str):
            raise CheckpointError(f"expected the keys of {name} to be names, found {brief(key)!r}")
        _check_tensor(key, value)
    parallel = all(key.startswith("module.") for key in content)
    return {key.removeprefix("module.") if parallel else key: value for key, value in content.items()}


def _check_tensor(key: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise CheckpointError(f"expected {_named(key)} to be a tensor, found {type(value).__name__}")
    if value.dtype not in {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
        raise CheckpointError(f"expected {_named(key)} to hold floating-point numbers, found {value.dtype}")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise CheckpointError(
            f"expected {_named(key)} to be a dense tensor, found {value.layout} on {value.device.type}"
        )
    # A stride of zero lets a few bytes claim any shape; float32 copies of that would fill the memory.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"{_named(key)} claims the shape {brief(tuple(value.shape))}, more than is stored for it")


def _check_stored(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that share what is stored, or whose storage was made larger than the file by their claims."""
    claimed, size = sum(value.numel() * value.element_size() for value in state.values()), path.stat().st_size
    if claimed > size:
        raise CheckpointError(f"its tensors claim {claimed} bytes, more than is stored in a file of {size}")


def _named(key: str) -> str:
    """A key of the file as a message can hold it."""
    return key if key.isprintable() and len(key) <= 80 else brief(key)


@dataclass(frozen=True, slots=True)
class _Topology:
    """What keys and shapes tell; the names are those of ``UNetSpec``."""

    channels: int
    base_channels: int
    channel_mults: tuple[int, ...]
    attention_levels: tuple[int, ...]
    num_res_blocks: int
    timesteps: int
    time_features: int
    time_dim: int


def _topology(state: Mapping[str, Tensor]) -> _Topology:
    head = _shape(state, "head.weight", axes=4)
    table = _shape(state, _TIME_TABLE, axes=2)
    levels = _levels(state)
    widths = [_shape(state, level[0] + "block1.2.weight", axes=4)[0] for level in levels]
    if not head[0] or any(width % head[0] for width in widths):
        raise CheckpointError(
            f"another architecture: expected the channels of every level to be multiples of the head's {head[0]}, "
            f"found {brief(widths)}"
        )
    return _Topology(
        channels=head[1],
        base_channels=head[0],
        channel_mults=tuple(width // head[0] for width in widths),
        attention_levels=tuple(i for i, level in enumerate(levels) if level[0] + "attn.proj_q.weight" in state),
        num_res_blocks=len(levels[0]),
        timesteps=table[0],
        time_features=table[1],
        time_dim=_shape(state, "time_embedding.timembedding.1.weight", axes=2)[0],
    )


def _levels(state: Mapping[str, Tensor]) -> list[list[str]]:
    """The key prefixes of the residual blocks on the way down, level by level; a downsampling ends a level."""
    levels: list[list[str]] = [[]]
    for index in count():
        prefix = f"downblocks.{index}."
        if prefix + "block1.2.weight" in state:
            levels[-1].append(prefix)
        elif prefix + "main.weight" in state:
            levels.append([])
        else:
            break
    blocks = [len(level) for level in levels]
    if not blocks[0] or len(set(blocks)) != 1:
        raise CheckpointError(
            f"another architecture: expected the same number of residual blocks (downblocks.N.block1…) on every "
            f"level, found {brief(blocks)}"
        )
    return levels


def _shape(state: Mapping[str, Tensor], key: str, *, axes: int) -> tuple[int, ...]:
    if key not in state:
        raise CheckpointError(f"another architecture: expected DDSM's U-Net, which has {key}; found {words(state)}")
    shape = tuple(state[key].shape)
    if len(shape) != axes:
        raise CheckpointError(
            f"another architecture: expected {key} to have {axes} axes, found the shape {brief(shape)}"
        )
    return shape


def _spec_and_schedule(topology: _Topology, facts: Facts) -> tuple[UNetSpec, NoiseSchedule]:
    contradictions = facts.contradictions(asdict(topology))
    if contradictions:
        raise CheckpointError(
            f"the flags contradict keys and shapes: {'; '.join(contradictions)}; give the flagfile of this run"
        )
    missing = facts.missing()
    if missing is not None:
        raise CheckpointError(missing)
    # `missing` has seen to it that these are known, which no type checker can see.
    assert facts.groups is not None
    assert facts.image_size is not None
    assert facts.beta_start is not None
    assert facts.beta_end is not None
    assert facts.variance_type is not None
    spec = UNetSpec(
        **asdict(topology),
        groups=facts.groups,
        image_size=facts.image_size,
        conv_multiple=8 if facts.conv_multiple is None else facts.conv_multiple,
        linear_multiple=16 if facts.linear_multiple is None else facts.linear_multiple,
        dropout=0.0 if facts.dropout is None else facts.dropout,
    )
    return spec, NoiseSchedule(facts.beta_start, facts.beta_end, topology.timesteps, facts.variance_type)


def _check_sample(x_T: object, spec: UNetSpec) -> None:
    """The noise that the training run sampled its previews from has the shape of its images."""
    if isinstance(x_T, Tensor) and x_T.dim() == 4 and tuple(x_T.shape[1:]) != spec.sample_shape:
        raise CheckpointError(
            f"--image-size {spec.image_size} and {spec.channels} channels are contradicted by x_T, whose samples have "
            f"the shape {brief(tuple(x_T.shape[1:]))}: give the image size of the training run"
        )


def _time_table(table: Tensor, spec: UNetSpec) -> Tensor:
    """The file's own table: its last bits are those the weights were trained with."""
    ours = sinusoid(range(spec.timesteps), spec.time_features)
    # Angles grow with the timestep, and float32 with them: half precision costs 2e-4, another table 1.
    tolerance = 1e-6 * max(spec.timesteps, 1000)
    difference = (table.to(torch.float32) - torch.from_numpy(ours)).abs().max().item()
    if not difference <= tolerance:  # NaN is no match either
        raise CheckpointError(
            f"{_TIME_TABLE} is not the sinusoidal table (sine and cosine interleaved): expected values within "
            f"{tolerance:g}, found a difference of {difference:.3g}; this is another network"
        )
    return table.detach().to(torch.float32, copy=True)


def _fit(state: Mapping[str, Tensor], spec: UNetSpec) -> dict[str, Tensor]:
    """The weights under our names, float32; refuse, by the file's own names, what does not fit."""
    expected = dict(empty_unet(spec, spec.base_channels).named_parameters())
    keys = {name: _published_name(name) for name in expected}
    missing = [key for key in keys.values() if key not in state]
    unknown = sorted(state.keys() - keys.values() - {_TIME_TABLE})
    if missing or unknown:
        raise CheckpointError(
            f"the keys do not fit the architecture that its other keys tell: missing {words(missing)}, "
            f"unexpected {words(unknown)}"
        )
    weights = {}
    for name, parameter in expected.items():
        key, shape = keys[name], tuple(parameter.shape)
        if state[key].shape != shape:
            raise CheckpointError(f"expected {key} to have the shape {shape}, found {brief(tuple(state[key].shape))}")
        # A copy: the file is only mapped, and may change or vanish later.
        weights[name] = state[key].detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if not np.isfinite(weights[name].numpy()).all():
            raise CheckpointError(f"{key} holds a value that is not finite (NaN or infinity); training had diverged")
    return weights


def _published_name(name: str) -> str:
    for ours, theirs in _PUBLISHED_NAMES:
        name = re.sub(ours, theirs, name)
    return name
