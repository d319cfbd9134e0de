"""The bundle: a directory with one artefact per variant, and the manifest that vouches for every byte of it.

The format is specified in ``ddsm_engine/README.md``. A file is hashed when it is about to be used.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import numpy as np
from safetensors.numpy import load_file

from ddsm_engine.errors import BundleError, DdsmError
from ddsm_engine.files import sha256_of
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.spec import UNetSpec
from ddsm_engine.time_table import TimeTable

FORMAT = "ddsm-bundle"
FORMAT_VERSION = 1
FAMILY = "ddsm-unet"
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
TIME_TABLE = "time_table.safetensors"
TIME_TABLE_KEY = "time_table"
MAX_MANIFEST_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One input or output of a variant; ``"batch"`` stands where the batch size goes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def at_batch(self, batch: int) -> tuple[int, ...]:
        """The shape with the batch size filled in."""
        return tuple(batch if size == "batch" else int(size) for size in self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How far an artefact was from the sliced torch network when it was made.

    Attributes:
        relative_l2: Largest ‖artefact - reference‖ / ‖reference‖ over the inputs tried.
        max_abs: Largest difference of one value.
        tolerance: What ``relative_l2`` had to stay within.
        backend: What ran the artefact.
    """

    relative_l2: float
    max_abs: float
    tolerance: float
    backend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One static network of the bundle. ``width`` and ``width_mult`` are what DDSM's variants differ by."""

    id: str
    role: str
    precision: Literal["fp32", "fp16"]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    file: str
    sha256: str
    size_bytes: int
    macs: int
    conv_linear_macs: int
    params: int
    width: int
    width_mult: float
    parity: Parity


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """A file that export wrote beside the variants."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What ``manifest.json`` says."""

    spec: UNetSpec
    noise_schedule: NoiseSchedule
    prediction_type: Literal["epsilon"]
    variants: tuple[Variant, ...]
    files: tuple[FileInfo, ...]
    provenance: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values, sealed with a checksum over itself."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "family": FAMILY,
            "spec": self.spec.to_json(),
            "noise_schedule": self.noise_schedule.to_json(),
            "prediction_type": self.prediction_type,
            "image_shape": list(self.spec.sample_shape),
            "variants": [asdict(variant) for variant in self.variants],
            "files": [asdict(file) for file in self.files],
            "provenance": dict(self.provenance),
        }
        body = json.loads(json.dumps(body))  # tuples become lists, as the checksum will see them again
        return {**body, "checksum": _checksum(body)}

    @classmethod
    def from_json(cls, data: object, origin: Path) -> "Manifest":
        """Read what ``to_json`` wrote.

        Raises:
            BundleError: not a manifest, changed since it was written, newer, or with an impossible value.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BundleError(f"{origin} is not the manifest of a bundle (expected format {FORMAT!r})")
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{origin} has format_version {version!r}; this program reads {FORMAT_VERSION}: update ddsm-engine, or "
                f"export the bundle again"
            )
        body = {name: value for name, value in data.items() if name != "checksum"}
        if data.get("checksum") != _checksum(body):
            raise BundleError(f"{origin} was changed after it was written (its checksum disagrees); export it again")
        kind = body.get("family"), body.get("prediction_type")
        if kind != (FAMILY, "epsilon"):
            raise BundleError(f"{origin}: expected family {FAMILY!r} predicting 'epsilon', found {kind}")
        try:
            return cls(
                spec=UNetSpec.from_json(body["spec"]),
                noise_schedule=NoiseSchedule.from_json(body["noise_schedule"]),
                prediction_type="epsilon",
                variants=tuple(_variant(entry) for entry in body["variants"]),
                files=tuple(_typed(FileInfo, entry) for entry in body["files"]),
                provenance=body["provenance"],
            )
        except (KeyError, TypeError) as error:
            raise BundleError(f"{origin} lacks a field or has one of the wrong kind: {error}") from error
        except BundleError:
            raise
        except DdsmError as error:
            raise BundleError(f"{origin}: {error}") from error


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _variant(entry: object) -> Variant:
    if not isinstance(entry, dict):
        raise TypeError(f"a variant is an object, found {entry!r}"[:200])
    if entry["precision"] not in ("fp32", "fp16"):
        raise TypeError(f"precision must be fp32 or fp16, found {entry['precision']!r}"[:200])
    nested = {key: tuple(_tensor(tensor) for tensor in entry[key]) for key in ("inputs", "outputs")}
    return _typed(Variant, entry | nested | {"parity": _typed(Parity, entry["parity"])})


def _tensor(entry: dict[str, Any]) -> TensorInfo:
    shape = tuple(entry["shape"])
    if not all(type(size) is int or size == "batch" for size in shape):
        raise TypeError(f"a shape is whole numbers and 'batch', found {shape}")
    return _typed(TensorInfo, entry | {"shape": shape})


Record = TypeVar("Record", Variant, TensorInfo, Parity, FileInfo)

_KINDS: Mapping[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (float, int)}
"""Annotation of a field → the JSON kinds that it takes; JSON writes 1.0 as 1 in some hands."""


def _typed(record: type[Record], entry: dict[str, Any]) -> Record:
    """Build a record, refusing a value of the wrong JSON kind (a dataclass itself checks none)."""
    for field in fields(record):
        kinds = _KINDS.get(getattr(field.type, "__name__", str(field.type)))
        if kinds is not None and type(entry[field.name]) not in kinds:
            raise TypeError(f"{field.name} must be {kinds[0].__name__}, found {entry[field.name]!r}"[:200])
    return record(**entry)


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: its folder and its manifest. Files are verified when they are asked for."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str) -> "Bundle":
        """Read and check the manifest.

        Raises:
            BundleError: no bundle, damaged, of a newer format.
        """
        path = Path(path)
        manifest = path / MANIFEST
        if not manifest.is_file():
            raise BundleError(f"{path} is not a bundle: {MANIFEST} is missing; make one with ddsm-export SUPERNET.pt")
        if manifest.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{manifest} is larger than {MAX_MANIFEST_BYTES} bytes; it is not a bundle's manifest")
        try:
            data = json.loads(manifest.read_bytes())
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{manifest} is not JSON: {error}; export the bundle again") from error
        opened = cls(path, Manifest.from_json(data, manifest))
        if not opened.variants:
            raise BundleError(f"{manifest} lists no variants; export the bundle again")
        return opened

    @property
    def variants(self) -> Mapping[str, Variant]:
        """Variants by id, in the manifest's order (narrowest first)."""
        return {variant.id: variant for variant in self.manifest.variants}

    @property
    def full(self) -> Variant:
        """The variant that costs most: the full width."""
        return max(self.manifest.variants, key=lambda variant: variant.macs)

    def artefact(self, variant: Variant) -> Path:
        """The verified file of a variant."""
        return self._verified(variant.file, variant.sha256, variant.size_bytes)

    def verify(self) -> None:
        """Check every file that the manifest vouches for."""
        for variant in self.manifest.variants:
            self.artefact(variant)
        for info in self.manifest.files:
            self._verified(info.path, info.sha256, info.size_bytes)

    def weights(self) -> Path:
        """The verified file with the supernet's weights."""
        file = self._listed(WEIGHTS)
        if file is None:
            raise BundleError(f"{self.path} holds no {WEIGHTS}; export it again")
        return file

    def time_table(self) -> TimeTable:
        """The table of time features: the checkpoint's own where it carried one."""
        spec = self.manifest.spec
        file = self._listed(TIME_TABLE)
        if file is None:
            return TimeTable.sinusoidal(spec.timesteps, spec.time_features)
        rows = load_file(file).get(TIME_TABLE_KEY)
        if rows is None or rows.dtype != np.float32 or rows.shape != (spec.timesteps, spec.time_features):
            raise BundleError(f"{file} does not hold the time table of this architecture; export the bundle again")
        return TimeTable(rows)

    def strategies(self) -> Mapping[str, Path]:
        """Strategy files by name (the file's name without ``.yaml``)."""
        return {file.stem: file for file in sorted(self.path.glob("strategies/*.yaml"))}

    def strategy_file(self, name: str) -> Path:
        """A strategy of the bundle by name, verified where the manifest vouches for it.

        Raises:
            BundleError: no strategy of this name.
        """
        found = self.strategies().get(name)
        if found is None:
            raise BundleError(f"{self.path} has no strategy {name!r}; it has: {', '.join(self.strategies()) or 'none'}")
        return self._listed(f"strategies/{name}.yaml") or found

    def _listed(self, relative: str) -> Path | None:
        """A file that the manifest lists, verified; None if it lists none of this name."""
        for info in self.manifest.files:
            if info.path == relative:
                return self._verified(info.path, info.sha256, info.size_bytes)
        return None

    def _verified(self, relative: str, sha256: str, size_bytes: int) -> Path:
        pure = PurePosixPath(relative)
        if pure.is_absolute() or ".." in pure.parts or "\\" in relative:
            raise BundleError(f"{self.path / MANIFEST} names {relative!r}, which leaves the bundle; do not use it")
        file = self.path / pure
        if not file.is_file():
            raise BundleError(f"{file} is missing from the bundle; export it again")
        if not file.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(f"{file} is a link that leaves the bundle; do not use it")
        if file.stat().st_size != size_bytes or sha256_of(file) != sha256:
            raise BundleError(f"{file} is damaged: its content is not what the manifest vouches for; export it again")
        return file
