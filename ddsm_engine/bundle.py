"""The bundle: a directory with one artefact per variant, and the manifest that vouches for every byte of it.

The format is specified in ``ddsm_engine/README.md``. A file is hashed when it is about to be used.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from ddsm_engine.errors import BundleError, DdsmError, OutputError, SamplerError
from ddsm_engine.files import clear_leftovers, sha256_of
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.onnx_file import check_onnx
from ddsm_engine.samplers import PREDICTION_TYPES, PredictionType
from ddsm_engine.samplers.config import read_config
from ddsm_engine.spec import UNetSpec
from ddsm_engine.time_table import TimeTable
from ddsm_engine.untrusted import brief, open_safetensors, parse_json, read_bytes, shapes_of, word

FORMAT = "ddsm-bundle"
FORMAT_VERSION = 1
FAMILY = "ddsm-unet"
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
TIME_TABLE = "time_table.safetensors"
TIME_TABLE_KEY = "time_table"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
MAX_MANIFEST_BYTES = 4 << 20
MAX_FILE_BYTES = 1 << 33
"""Of any file that a manifest lists: no more is hashed, mapped or read."""
MAX_VARIANTS = 256
MAX_PATH = 240
MAX_COUNT = 1 << 62
"""Of multiply-accumulates, parameters and bytes: they stay exact, and can be divided."""


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
    """One static network of the bundle: a width of the supernet, or an expert that was trained by itself.

    ``width`` is the channels of its first level and ``width_mult`` its share of the supernet's. An expert has no
    ``width_mult``, and a ``spec`` and a file of ``weights`` of its own, where a width of the supernet has neither.
    """

    id: str
    role: str
    precision: Literal["fp32", "fp16", "bf16"]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    file: str
    sha256: str
    size_bytes: int
    macs: int
    conv_linear_macs: int
    params: int
    width: int
    width_mult: float | None = None
    parity: Parity
    spec: UNetSpec | None = None
    weights: str | None = None


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
    prediction_type: PredictionType
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
            "variants": [_variant_to_json(variant) for variant in self.variants],
            "files": [asdict(file) for file in self.files],
            "provenance": dict(self.provenance),
        }
        body = json.loads(json.dumps(body))  # tuples become lists, as the checksum will see them again
        return {**body, "checksum": checksum_of(body)}

    @property
    def checksum(self) -> str:
        """SHA-256 over everything else that the manifest says, hexadecimal."""
        return str(self.to_json()["checksum"])

    @classmethod
    def from_json(cls, data: object, origin: Path) -> "Manifest":
        """Read what ``to_json`` wrote.

        Raises:
            BundleError: not a manifest, changed since it was written, newer, or with an impossible value.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BundleError(f"{origin} is not the manifest of a bundle (expected format {FORMAT!r})")
        version = data.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise BundleError(
                f"{origin} has format_version {brief(version)}; this program reads {FORMAT_VERSION}: update "
                f"ddsm-engine, or export the bundle again"
            )
        body = {name: value for name, value in data.items() if name != "checksum"}
        if data.get("checksum") != checksum_of(body):
            raise BundleError(f"{origin} was changed after it was written (its checksum disagrees); export it again")
        family, prediction = body.get("family"), body.get("prediction_type")
        if family != FAMILY or prediction not in PREDICTION_TYPES:
            raise BundleError(
                f"{origin}: expected family {FAMILY!r} predicting {', '.join(PREDICTION_TYPES)}, found "
                f"{brief((family, prediction))}"
            )
        try:
            manifest = cls(
                spec=UNetSpec.from_json(body["spec"]),
                noise_schedule=NoiseSchedule.from_json(body["noise_schedule"]),
                prediction_type=prediction,
                variants=tuple(_variant(entry) for entry in _list(body["variants"])),
                files=tuple(_typed(FileInfo, _object(entry)) for entry in _list(body["files"])),
                provenance=_object(body["provenance"]),
            )
            manifest._check(body["image_shape"])
        except (KeyError, TypeError) as error:
            raise BundleError(f"{origin} lacks a field or has one of the wrong kind: {str(error)[:300]}") from error
        except DdsmError as error:
            raise BundleError(f"{origin}: {error}") from error
        return manifest

    def _check(self, image_shape: object) -> None:
        """Refuse what does not fit together: a run would find out too late, or not at all."""
        spec = self.spec
        if image_shape != list(spec.sample_shape):
            raise BundleError(f"image_shape must be {list(spec.sample_shape)}, found {brief(image_shape)}")
        if spec.timesteps != self.noise_schedule.timesteps:
            raise BundleError(f"{self.noise_schedule.timesteps} timesteps of noise meet {spec.timesteps} of the spec")
        if len(self.variants) > MAX_VARIANTS:
            raise BundleError(f"expected at most {MAX_VARIANTS} variants, found {len(self.variants)}")
        for variant in self.variants:
            self._check_variant(variant)
        names = Counter(variant.id for variant in self.variants)
        names += Counter([*(variant.file for variant in self.variants), *(file.path for file in self.files)])
        if repeated := [name for name, times in names.items() if times > 1]:
            raise BundleError(f"{brief(repeated[0])} stands for two things; export the bundle again")

    def _check_variant(self, variant: Variant) -> None:
        if variant.role != "denoiser":
            raise BundleError(f"{variant.id}: expected the role 'denoiser', found {brief(variant.role)}")
        if not variant.file.endswith(".onnx"):  # a backend tells formats by it
            raise BundleError(f"{variant.id}: expected an .onnx file, found {brief(variant.file)}")
        spec = self.spec if variant.spec is None else variant.spec
        if variant.spec is not None:
            self._check_expert(variant, variant.spec)
        reason = spec.why_not(variant.width)
        share = variant.width / spec.base_channels if variant.spec is None else None
        if reason is not None or variant.width_mult != share:
            found = f"{brief(variant.width)} ({brief(variant.width_mult)} of the full one)"
            raise BundleError(f"{variant.id}: the width {found} cannot be: {reason or 'share and width disagree'}")
        expected = denoiser_inputs(spec), denoiser_outputs(spec)
        if (variant.inputs, variant.outputs) != expected:
            raise BundleError(
                f"{variant.id}: expected the inputs and outputs {_signature(*expected)}, found "
                f"{_signature(variant.inputs, variant.outputs)[:300]}; export the bundle again"
            )

    def _check_expert(self, variant: Variant, spec: UNetSpec) -> None:
        """Refuse a network of its own that cannot take the supernet's, or the other experts', place in a run."""
        if (spec.sample_shape, spec.timesteps) != (self.spec.sample_shape, self.spec.timesteps):
            expected, found = (f"{list(s.sample_shape)}, {s.timesteps} timesteps" for s in (self.spec, spec))
            raise BundleError(f"{variant.id}: expected samples of the bundle's {expected}, found {found}")
        if variant.width != spec.base_channels:
            raise BundleError(f"{variant.id}: expected its spec's width {spec.base_channels}, found {variant.width}")
        if variant.weights not in {file.path for file in self.files}:
            raise BundleError(f"{variant.id}: its weights {brief(variant.weights)} are not among the files")


def denoiser_inputs(spec: UNetSpec) -> tuple[TensorInfo, ...]:
    """The inputs of every denoiser."""
    return (
        TensorInfo(name="sample", dtype="float32", shape=("batch", *spec.sample_shape)),
        TensorInfo(name="time_features", dtype="float32", shape=("batch", spec.time_features)),
    )


def denoiser_outputs(spec: UNetSpec) -> tuple[TensorInfo, ...]:
    """The outputs of every denoiser."""
    return (TensorInfo(name="out_sample", dtype="float32", shape=("batch", *spec.sample_shape)),)


def _signature(inputs: tuple[TensorInfo, ...], outputs: tuple[TensorInfo, ...]) -> str:
    """Inputs and outputs as one reads them: ``sample float32 [batch, 3, 8, 8], … → …``."""
    sides = (
        ", ".join(f"{word(t.name)} {word(t.dtype)} [{', '.join(map(str, t.shape[:8]))}]" for t in side[:4])
        for side in (inputs, outputs)
    )
    return " → ".join(sides)


def checksum_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, written with sorted keys and no spaces; hexadecimal."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _variant_to_json(variant: Variant) -> dict[str, Any]:
    """What a variant of a supernet has not is left out."""
    own = {} if variant.spec is None else {"spec": variant.spec.to_json()}
    return {name: value for name, value in asdict(variant).items() if value is not None} | own


def _variant(entry: object) -> Variant:
    data = _object(entry)
    expert, width = {"spec", "weights"}, {"width_mult"}
    own, foreign = (expert, width) if "spec" in data else (width, expert)
    if clash := sorted(foreign & data.keys()):
        raise TypeError(f"{clash[0]} meets {min(own)}: a variant is a width of the supernet or a network of its own")
    if absent := sorted(own - data.keys()):
        raise KeyError(absent[0])
    if "spec" in data:
        data = data | {"spec": UNetSpec.from_json(data["spec"])}
    if data["precision"] not in ("fp32", "fp16", "bf16"):
        raise TypeError(f"precision must be fp32, fp16 or bf16, found {brief(data['precision'])}")
    nested = {key: tuple(_tensor(_object(tensor)) for tensor in _list(data[key])) for key in ("inputs", "outputs")}
    return _typed(Variant, data | nested | {"parity": _typed(Parity, _object(data["parity"]))})


def _tensor(entry: dict[str, Any]) -> TensorInfo:
    shape = tuple(_list(entry["shape"]))
    if not all(size == "batch" or (type(size) is int and 1 <= size <= MAX_COUNT) for size in shape):
        raise TypeError(f"a shape is whole numbers and 'batch', found {brief(shape)}")
    return _typed(TensorInfo, entry | {"shape": shape})


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, found {brief(value)}")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, found {brief(value)}")
    return value


Record = TypeVar("Record", Variant, TensorInfo, Parity, FileInfo)

_KINDS: Mapping[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "float": (float, int), "str | None": (str,), "float | None": (float, int),
}  # fmt: skip
"""Annotation of a field → the JSON kinds that it takes; JSON writes 1.0 as 1 in some hands."""

_LEAST = {"macs": 1, "conv_linear_macs": 1, "params": 1, "width": 1}
_PATTERNS = {"id": re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII), "sha256": re.compile(r"[0-9a-f]{64}")}


def _typed(record: type[Record], entry: dict[str, Any]) -> Record:
    """Build a record, refusing a value of the wrong JSON kind or out of range (a dataclass itself checks none)."""
    for field in fields(record):
        kinds = _KINDS.get(getattr(field.type, "__name__", str(field.type)))
        if kinds is None or (field.default is None and field.name not in entry):
            continue
        value = entry[field.name]
        if type(value) not in kinds:
            raise TypeError(f"{field.name} must be {kinds[0].__name__}, found {brief(value)}")
        if kinds != (str,) and not _LEAST.get(field.name, 0) <= value <= MAX_COUNT:
            raise TypeError(f"{field.name} must lie in {_LEAST.get(field.name, 0)}…{MAX_COUNT}, found {brief(value)}")
        if field.name == "size_bytes" and value > MAX_FILE_BYTES:
            raise TypeError(f"size_bytes must be at most {MAX_FILE_BYTES}, found {value}")
        if field.name in _PATTERNS and not _PATTERNS[field.name].fullmatch(value):
            raise TypeError(f"{field.name} must be {_PATTERNS[field.name].pattern}, found {brief(value)}")
        if field.name in ("file", "path", "weights"):
            _check_path(value)
    return record(**entry)


def _check_path(relative: str) -> None:
    """Refuse a path that leads out of the bundle, or that cannot be printed."""
    pure = PurePosixPath(relative)
    if pure.is_absolute() or ".." in pure.parts or "\\" in relative:
        raise BundleError(f"it names {brief(relative)}, which leaves the bundle; do not use it")
    if not relative.isprintable() or not 1 <= len(relative) <= MAX_PATH or str(pure) != relative:
        raise TypeError(f"a path is printable, plain and of at most {MAX_PATH} characters, found {brief(relative)}")


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
        if not path.exists():
            clear_leftovers(path.parent, path.name)  # a kill may have left it aside, see ddsm_engine.files
        manifest = path / MANIFEST
        if not manifest.is_file():
            raise BundleError(f"{path} is not a bundle: {MANIFEST} is missing; make one with ddsm-export SUPERNET.pt")
        try:
            data = parse_json(read_bytes(manifest, MAX_MANIFEST_BYTES))
        except ValueError as error:
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
        """The variant that costs most: the full width, or the largest of several experts."""
        return max(self.manifest.variants, key=lambda variant: variant.macs)

    def spec(self, variant: Variant) -> UNetSpec:
        """The architecture that a variant is cut from: its own, or the supernet's."""
        return variant.spec or self.manifest.spec

    def label(self, variant: Variant) -> str:
        """A variant as people write it: ``48 (3/8)``, or its id where it is no part of a supernet."""
        return variant.id if variant.width_mult is None else self.manifest.spec.label(variant.width)

    def artefact(self, variant: Variant) -> Path:
        """The verified file of a variant: the one that was exported, and nothing that a backend should not load."""
        file = self._verified(variant.file, variant.sha256, variant.size_bytes)
        check_onnx(file)
        return file

    def verify(self) -> None:
        """Check every file that the manifest vouches for."""
        for variant in self.manifest.variants:
            self.artefact(variant)
        for info in self.manifest.files:
            self._verified(info.path, info.sha256, info.size_bytes)

    def weights(self, variant: Variant) -> Path:
        """The verified file with the weights that a variant is cut from: its own, or the supernet's."""
        relative = variant.weights or WEIGHTS
        file = self._listed(relative)
        if file is None:
            raise BundleError(f"{self.path} holds no {relative}; export it again")
        return file

    def time_table(self, variant: Variant) -> TimeTable:
        """The table of a variant's time features: the supernet's own where its checkpoint carried one."""
        spec = self.spec(variant)
        file = self._listed(TIME_TABLE) if variant.spec is None else None
        if file is None:
            return TimeTable.sinusoidal(spec.timesteps, spec.time_features, spec.time_freq_shift)
        try:
            with open_safetensors(file, "np") as opened:
                fits = shapes_of(opened) == {TIME_TABLE_KEY: (spec.timesteps, spec.time_features)}
                rows: NDArray[np.float32] | None = opened.get_tensor(TIME_TABLE_KEY) if fits else None
        except (SafetensorError, TypeError) as error:  # numpy has no bfloat16
            raise BundleError(f"{file} is not a readable time table: {error}; export the bundle again") from error
        if rows is None or rows.dtype != np.float32 or not np.isfinite(rows).all():
            raise BundleError(f"{file} does not hold the time table of this architecture; export the bundle again")
        return TimeTable(rows, spec.time_freq_shift)

    def time_tables(self) -> dict[str, TimeTable]:
        """Every variant's table, by id."""
        supernet = [variant for variant in self.manifest.variants if variant.spec is None]
        shared = dict.fromkeys((variant.id for variant in supernet), self.time_table(supernet[0])) if supernet else {}
        return {v.id: shared[v.id] if v.id in shared else self.time_table(v) for v in self.manifest.variants}

    def scheduler_config(self) -> dict[str, Any] | None:
        """The scheduler of the diffusers pipeline that the bundle was made from, verified; None where there was none.

        Raises:
            BundleError: a file that is damaged, or not the configuration of a scheduler.
        """
        file = self._listed(SCHEDULER_CONFIG)
        if file is None:
            return None
        try:
            return read_config(file)
        except SamplerError as error:
            raise BundleError(f"{file} is no scheduler's configuration: {error}; export the bundle again") from error

    def strategies(self) -> Mapping[str, Path]:
        """Strategy files by name (the file's name without ``.yaml``).

        Raises:
            BundleError: a name that cannot be printed.
        """
        files = sorted(self.path.glob("strategies/*.yaml"))
        for file in files:
            if not file.name.isprintable():
                raise BundleError(f"{self.path} holds a strategy of the name {brief(file.name)}; do not use it")
        return {file.stem: file for file in files}

    @property
    def exported_strategies(self) -> frozenset[str]:
        """Names of the strategies that it came with, which the manifest vouches for."""
        return frozenset(Path(info.path).stem for info in self.manifest.files if info.path.startswith("strategies/"))

    def strategy_file(self, name: str) -> Path:
        """A strategy of the bundle by name, verified where the manifest vouches for it.

        Raises:
            BundleError: no strategy of this name, or a link out of the bundle.
        """
        found = self.strategies().get(name)
        if found is None:
            known = ", ".join(list(self.strategies())[:20])[:400]
            raise BundleError(f"{self.path} has no strategy {brief(name)}; it has: {known or 'none'}")
        self._check_inside(found)
        return self._listed(f"strategies/{name}.yaml") or found

    def _listed(self, relative: str) -> Path | None:
        """A file that the manifest lists, verified; None if it lists none of this name."""
        for info in self.manifest.files:
            if info.path == relative:
                return self._verified(info.path, info.sha256, info.size_bytes)
        return None

    def _verified(self, relative: str, sha256: str, size_bytes: int) -> Path:
        file = self.path / relative
        if not file.is_file():
            raise BundleError(f"{file} is missing from the bundle; export it again")
        self._check_inside(file)
        if file.stat().st_size != size_bytes or sha256_of(file) != sha256:
            raise BundleError(f"{file} is damaged: its content is not what the manifest vouches for; export it again")
        return file

    def is_inside(self, file: Path) -> bool:
        """Whether a path stays in the bundle when its links are followed."""
        # Not Path.resolve, which fails on links in a circle.
        return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(self.path))

    def refuse_outside(self, output: Path) -> None:
        """Refuse to write what would lie elsewhere.

        Raises:
            OutputError: a link that leaves the bundle.
        """
        if not self.is_inside(output):
            raise OutputError(f"{output} cannot be written: it is a link that leaves the bundle; remove the link")

    def _check_inside(self, file: Path) -> None:
        if not self.is_inside(file):
            raise BundleError(f"{file} is a link that leaves the bundle; do not use it")
