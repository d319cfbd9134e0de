"""The trained supernet: an architecture and its weights, and the project's own file for it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddsm_engine.bundle import TIME_TABLE_KEY
from ddsm_engine.errors import CheckpointError, DdsmError
from ddsm_engine.files import atomic_path
from ddsm_engine.networks.slicing import empty_unet
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.spec import UNetSpec
from ddsm_engine.time_table import TimeTable

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
        full = empty_unet(self.spec, self.spec.base_channels)
        expected = {name: parameter.shape for name, parameter in full.named_parameters()}
        missing, unknown = sorted(expected.keys() - self.weights.keys()), sorted(self.weights.keys() - expected.keys())
        if missing or unknown:
            raise CheckpointError(
                f"the weights do not fit the architecture: missing {_some(missing)}, unexpected {_some(unknown)}"
            )
        for name, shape in expected.items():
            tensor = self.weights[name]
            if tensor.shape != shape:
                raise CheckpointError(f"{name} must have the shape {tuple(shape)}, found {tuple(tensor.shape)}")
            if not np.isfinite(tensor.detach().numpy()).all():
                raise CheckpointError(f"{name} holds a value that is not finite (NaN or infinity)")
        if self.time_table is not None and self.time_table.shape != (self.spec.timesteps, self.spec.time_features):
            raise CheckpointError(f"the time table has the shape {tuple(self.time_table.shape)}, which does not fit")

    @property
    def time_features(self) -> TimeTable:
        """What the network reads of a timestep."""
        if self.time_table is None:
            return TimeTable.sinusoidal(self.spec.timesteps, self.spec.time_features)
        return TimeTable(self.time_table.numpy())


def _some(names: list[str]) -> str:
    return ("none" if not names else ", ".join(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
        save_file(tensors, temporary, metadata=header)


def load_supernet(path: Path) -> Supernet:
    """Read what ``save_supernet`` wrote; weights are widened to float32.

    Raises:
        CheckpointError: not a safetensors file, not a supernet, of a newer format, or weights that do not fit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check_header(header, path)
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a mapping
        return Supernet(
            spec=UNetSpec.from_json(json.loads(header["spec"])),
            noise_schedule=NoiseSchedule.from_json(json.loads(header["noise_schedule"])),
            time_table=weights.pop(TIME_TABLE_KEY, None),
            weights=weights,
            provenance=json.loads(header["provenance"]),
        )
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{path} is not a readable supernet file: {error}") from error
    except CheckpointError:
        raise
    except DdsmError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_header(header: Mapping[str, str], path: Path) -> None:
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a safetensors file without a supernet's spec in its header (expected format "
            f"{FORMAT!r}, found {header.get('format')!r}); give the training checkpoint instead"
        )
    version = header.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise CheckpointError(f"{path} has format_version {version!r}; this program reads {FORMAT_VERSION}: update it")
