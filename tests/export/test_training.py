"""Does a training step do what the sandwich rule says, does it survive a kill, and are the images the ones on disk?"""

import gzip
import io
import json
import math
import pickle
import random
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddsm_engine.dataset import load_images
from ddsm_engine.errors import CheckpointError, DataError
from ddsm_engine.files import only_one_process
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_export.supernet import load_supernet
from ddsm_export.training import trainer as trainer_module
from ddsm_export.training.cli import forget_log_after, main, parser, spec_from_options
from ddsm_export.training.trainer import (
    TrainConfig,
    Trainer,
    TrainingState,
    fingerprint,
    initial_state,
    load_state,
    run_training,
    save_state,
    widths_of_step,
)
from tests.conftest import Refusal
from tests.oracle.dynamic_unet import TABLE, Config, Mistake, dynamic_unet, published_state_dict
from tests.oracle.names import product_name, product_spec, product_weights

CONFIG = Config(ch=16, ch_mult=(1, 2), attn=(1,), num_res_blocks=1, groups=4, conv_multiple=4, linear_multiple=4, T=100)
SPEC = product_spec(CONFIG, image_size=8)
SCHEDULE = NoiseSchedule(1e-4, 0.02, CONFIG.T)
WIDTHS = (4, 8, 12, 16)
STATE = published_state_dict(CONFIG, seed=3)
TRAIN = TrainConfig(batch_size=4, learning_rate=1e-3, warmup_steps=10, grad_clip=0.5, seed=5)


def pictures(count: int = 10, size: int = 8, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def state_of(weights: dict[str, Tensor]) -> TrainingState:
    return replace(
        initial_state(SPEC, 0),
        weights={name: tensor.clone() for name, tensor in weights.items()},
        ema={name: tensor.clone() for name, tensor in weights.items()},
    )


def make(config: TrainConfig = TRAIN, state: TrainingState | None = None, *, bf16: bool = False) -> Trainer:
    """A trainer over random weights: at the initial ones, most gradients are as good as zero."""
    return Trainer(SPEC, SCHEDULE, WIDTHS, config, pictures(), state or state_of(product_weights(STATE)), bf16=bf16)


def joined(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].detach().double().flatten() for name in sorted(tensors)])


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative L2 over all tensors together."""
    assert found.keys() == expected.keys()
    return float((joined(found) - joined(expected)).norm() / joined(expected).norm())


# --- one step ---------------------------------------------------------------------------------------------------------


def oracle_gradient(step: int, config: TrainConfig, mistake: Mistake | None = None) -> dict[int, dict[str, Tensor]]:
    """Width → its gradient, through the published code's slicing, written out again: draws in the documented order."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step + 1)
    size, images = config.batch_size, pictures()
    order = [np.random.default_rng([config.seed, epoch]).permutation(len(images)) for epoch in range(3)]
    drawn = [order[p // len(images)][p % len(images)] for p in range(step * size, step * size + size)]
    x_0 = torch.from_numpy(images[drawn]).float() / 127.5 - 1
    mirrored = torch.rand(size, generator=generator) < 0.5
    x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(-1), x_0)
    middle = (8, 12)[int(torch.randperm(2, generator=generator)[0])]
    survival = torch.cumprod(1 - torch.linspace(1e-4, 0.02, CONFIG.T).double(), 0)
    gradients = {}
    for width in (16, 4, middle):
        t = ((torch.arange(size) + torch.rand(size, generator=generator)) / size * CONFIG.T).long()
        eps = torch.randn(x_0.shape, generator=generator)
        kept = survival[t].sqrt().float()[:, None, None, None]
        lost = (1 - survival[t]).sqrt().float()[:, None, None, None]
        state = {name: tensor.clone().requires_grad_(name != TABLE) for name, tensor in STATE.items()}
        predicted = dynamic_unet(CONFIG, state, kept * x_0 + lost * eps, t, width / 16, mistake)
        (predicted - eps).square().mean().backward()  # type: ignore[no-untyped-call]
        gradients[width] = {
            product_name(name): torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            for name, tensor in state.items()
            if name != TABLE
        }
    return gradients


def summed(gradients: dict[int, dict[str, Tensor]], without: int | None = None) -> dict[str, Tensor]:
    kept = [gradient for width, gradient in gradients.items() if width != without]
    return {name: torch.stack([gradient[name] for gradient in kept]).sum(0) for name in kept[0]}


@pytest.fixture
def before_clipping(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The gradients as they arrive at the clip, one list a step."""
    seen: list[list[Tensor]] = []
    clip = torch.nn.utils.clip_grad_norm_

    def record(parameters: Any, limit: float, **options: Any) -> Tensor:
        parameters = list(parameters)
        seen.append([parameter.grad.clone() for parameter in parameters])
        return clip(parameters, limit, **options)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    return seen


@pytest.mark.parametrize("first", [0, 2])
def test_a_step_sums_the_gradients_of_the_widths_as_the_published_slicing_gives_them(
    before_clipping: list[list[Tensor]], first: int
) -> None:
    """Step 2 crosses from one shuffled epoch into the next: ten images, four at a time."""
    trainer = make()
    trainer.state.step = first
    losses = trainer.step()
    found = dict(zip(trainer.state.weights, before_clipping[0], strict=True))
    gradients = oracle_gradient(first, TRAIN)
    assert list(losses) == list(gradients)
    expected = summed(gradients)
    assert distance(found, expected) < 1e-5
    # The comparison can tell: a width left out, the wrong columns of a concatenation, another step's draws.
    for width in gradients:
        assert distance(found, summed(gradients, without=width)) > 1e-2
    assert distance(found, summed(oracle_gradient(first, TRAIN, "aligned_concat"))) > 1e-2
    assert distance(found, summed(oracle_gradient(first + 1, TRAIN))) > 1e-2


def test_the_update_is_clipped_adam_with_a_warm_up(before_clipping: list[list[Tensor]]) -> None:
    trainer = make()
    weights = {name: tensor.detach().double().clone() for name, tensor in trainer.state.weights.items()}
    first = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    for n in range(1, 13):
        trainer.step()
        gradient = dict(zip(trainer.state.weights, (g.double() for g in before_clipping[-1]), strict=True))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
        assert norm > TRAIN.grad_clip, "a clip that never bites proves nothing"
        rate = 1e-3 * min(1.0, n / 10)
        moved = {}
        for name, g in gradient.items():
            g = g * TRAIN.grad_clip / (norm + 1e-6)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g.square()
            slope = (first[name] / (1 - 0.9**n)) / ((second[name] / (1 - 0.999**n)).sqrt() + 1e-8)
            moved[name] = -rate * slope
            weights[name] = weights[name] + moved[name]
        assert distance(trainer.state.weights, weights) < 1e-6
    assert float(joined(moved).norm() / joined(weights).norm()) > 1e-4, "one step is far more than the tolerance"


def test_the_average_follows_its_law_exactly() -> None:
    """After n steps the decay is min(ceiling, (1 + n) / (10 + n)); the ceiling is reached at the third of these."""
    trainer = make(replace(TRAIN, ema_decay=0.3, learning_rate=0.05, warmup_steps=1))
    average = {name: tensor.double() for name, tensor in trainer.state.ema.items()}
    without_ceiling = dict(average)
    for decay, rising in ((2 / 11, 2 / 11), (3 / 12, 3 / 12), (0.3, 4 / 13), (0.3, 5 / 14)):
        trainer.step()
        weights = {name: tensor.detach().double() for name, tensor in trainer.state.weights.items()}
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
        without_ceiling = {name: rising * without_ceiling[name] + (1 - rising) * weights[name] for name in weights}
        assert distance(trainer.state.ema, average) < 1e-7
    assert distance(trainer.state.ema, without_ceiling) > 1e-4
    assert distance(trainer.supernet().weights, average) < 1e-7  # type: ignore[arg-type]


@given(
    widths=st.lists(st.integers(1, 512), min_size=1, max_size=9, unique=True).map(lambda w: tuple(sorted(w))),
    middle=st.integers(0, 9),
    seed=st.integers(0, 2**31),
)
def test_the_sandwich_holds_both_ends_and_random_others(widths: tuple[int, ...], middle: int, seed: int) -> None:
    chosen = widths_of_step(widths, middle, torch.Generator().manual_seed(seed))
    assert chosen[0] == widths[-1]
    assert {widths[0], widths[-1]} <= set(chosen) <= set(widths)
    assert len(chosen) == len(set(chosen)) == min(len(widths), 2 + middle)


def test_the_middle_of_the_sandwich_is_every_width_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [widths_of_step((4, 6, 8, 10, 12), 1, generator)[2] for _ in range(600)]
    assert {width: abs(drawn.count(width) - 200) < 50 for width in (6, 8, 10)} == {6: True, 8: True, 10: True}
    assert widths_of_step((7,), 1, generator) == (7,)
    assert widths_of_step((4, 8), 1, generator) == (8, 4)


def test_what_no_width_of_a_step_reads_is_not_moved_by_it() -> None:
    """With the narrowest width alone, everything outside the leading blocks keeps its bits."""
    state = state_of(product_weights(STATE))
    before = {name: tensor.clone() for name, tensor in state.weights.items()}
    trainer = Trainer(SPEC, SCHEDULE, (4,), TRAIN, pictures(), state, bf16=False)
    assert list(trainer.step()) == [4]
    weight = state.weights["up.0.conv1.weight"].detach()
    assert not torch.equal(weight[:8, :16], before["up.0.conv1.weight"][:8, :16])
    assert torch.equal(weight[8:], before["up.0.conv1.weight"][8:])
    assert torch.equal(weight[:, 16:], before["up.0.conv1.weight"][:, 16:])


def test_the_loss_falls() -> None:
    """One grey picture, so that the noise can be read off; every width learns it."""
    config = TrainConfig(batch_size=16, learning_rate=4e-3, warmup_steps=5, seed=1, flip=False)
    images = np.full((4, 3, 8, 8), 200, np.uint8)
    trainer = Trainer(SPEC, SCHEDULE, WIDTHS, config, images, initial_state(SPEC, 1), bf16=False)
    history = [trainer.step() for _ in range(60)]
    assert min(history[0].values()) > 0.8
    assert max(history[-1].values()) < 0.5
    assert trainer.state.losses.keys() == set(WIDTHS)


def test_bf16_gives_nearly_the_same_loss() -> None:
    exact, rounded = make().step(), make(bf16=True).step()
    assert exact.keys() == rounded.keys()
    for width, loss in exact.items():
        assert rounded[width] != loss, "nothing was computed in bf16"
        assert rounded[width] == pytest.approx(loss, rel=0.05)


def test_bf16_keeps_weights_and_moments_in_float32() -> None:
    trainer = make(bf16=True)
    trainer.step()
    assert {tensor.dtype for tensor in trainer.state.tensors.values()} == {torch.float32}


# --- state ------------------------------------------------------------------------------------------------------------

IDENTITY = fingerprint(SPEC, SCHEDULE, WIDTHS, TRAIN, pictures())


def steps(trainer: Trainer, count: int) -> TrainingState:
    for _ in range(count):
        trainer.step()
    return trainer.state


def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole = steps(make(), 6)
    save_state(steps(make(), 3), IDENTITY, tmp_path / "state")
    trainer = make(state=load_state(IDENTITY, tmp_path / "state"))
    assert not all(torch.equal(whole.weights[n], trainer.state.weights[n]) for n in whole.weights)
    resumed = steps(trainer, 3)
    assert (resumed.step, resumed.losses) == (6, whole.losses)
    assert resumed.tensors.keys() == whole.tensors.keys()
    different = [name for name in whole.tensors if not torch.equal(whole.tensors[name], resumed.tensors[name])]
    assert different == []


def test_dropout_follows_from_the_step_alone_and_leaves_the_caller_s_random_numbers_alone() -> None:
    spec = replace(SPEC, dropout=0.3)
    losses = []
    for disturbance in (0, 5):
        trainer = Trainer(spec, SCHEDULE, WIDTHS, TRAIN, pictures(), state_of(product_weights(STATE)), bf16=False)
        torch.manual_seed(disturbance)
        expected = torch.rand(3)
        torch.manual_seed(disturbance)
        losses.append(trainer.step())
        assert torch.equal(torch.rand(3), expected)
    assert losses[0] == losses[1]


def test_another_seed_is_another_training() -> None:
    one, other = steps(make(), 2), steps(make(replace(TRAIN, seed=6)), 2)
    assert distance(one.weights, other.weights) > 1e-5


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_kill_while_saving_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    path = tmp_path / "state"
    trainer = make()
    save_state(steps(trainer, 1), IDENTITY, path)
    old = path.read_bytes()

    def half(tensors: dict[str, Tensor], file: Path, *_: object) -> None:
        file.write_bytes(old[: len(old) // 2])
        raise error("killed")

    monkeypatch.setattr(trainer_module, "save_tensors", half)
    with pytest.raises(error):
        save_state(steps(trainer, 1), IDENTITY, path)
    assert path.read_bytes() == old
    assert load_state(IDENTITY, path).step == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_state_whose_loss_is_no_float_is_refused(tmp_path: Path) -> None:
    state = make().state
    state.losses = {8: 10**400}
    save_state(state, IDENTITY, tmp_path / "state")
    with pytest.raises(CheckpointError, match="is not a readable training state"):
        load_state(IDENTITY, tmp_path / "state")


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.999])
def test_a_damaged_state_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "state"
    save_state(make().state, IDENTITY, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(CheckpointError, match=r"is not a readable training state.*remove it to start anew"):
        load_state(IDENTITY, path)


def test_a_state_of_another_training_is_refused_by_name(tmp_path: Path) -> None:
    save_state(make().state, IDENTITY, tmp_path / "state")
    others = {
        "config": fingerprint(SPEC, SCHEDULE, WIDTHS, replace(TRAIN, learning_rate=1.0), pictures()),
        "widths": fingerprint(SPEC, SCHEDULE, (4, 16), TRAIN, pictures()),
        "spec": fingerprint(replace(SPEC, groups=2), SCHEDULE, WIDTHS, TRAIN, pictures()),
        "noise_schedule": fingerprint(SPEC, replace(SCHEDULE, beta_end=0.03), WIDTHS, TRAIN, pictures()),
        "images": fingerprint(SPEC, SCHEDULE, WIDTHS, TRAIN, pictures(11)),
    }
    for name, identity in others.items():
        with pytest.raises(CheckpointError, match=f"belongs to a training with another {name};"):
            load_state(identity, tmp_path / "state")
    assert load_state(IDENTITY, tmp_path / "state").step == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_loop_saves_and_goes_on_with_the_interruption(error: type[BaseException]) -> None:
    trainer, saved = make(), list[int]()

    def on_step(_: dict[int, float]) -> None:
        if trainer.state.step == 2:
            raise error("stop")

    with pytest.raises(error):
        run_training(
            trainer, steps=5, save_every_s=1e9, on_step=on_step, on_save=lambda: saved.append(trainer.state.step)
        )
    assert saved == [2]


def test_a_loss_that_is_not_finite_ends_the_training_and_keeps_the_last_good_state() -> None:
    state = state_of(product_weights(STATE))
    trainer, saved = make(state=state), list[int]()

    def on_step(_: dict[int, float]) -> None:
        with torch.no_grad():
            state.weights["tail.conv.bias"].fill_(math.nan)

    with pytest.raises(CheckpointError, match=r"the loss of width 16 is nan at step 1; lower --lr"):
        run_training(trainer, steps=5, save_every_s=1e9, on_step=on_step, on_save=lambda: saved.append(state.step))
    assert saved == [], "saving now would put the spoilt weights in the place of good ones"


# --- the command ------------------------------------------------------------------------------------------------------

TINY_NETWORK = [
    "--image-size", "8", "--base-channels", "8", "--channel-mults", "1", "--attention-levels", "", "--groups", "2",
    "--num-res-blocks", "1", "--conv-multiple", "2", "--linear-multiple", "2", "--timesteps", "50",
    "--batch-size", "4", "--warmup-steps", "2", "--precision", "fp32",
]  # fmt: skip
"""With two groups and multiples of two, the widths are 2, 4, 6 and 8."""


def npz(folder: Path, images: NDArray[np.uint8]) -> Path:
    np.savez(folder / "data.npz", images=images.transpose(0, 2, 3, 1))
    return folder / "data.npz"


def test_the_command_trains_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: Refusal) -> None:
    data, out = npz(tmp_path, pictures()), tmp_path / "out"
    command = [str(data), "-o", str(out), *TINY_NETWORK]
    assert main([*command, "--images", "10"]) == 0
    captured = capsys.readouterr()
    assert "10 images, widths 2 (2/8), 4 (4/8), 6 (6/8), 8 (8/8), fp32; from step 0 of 3" in captured.err
    assert "cut it with: ddsm-export" in captured.out
    grids = [f"w{width:03d}.png" for width in (2, 4, 6, 8)]
    assert {p.name for p in out.iterdir()} == {"supernet.safetensors", "state.safetensors", "log.jsonl", "samples"}
    assert sorted(p.name for p in (out / "samples").iterdir()) == grids
    for name in grids:
        with Image.open(out / "samples" / name) as picture:
            assert picture.size == (8 * 10 - 2, 2 * 10 - 2)
            assert np.asarray(picture).std() > 1
    line = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert line.keys() == {"step", "images", "images_per_s", "loss"}
    assert {"w002", "w008"} <= line["loss"].keys()
    supernet = load_supernet(out / "supernet.safetensors")
    assert supernet.provenance["steps"] == 3
    assert (supernet.spec.base_channels, supernet.spec.widths()) == (8, (2, 4, 6, 8))

    # Other options are another training; nothing of this one is touched.
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert "belongs to a training with another config" in refusal(main, *command, "--images", "20", "--lr", "0.1")
    assert "with another spec" in refusal(main, *command, "--images", "20", "--dropout", "0.5")
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before

    assert main([*command, "--images", "20"]) == 0
    assert "resuming at step 3 of 5" in capsys.readouterr().err
    assert load_supernet(out / "supernet.safetensors").provenance["steps"] == 5


def test_a_log_forgets_what_a_kill_undid(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 5, 9)]
    log = tmp_path / "log.jsonl"
    for text, step, kept in (
        ("".join(lines), 9, 3),
        ("".join(lines), 6, 2),
        (lines[0] + lines[1][:4], 9, 1),
        (lines[0] + "7\n" + lines[1], 9, 1),
        ("\x00", 9, 0),
    ):
        log.write_text(text)
        forget_log_after(log, step)
        assert log.read_text() == "".join(lines[:kept])
    log.write_bytes(b"\xff\xfe")
    forget_log_after(log, 9)
    assert log.read_bytes() == b""


def test_two_trainings_do_not_share_a_folder(tmp_path: Path, refusal: Refusal) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with only_one_process(out):
        assert "in use by another process" in refusal(main, npz(tmp_path, pictures()), "-o", out, *TINY_NETWORK)
    assert list(out.iterdir()) == []


def test_a_training_may_begin_at_a_supernet(tmp_path: Path, refusal: Refusal) -> None:
    data, first = npz(tmp_path, pictures()), tmp_path / "first"
    assert main([str(data), "-o", str(first), *TINY_NETWORK, "--images", "12"]) == 0
    begun = load_supernet(first / "supernet.safetensors")
    command = [str(data), *TINY_NETWORK, "--images", "4", "--lr", "1e-9", "--init", str(first / "supernet.safetensors")]
    assert main([*command, "-o", str(tmp_path / "second")]) == 0
    found = load_supernet(tmp_path / "second" / "supernet.safetensors")
    for name, weight in begun.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-6)
    assert found.provenance["steps"] == 1
    assert found.provenance["init"]["steps"] == 3
    assert found.provenance["data"]["shape"] == [10, 3, 8, 8]
    words = refusal(main, *command, "-o", tmp_path / "third", "--groups", "1")
    assert "is a supernet of another architecture" in words
    assert not (tmp_path / "third").exists()


def test_the_command_draws_samples_of_a_schedule_shorter_than_fifty_steps(tmp_path: Path) -> None:
    options = [*TINY_NETWORK, "--timesteps", "12", "--images", "4"]
    assert main([str(npz(tmp_path, pictures())), "-o", str(tmp_path / "out"), *options]) == 0
    assert (tmp_path / "out" / "samples" / "w008.png").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--images", "0"], "--images must be positive"),
        (["--batch-size", "-1"], "--batch-size must be positive"),
        (["--lr", "nan"], "--lr must be positive"),
        (["--lr", "inf"], "--lr must be positive and finite, found inf"),
        (["--grad-clip", "inf"], "--grad-clip must be positive and finite"),
        (["--save-every", "nan"], "--save-every must be at least 0, found nan"),
        (["--seed", "-1"], "--seed must be 0 to 8796093022207, found -1"),
        (["--seed", "100000000000000"], "--seed must be 0 to 8796093022207, found 100000000000000"),
        (["--ema-decay", "nan"], "--ema-decay must be 0 to 1, found nan"),
        (["--ema-decay", "-1"], "--ema-decay must be 0 to 1, found -1.0"),
        (["--ema-decay", "1.5"], "--ema-decay must be 0 to 1, found 1.5"),
        (["--middle-widths", "-1"], "--middle-widths must be at least 0, found -1"),
        (["--warmup-steps", "-5"], "--warmup-steps must be at least 0, found -5"),
        (["--threads", "-1"], "--threads must be 0 to 1024, found -1"),
        (["--dropout", "nan"], "dropout"),
        (["--groups", "3"], "8 channels cannot be normalised in 3 groups"),
        (["--image-size", "4"], "holds images of 8x8; the network takes 4x4"),
        (["--channels", "1"], "holds images of 3 channels; the network takes 1"),
    ],
)
def test_options_that_cannot_be_are_refused_and_no_folder_is_made(
    tmp_path: Path, refusal: Refusal, options: list[str], words: str
) -> None:
    assert words in refusal(main, npz(tmp_path, pictures()), "-o", tmp_path / "out", *TINY_NETWORK, *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--seed", str(2**43 - 1)),
        ("--ema-decay", "1"),
        ("--ema-decay", "0"),
        ("--middle-widths", "0", "--warmup-steps", "0"),
        ("--middle-widths", "99"),
    ],
    ids=" ".join,
)
def test_the_least_and_the_most_that_an_option_takes_trains_and_resumes(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    command = [str(npz(tmp_path, pictures())), "-o", str(tmp_path / "out"), *TINY_NETWORK, *options]
    for images in ("8", "16"):
        assert main([*command, "--images", images]) == 0
    supernet = load_supernet(tmp_path / "out/supernet.safetensors")
    assert supernet.provenance["images"] == 16
    assert all(tensor.isfinite().all() for tensor in supernet.weights.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    command = [npz(tmp_path, pictures()), "-o", tmp_path / "out", *TINY_NETWORK, "--device", "cuda"]
    assert "no CUDA device here; use --device cpu" in refusal(main, *command)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_as_the_cpu_does_and_each_resumes_the_other(tmp_path: Path) -> None:
    def on(device: str, state: TrainingState | None = None) -> Trainer:
        state = state or state_of(product_weights(STATE))
        return Trainer(SPEC, SCHEDULE, WIDTHS, TRAIN, pictures(), state, bf16=False, device=device)

    cpu, gpu = steps(on("cpu"), 3), steps(on("cuda"), 3)
    save_state(gpu, IDENTITY, tmp_path / "state")
    assert distance(cpu.weights, {name: tensor.cpu() for name, tensor in gpu.weights.items()}) < 1e-4
    resumed = steps(on("cpu", load_state(IDENTITY, tmp_path / "state")), 1)
    assert resumed.losses == pytest.approx(steps(on("cpu", cpu), 1).losses, rel=1e-3)


def test_data_that_is_not_there_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    assert "absent does not exist" in refusal(main, tmp_path / "absent", "-o", tmp_path / "out", *TINY_NETWORK)
    assert list(tmp_path.iterdir()) == []


def test_the_default_network_is_the_papers_with_sixteen_groups() -> None:
    a = parser().parse_args(["data", "-o", "out"])
    spec = spec_from_options(a)
    assert spec.widths() == (32, 48, 64, 80, 96, 112, 128)
    assert (a.lr, a.ema_decay, a.grad_clip, a.warmup_steps, a.dropout) == (4e-4, 0.9999, 1.0, 5000, 0.1)


# --- data -------------------------------------------------------------------------------------------------------------


def idx(images: NDArray[np.uint8], magic: int = 0x803) -> bytes:
    header = [magic, len(images), *images.shape[-2:]]
    return b"".join(number.to_bytes(4, "big") for number in header) + images.tobytes()


def cifar(images: NDArray[np.uint8]) -> bytes:
    return b"".join(bytes([label % 10]) + image.tobytes() for label, image in enumerate(images))


def in_folder(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def save_folder(folder: Path, images: NDArray[np.uint8]) -> None:
    for number, image in enumerate(images):
        pixels = image.transpose(1, 2, 0) if len(image) == 3 else image[0]
        target = folder / ("a" if number < 3 else "b") / f"{number:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target)


WRITERS: dict[str, tuple[int, int, Callable[[Path, NDArray[np.uint8]], object]]] = {
    # name: channels, size, how to write images [N, C, H, W] at a path
    "colour.npz": (3, 8, lambda path, x: np.savez(path, images=x.transpose(0, 2, 3, 1))),
    "grey.npz": (1, 8, lambda path, x: np.savez(path, x[:, 0])),
    "grey-with-axis.npz": (1, 8, lambda path, x: np.savez(path, other=x.transpose(0, 2, 3, 1), images=x[:, 0])),
    "compressed.npz": (3, 8, lambda path, x: np.savez_compressed(path, x.transpose(0, 2, 3, 1))),
    "colour.npy": (3, 8, lambda path, x: np.save(path, x.transpose(0, 2, 3, 1))),
    "t10k-images-idx3-ubyte": (1, 28, lambda path, x: path.write_bytes(idx(x))),
    "t10k-images-idx3-ubyte.gz": (1, 28, lambda path, x: path.write_bytes(gzip.compress(idx(x)))),
    "colour-folder": (3, 8, save_folder),
    "grey-folder": (1, 8, save_folder),
    "cifar": (
        3,
        32,
        lambda path, x: in_folder(
            path, {"data_batch_2.bin": cifar(x[4:]), "data_batch_1.bin": cifar(x[:4]), "test_batch.bin": cifar(x)}
        ),
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_reads_back_what_was_written(tmp_path: Path, name: str) -> None:
    channels, size, write = WRITERS[name]
    images = pictures(7, size, channels)
    write(tmp_path / name, images)
    read = load_images(tmp_path / name, channels=channels, image_size=size)
    assert read.dtype == np.uint8
    assert np.array_equal(read, images)


def test_an_array_is_told_by_its_content_whatever_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "renamed.npz").write_bytes(_npy_bytes())
    assert np.array_equal(load_images(tmp_path / "renamed.npz", channels=1, image_size=8), pictures(3, 8, 1))


def test_smaller_arrays_are_padded_in_their_middle(tmp_path: Path) -> None:
    images = pictures(3, 28, 1)
    (tmp_path / "idx").write_bytes(idx(images))
    read = load_images(tmp_path / "idx", channels=1, image_size=32)
    assert np.array_equal(read[:, :, 2:30, 2:30], images)
    assert read.sum(dtype=np.int64) == images.sum(dtype=np.int64)


def test_pictures_are_converted_cropped_to_their_middle_and_resized(tmp_path: Path) -> None:
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 255  # the centred square is white, its surroundings black
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.transpose(1, 0, 2)).convert("P").save(tmp_path / "tall.bmp")
    (tmp_path / "notes.txt").write_text("no picture")
    read = load_images(tmp_path, channels=1, image_size=4)
    assert read.shape == (2, 1, 4, 4)
    assert (read == 255).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grey_picture_of_sixteen_bits_is_read_by_its_upper_eight(tmp_path: Path, channels: int) -> None:
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(levels).save(tmp_path / "deep.png")
    read = load_images(tmp_path, channels=channels, image_size=8)
    assert np.array_equal(read[0], np.broadcast_to(levels >> 8, (channels, 8, 8)))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated-idx": (lambda path: path.write_bytes(idx(pictures(3, 8, 1))[:-1]), "announces 3 images .192 bytes. and"),
    "longer-idx": (lambda path: path.write_bytes(idx(pictures(3, 8, 1)) + b"\0"), "announces 3 images"),
    "idx-of-labels": (lambda path: path.write_bytes(idx(pictures(3, 8, 1), 0x801)), "not an IDX file of images .magic"),
    "idx-header-only": (lambda path: path.write_bytes(b"\0\0\x08\x03"), "is not an IDX file"),
    "idx-of-none": (lambda path: path.write_bytes(idx(pictures(0, 8, 1))), "with 0 of them"),
    "claims-much.idx": (
        lambda path: path.write_bytes(b"\0\0\x08\x03" + b"\xff" * 4 + b"\0\0\0\x08" * 2),
        "announces 4294967295 images|could not be read",
    ),
    "plain.gz": (lambda path: path.write_bytes(idx(pictures(3, 8, 1))), "could not be read as images"),
    "truncated.gz": (
        lambda path: path.write_bytes(gzip.compress(idx(pictures(3, 8, 1)))[:-20]), "could not be read as images"
    ),
    "damaged.gz": (
        lambda path: path.write_bytes(gzip.compress(idx(pictures(9, 8, 1)))[:60] + b"\xff" * 300), "could not be read"
    ),
    "wrong-channels.npz": (lambda path: np.savez(path, pictures(3).transpose(0, 2, 3, 1)), "of 3 channels.*takes 1"),
    "too-big.npz": (lambda path: np.savez(path, pictures(3, 9, 1)[:, 0]), "of 9x9; the network takes 8x8"),
    "floats.npz": (lambda path: np.savez(path, np.zeros((2, 8, 8))), "must hold uint8 images, found float64"),
    "flat.npz": (lambda path: np.savez(path, np.zeros((2, 64), np.uint8)), "found shape .2, 64."),
    "two-arrays.npz": (lambda path: np.savez(path, a=np.zeros(1), b=np.zeros(1)), "array named 'images'.*'a', 'b'"),
    "truncated.npz": (lambda path: path.write_bytes(_npz_bytes()[:-30]), "could not be read as images"),
    "no-zip.npz": (lambda path: path.write_bytes(b"PK\x03\x04 is all there is"), "could not be read"),
    "text.npz": (lambda path: path.write_text("step,loss"), "could not be read"),
    "no-array.npz": (lambda path: path.write_bytes(_text_zip_bytes()), "must hold an array, found bytes"),
    "empty-folder": (lambda path: path.mkdir(), "holds no images .*png"),
    "broken-picture": (
        lambda path: in_folder(path, {"a.png": b"\x89PNG"}), "a.png is not a readable image"
    ),
    "bomb-picture": (
        lambda path: in_folder(path, {"a.png": _bomb_bytes()}), "a.png is not a readable image"
    ),
    "truncated-picture": (
        lambda path: in_folder(path, {"a.png": _png_bytes()[:-40]}), "a.png is not a readable image"
    ),
    "cifar-of-wrong-size": (
        lambda path: in_folder(path, {"data_batch_1.bin": cifar(pictures(2, 32))[:-1]}),
        "data_batch_1.bin is not a CIFAR-10 binary batch .6145 bytes, records of 3073",
    ),
    "cifar-empty": (
        lambda path: in_folder(path, {"data_batch_1.bin": b""}), "is not a CIFAR-10 binary batch"
    ),
}  # fmt: skip


def _npz_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, pictures(3, 8, 1)[:, 0])
    return buffer.getvalue()


def _npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pictures(3, 8, 1)[:, 0])
    return buffer.getvalue()


def _png_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pictures(1, 32)[0].transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _bomb_bytes() -> bytes:
    """A header that claims 4 x 10^9 pixels, with its checksum right."""
    data = bytearray(_png_bytes())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def _text_zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("images.txt", "no array")
    return buffer.getvalue()


@pytest.mark.parametrize("name", REFUSED)
def test_data_that_cannot_be_read_or_does_not_fit_is_refused(tmp_path: Path, name: str) -> None:
    write, words = REFUSED[name]
    write(tmp_path / name)
    with pytest.raises(DataError, match=words) as caught:
        load_images(tmp_path / name, channels=1, image_size=8)
    assert name in str(caught.value)


class _Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return _make_folder, (str(self.marker),)


def _make_folder(path: str) -> None:
    Path(path).mkdir()


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_pickled_arrays_are_refused_and_their_code_is_not_run(tmp_path: Path, suffix: str) -> None:
    path, marker = tmp_path / f"data.{suffix}", tmp_path / "ran"
    array = np.empty(1, dtype=object)
    array[0] = _Attack(marker)
    np.savez(path, images=array) if suffix == "npz" else np.save(path, array)
    with pytest.raises(DataError, match="could not be read as images"):
        load_images(path, channels=1, image_size=8)
    path.write_bytes(pickle.dumps(_Attack(marker)))
    with pytest.raises(DataError, match="could not be read as images"):
        load_images(path, channels=1, image_size=8)
    assert not marker.exists()
    # The attack is real: reading with pickles allowed runs it.
    np.load(path, allow_pickle=True)
    assert marker.exists()


def test_damaged_files_never_give_a_traceback(tmp_path: Path) -> None:
    generator, refused = random.Random(0), 0
    sources = {"a.npz": _npz_bytes(), "b.npy": _npy_bytes(), "c.gz": gzip.compress(idx(pictures(3, 8, 1)))}
    for number in range(400):
        name = ("a.npz", "b.npy", "c.gz", "d/p.png")[number % 4]
        data = bytearray(sources.get(name, _png_bytes()))
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
        try:
            load_images(tmp_path / "d" if name == "d/p.png" else tmp_path / name, channels=1, image_size=32)
        except DataError:
            refused += 1
    assert refused > 100
