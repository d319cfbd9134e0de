"""The readers of foreign files, each as a function of bytes, with unbroken inputs to mutate."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from ddsm_engine.bundle import MANIFEST, Bundle, Manifest, Parity, Variant, denoiser_inputs, denoiser_outputs
from ddsm_engine.errors import BundleError
from ddsm_engine.inspect import describe_strategy
from ddsm_engine.networks.slicing import empty_unet
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.onnx_file import check_onnx
from ddsm_engine.samplers import make_sampler
from ddsm_engine.samplers.config import CLASSES
from ddsm_engine.strategy import Strategy
from ddsm_export.checkpoints import Facts, facts_from_flagfile, read_checkpoint, read_experts
from ddsm_export.diffusers import diffusers_name, unet_config
from ddsm_export.supernet import Supernet, load_supernet, save_supernet
from tests.hostile.corpus import model, seal
from tests.oracle.dynamic_unet import TABLE, Config, published_state_dict
from tests.oracle.names import product_spec, product_weights

CONFIG = Config(
    ch=4, ch_mult=(1,), attn=(), num_res_blocks=1, groups=2, conv_multiple=2, linear_multiple=2, T=4, in_channels=1
)
SPEC = product_spec(CONFIG, image_size=2)
STATE = published_state_dict(CONFIG, seed=0)
SCHEDULE = NoiseSchedule(1e-4, 0.02, 4)
FACTS = Facts(
    groups=2, image_size=2, beta_start=1e-4, beta_end=0.02, variance_type="fixed_large", conv_multiple=2,
    linear_multiple=2,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reader:
    """How bytes are read as one kind of file: by the function that the commands use."""

    read: Callable[[Path, bytes], object]
    seeds: Callable[[Path], list[bytes]]


def _into(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    def call(folder: Path, data: bytes) -> object:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return call


def _manifest(folder: Path, data: bytes) -> object:
    """As it is; and with the checksum that an author who means harm would give it."""
    (folder / MANIFEST).write_bytes(data)
    try:
        return Bundle.open(folder)
    except BundleError:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            raise BundleError("no JSON at all") from None
        if not isinstance(value, dict):
            raise
        try:
            seal(folder, value)
        except (ValueError, RecursionError):
            raise BundleError("no checksum can be made of it") from None
        return Bundle.open(folder)


def _manifest_seeds(folder: Path) -> list[bytes]:
    variant = Variant(
        id="w004", role="denoiser", precision="fp32", inputs=denoiser_inputs(SPEC), outputs=denoiser_outputs(SPEC),
        file="variants/w004/model.onnx", sha256="0" * 64, size_bytes=10, macs=9, conv_linear_macs=8, params=7, width=4,
        width_mult=1.0, parity=Parity(relative_l2=1e-7, max_abs=1e-6, tolerance=1e-5, backend="onnxruntime"),
    )  # fmt: skip
    manifest = Manifest(
        spec=SPEC,
        noise_schedule=SCHEDULE,
        prediction_type="epsilon",
        variants=(variant,),
        files=(),
        provenance={"a": 1},
    )
    return [json.dumps(manifest.to_json()).encode()]


def _strategy_seeds(folder: Path) -> list[bytes]:
    timesteps = Strategy((Fraction(1, 2), Fraction(1), Fraction(1)), provenance={"kind": "list", "lr": 1e-4}).to_json()
    calls = Strategy(("w004", Fraction(1)), axis="call", sampler="ddim", steps=2).to_json()
    return [
        b"[1, 0.5, 0.25]",
        json.dumps(timesteps).encode(),
        *(yaml.safe_dump(data, sort_keys=False).encode() for data in (timesteps, calls)),
    ]


def _checkpoint_seeds(folder: Path) -> list[bytes]:
    seeds = []
    for content in ({"ema_model": STATE, "step": 3, "x_T": torch.zeros(1, 1, 2, 2)}, STATE):
        for archive in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=archive)
            seeds.append(buffer.getvalue())
    return seeds


def _supernet_seeds(folder: Path) -> list[bytes]:
    file = folder / "seed.safetensors"
    save_supernet(Supernet(SPEC, SCHEDULE, product_weights(STATE), {"a": 1}, STATE[TABLE]), file)
    return [file.read_bytes()]


def _scheduler_seeds(folder: Path) -> list[bytes]:
    training = {"num_train_timesteps": 4, "beta_start": 1e-4, "beta_end": 0.02}
    configs = (
        {"_class_name": kind, **training, **{field: default for field, (default, _) in fields.items()}}
        for kind, fields in CLASSES.items()
    )
    return [json.dumps(config).encode() for config in configs]


MODEL = {"_class_name": "UNet2DModel", **unet_config(SPEC, SPEC.base_channels)}
TRAINING = {"num_train_timesteps": 4, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def _diffusers(name: str) -> Callable[[Path, bytes], object]:
    """A folder that diffusers saved, with one of its two configs replaced."""

    def call(folder: Path, data: bytes) -> object:
        weights = folder / "diffusion_pytorch_model.safetensors"
        if not weights.exists():
            shapes = {n: p.shape for n, p in empty_unet(SPEC, SPEC.base_channels).named_parameters()}
            save_file({diffusers_name(SPEC, name): torch.ones(shape) for name, shape in shapes.items()}, weights)
        for file, content in (("config.json", MODEL), ("scheduler_config.json", TRAINING)):
            (folder / file).write_bytes(data if file == name else json.dumps(content).encode())
        return read_experts([folder], Facts())

    return call


def _describe(path: Path) -> str:
    return describe_strategy(Strategy.load(path), None)


READERS: dict[str, Reader] = {
    "manifest": Reader(_manifest, _manifest_seeds),
    "strategy": Reader(_into("strategy.yaml", _describe), _strategy_seeds),
    "flagfile": Reader(
        _into("flagfile.txt", facts_from_flagfile),
        lambda folder: [
            b"--T=4\n--attn=0\n--beta_1=0.0001\n--ch_mult=1\n--ch_mult=2\n--slimmable_unet\n--noeval\n# a\n"
        ],
    ),
    "checkpoint": Reader(_into("ckpt.pt", lambda path: read_checkpoint(path, FACTS)), _checkpoint_seeds),
    "supernet": Reader(_into("supernet.safetensors", load_supernet), _supernet_seeds),
    "scheduler": Reader(_into("scheduler_config.json", lambda path: make_sampler(path, SCHEDULE, 3)), _scheduler_seeds),
    "diffusers model": Reader(_diffusers("config.json"), lambda folder: [json.dumps(MODEL).encode()]),
    "diffusers training": Reader(_diffusers("scheduler_config.json"), lambda folder: [json.dumps(TRAINING).encode()]),
    "onnx": Reader(_into("model.onnx", check_onnx), lambda folder: [model().SerializeToString()]),
}
