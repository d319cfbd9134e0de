"""``ddsm train DATA -o FOLDER``: train a supernet whose every width denoises."""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ddsm_engine.backends.engine import MAX_THREADS
from ddsm_engine.cli import guarded
from ddsm_engine.errors import BackendError, SpecError
from ddsm_engine.files import clear_leftovers, only_one_process, write_atomically
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.spec import UNetSpec

if TYPE_CHECKING:
    from ddsm_export.training.trainer import Trainer

LOG_EVERY_S = 30.0
STATE = "state.safetensors"
SUPERNET = "supernet.safetensors"
SAMPLES = "samples"
LOG = "log.jsonl"

POSITIVE = ("images", "batch_size", "lr", "grad_clip")

LIMITS: Mapping[str, tuple[float, float]] = {
    "seed": (0, 2**43 - 1),  # every step's own, a million times as large and more, is of 64 bits
    "ema_decay": (0, 1),  # a ceiling, which 1 takes away
    "middle_widths": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "threads": (0, MAX_THREADS),
    "save_every": (0, math.inf),
}
"""Option → the least and the most that it takes."""


def parser() -> argparse.ArgumentParser:
    """The options of ``train``; defaults are the paper's CIFAR-10 network with 16 groups and its training recipe."""
    p = argparse.ArgumentParser(
        prog="ddsm train",
        description="Train a supernet with the sandwich rule. Started again with the same options, it resumes.",
    )
    p.add_argument("data", type=Path, help="a folder of images, .npz, an IDX file, or a folder of CIFAR-10 .bin")
    p.add_argument("-o", "--output", type=Path, required=True, help="folder for the supernet, state, log and samples")
    p.add_argument("--images", type=int, default=57_600_000, help="images to draw in all (paper: 450,000 x 128)")
    p.add_argument(
        "--init", type=Path, help="begin at the weights of this supernet (.safetensors) instead of at random"
    )
    net = p.add_argument_group("network")
    net.add_argument("--image-size", type=int, default=32)
    net.add_argument("--channels", type=int, choices=(1, 3), default=3)
    net.add_argument("--base-channels", type=int, default=128)
    net.add_argument("--channel-mults", type=_numbers, default=(1, 2, 2, 2), metavar="1,2,2,2")
    net.add_argument("--attention-levels", type=_numbers, default=(1,), metavar="1")
    net.add_argument("--num-res-blocks", type=int, default=2)
    net.add_argument("--groups", type=int, default=16)
    net.add_argument("--conv-multiple", type=int, default=8)
    net.add_argument("--linear-multiple", type=int, default=16)
    net.add_argument("--timesteps", type=int, default=1000)
    net.add_argument("--dropout", type=float, default=0.1)
    recipe = p.add_argument_group("recipe")
    recipe.add_argument("--batch-size", type=int, default=128)
    recipe.add_argument("--lr", type=float, default=4e-4)
    recipe.add_argument("--warmup-steps", type=int, default=5000)
    recipe.add_argument("--grad-clip", type=float, default=1.0)
    recipe.add_argument("--ema-decay", type=float, default=0.9999)
    recipe.add_argument("--middle-widths", type=int, default=1, help="random widths per step beside the two ends")
    recipe.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the images")
    recipe.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU or a CPU with AMX"
    )
    p.add_argument("--threads", type=int, default=0, help="0 leaves it to torch")
    p.add_argument("--save-every", type=float, default=300.0, metavar="SECONDS")
    p.add_argument("--samples-every", type=int, default=50_000, metavar="IMAGES", help="also drawn at the end")
    return p


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(item) for item in text.split(",") if item)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parser().parse_args(argv)
    return guarded(lambda: train(arguments))


def train(arguments: argparse.Namespace) -> None:
    """Train, or go on where the folder's state stopped.

    Raises:
        DdsmError: data or options that do not fit, or a state of another training.
    """
    a = arguments
    spec = spec_from_options(a)
    check_numbers(a)
    # Imported here so that --help and a wrong option answer at once, without torch.
    import torch

    from ddsm_engine.dataset import load_images
    from ddsm_export.supernet import load_supernet
    from ddsm_export.training.trainer import (
        TrainConfig,
        Trainer,
        fingerprint,
        initial_state,
        load_state,
        run_training,
        state_from_weights,
    )

    if a.device == "cuda" and not torch.cuda.is_available():
        raise BackendError("torch sees no CUDA device here; use --device cpu")
    if a.threads:
        torch.set_num_threads(a.threads)
    schedule = NoiseSchedule(1e-4, 0.02, a.timesteps)
    config = TrainConfig(
        batch_size=a.batch_size,
        learning_rate=a.lr,
        warmup_steps=a.warmup_steps,
        grad_clip=a.grad_clip,
        ema_decay=a.ema_decay,
        middle_widths=a.middle_widths,
        flip=a.flip,
        seed=a.seed,
    )
    images = load_images(a.data, channels=spec.channels, image_size=spec.image_size)
    widths = spec.widths()
    init = None if a.init is None else load_supernet(a.init)
    if init is not None and init.spec != spec:
        raise SpecError(f"{a.init} is a supernet of another architecture: {init.spec.to_json()}")
    identity = fingerprint(spec, schedule, widths, config, images, init)
    provenance: dict[str, Any] = {"data": {"name": a.data.name, **identity["images"]}}
    if init is not None:
        provenance["init"] = dict(init.provenance)
    native = a.device == "cuda" or torch.cpu._is_amx_tile_supported()
    bf16 = a.precision == "bf16" or (a.precision == "auto" and native)
    steps = -(-a.images // a.batch_size)
    a.output.mkdir(parents=True, exist_ok=True)
    with only_one_process(a.output):
        clear_leftovers(a.output)
        clear_leftovers(a.output / SAMPLES)
        if (a.output / STATE).exists():
            state = load_state(identity, a.output / STATE)
        else:
            state = initial_state(spec, a.seed) if init is None else state_from_weights(init.weights)
        print(
            f"{len(images)} images, widths {', '.join(spec.label(w) for w in widths)}, {'bf16' if bf16 else 'fp32'}; "
            f"{'resuming at' if state.step else 'from'} step {state.step} of {steps}",
            file=sys.stderr,
        )
        trainer = Trainer(
            spec, schedule, widths, config, images, state, bf16=bf16, device=a.device, provenance=provenance
        )
        with _Progress(trainer, identity, a.output, steps, a.samples_every) as progress:
            run_training(
                trainer, steps=steps, save_every_s=a.save_every, on_step=progress.advance, on_save=progress.save
            )
        progress.draw()
    print(f"{a.output / SUPERNET}: cut it with: ddsm-export {a.output / SUPERNET}")


def check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse what a training would only stumble over, or take for something else, when it has begun.

    Raises:
        SpecError: a number that cannot be.
    """
    for name, found in vars(arguments).items():
        option = f"--{name.replace('_', '-')}"
        if name in POSITIVE and not 0 < found < math.inf:
            raise SpecError(f"{option} must be positive and finite, found {found}")
        if name in LIMITS:
            least, most = LIMITS[name]
            if not least <= found <= most:
                expected = f"at least {least}" if most == math.inf else f"{least} to {most}"
                raise SpecError(f"{option} must be {expected}, found {found}")


def spec_from_options(arguments: argparse.Namespace) -> UNetSpec:
    """The architecture that the options name; its full width must be possible.

    Raises:
        SpecError: it cannot exist.
    """
    a = arguments
    spec = UNetSpec(
        image_size=a.image_size,
        channels=a.channels,
        base_channels=a.base_channels,
        channel_mults=a.channel_mults,
        attention_levels=a.attention_levels,
        num_res_blocks=a.num_res_blocks,
        groups=a.groups,
        conv_multiple=a.conv_multiple,
        linear_multiple=a.linear_multiple,
        timesteps=a.timesteps,
        time_features=a.base_channels,
        time_dim=4 * a.base_channels,
        dropout=a.dropout,
    )
    spec.check_width(a.base_channels)
    return spec


def forget_log_after(log: Path, step: int) -> None:
    """Drop the lines of steps that a kill undid (they are taken again), and one that it cut off in the middle."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if not json.loads(line)["step"] <= step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    write_atomically(log, "".join(kept).encode())


class _Progress:
    """What a training shows and leaves behind: bar or lines, log, state, supernet, samples."""

    def __init__(
        self, trainer: "Trainer", identity: Mapping[str, Any], output: Path, steps: int, samples_every: int
    ) -> None:
        self.trainer, self.identity, self.output = trainer, identity, output
        self.steps_between_samples = max(1, samples_every // trainer.config.batch_size)
        self.first_step, self.started, self.logged = trainer.state.step, time.monotonic(), 0.0
        forget_log_after(output / LOG, self.first_step)
        self.bar = tqdm(total=steps, initial=self.first_step, unit="step", disable=not sys.stderr.isatty())

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, _: Mapping[int, float]) -> None:
        """After every step."""
        self.bar.update()
        if time.monotonic() - self.logged > LOG_EVERY_S:
            self.log()
        if self.trainer.state.step % self.steps_between_samples == 0:
            self.draw()

    def log(self) -> None:
        """One line of ``log.jsonl``, with the running loss of every width."""
        self.logged = time.monotonic()
        state = self.trainer.state
        rate = (state.step - self.first_step) * self.trainer.config.batch_size / (self.logged - self.started)
        loss = {f"w{width:03d}": round(value, 4) for width, value in sorted(state.losses.items())}
        line = {"step": state.step, "images": self.trainer.images_seen, "images_per_s": round(rate, 2), "loss": loss}
        with (self.output / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        self.bar.set_postfix(loss)
        if self.bar.disable:
            print(json.dumps(line), file=sys.stderr, flush=True)

    def save(self) -> None:
        """The state to resume from, and the supernet so far."""
        from ddsm_export.supernet import save_supernet
        from ddsm_export.training.trainer import save_state

        save_state(self.trainer.state, self.identity, self.output / STATE)
        save_supernet(self.trainer.supernet(), self.output / SUPERNET)

    def draw(self) -> None:
        """A grid of samples per width."""
        from ddsm_export.training.samples import save_grids

        save_grids(self.trainer.supernet(), self.trainer.widths, self.output / SAMPLES)


if __name__ == "__main__":
    sys.exit(main())
