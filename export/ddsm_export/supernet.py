"""The trained supernet: an architecture and its weights, and the project's own file for it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ddsm_engine.bundle import TIME_TABLE_KEY
from ddsm_engine.errors import CheckpointError, DdsmError, OutputError
from ddsm_engine.files import atomic_path
from ddsm_engine.networks.slicing import empty_unet
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.spec import UNetSpec
from ddsm_engine.time_table import TimeTable
from ddsm_engine.untrusted import brief, open_safetensors, parse_json, shapes_of, words

FORMAT = "ddsm-supernet"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Supernet:
    """An architecture, its noise schedule and the trained weights at full width; it has no ``forward``.

    Attributes:
        spec: The architecture.
        noise_schedule: What it was trained with.
        weights: Parameter name (of ``ddsm_engine.networks.unet.UNet``) → float32 tensor.
        provenance: Where the weights come from, as JSON values.
        time_table: float32 [timesteps, time_features] where a checkpoint carries its own; None where the network was
            trained with ``ddsm_engine.time_table.sinusoid``.
    """

    spec: UNetSpec
    noise_schedule: NoiseSchedule
    weights: Mapping[str, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    time_table: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse weights that do not fit the spec: a key too many or too few, a shape, a value that is not finite."""
        tensors = dict(self.weights) if self.time_table is None else {**self.weights, TIME_TABLE_KEY: self.time_table}
        _check_shapes(self.spec, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            if not np.isfinite(tensor.detach().numpy()).all():
                raise CheckpointError(f"{name} holds a value that is not finite (NaN or infinity)")
        if self.spec.timesteps != self.noise_schedule.timesteps:
            raise CheckpointError(
                f"{self.noise_schedule.timesteps} timesteps of noise meet {self.spec.timesteps} of the architecture"
            )

    @property
    def time_features(self) -> TimeTable:
        """What the network reads of a timestep."""
        if self.time_table is None:
            return TimeTable.sinusoidal(self.spec.timesteps, self.spec.time_features, self.spec.time_freq_shift)
        return TimeTable(self.time_table.numpy(), self.spec.time_freq_shift)


def _check_shapes(spec: UNetSpec, found: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that are not those of the architecture, by name and shape; the time table may be absent."""
    full = empty_unet(spec, spec.base_channels)
    expected = {name: tuple(parameter.shape) for name, parameter in full.named_parameters()}
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys() - {TIME_TABLE_KEY})
    if missing or unknown:
        raise CheckpointError(
            f"the weights do not fit the architecture: missing {words(missing)}, unexpected {words(unknown)}"
        )
    for name, shape in (expected | {TIME_TABLE_KEY: (spec.timesteps, spec.time_features)}).items():
        if found.get(name, shape) != shape:
            raise CheckpointError(f"{name} must have the shape {shape}, found {brief(found[name])}")


def save_supernet(supernet: Supernet, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write one safetensors file with the spec, schedule and provenance in its header; whole or not at all."""
    header = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "spec": json.dumps(supernet.spec.to_json()),
        "noise_schedule": json.dumps(supernet.noise_schedule.to_json()),
        "provenance": json.dumps(dict(supernet.provenance)),
    }
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in supernet.weights.items()}
    if supernet.time_table is not None:
        tensors[TIME_TABLE_KEY] = supernet.time_table
    with atomic_path(path) as temporary:
        save_tensors(tensors, temporary, header)


def save_tensors(tensors: dict[str, Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OutputError: it cannot be written (a full disk, say).
    """
    try:
        save_file(tensors, path, metadata=header)
    except SafetensorError as error:
        raise OutputError(f"{path.name} could not be written: {error}") from error


def load_supernet(path: Path) -> Supernet:
    """Read what ``save_supernet`` wrote; weights are widened to float32.

    Names, shapes and number types are compared with the spec in the header before a weight is read.

    Raises:
        CheckpointError: not a safetensors file, not a supernet, of a newer format, or weights that do not fit.
    """
    try:
        with open_safetensors(path, "pt") as file:
            header = file.metadata() or {}
            _check_header(header)
            spec = UNetSpec.from_json(parse_json(header["spec"]))
            noise_schedule = NoiseSchedule.from_json(parse_json(header["noise_schedule"]))
            provenance = parse_json(header["provenance"])
            shapes = shapes_of(file)
            _check_shapes(spec, shapes)
            weights = {name: file.get_tensor(name).float() for name in shapes}
        if not isinstance(provenance, dict):
            raise CheckpointError(f"the provenance must be an object, found {brief(provenance)}")
        time_table = weights.pop(TIME_TABLE_KEY, None)
        return Supernet(spec, noise_schedule, weights, provenance, time_table)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a readable supernet file: {str(error)[:300]}") from error
    except DdsmError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_header(header: Mapping[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"a safetensors file without a supernet's spec in its header (expected format {FORMAT!r}, found "
            f"{brief(header.get('format'))}); give the training checkpoint instead"
        )
    version = header.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise CheckpointError(f"it has format_version {brief(version)}; this program reads {FORMAT_VERSION}: update it")
