"""Sandwich training: one step, the state that survives a kill, and the loop.

The product holds no slimmable layer. A width is trained by narrowing the full parameters (a differentiable view) and
calling the static network of that width with them; gradients of all widths of a step add up in the full parameters.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from torch.func import functional_call

from ddsm_engine.errors import CheckpointError
from ddsm_engine.files import atomic_path
from ddsm_engine.networks.slicing import empty_unet, slice_weights
from ddsm_engine.networks.unet import UNet
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.spec import UNetSpec
from ddsm_engine.time_table import sinusoid
from ddsm_engine.untrusted import TensorFile, brief, open_safetensors, parse_json, shapes_of
from ddsm_export.supernet import Supernet, save_tensors

LOSS_MEMORY = 0.95
"""Decay of the running loss that is shown per width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything that decides the weights; a resumed training must agree with it.

    Attributes:
        batch_size: Images per step; every width of the step sees all of them with its own timesteps and noise.
        learning_rate: Adam's, after the warm-up.
        warmup_steps: Steps over which the learning rate rises linearly.
        grad_clip: Largest norm of the summed gradient.
        ema_decay: Ceiling of the averaging decay min(ceiling, (1 + n) / (10 + n)) after n steps.
        middle_widths: Random widths per step between the smallest and the largest (published: 1).
        flip: Mirror half of the images.
        seed: Of initialisation, order, timesteps, noise and widths.
    """

    batch_size: int = 128
    learning_rate: float = 4e-4
    warmup_steps: int = 5000
    grad_clip: float = 1.0
    ema_decay: float = 0.9999
    middle_widths: int = 1
    flip: bool = True
    seed: int = 0


@dataclass(slots=True)
class TrainingState:
    """What training changes: restored, it continues as if it had never stopped."""

    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    first_moment: dict[str, Tensor]
    second_moment: dict[str, Tensor]
    step: int
    losses: dict[int, float]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors under one flat naming, for the state file."""
        groups = {
            "weights": self.weights, "ema": self.ema, "adam1": self.first_moment, "adam2": self.second_moment
        }  # fmt: skip
        return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def to(self, device: torch.device) -> None:
        """Move every tensor."""
        for tensors in (self.weights, self.ema, self.first_moment, self.second_moment):
            tensors |= {name: tensor.to(device) for name, tensor in tensors.items()}


def initial_state(spec: UNetSpec, seed: int) -> TrainingState:
    """Initialise as pytorch-ddpm does: Xavier uniform, zero biases, and 1e-5 gain where a residual branch ends."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, parameter in empty_unet(spec, spec.base_channels).named_parameters():
        if "norm" in name and name.endswith("weight"):
            weights[name] = torch.ones(parameter.shape)
        elif name.endswith("bias"):
            weights[name] = torch.zeros(parameter.shape)
        else:
            gain = 1e-5 if name.endswith(("conv2.weight", "attention.out.weight", "tail.conv.weight")) else 1.0
            tensor = torch.empty(parameter.shape)
            torch.nn.init.xavier_uniform_(tensor, gain=gain, generator=generator)
            weights[name] = tensor
    return state_from_weights(weights)


def state_from_weights(weights: Mapping[str, Tensor]) -> TrainingState:
    """A training that begins at these weights: no step taken, no moment known."""
    return TrainingState(
        weights={name: tensor.clone() for name, tensor in weights.items()},
        ema={name: tensor.clone() for name, tensor in weights.items()},
        first_moment={name: torch.zeros_like(tensor) for name, tensor in weights.items()},
        second_moment={name: torch.zeros_like(tensor) for name, tensor in weights.items()},
        step=0,
        losses={},
    )


def widths_of_step(widths: tuple[int, ...], middle: int, generator: torch.Generator) -> tuple[int, ...]:
    """The sandwich rule (Yu & Huang 2019): the largest, the smallest, and ``middle`` random others."""
    smallest, *between, largest = widths if len(widths) > 1 else (widths[0], widths[0])
    order = torch.randperm(len(between), generator=generator)[:middle].tolist()
    chosen = (largest, smallest, *(between[i] for i in order))
    return chosen if largest != smallest else (largest,)


class Trainer:
    """Owns the state, the optimiser over it, and the static networks the widths are called through.

    ``bf16`` computes under autocast on ``device``; neither is part of the recipe, so a training may resume on another
    machine. Random numbers are drawn on the CPU (but for dropout), and are the same everywhere.
    ``provenance`` (data, what it began from) is passed on to the supernet.
    """

    def __init__(
        self,
        spec: UNetSpec,
        schedule: NoiseSchedule,
        widths: tuple[int, ...],
        config: TrainConfig,
        images: NDArray[np.uint8],
        state: TrainingState,
        *,
        bf16: bool,
        device: str = "cpu",
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.bf16, self.device, self.provenance = bf16, torch.device(device), provenance or {}
        self.spec, self.schedule, self.widths, self.config, self.state = spec, schedule, widths, config, state
        self.images = images
        self.networks: dict[int, UNet] = {width: empty_unet(spec, width).train() for width in widths}
        alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod).to(self.device)
        self.signal, self.noise = alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float()
        self.time_table = torch.from_numpy(sinusoid(range(schedule.timesteps), spec.time_features)).to(self.device)
        state.to(self.device)
        # A state that was read has another order, and the order of the clip's sum decides its last bit.
        state.weights, state.ema = dict(sorted(state.weights.items())), dict(sorted(state.ema.items()))
        for tensor in state.weights.values():
            tensor.requires_grad_()
        self.optimizer = torch.optim.Adam(state.weights.values(), lr=config.learning_rate, fused=True)
        for name, weight in state.weights.items():
            self.optimizer.state[weight] = {
                "step": torch.tensor(float(state.step), device=self.device),
                "exp_avg": state.first_moment[name],
                "exp_avg_sq": state.second_moment[name],
            }

    def step(self) -> dict[int, float]:
        """Train one step on every width of the sandwich; returns each width's loss.

        Raises:
            CheckpointError: a loss is not finite; the state file still holds the last good one.
        """
        config, state = self.config, self.state
        seed = config.seed * 1_000_003 + state.step + 1
        generator = torch.Generator().manual_seed(seed)
        x_0 = self._batch(generator)
        losses = {}
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)  # dropout takes no generator
            for width in widths_of_step(self.widths, config.middle_widths, generator):
                loss = self._loss(width, x_0, generator)
                loss.backward()  # type: ignore[no-untyped-call]
                losses[width] = loss.item()
                if not math.isfinite(losses[width]):
                    raise CheckpointError(
                        f"the loss of width {width} is {losses[width]} at step {state.step}; lower --lr"
                    )
        torch.nn.utils.clip_grad_norm_(state.weights.values(), config.grad_clip)
        rate = config.learning_rate * min(1.0, (state.step + 1) / max(1, config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        decay = min(config.ema_decay, (1 + state.step) / (10 + state.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(state.ema.values()), list(state.weights.values()), 1 - decay)
        for width, value in losses.items():
            state.losses[width] = LOSS_MEMORY * state.losses.get(width, value) + (1 - LOSS_MEMORY) * value
        return losses

    def _batch(self, generator: torch.Generator) -> Tensor:
        """The step's images in [-1, 1]; position in the shuffled epochs follows from the step alone."""
        count, size = len(self.images), self.config.batch_size
        positions = range(self.state.step * size, (self.state.step + 1) * size)
        picked = np.array([_epoch_order(count, self.config.seed, p // count)[p % count] for p in positions])
        x_0 = torch.from_numpy(self.images[picked]).float() / 127.5 - 1
        if self.config.flip:
            mirrored = torch.rand(size, generator=generator) < 0.5
            x_0[mirrored] = x_0[mirrored].flip(-1)
        return x_0.to(self.device)

    def _loss(self, width: int, x_0: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of the predicted noise (Ho et al. 2020, equation 14); timesteps are stratified."""
        size = len(x_0)
        strata = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        t = (strata * self.schedule.timesteps).long().clamp(max=self.schedule.timesteps - 1).to(self.device)
        eps = torch.randn(x_0.shape, generator=generator).to(self.device)
        x_t = self.signal[t, None, None, None] * x_0 + self.noise[t, None, None, None] * eps
        network = self.networks[width]
        parameters = slice_weights(self.state.weights, network)
        if self.bf16:
            x_t = x_t.to(memory_format=torch.channels_last)  # the layout of bf16 convolutions
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            predicted = functional_call(network, parameters, (x_t, self.time_table[t]))
        return (predicted.float() - eps).square().mean()

    @property
    def images_seen(self) -> int:
        """Images drawn so far; each passed through every width of its step."""
        return self.state.step * self.config.batch_size

    def supernet(self) -> Supernet:
        """The averaged weights as a supernet, with how they were made."""
        return Supernet(
            spec=self.spec,
            noise_schedule=self.schedule,
            weights={name: tensor.clone().cpu() for name, tensor in self.state.ema.items()},
            provenance={
                "weights": "ema",
                "steps": self.state.step,
                "images": self.images_seen,
                "widths": list(self.widths),
                "loss": {str(width): round(loss, 5) for width, loss in sorted(self.state.losses.items())},
                "config": asdict(self.config),
                **self.provenance,
            },
        )


@lru_cache(maxsize=2)  # a batch may span two epochs
def _epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def fingerprint(
    spec: UNetSpec,
    schedule: NoiseSchedule,
    widths: tuple[int, ...],
    config: TrainConfig,
    images: NDArray[np.uint8],
    init: Supernet | None = None,
) -> dict[str, Any]:
    """What a resumed training must agree with."""
    return {
        "spec": spec.to_json(),
        "noise_schedule": schedule.to_json(),
        "widths": list(widths),
        "config": asdict(config),
        "images": {"shape": list(images.shape), "sha256": sha256(images.tobytes()).hexdigest()},
        "init": None if init is None else dict(init.provenance),
    }


def save_state(state: TrainingState, identity: Mapping[str, Any], path: Path) -> None:
    """Write the whole state; a kill leaves the old file or the new one."""
    header = {
        "format": "ddsm-training",
        "identity": json.dumps(identity),
        "step": str(state.step),
        "losses": json.dumps(state.losses),
    }
    with atomic_path(path) as temporary:
        save_tensors({name: t.detach().cpu().contiguous() for name, t in state.tensors.items()}, temporary, header)


def load_state(identity: Mapping[str, Any], path: Path) -> TrainingState:
    """Read what ``save_state`` wrote; names and shapes are compared with the spec before a tensor is read.

    Raises:
        CheckpointError: unreadable, or of a training with other settings.
    """
    try:
        with open_safetensors(path, "pt") as file:
            header = file.metadata() or {}
            step, losses = _progress(header)
            _check_same_training(parse_json(header["identity"]), identity, path)
            tensors = _read_tensors(file, UNetSpec.from_json(identity["spec"]))
    except (SafetensorError, KeyError, ValueError, OverflowError) as error:
        detail = str(error)[:300]
        raise CheckpointError(f"{path} is not a readable training state: {detail}; remove it to start anew") from error

    def group(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    return TrainingState(group("weights/"), group("ema/"), group("adam1/"), group("adam2/"), step, losses)


def _progress(header: Mapping[str, str]) -> tuple[int, dict[int, float]]:
    """Step and running losses of a state file's header."""
    step, losses = parse_json(header["step"]), parse_json(header["losses"])
    if type(step) is not int or not 0 <= step < 1 << 53 or not isinstance(losses, dict):
        raise ValueError(f"step and losses are {brief(step)} and {brief(losses)}")
    if not all(width.isdecimal() and isinstance(loss, float | int) for width, loss in losses.items()):
        raise ValueError(f"losses are {brief(losses)}, expected a number for each width")
    return step, {int(width): float(loss) for width, loss in losses.items()}


def _check_same_training(found: object, identity: Mapping[str, Any], path: Path) -> None:
    if not isinstance(found, dict):
        raise KeyError(f"its identity is {brief(found)}")
    different = [k for k in identity if identity[k] != found.get(k)]
    if different:
        raise CheckpointError(
            f"{path} belongs to a training with another {', '.join(different)}; give the same options to resume it, "
            f"or another output folder to start anew"
        )


def _read_tensors(file: TensorFile, spec: UNetSpec) -> dict[str, Tensor]:
    weights = {name: tuple(p.shape) for name, p in empty_unet(spec, spec.base_channels).named_parameters()}
    groups = ("weights", "ema", "adam1", "adam2")
    expected = {f"{group}/{name}": shape for group in groups for name, shape in weights.items()}
    if shapes_of(file) != expected:
        raise ValueError("its tensors are not those of this architecture")
    return {name: file.get_tensor(name).float() for name in expected}


def run_training(
    trainer: Trainer,
    *,
    steps: int,
    save_every_s: float,
    on_step: Callable[[dict[int, float]], None],
    on_save: Callable[[], None],
) -> None:
    """Train up to ``steps`` in all; ``on_save`` is called at intervals, on Ctrl-C and at the end."""
    saved = time.monotonic()
    try:
        while trainer.state.step < steps:
            on_step(trainer.step())
            if time.monotonic() - saved > save_every_s:
                on_save()
                saved = time.monotonic()
    except CheckpointError:
        raise  # weights that gave no finite loss must not replace the last good state
    except BaseException:
        on_save()
        raise
    on_save()
