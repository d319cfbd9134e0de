"""``DDSMPipeline`` beside diffusers' own pipelines with the same weights: same arguments, same images."""

import inspect
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddsm_engine.backends import open_engine
from ddsm_engine.bundle import Bundle
from ddsm_engine.diffusers import DDSMPipeline, scheduler_of
from ddsm_engine.errors import BackendError, BundleError, DdsmError, OutputError, SamplerError, StrategyError
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.strategy import Strategy
from ddsm_export.bundling import ExportOptions, export_bundle
from ddsm_export.diffusers import diffusers_from_bundle
from ddsm_export.supernet import Supernet
from tests.oracle.dynamic_unet import Config, published_state_dict
from tests.oracle.names import product_spec, product_weights
from tests.tolerances import DIFFUSERS_IMAGES

Array = NDArray[np.float32]

DISTINCT = 0.05
"""What other noise or another network does at least to some value."""


@pytest.fixture(scope="module")
def pipe(bundle_path: Path) -> Iterator[DDSMPipeline]:
    opened = DDSMPipeline.from_pretrained(bundle_path, backend="torch")
    opened.set_progress_bar_config(disable=True)
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def _same_scheduler_for_every_test(pipe: DDSMPipeline) -> None:
    pipe.scheduler = scheduler_of(pipe.engines.bundle)


@pytest.fixture(scope="module")
def theirs(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """diffusers' pipeline with the full width."""
    folder = tmp_path_factory.mktemp("theirs") / "out"
    diffusers_from_bundle(bundle, folder, [32])
    opened = DDPMPipeline.from_pretrained(folder / "w032")
    opened.set_progress_bar_config(disable=True)
    return opened


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def largest(one: Array, other: Array) -> float:
    return float(np.abs(one - other).max())


def draw(pipe: Any, seed: int = 3, **options: Any) -> Array:
    """Three images of the full width, unless told otherwise."""
    given: dict[str, Any] = {"batch_size": 3, "generator": seeded(seed), "output_type": "np"} | options
    if isinstance(pipe, DDSMPipeline):
        given = {"strategy": "uniform:8/8"} | given
    images: Array = pipe(**given).images
    return images


# --- the same images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_a_seed_gives_the_images_of_diffusers_ddpm_pipeline(pipe: DDSMPipeline, theirs: Any, steps: int) -> None:
    found, expected = (draw(one, num_inference_steps=steps) for one in (pipe, theirs))
    assert largest(found, expected) < DIFFUSERS_IMAGES
    assert largest(draw(pipe, 4, num_inference_steps=steps), expected) > DISTINCT


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_seed_gives_the_images_of_diffusers_ddim_pipeline(pipe: DDSMPipeline, theirs: Any, eta: float) -> None:
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    ddim = DDIMPipeline(theirs.unet, theirs.scheduler)
    ddim.set_progress_bar_config(disable=True)
    assert largest(*(draw(one, num_inference_steps=7, eta=eta) for one in (pipe, ddim))) < DIFFUSERS_IMAGES


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_generator_is_left_where_diffusers_leaves_it(pipe: DDSMPipeline, theirs: Any, eta: float) -> None:
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    ddim = DDIMPipeline(theirs.unet, theirs.scheduler)
    ddim.set_progress_bar_config(disable=True)
    own, other = seeded(3), seeded(3)
    for one, generator in ((pipe, own), (ddim, other)):
        draw(one, generator=generator, num_inference_steps=3, eta=eta)
    assert torch.equal(own.get_state(), other.get_state()), "so that a second call goes on with the same noise"


def test_a_generator_for_each_image(pipe: DDSMPipeline, theirs: Any) -> None:
    found, expected = (
        draw(one, generator=[seeded(1), seeded(2), seeded(1)], num_inference_steps=4) for one in (pipe, theirs)
    )
    assert largest(found, expected) < DIFFUSERS_IMAGES
    assert (found[0] == found[2]).all()
    assert largest(found[:1], found[1:2]) > DISTINCT


def test_without_a_generator_torchs_own_is_drawn_from(pipe: DDSMPipeline, theirs: Any) -> None:
    both = []
    for one in (pipe, theirs):
        torch.manual_seed(11)
        both.append(draw(one, generator=None, num_inference_steps=4))
    assert largest(*both) < DIFFUSERS_IMAGES


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "DPM-Solver++, karras": lambda config: DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True),
    "DPM-Solver++, stochastic": lambda config: DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="sde-dpmsolver++"
    ),
    "DPM-Solver++, single step, stochastic": lambda config: DPMSolverSinglestepScheduler.from_config(
        config, algorithm_type="sde-dpmsolver++", lower_order_final=True
    ),
    "Heun": HeunDiscreteScheduler.from_config,
    "Euler": EulerDiscreteScheduler.from_config,
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_replaces_the_pipelines_own_is_followed(pipe: DDSMPipeline, theirs: Any, name: str) -> None:
    scheduler = SCHEDULERS[name](pipe.scheduler.config)
    pipe.scheduler = SCHEDULERS[name](pipe.scheduler.config)
    own = seeded(3)
    found = draw(pipe, num_inference_steps=6, generator=own)

    # The loop of diffusers' other pipelines: these schedulers scale the sample by what they call init_noise_sigma.
    generator = seeded(3)
    scheduler.set_timesteps(6)
    x = randn_tensor((3, 3, 8, 8), generator=generator) * scheduler.init_noise_sigma
    noise = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    with torch.no_grad():
        for t in scheduler.timesteps:
            predicted = theirs.unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(predicted, t, x, **noise).prev_sample
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert largest(found, expected) < 10 * DIFFUSERS_IMAGES, "in units of σ, float32 loses more digits (observed 7e-4)"
    assert torch.equal(own.get_state(), generator.get_state())


# --- the strategy -----------------------------------------------------------------------------------------------------


def test_every_way_to_name_a_strategy(pipe: DDSMPipeline, bundle: Bundle) -> None:
    ways = [Strategy.uniform(Fraction(1, 2), 1000), "uniform:4/8", Strategy(("w016",) * 1000)]
    first, *others = (draw(pipe, strategy=way, num_inference_steps=4) for way in ways)
    assert all((other == first).all() for other in others)
    assert largest(draw(pipe, num_inference_steps=4), first) > DISTINCT
    by_name = draw(pipe, strategy="coarse", num_inference_steps=4)
    assert (draw(pipe, strategy=bundle.strategy_file("coarse"), num_inference_steps=4) == by_name).all()


@pytest.mark.parametrize(
    ("names", "equivalent"),
    [(["coarse"], "coarse"), ([], "uniform:8/8"), (["coarse", "other"], "uniform:8/8")],
)
def test_without_a_strategy_the_only_one_is_followed_else_the_full_width(
    bundle_path: Path, tmp_path: Path, pipe: DDSMPipeline, names: list[str], equivalent: str
) -> None:
    changed = Path(shutil.copytree(bundle_path, tmp_path / "changed"))
    strategy = (changed / "strategies" / "coarse.yaml").rename(tmp_path / "coarse.yaml")
    for name in names:
        shutil.copy(strategy, changed / "strategies" / f"{name}.yaml")
    opened = DDSMPipeline.from_pretrained(changed, backend="torch")
    opened.set_progress_bar_config(disable=True)
    found = draw(opened, strategy=None, num_inference_steps=4)
    opened.close()
    assert (found == draw(pipe, strategy=equivalent, num_inference_steps=4)).all()


def test_a_strategy_over_calls_brings_its_number_of_steps(pipe: DDSMPipeline) -> None:
    strategy = Strategy(("w008", "w016", "w032"), axis="call", sampler="ddim", steps=3)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    found = draw(pipe, strategy=strategy)
    assert (found == draw(pipe, strategy=strategy, num_inference_steps=3)).all()


# --- the callback -----------------------------------------------------------------------------------------------------


def test_the_callback_sees_every_step_as_in_diffusers(pipe: DDSMPipeline) -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []

    def record(who: object, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert who is pipe
        assert set(tensors) == {"latents"}
        seen.append((step, timestep, tensors["latents"]))
        return tensors

    images = draw(pipe, num_inference_steps=4, callback_on_step_end=record)
    steps, timesteps, latents = zip(*seen, strict=True)
    pipe.scheduler.set_timesteps(4)
    assert steps == (0, 1, 2, 3)
    assert torch.equal(torch.stack(timesteps), pipe.scheduler.timesteps)
    assert all(tensor.shape == (3, 3, 8, 8) for tensor in latents)
    assert len({tensor.numpy().tobytes() for tensor in latents}) == 4, "kept tensors are not overwritten"
    expected = (latents[-1] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert (images == expected).all()
    assert (images == draw(pipe, num_inference_steps=4)).all(), "to look on changes nothing"


def test_what_the_callback_returns_replaces_the_state(pipe: DDSMPipeline, theirs: Any) -> None:
    start = randn_tensor((3, 3, 8, 8), generator=seeded(9))

    def restart(_: object, step: int, __: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": start} if step == 0 else tensors

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    found = draw(pipe, num_inference_steps=2, callback_on_step_end=restart)
    with torch.no_grad():
        pipe.scheduler.set_timesteps(2)
        last = pipe.scheduler.timesteps[-1]
        x = pipe.scheduler.step(theirs.unet(start, last).sample, last, start).prev_sample
    assert largest(found, (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()) < DIFFUSERS_IMAGES


def test_a_callback_may_write_into_the_tensor_and_return_nothing(pipe: DDSMPipeline) -> None:
    def grey(_: object, step: int, __: Tensor, tensors: dict[str, Tensor]) -> None:
        if step == 3:
            tensors["latents"].zero_()

    assert (draw(pipe, num_inference_steps=4, callback_on_step_end=grey) == 0.5).all()


def test_a_callback_that_asks_for_no_tensor_gets_none(pipe: DDSMPipeline) -> None:
    given: list[dict[str, Tensor]] = []

    def record(_: object, __: int, ___: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        given.append(tensors)
        return {}

    draw(pipe, num_inference_steps=2, callback_on_step_end=record, callback_on_step_end_tensor_inputs=())
    assert given == [{}, {}]


@pytest.mark.parametrize("wrong", [torch.zeros(1, 3, 8, 8), np.zeros((3, 3, 8, 8), np.float32), None])
def test_latents_of_another_shape_are_refused(pipe: DDSMPipeline, wrong: Any) -> None:
    with pytest.raises(SamplerError, match=r"callback_on_step_end must return latents of \(3, 3, 8, 8\), found"):
        draw(pipe, num_inference_steps=2, callback_on_step_end=lambda *_: {"latents": wrong})


# --- what comes back --------------------------------------------------------------------------------------------------


def test_images_come_in_diffusers_forms(pipe: DDSMPipeline) -> None:
    array = draw(pipe, num_inference_steps=2)
    assert array.shape == (3, 8, 8, 3)
    assert array.dtype == np.float32
    assert 0 <= array.min() < array.max() <= 1
    assert (draw(pipe, num_inference_steps=2, output_type="numpy") == array).all()
    tensor: Any = draw(pipe, num_inference_steps=2, output_type="pt")
    assert (tensor.permute(0, 2, 3, 1).numpy() == array).all()
    pictures: Any = draw(pipe, num_inference_steps=2, output_type="pil")
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (8, 8))] * 3
    assert (np.asarray(pictures[1]) == (array[1] * 255).round()).all()


def test_without_a_dictionary_a_tuple_comes_back(pipe: DDSMPipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "strategy": "uniform:2/8"}
    found, same = (pipe(generator=seeded(1), return_dict=whole, **options) for whole in (False, True))
    assert isinstance(found, tuple)
    ((picture,),) = found
    assert isinstance(picture, Image.Image)
    assert not isinstance(same, tuple)
    assert picture.tobytes() == same.images[0].tobytes()


GREY = Config(
    ch=16, ch_mult=(1,), attn=(), num_res_blocks=1, groups=4, conv_multiple=4, linear_multiple=4, T=60, in_channels=1
)


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DDSMPipeline]:
    """One width of a supernet for grey images, of 60 timesteps."""
    path = tmp_path_factory.mktemp("grey") / "grey.bundle"
    spec, weights = product_spec(GREY, image_size=8), product_weights(published_state_dict(GREY, seed=3))
    supernet = Supernet(spec, NoiseSchedule(1e-3, 0.02, 60, "fixed_small"), weights)
    export_bundle(supernet, path, ExportOptions(widths=[4]))
    opened = DDSMPipeline.from_pretrained(str(path), backend="torch")
    opened.set_progress_bar_config(disable=True)
    yield opened
    opened.close()


def test_grey_images_are_pictures_of_one_channel(grey: DDSMPipeline) -> None:
    drawn: Any = grey(generator=seeded(0))
    (picture,) = drawn.images
    assert (picture.mode, picture.size) == ("L", (8, 8))


def test_the_scheduler_is_the_supernets_own(grey: DDSMPipeline) -> None:
    config, schedule = grey.scheduler.config, NoiseSchedule(1e-3, 0.02, 60, "fixed_small")
    assert isinstance(grey.scheduler, DDPMScheduler)
    assert (config.variance_type, config.prediction_type, config.clip_sample) == ("fixed_small", "epsilon", False)
    assert (grey.scheduler.betas.numpy() == schedule.betas.astype(np.float32)).all()


@pytest.mark.parametrize(("kind", "calls"), [(DDPMScheduler, 60), (DDIMScheduler, 50), (HeunDiscreteScheduler, 99)])
def test_the_number_of_steps_is_diffusers_by_default(grey: DDSMPipeline, kind: Any, calls: int) -> None:
    seen: list[int] = []
    own = grey.scheduler
    grey.scheduler = kind.from_config(own.config)
    grey(callback_on_step_end=lambda _, step, *__: seen.append(step))
    grey.scheduler = own
    assert seen == list(range(calls))


def test_the_progress_bar_counts_calls_and_can_be_configured(
    pipe: DDSMPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.set_progress_bar_config(desc="drawing", ascii=True)
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    draw(pipe, num_inference_steps=4)
    pipe.set_progress_bar_config(disable=True)
    shown = capsys.readouterr().err
    assert "drawing" in shown
    assert "7/7" in shown


# --- engines ----------------------------------------------------------------------------------------------------------


def test_engines_stay_open_until_they_are_closed(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def count(name: str, bundle: Bundle, variant: Any, *rest: Any) -> Any:
        opened.append(variant.id)
        return open_engine(name, bundle, variant, *rest)

    monkeypatch.setattr("ddsm_engine.backends.open_engine", count)
    own = DDSMPipeline.from_pretrained(bundle_path, backend="torch")
    own.set_progress_bar_config(disable=True)
    draw(own, num_inference_steps=2)
    draw(own, num_inference_steps=5)
    assert opened == ["w032"]
    own.close()
    draw(own, num_inference_steps=2)
    assert opened == ["w032", "w032"]
    own.close()


@pytest.mark.parametrize("device", ["cuda:0", torch.device("cuda")])
def test_a_gpu_that_torch_would_name_so_is_not_replaced_by_the_cpu(bundle_path: Path, device: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    opened = DDSMPipeline.from_pretrained(bundle_path, backend="torch", device=device)
    assert opened.device == torch.device("cuda")
    with pytest.raises(BackendError, match="needs an NVIDIA GPU"):
        draw(opened, num_inference_steps=1)


def test_torch_s_own_device_is_taken(bundle_path: Path) -> None:
    assert DDSMPipeline.from_pretrained(bundle_path, device=torch.device("cpu")).device == torch.device("cpu")
    with pytest.raises(BackendError, match=r"expected the device auto, cpu, cuda, found 'cuda:1'"):
        DDSMPipeline.from_pretrained(bundle_path, device=torch.device("cuda:1"))


def test_a_pipeline_stays_where_it_is(pipe: DDSMPipeline) -> None:
    assert pipe.device == torch.device("cpu")
    for here in (("cpu",), (torch.device("cpu"),), ("cpu", torch.float32), ("cpu:0",), ()):
        assert pipe.to(*here) is pipe
    assert pipe.to(device="cpu", dtype=torch.float32) is pipe
    for elsewhere in (("cuda",), ("cuda:0",), (torch.float16,), ("cpu", torch.bfloat16), ("nowhere",)):
        with pytest.raises(BackendError, match="the engines run on cpu and exchange float32, and cannot be moved"):
            pipe.to(*elsewhere)
    with pytest.raises(BackendError, match="cannot be moved to 'cuda'"):
        pipe.to(device="cuda")


def test_there_is_nothing_to_save_but_the_bundle(pipe: DDSMPipeline, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"this pipeline is the bundle .*tiny\.bundle: copy that folder"):
        pipe.save_pretrained(tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_it_is_a_pipeline_like_others(pipe: DDSMPipeline) -> None:
    assert set(pipe.components) == {"engines", "scheduler"}
    assert "DDPMScheduler" in str(pipe)
    assert pipe.dtype == torch.float32


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batch_size": 0}, SamplerError, "expected at least one image"),
        ({"output_type": "jpeg"}, SamplerError, "output_type must be one of pil, np, numpy, pt, found 'jpeg'"),
        ({"callback_on_step_end_tensor_inputs": ["prompt"]}, SamplerError, r"'latents' only, found \['prompt'\]"),
        ({"generator": [seeded(0)] * 2}, SamplerError, "one for each of 3 images, found 2"),
        ({"num_inference_steps": 0}, SamplerError, "found 0"),
        ({"num_inference_steps": 1001}, SamplerError, "found 1001"),
        ({"eta": 0.5}, SamplerError, "eta"),
        ({"strategy": "uniform:1/8"}, StrategyError, "1/8"),
        ({"strategy": "nothing"}, BundleError, "no strategy 'nothing'"),
        ({"strategy": Strategy.uniform(1.0, 20)}, StrategyError, "20 entries"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    pipe: DDSMPipeline, options: dict[str, Any], error: type[DdsmError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        draw(pipe, **{"num_inference_steps": 4} | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (LMSDiscreteScheduler(), "LMSDiscreteScheduler"),
        (DDIMScheduler(beta_end=0.03), "beta_end"),
        (DDPMScheduler(prediction_type="v_prediction"), "prediction_type"),
    ],
)
def test_a_scheduler_that_the_network_cannot_follow_is_refused(pipe: DDSMPipeline, scheduler: Any, words: str) -> None:
    pipe.scheduler = scheduler
    with pytest.raises(SamplerError, match=words):
        draw(pipe, num_inference_steps=4)


def test_a_bundle_brings_its_own_scheduler(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dict(DDIMScheduler(timestep_spacing="trailing").config) | {"_class_name": "DDIMScheduler"}
    monkeypatch.setattr(Bundle, "scheduler_config", lambda self: config)
    scheduler = DDSMPipeline.from_pretrained(bundle_path, backend="torch").scheduler
    assert isinstance(scheduler, DDIMScheduler)
    assert (scheduler.config.timestep_spacing, scheduler.config.clip_sample) == ("trailing", True)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "NoSuchScheduler"}, "the scheduler 'NoSuchScheduler', which this diffusers lacks"),
        ({"_class_name": "UNet2DModel"}, "the scheduler 'UNet2DModel', which this diffusers lacks"),
        ({}, "the scheduler None, which this diffusers lacks"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "none"}, "a scheduler that diffusers refuses: none"),
        ({"_class_name": "DDIMScheduler", "beta_start": "x"}, "a scheduler that diffusers refuses"),
    ],
)
def test_a_bundle_whose_scheduler_is_none_is_refused(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(Bundle, "scheduler_config", lambda self: config)
    with pytest.raises(BundleError, match=words):
        DDSMPipeline.from_pretrained(bundle_path, backend="torch")


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        DDSMPipeline.from_pretrained(tmp_path)
