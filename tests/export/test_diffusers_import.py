"""Folders that diffusers saved become bundles; diffusers itself is the oracle of what their networks compute."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddsm_engine import bench, build, inspect, verify
from ddsm_engine.backends import BACKENDS, open_engine
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import MANIFEST, SCHEDULER_CONFIG, Bundle, checksum_of
from ddsm_engine.errors import BundleError, CheckpointError, StrategyError
from ddsm_engine.networks.slicing import subnetwork
from ddsm_engine.pipeline import Pipeline
from ddsm_engine.spec import UNetSpec
from ddsm_engine.time_table import sinusoid
from ddsm_export.checkpoints import Expert, Facts, read_experts
from ddsm_export.cli import main
from tests.conftest import Refusal
from tests.tolerances import DIFFUSERS_ENGINE

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
GOOGLE: dict[str, Any] = SMALL | {
    "act_fn": "silu", "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
    "mid_block_scale_factor": 1, "norm_eps": 1e-6,
}  # fmt: skip
"""As google/ddpm-cifar10-32 and google/ddpm-celebahq-256 have it, in small."""

CONFIGS: Mapping[str, dict[str, Any]] = {
    "google": GOOGLE,
    "training": SMALL,  # diffusers' defaults: heads of 8 channels, 1e-5, padding all around, cosines first
    "narrow": SMALL | {"block_out_channels": (8, 16), "attention_head_dim": 4},  # as those
    "six": SMALL | {
        "sample_size": 32,
        "block_out_channels": (8, 8, 16, 16, 32, 32),
        "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    },
    "grey": SMALL | {
        "sample_size": (8, 8), "in_channels": 1, "out_channels": 1, "block_out_channels": (24, 24, 72),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "DownBlock2D"), "act_fn": "swish",
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D"), "attention_head_dim": 12, "freq_shift": 2,
        "norm_eps": 1e-3, "time_embedding_dim": 40, "dropout": 0.1, "downsample_padding": 0,
    },
}  # fmt: skip
TIMESTEPS = [0, 412, 999]
FP32 = EngineOptions(precision="fp32", threads=1)


def make(folder: Path, scheduler: Any = None, **config: Any) -> UNet2DModel:
    """Save a pipeline folder with a random network; at default initialisation every wrong network passes."""
    network = UNet2DModel(**config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    network.eval().save_pretrained(folder / "unet")
    (scheduler or DDPMScheduler()).save_pretrained(folder / "scheduler")
    return network


def sample_of(network: UNet2DModel, batch: int = 3) -> Tensor:
    size = network.config["sample_size"]
    shape = (batch, network.config["in_channels"], *([size, size] if isinstance(size, int) else size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def answer(network: UNet2DModel, x: Tensor, timesteps: list[float]) -> NDArray[np.float32]:
    with torch.no_grad():
        out: Tensor = network(x, torch.tensor(timesteps)).sample
    assert out.std() > 0.1, "outputs must be of order one for the comparison to mean anything"
    return out.numpy()


def ours(expert: Expert, x: Tensor, timesteps: list[float], spec: UNetSpec | None = None) -> NDArray[np.float32]:
    """The torch network of an expert, or of another spec with the same weights."""
    spec = spec or expert.network.spec
    network = subnetwork(spec, expert.network.weights, spec.base_channels)
    features = sinusoid(timesteps, spec.time_features, spec.time_freq_shift)
    with torch.no_grad():
        out: Tensor = network(x, torch.from_numpy(features))
    return out.numpy()


def relative_l2(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def edit_json(file: Path, **changes: Any) -> None:
    """Change fields; ``...`` removes one."""
    data = json.loads(file.read_bytes()) | changes
    file.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}), encoding="utf-8")


def read(folder: Path, facts: Facts | None = None) -> Expert:
    (expert,) = read_experts([folder], facts or Facts())
    return expert


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folders")


@pytest.fixture(scope="module")
def networks(folders: Path) -> dict[str, UNet2DModel]:
    large = DDPMScheduler(variance_type="fixed_large")
    schedulers = {"google": large, "narrow": large, "grey": DDIMScheduler()}
    return {name: make(folders / name, schedulers.get(name), **config) for name, config in CONFIGS.items()}


@pytest.fixture
def folder(folders: Path, networks: dict[str, UNet2DModel], tmp_path: Path) -> Path:
    """A copy of the google-like folder, to be broken."""
    assert networks
    return Path(shutil.copytree(folders / "google", tmp_path / "copy"))


# --- one network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_network_is_diffusers_network_at_whole_and_fractional_timesteps(
    name: str, folders: Path, networks: dict[str, UNet2DModel]
) -> None:
    x, expert = sample_of(networks[name]), read(folders / name)
    for timesteps in ([float(t) for t in TIMESTEPS], [0.5, 412.25, 998.75]):
        expected = answer(networks[name], x, timesteps)
        assert relative_l2(ours(expert, x, timesteps), expected) <= DIFFUSERS_ENGINE


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("google", {"head_channels": 8}),
        ("training", {"head_channels": None}),
        ("training", {"head_channels": 16}),
        ("google", {"norm_eps": 1e-3}),
        ("google", {"asymmetric_downsample": False}),
        ("training", {"asymmetric_downsample": True}),
        ("google", {"time_freq_shift": 0}),
        ("training", {"time_freq_shift": 1}),
        ("training", {"groups": 8}),
    ],
    ids=str,
)
def test_every_field_that_the_spec_got_for_these_networks_is_needed(
    name: str, change: dict[str, Any], folders: Path, networks: dict[str, UNet2DModel]
) -> None:
    x, expert = sample_of(networks[name]), read(folders / name)
    expected = answer(networks[name], x, [float(t) for t in TIMESTEPS])
    other = replace(expert.network.spec, **change)
    assert relative_l2(ours(expert, x, [float(t) for t in TIMESTEPS], other), expected) > 1e-3


@pytest.mark.parametrize("name", ["google", "training"])
def test_sines_and_cosines_in_the_other_order_are_another_function(
    name: str, folders: Path, networks: dict[str, UNet2DModel], tmp_path: Path
) -> None:
    flipped = Path(shutil.copytree(folders / name, tmp_path / "flipped"))
    edit_json(flipped / "unet/config.json", flip_sin_to_cos=not networks[name].config["flip_sin_to_cos"])
    x, timesteps = sample_of(networks[name]), [float(t) for t in TIMESTEPS]
    assert relative_l2(ours(read(flipped), x, timesteps), answer(networks[name], x, timesteps)) > 1e-3


def test_fields_that_a_config_leaves_out_are_those_that_diffusers_assumes(
    folders: Path, networks: dict[str, UNet2DModel], tmp_path: Path
) -> None:
    short = Path(shutil.copytree(folders / "training", tmp_path / "short"))
    given = {"_class_name": "UNet2DModel", **SMALL}
    (short / "unet/config.json").write_text(json.dumps(given), encoding="utf-8")
    assert read(short).network.spec == read(folders / "training").network.spec


# --- where the parts of a folder lie ----------------------------------------------------------------------------------


def same(expert: Expert, other: Expert) -> bool:
    weights, others = expert.network.weights, other.network.weights
    return (
        expert.network.spec == other.network.spec
        and expert.network.noise_schedule == other.network.noise_schedule
        and weights.keys() == others.keys()
        and all(torch.equal(weights[name], others[name]) for name in weights)
    )


def test_a_model_folder_finds_its_scheduler_beside_it_or_in_it(folder: Path, tmp_path: Path) -> None:
    whole = read(folder)
    assert same(read(folder / "unet"), whole)
    flat = Path(shutil.copytree(folder / "unet", tmp_path / "flat"))
    shutil.copy(folder / "scheduler/scheduler_config.json", flat)
    assert same(read(flat), whole)


def test_weights_of_torch_save_under_the_names_of_the_first_checkpoints_are_the_same(folder: Path) -> None:
    whole = read(folder)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in state.items()}
    assert sum(".proj_attn." in key for key in state) == 8
    torch.save(state, file.with_suffix(".bin"))
    file.unlink()
    assert same(read(folder), whole)


def test_weights_in_half_precision_are_widened(folder: Path) -> None:
    whole, file = read(folder), folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({key: tensor.half() for key, tensor in load_file(file).items()}, file)
    weights = read(folder).network.weights
    for name, tensor in whole.network.weights.items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], tensor.half().float())


def test_the_state_of_diffusers_average_in_a_config_is_ignored(folder: Path) -> None:
    whole = read(folder)
    edit_json(folder / "unet/config.json", decay=0.9999, optimization_step=7, use_ema_warmup=True, power=0.75)
    assert same(read(folder), whole)


def test_a_model_of_any_size_gets_its_size_from_the_caller(folder: Path) -> None:
    edit_json(folder / "unet/config.json", sample_size=None)
    with pytest.raises(CheckpointError, match="sample_size is null; give --image-size"):
        read(folder)
    assert read(folder, Facts(image_size=16)).network.spec.sample_shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, "scaled_linear"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ({"num_train_timesteps": 50}, "linear"),
    ],
)
def test_the_noise_schedule_is_the_scheduler_s(config: dict[str, Any], expected: str, folder: Path) -> None:
    scheduler = DDPMScheduler(**config)
    scheduler.save_pretrained(folder / "scheduler")
    schedule = read(folder).network.noise_schedule
    assert (schedule.type, schedule.variance_type) == (expected, "fixed_small")
    np.testing.assert_array_equal(schedule.betas, scheduler.betas.double().numpy())


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_what_the_network_predicts_is_the_scheduler_s(prediction: str, folder: Path) -> None:
    edit_json(folder / "scheduler/scheduler_config.json", prediction_type=prediction)
    assert read(folder).prediction_type == prediction


def test_a_scheduler_without_a_variance_has_diffusers_default(folder: Path) -> None:
    edit_json(folder / "scheduler/scheduler_config.json", variance_type=..., prediction_type=...)
    expert = read(folder)
    assert (expert.network.noise_schedule.variance_type, expert.prediction_type) == ("fixed_small", "epsilon")


# --- refusals ---------------------------------------------------------------------------------------------------------

UNET_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"_class_name": "UNet2DConditionModel"}, "_class_name is 'UNet2DConditionModel'; supported: 'UNet2DModel' or"),
    ({"time_features": 64}, "time_features is 64; supported: null or 16"),
    ({"_class_name": ...}, "lacks _class_name"),
    ({"act_fn": "gelu"}, "act_fn is 'gelu'; supported: 'silu' or 'swish'"),
    ({"add_attention": False}, "add_attention is False; supported: True"),
    ({"attention_head_dim": 12}, r"attention_head_dim is 12; supported: null or a divisor of \[32\]"),
    ({"attention_head_dim": 64}, r"attention_head_dim is 64; supported: null or a divisor of \[32\]"),
    ({"attention_head_dim": "8"}, "attention_head_dim is '8'; supported: a whole number"),
    ({"attn_norm_num_groups": 8}, "attn_norm_num_groups is 8; supported: null or norm_num_groups, which is 4"),
    ({"block_out_channels": [16, 24]}, r"block_out_channels is \[16, 24\]; supported: whole multiples of the first"),
    ({"block_out_channels": [0, 0]}, "block_out_channels is .* supported: whole multiples"),
    ({"block_out_channels": None}, "block_out_channels is None; supported: a list"),
    ({"block_out_channels": [16, 32, 32]}, "down_block_types is .* 3 of them"),
    ({"center_input_sample": True}, "center_input_sample is True; supported: False"),
    ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'; supported: null"),
    ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "down_block_types is .*; supported: DownBlock2D and"),
    ({"downsample_padding": 2}, "downsample_padding is 2; supported: 1 or 0"),
    ({"downsample_padding": True}, "downsample_padding is True; supported: 1 or 0"),
    ({"downsample_type": "resnet"}, "downsample_type is 'resnet'; supported: 'conv'"),
    ({"dropout": "much"}, "dropout is 'much'; supported: a number"),
    ({"flip_sin_to_cos": None}, "flip_sin_to_cos is None; supported: True or False"),
    ({"freq_shift": 8}, "freq_shift is 8; supported: less than 8"),
    ({"freq_shift": 0.5}, "freq_shift is 0.5; supported: a whole number"),
    ({"layers_per_block": [1, 2]}, r"layers_per_block is \[1, 2\]; supported: a whole number"),
    ({"mid_block_scale_factor": 2}, "mid_block_scale_factor is 2; supported: 1"),
    ({"mid_block_type": None}, "mid_block_type is None; supported: 'UNetMidBlock2D'"),
    ({"norm_eps": 0}, r"norm_eps must lie in \(0, 1\), found 0.0"),
    ({"norm_num_groups": None}, "norm_num_groups is None; supported: a whole number"),
    ({"norm_num_groups": 5}, "16 channels cannot be normalised in 5 groups"),
    ({"num_class_embeds": 10}, "num_class_embeds is 10; supported: null"),
    ({"out_channels": 6}, "out_channels is 6; supported: in_channels, which is 3: a learned variance is not modelled"),
    ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift is 'scale_shift'; supported: 'default'"),
    ({"sample_size": [8, 16]}, r"sample_size is \[8, 16\]; supported: .*images are square"),
    ({"sample_size": 9}, "image_size 9 cannot be halved 1 times"),
    ({"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'; supported: 'positional'"),
    ({"time_embedding_type": "learned"}, "time_embedding_type is 'learned'; supported: 'positional'"),
    ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "up_block_types is .*; supported: .*mirroring"),
    ({"upsample_type": "resnet"}, "upsample_type is 'resnet'; supported: 'conv'"),
    ({"encoder_hid_dim": 7}, "'encoder_hid_dim' is 7, a field that is not known here"),
]
SCHEDULER_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'; supported: 'linear' or 'scaled_linear' or"),
    ({"beta_end": ...}, "lacks beta_end: expected a scheduler of a discrete noise schedule"),
    ({"beta_start": "low"}, "betas must be numbers"),
    ({"beta_start": -(10**400)}, "betas must satisfy 0 < start ≤ end < 1"),
    ({"beta_end": 0.99, "num_train_timesteps": 60000}, "cannot be computed with"),
    ({"num_train_timesteps": 0}, "timesteps must be from 2"),
    ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'; supported: 'epsilon' or"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True; supported: False"),
    ({"trained_betas": [0.1, 0.2]}, r"trained_betas is \[0.1, 0.2\]; supported: null"),
    (
        {"variance_type": "learned_range"},
        "variance_type is 'learned_range'; supported: 'fixed_small' or 'fixed_small_log'",
    ),
]


@pytest.mark.parametrize(("change", "words"), UNET_REFUSALS, ids=lambda value: str(value)[:40])
def test_a_network_that_is_not_modelled_is_refused_by_its_field(
    change: dict[str, Any], words: str, folder: Path
) -> None:
    edit_json(folder / "unet/config.json", **change)
    with pytest.raises(CheckpointError, match=words) as refused:
        read(folder)
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize(("change", "words"), SCHEDULER_REFUSALS, ids=lambda value: str(value)[:40])
def test_a_noise_schedule_that_is_not_modelled_is_refused_by_its_field(
    change: dict[str, Any], words: str, folder: Path
) -> None:
    edit_json(folder / "scheduler/scheduler_config.json", **change)
    with pytest.raises(CheckpointError, match=words):
        read(folder)


def _no_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")


def _no_weights(folder: Path) -> None:
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()


def _truncated(folder: Path) -> None:
    os.truncate(folder / "unet/diffusion_pytorch_model.safetensors", 1000)


def _rename(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({key.replace("conv_in", "conv_first"): tensor for key, tensor in state.items()}, file)


def _twice(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    key = next(key for key in state if ".to_q.weight" in key)
    save_file(state | {key.replace("to_q", "query"): state[key].clone()}, file)


def _reshape(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"conv_in.bias": torch.zeros(17)}, file)


def _nan(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"conv_in.bias": torch.full((16,), torch.nan)}, file)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: shutil.rmtree(folder / "unet"), "expected a folder that diffusers saved"),
        (_no_scheduler, "the noise schedule is not in the model, and is never guessed"),
        (_no_weights, "expected diffusion_pytorch_model.safetensors or diffusion_pytorch_model.bin"),
        (_truncated, "cannot be read as safetensors"),
        (_rename, "missing conv_in.bias, conv_in.weight, unexpected conv_first.bias, conv_first.weight"),
        (_twice, "missing none, unexpected down_blocks.1.attentions.0."),
        (_reshape, "'conv_in.bias' must have the shape (16,), found (17,)"),
        (_nan, "head.bias holds a value that is not finite"),
        (lambda folder: (folder / "unet/config.json").write_text("{"), "config.json is not readable as JSON"),
        (lambda folder: (folder / "unet/config.json").write_text("[]"), "expected an object in"),
        (lambda folder: (folder / "scheduler/scheduler_config.json").write_text("1"), "expected an object in"),
        (lambda folder: (folder / "unet/config.json").write_bytes(b" " * (2 << 20)), "expected at most"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_with_one_line(
    spoil: Any, words: str, folder: Path, refusal: Refusal
) -> None:
    spoil(folder)
    assert words in refusal(main, folder)
    assert sorted(file.name for file in folder.parent.iterdir()) == ["copy"]


def test_a_pickle_with_code_among_the_weights_is_refused(folder: Path, refusal: Refusal) -> None:
    _no_weights(folder)
    torch.save({"conv_in.weight": torch.zeros(1), "code": os.system}, folder / "unet/diffusion_pytorch_model.bin")
    assert "holds code or objects other than tensors" in refusal(main, folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--groups", 8), "contradicted by --groups 8 (the file says 4): leave these out"),
        (("--image-size", 32), "contradicted by --image-size 32 (the file says 8)"),
        (("--beta-1", 0.001), "contradicted by --beta-1 0.001 (the file says 0.0001)"),
        (("--beta-T", 0.01), "contradicted by --beta-T 0.01 (the file says 0.02)"),
        (("--var-type", "fixedsmall"), "contradicted by --var-type 'fixed_small' (the file says 'fixed_large')"),
        (("--conv-multiple", 8), "contradicted by --conv-multiple 8 (the file says 1)"),
        (("--widths", "2/8"), "--widths is for supernets"),
        (("--weights", "net"), "--weights is for supernets"),
        (("--flagfile", "flagfile.txt"), "--flagfile is for supernets"),
    ],
)
def test_options_that_contradict_a_folder_or_mean_nothing_are_refused(
    options: tuple[object, ...], words: str, folder: Path, refusal: Refusal
) -> None:
    assert words in refusal(main, folder, *options)


def test_a_flagfile_beside_a_folder_is_another_training_s(folder: Path, refusal: Refusal) -> None:
    (folder.parent / "flagfile.txt").write_text("nonsense", encoding="utf-8")
    edit_json(folder / "unet/config.json", act_fn="relu")
    assert "act_fn is 'relu'" in refusal(main, folder)


# --- several folders --------------------------------------------------------------------------------------------------


def test_the_variants_are_called_as_their_folders(folder: Path, tmp_path: Path) -> None:
    names = ["big", "a/big", "0.5", "sp ace&é", "big-2", "b/big"]
    places = [Path(shutil.copytree(folder, tmp_path / name)) for name in names]
    found = [expert.id for expert in read_experts(places, Facts())]
    assert found == ["big", "big-2", "expert-0.5", "sp-ace", "big-2-2", "big-3"]


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("unet/config.json", {"sample_size": 16}, r"the sample's shape is \[3, 8, 8\] in the one and \[3, 16, 16\] in"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.03}, "beta_end of the noise schedule is 0.02 in the one"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10}, "timesteps of the noise schedule is 1000"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "scaled_linear"}, "type of the noise schedule is linear"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type is epsilon in the one"),
    ],
    ids=str,
)
def test_networks_that_cannot_meet_in_one_run_are_refused(
    file: str, change: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    edit_json(other / file, **change)
    with pytest.raises(CheckpointError, match=words) as refused:
        read_experts([folder, other], Facts())
    assert str(refused.value).startswith(f"{folder} and {other} cannot take turns")


def test_sources_that_do_not_go_into_one_bundle_are_refused(folder: Path, refusal: Refusal) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save({}, folder.parent / name)
    assert "is named twice" in refusal(main, folder, folder / "../copy", "-o", folder.parent / "x.bundle")
    assert "make one bundle, which needs a name: give -o" in refusal(main, folder, folder / "unet")
    for sources in (("a.pt", "b.pt"), ("a.pt", "copy"), ("copy", "a.pt")):
        message = refusal(main, *(folder.parent / name for name in sources), "-o", folder.parent / "x.bundle")
        assert "only folders of diffusers go together into one bundle, found 2 sources" in message
        assert "export each supernet by itself" in message
    assert not (folder.parent / "x.bundle").exists()


# --- bundles ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(folders: Path, networks: dict[str, UNet2DModel]) -> Bundle:
    """The largest first, as people name them; the narrower one is as diffusers' training example makes them."""
    assert networks
    output = folders / "pair.bundle"
    assert main([str(folders / "google"), str(folders / "narrow"), "-o", str(output)]) == 0
    return Bundle.open(output)


@pytest.fixture
def copy(pair: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair.path, tmp_path / "copy.bundle"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["google", "narrow"])
def test_every_backend_computes_diffusers_network(
    name: str, backend: str, pair: Bundle, networks: dict[str, UNet2DModel]
) -> None:
    variant, x = pair.variants[name], sample_of(networks[name])
    out = np.full_like(x.numpy(), np.nan)
    engine = open_engine(backend, pair, variant, len(x), FP32)
    engine.bind({"sample": x.numpy(), "time_features": pair.time_table(variant)[TIMESTEPS]}, {"out_sample": out})
    engine.run()
    engine.close()
    assert relative_l2(out, answer(networks[name], x, [float(t) for t in TIMESTEPS])) <= DIFFUSERS_ENGINE


def test_a_bundle_says_what_its_folders_said(pair: Bundle, folders: Path) -> None:
    manifest, variant = pair.manifest, pair.full
    assert (variant.id, variant.width, variant.width_mult) == ("google", 16, None)
    assert pair.spec(variant) == manifest.spec
    assert (manifest.spec.norm_eps, manifest.spec.head_channels, manifest.spec.time_freq_shift) == (1e-6, None, 1)
    assert manifest.spec.asymmetric_downsample
    assert pair.weights(variant) == pair.path / "variants/google/weights.safetensors"
    saved = json.loads((folders / "google/scheduler/scheduler_config.json").read_bytes())
    assert pair.scheduler_config() == saved
    assert saved["clip_sample"] is True
    assert saved["variance_type"] == manifest.noise_schedule.variance_type == "fixed_large"


def test_costs_of_multi_head_attention_are_those_of_its_tensors(pair: Bundle) -> None:
    narrow = pair.variants["narrow"]
    # Four attentions (one down, one in the middle, two up) over 4 x 4 pixels and 16 channels, two products each.
    assert narrow.macs - narrow.conv_linear_macs == 4 * 2 * 16 * 16 * 16


def test_experts_stand_beside_each_other_in_a_bundle(pair: Bundle, folders: Path) -> None:
    assert list(pair.variants) == ["narrow", "google"], "the cheapest first"
    assert pair.full.id == "google"
    assert pair.manifest.spec == read(folders / "google").network.spec
    for name, variant in pair.variants.items():
        spec = read(folders / name).network.spec
        assert pair.spec(variant) == spec
        assert pair.label(variant) == name
        assert variant.width == spec.base_channels
        assert variant.inputs[1].shape == ("batch", spec.time_features)
        assert pair.time_table(variant).features == spec.time_features
        assert pair.weights(variant).parent.name == name
    listed = {info.path for info in pair.manifest.files}
    assert listed == {"README.md", SCHEDULER_CONFIG, *(f"variants/{n}/weights.safetensors" for n in pair.variants)}
    data = json.loads((pair.path / MANIFEST).read_bytes())
    assert all("width_mult" not in variant for variant in data["variants"])


def test_experts_take_turns_in_a_run(pair: Bundle, tmp_path: Path) -> None:
    strategy = tmp_path / "turns.yaml"
    strategy.write_text(
        "format: ddsm-strategy\nformat_version: 1\nlength: 1000\nsegments:\n"
        "- {first: 0, last: 499, variant: google}\n- {first: 500, last: 999, variant: narrow}\n",
        encoding="utf-8",
    )
    images = {}
    for backend in BACKENDS:
        with Pipeline(pair, backend, FP32) as pipe:
            plan = pipe.plan(strategy, "ddim", 4, clip_sample=1.0)
            assert plan.variants == ("narrow", "narrow", "google", "google")
            images[backend] = pipe(strategy, "ddim", 4, num_images=2, clip_sample=1.0).images
    for backend in BACKENDS:
        assert relative_l2(images[backend], images["torch"]) < 1e-4, "rounding adds up over the calls"


def test_one_expert_serves_every_timestep_when_it_is_named(pair: Bundle) -> None:
    with Pipeline(pair, "torch", FP32) as pipe:
        assert set(pipe.plan("uniform:narrow", "ddim", 3).variants) == {"narrow"}
        with pytest.raises(StrategyError, match="asks for 8/8; the bundle offers narrow, google"):
            pipe.plan("uniform:8/8", "ddim", 3)
        with pytest.raises(StrategyError, match="asks for wide; the bundle offers narrow, google"):
            pipe.plan("uniform:wide", "ddim", 3)


def test_the_commands_take_a_bundle_of_experts(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(copy)]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert (rows["narrow"][0], rows["google"][0]) == ("8", "16")
    assert build.main([str(copy), "--batch-size", "2", "--threads", "1"]) == 0
    trajectory = ("--trajectory", "--strategy", "uniform:narrow", "--steps", "2", "--num-images", "1", "--clip-sample")
    assert verify.main([str(copy), "--threads", "1", *trajectory]) == 0
    assert "engines: 2 whole" in capsys.readouterr().out
    assert bench.main([str(copy), "--batch-size", "1", "--repeats", "1", "--backend", "onnxruntime", "--json"]) == 0
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    assert [row["variant"] for row in table["rows"]] == ["narrow", "google"]


def test_the_weights_of_an_expert_are_no_supernet(pair: Bundle, refusal: Refusal) -> None:
    weights = pair.weights(pair.full)
    assert "without a supernet's spec in its header" in refusal(main, weights)


def test_one_folder_becomes_a_bundle_beside_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported: list[tuple[list[str], Path]] = []
    monkeypatch.setattr(
        "ddsm_export.bundling.export_experts",
        lambda experts, output, *_, **__: exported.append(([expert.id for expert in experts], output)),
    )
    monkeypatch.chdir(folder)
    assert main(["."]) == main([str(folder)]) == main(["--groups", "4", f"{folder}/"]) == 0
    assert exported == [(["copy"], folder.parent / "copy.bundle")] * 3
    assert "copy.bundle: 1 variants; look inside with: ddsm inspect" in capsys.readouterr().out


def test_schedulers_that_differ_elsewhere_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(folder, folder.parent / "other"))
    edit_json(other / "scheduler/scheduler_config.json", clip_sample=False)
    monkeypatch.setattr("ddsm_export.bundling.export_experts", lambda *arguments, **options: None)
    assert main([str(folder), str(other), "-o", str(folder.parent / "two.bundle")]) == 0
    assert "the scheduler is that of copy; other differs in clip_sample" in capsys.readouterr().err


def test_an_end_in_the_middle_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ddsm_export.bundling.onnx_from_subnetwork", stop)
    assert main([str(folder)]) == 1
    assert [file.name for file in folder.parent.iterdir()] == ["copy"]


def reseal(folder: Path, change: Any) -> None:
    data = json.loads((folder / MANIFEST).read_bytes())
    change(data)
    del data["checksum"]
    data["checksum"] = checksum_of(data)
    (folder / MANIFEST).write_text(json.dumps(data), encoding="utf-8")


def _expert(data: dict[str, Any], **changes: Any) -> None:
    entry = data["variants"][0]
    data["variants"][0] = {k: v for k, v in {**entry, **changes}.items() if v is not ...}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (partial(_expert, weights=...), "lacks a field .*weights"),
        (partial(_expert, spec=...), "weights meets width_mult"),
        (partial(_expert, width_mult=1.0), "width_mult meets spec"),
        (partial(_expert, weights=None), "weights must be str"),
        (partial(_expert, spec=None), "an architecture spec must be an object"),
        (partial(_expert, weights="../secret.safetensors"), "leaves the bundle"),
        (partial(_expert, weights="variants/else.safetensors"), "are not among the files"),
        (partial(_expert, width=16), "expected its spec's width 8, found 16"),
        (lambda data: data["variants"][0]["spec"].update(timesteps=10), r"narrow: expected samples of the bundle's"),
        (lambda data: data["variants"][0]["spec"].update(image_size=16), r"expected samples .*found \[3, 16, 16\]"),
        (lambda data: data["variants"][0]["spec"].update(groups=3), "cannot be normalised in 3 groups"),
        (lambda data: data["variants"][0]["spec"].update(time_features=16), "expected the inputs and outputs"),
        (lambda data: data.update(prediction_type="score"), "predicting epsilon, sample, v_prediction"),
    ],
)
def test_a_manifest_whose_experts_do_not_fit_is_refused(change: Any, words: str, copy: Path) -> None:
    reseal(copy, change)
    with pytest.raises(BundleError, match=words):
        Bundle.open(copy)


@pytest.mark.parametrize("relative", [SCHEDULER_CONFIG, "variants/narrow/weights.safetensors"])
def test_a_changed_file_of_an_expert_is_refused_when_it_is_used(relative: str, copy: Path) -> None:
    bundle = Bundle.open(copy)
    data = bytearray((copy / relative).read_bytes())
    data[-3] ^= 1
    (copy / relative).write_bytes(data)
    with pytest.raises(BundleError, match="is damaged"):
        bundle.scheduler_config() if relative == SCHEDULER_CONFIG else bundle.weights(bundle.variants["narrow"])
    with pytest.raises(BundleError, match="is damaged"):
        bundle.verify()


def test_a_supernet_s_bundle_has_no_scheduler(bundle: Bundle) -> None:
    assert bundle.scheduler_config() is None
