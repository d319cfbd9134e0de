"""``--to diffusers``: what diffusers loads from the folder computes what the sub-network computes."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddsm_engine.diffusers import DDSMPipeline, SubNetworkUNet2DModel
from ddsm_engine.errors import BackendError, CheckpointError
from ddsm_engine.networks.slicing import subnetwork
from ddsm_export.checkpoints.diffusers import read_experts
from ddsm_export.checkpoints.flagfile import Facts
from ddsm_export.cli import main
from ddsm_export.diffusers import INDEX, diffusers_from_supernet, diffusers_unet
from ddsm_export.supernet import Supernet, save_supernet
from tests.conftest import TINY, Refusal
from tests.tolerances import DIFFUSERS_FORWARD

WIDTHS = TINY.widths()
TIMESTEPS = [0, 1, 500, 999]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, supernet: Supernet) -> Path:
    path = tmp_path_factory.mktemp("source") / "tiny.safetensors"
    save_supernet(supernet, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """All widths, as the command writes them."""
    output = tmp_path_factory.mktemp("export") / "pipelines"
    assert main([str(source), "--to", "diffusers", str(output)]) == 0
    return output


def sample(seed: int = 0) -> Tensor:
    return torch.randn(len(TIMESTEPS), *TINY.sample_shape, generator=torch.Generator().manual_seed(seed))


def expected(supernet: Supernet, width: int) -> Tensor:
    rows = torch.from_numpy(supernet.time_features[TIMESTEPS])
    answer: Tensor = subnetwork(supernet.spec, supernet.weights, width)(sample(), rows)
    return answer


def found(unet: Any) -> Tensor:
    with torch.inference_mode():
        answer: Tensor = unet(sample(), torch.tensor(TIMESTEPS)).sample
    return answer


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def fields(thing: Any) -> dict[str, Any]:
    """The config of a model or a scheduler, without what diffusers notes of its origin."""
    config = {name: value for name, value in thing.config.items() if not name.startswith("_")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}


def listing(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


# --- the function -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_computes_in_diffusers_what_the_sub_network_computes(
    folder: Path, supernet: Supernet, width: int
) -> None:
    kind = UNet2DModel if width == TINY.base_channels else SubNetworkUNet2DModel
    unet, loaded = kind.from_pretrained(folder / f"w{width:03d}" / "unet", output_loading_info=True)
    assert not any(loaded.values()), loaded
    assert type(unet) is kind
    assert distance(found(unet), expected(supernet, width)) < DIFFUSERS_FORWARD


def interleave(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "time_embedding.linear_1.weight"
    return weights | {name: torch.stack(weights[name].chunk(2, dim=1), dim=2).flatten(1)}


MISTAKES: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "heads of 8 channels": ({"attention_head_dim": 8}, dict),
    "cosines first": ({"flip_sin_to_cos": True}, dict),
    "shifted frequencies": ({"freq_shift": 1}, dict),
    "padding on the right and below only": ({"downsample_padding": 0}, dict),
    "a coarser eps": ({"norm_eps": 1e-2}, dict),
    "columns left interleaved": ({}, interleave),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("width", [8, 32])
def test_the_comparison_would_notice(folder: Path, supernet: Supernet, width: int, mistake: str) -> None:
    fields, change = MISTAKES[mistake]
    unet = folder / f"w{width:03d}" / "unet"
    config = json.loads((unet / "config.json").read_text(encoding="utf-8"))
    wrong = getattr(diffusers, config["_class_name"], SubNetworkUNet2DModel).from_config(config | fields).eval()
    wrong.load_state_dict(change(load_file(folder / f"w{width:03d}" / WEIGHTS)), strict=True)
    assert distance(found(wrong), expected(supernet, width)) > 1e-3


# --- the folder -------------------------------------------------------------------------------------------------------


def test_every_width_is_a_pipeline_of_its_own(folder: Path) -> None:
    files = {"model_index.json", "scheduler", "scheduler/scheduler_config.json", "unet", "unet/config.json", WEIGHTS}
    assert {path.name for path in folder.iterdir()} == {INDEX, *(f"w{width:03d}" for width in WIDTHS)}
    for width in WIDTHS:
        assert set(listing(folder / f"w{width:03d}")) == files
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    assert index["networks"]["w032"] == "UNet2DModel"
    assert {index["networks"][f"w{width:03d}"] for width in WIDTHS[:-1]} == {"SubNetworkUNet2DModel"}
    assert index["provenance"] == {"source": "random"}


@pytest.mark.parametrize("width", [8, 32])
def test_a_pipeline_of_diffusers_loads_the_folder_and_draws(folder: Path, width: int) -> None:
    pipe = DDPMPipeline.from_pretrained(folder / f"w{width:03d}")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    assert np.isfinite(images).all()
    assert images[0].std() > 0


def test_a_sub_network_serves_a_pipeline_that_is_put_together_by_hand(folder: Path) -> None:
    unet = SubNetworkUNet2DModel.from_pretrained(folder / "w012" / "unet")
    scheduler = DDPMScheduler.from_pretrained(folder / "w012" / "scheduler")
    pipe = DDPMPipeline(unet=unet, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=2, output_type="pt").images.shape == (1, 3, 8, 8)


def test_the_full_width_needs_nothing_of_ours(folder: Path) -> None:
    script = (
        "import sys; from diffusers import DDPMPipeline; p = DDPMPipeline.from_pretrained(sys.argv[1]); "
        "assert type(p.unet).__name__ == 'UNet2DModel'; assert not any(m.startswith('ddsm') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, folder / "w032"], check=True, capture_output=True)


def test_the_scheduler_has_the_betas_of_the_training_and_clips_nothing(folder: Path, supernet: Supernet) -> None:
    scheduler = DDPMScheduler.from_pretrained(folder / "w008" / "scheduler")
    assert (scheduler.betas.numpy() == supernet.noise_schedule.betas.astype(np.float32)).all()
    config = scheduler.config
    assert (config.variance_type, config.prediction_type, config.clip_sample) == ("fixed_large", "epsilon", False)


def test_the_variance_and_the_shape_of_the_schedule_are_handed_on(supernet: Supernet, tmp_path: Path) -> None:
    other = replace(supernet.noise_schedule, variance_type="fixed_small", type="scaled_linear")
    diffusers_from_supernet(replace(supernet, noise_schedule=other), tmp_path / "out", [8])
    config = DDPMScheduler.from_pretrained(tmp_path / "out" / "w008" / "scheduler").config
    assert (config.variance_type, config.beta_schedule) == ("fixed_small", "scaled_linear")


def test_a_sub_network_that_diffusers_saves_is_read_again(folder: Path, tmp_path: Path) -> None:
    unet = SubNetworkUNet2DModel.from_pretrained(folder / "w020" / "unet")
    unet.save_pretrained(tmp_path)
    again = SubNetworkUNet2DModel.from_pretrained(tmp_path)
    assert fields(again) == fields(unet)
    assert again.config.time_features == 32
    assert torch.equal(found(again), found(unet))


@pytest.mark.parametrize("what", ["missing", "unexpected"])
def test_weights_that_are_not_the_networks_are_refused(folder: Path, tmp_path: Path, what: str) -> None:
    unet = SubNetworkUNet2DModel.from_pretrained(folder / "w008" / "unet")
    unet.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.weights"] = weights.pop("conv_in.weight") if what == "missing" else weights["conv_in.weight"] + 1
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"does not hold this network's weights: {what} \['conv_in.weight"):
        SubNetworkUNet2DModel.from_pretrained(tmp_path)


# --- from a bundle ----------------------------------------------------------------------------------------------------


def test_a_bundle_gives_the_same_weights(bundle_path: Path, folder: Path, tmp_path: Path) -> None:
    assert main([str(bundle_path), "--to", "diffusers", str(tmp_path / "out"), "--widths", "2/8,32"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {INDEX, "w008", "w032"}
    for name in ("w008", "w032"):
        ours, theirs = load_file(tmp_path / "out" / name / WEIGHTS), load_file(folder / name / WEIGHTS)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# --- from diffusers and back ------------------------------------------------------------------------------------------


def foreign_unet(seed: int, **fields: Any) -> Any:
    """A network of diffusers' own with parameters at random, norms and biases among them."""
    generator = torch.Generator().manual_seed(seed)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), **fields,
    )  # fmt: skip
    for name, parameter in unet.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            parameter.data = 0.2 * noise
        else:
            parameter.data = 1 + 0.3 * noise if noise.ndim == 1 else noise / noise[0].numel() ** 0.5
    return unet.eval()


FOREIGN: dict[str, dict[str, Any]] = {
    "as Ho et al. published": {
        "attention_head_dim": None, "norm_eps": 1e-6, "downsample_padding": 0, "freq_shift": 1,
        "flip_sin_to_cos": False,
    },
    "as the training example makes them": {},
}  # fmt: skip


@pytest.mark.parametrize("style", FOREIGN)
def test_a_network_of_diffusers_own_comes_out_as_it_went_in(tmp_path: Path, style: str) -> None:
    unet = foreign_unet(1, **FOREIGN[style])
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    (expert,) = read_experts([tmp_path], Facts())
    network = expert.network
    again: Any = diffusers_unet(subnetwork(network.spec, network.weights, network.spec.base_channels))
    assert type(again) is UNet2DModel
    ours, theirs = again.state_dict(), unet.state_dict()
    if unet.config.flip_sin_to_cos:
        columns = "time_embedding.linear_1.weight"
        ours[columns] = torch.cat(ours[columns].chunk(2, dim=1)[::-1], dim=1)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    same = {"flip_sin_to_cos": False, "time_embedding_dim": 64}
    assert fields(again) | same == fields(unet) | same
    assert distance(found(again), found(unet)) < DIFFUSERS_FORWARD


def test_an_expert_draws_the_same_images_as_a_bundle_and_comes_out_of_it(tmp_path: Path) -> None:
    unet = foreign_unet(2, **FOREIGN["as Ho et al. published"])
    scheduler = DDPMScheduler(variance_type="fixed_large", beta_end=0.01)
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "small")
    assert main([str(tmp_path / "small")]) == 0
    bundled = DDSMPipeline.from_pretrained(tmp_path / "small.bundle", backend="torch")
    pipes: tuple[Any, ...] = (bundled, DDPMPipeline.from_pretrained(tmp_path / "small"))
    images = []
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        images.append(pipe(batch_size=2, generator=generator, num_inference_steps=4, output_type="np").images)
    bundled.close()
    assert np.abs(images[0] - images[1]).max() < 1e-4, "the scheduler clips, so that little is amplified"
    assert main([str(tmp_path / "small.bundle"), "--to", "diffusers", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {INDEX, "small"}
    again = DDPMPipeline.from_pretrained(tmp_path / "out" / "small")
    assert fields(again.scheduler) == fields(scheduler)
    assert all(torch.equal(weight, unet.state_dict()[name]) for name, weight in again.unet.state_dict().items())
    assert torch.equal(found(again.unet), found(unet))


def test_sub_networks_come_back_in_as_experts(folder: Path, supernet: Supernet) -> None:
    widths = [8, 20, 32]
    experts = read_experts([folder / f"w{width:03d}" for width in widths], Facts())
    for expert, width in zip(experts, widths, strict=True):
        spec = expert.network.spec
        assert (spec.base_channels, spec.time_features) == (width, TINY.time_features)
        cut = dict(subnetwork(supernet.spec, supernet.weights, width).named_parameters())
        assert all(torch.equal(weight, cut[name]) for name, weight in expert.network.weights.items())


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "onnx", "OUT"], "--to writes diffusers, found 'onnx'"),
        (["--to", "diffusers", "OUT", "-o", "my.bundle"], "--output is for bundles"),
        (["--to", "diffusers", "OUT", "--precision", "fp16"], "--precision is for bundles"),
        (["--to", "diffusers", "OUT", "--opset", "20"], "--opset is for bundles"),
        (["--to", "diffusers", "OUT", "--widths", "3"], "width 3 (3/32) cannot be cut"),
        (["--to", "diffusers", "OUT", "--groups", "8"], "contradicted by --groups 8"),
    ],
)
def test_what_does_not_fit_is_refused_with_one_line(
    source: Path, tmp_path: Path, refusal: Refusal, options: list[str], words: str
) -> None:
    given = [str(tmp_path / "out") if option == "OUT" else option for option in options]
    assert words in refusal(main, source, *given)
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--groups", "4"], "--groups is for checkpoints, and a bundle knows it"),
        (["--weights", "net"], "--weights is for checkpoints"),
        (["--widths", "1/2,1/32"], "cannot be cut"),
    ],
)
def test_options_that_a_bundle_answers_itself_are_refused(
    bundle_path: Path, tmp_path: Path, refusal: Refusal, options: list[str], words: str
) -> None:
    assert words in refusal(main, bundle_path, "--to", "diffusers", tmp_path / "out", *options)
    assert listing(tmp_path) == []


def test_two_sources_are_refused(source: Path, bundle_path: Path, tmp_path: Path, refusal: Refusal) -> None:
    for other in (source, bundle_path):
        line = refusal(main, bundle_path, other, "--to", "diffusers", tmp_path / "out")
        assert "takes one supernet or bundle, found 2" in line


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "here").mkdir()
    line = refusal(main, tmp_path / "here", "--to", "diffusers", tmp_path / "out")
    assert "is not a bundle" in line
    assert listing(tmp_path) == ["here"]


def test_an_output_that_exists_is_kept_without_force_and_never_taken_for_ours(
    source: Path, tmp_path: Path, refusal: Refusal
) -> None:
    output = tmp_path / "out"
    arguments = (source, "--to", "diffusers", output, "--widths", "2/8")
    assert main([str(argument) for argument in arguments]) == 0
    assert "exists already" in refusal(main, *arguments)
    assert main([str(argument) for argument in (*arguments[:-1], "3/8", "--force")]) == 0
    assert {path.name for path in output.iterdir()} == {INDEX, "w012"}
    (output / INDEX).unlink()
    assert "holds something else" in refusal(main, *arguments, "--force")


def test_a_time_table_that_diffusers_cannot_know_is_refused(supernet: Supernet, tmp_path: Path) -> None:
    assert supernet.time_table is not None
    own = replace(supernet, time_table=supernet.time_table.roll(1, dims=0))
    with pytest.raises(BackendError, match="w008 as diffusers computes it differs from the sub-network by"):
        diffusers_from_supernet(own, tmp_path / "out", [8])
    assert listing(tmp_path) == []


def test_without_diffusers_one_line_says_how_to_install_it(
    source: Path, tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "ddsm_engine.diffusers")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    line = refusal(main, source, "--to", "diffusers", tmp_path / "out")
    assert line == "error: diffusers is not installed: pip install 'ddsm-engine[diffusers]'"
    assert listing(tmp_path) == []


# --- whole or not at all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("No space left on device")]
)
def test_a_disk_that_fills_up_leaves_what_was_there(
    source: Path, tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    output = tmp_path / "out"
    assert main([str(source), "--to", "diffusers", str(output), "--widths", "2/8"]) == 0
    before = {name: (output / name).read_bytes() for name in listing(output) if (output / name).is_file()}
    right = DDPMPipeline.save_pretrained

    def full(self: Any, path: Path) -> None:
        if path.name == "w016":
            raise error
        right(self, path)

    monkeypatch.setattr(DDPMPipeline, "save_pretrained", full)
    line = refusal(main, source, "--to", "diffusers", output, "--force")
    assert "could not be written" in line
    assert "No space left on device" in line
    assert {name: (output / name).read_bytes() for name in listing(output) if (output / name).is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
from diffusers import DDPMPipeline
from ddsm_export.cli import main
right = DDPMPipeline.save_pretrained
def save(self, path):
    right(self, path)
    if path.name == "w016":
        os.kill(os.getpid(), signal.SIGKILL)
DDPMPipeline.save_pretrained = save
main(sys.argv[1:])
"""


def test_a_kill_leaves_nothing_that_the_next_command_does_not_clear(source: Path, tmp_path: Path) -> None:
    arguments = [str(source), "--to", "diffusers", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    assert main([*arguments, "--widths", "2/8"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
