"""The ways to run a strategy that ``benchmarks.peers`` compares: ours, and what people would otherwise write.

Every contender draws by the same walk: evenly strided ancestral sampling, which is DDIM with η = 1. Only ours and the
published loop bring a loop of their own; ONNX Runtime, OpenVINO and torch.compile get the one that people write.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.cifar10 import some_calls
from benchmarks.dynamic_torch import DynamicLoop, DynamicUNet, PeerPrecision
from ddsm_engine.backends.torch import network_from_weights
from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.errors import BackendError
from ddsm_engine.noise import INITIAL, PER_CALL, SeededNoise
from ddsm_engine.pipeline import Pipeline
from ddsm_engine.samplers import make_sampler
from ddsm_engine.strategy import Strategy
from ddsm_engine.untrusted import one_line
from ddsm_export.diffusers import diffusers_unet

Images = NDArray[np.float32]

Array = TypeVar("Array", Images, Tensor)

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Walk:
    """The calls of a run: a timestep, noisiest first, and a width for each."""

    timesteps: tuple[int, ...]
    widths: tuple[int, ...]


def even_walk(bundle: Bundle, widths: Sequence[int], calls: int) -> Walk:
    """An even part of the timesteps, each with its entry of ``widths`` (one per timestep, the clean end first)."""
    sampler = make_sampler("ddim", bundle.manifest.noise_schedule, calls, eta=1.0)
    timesteps = [int(t) for t in sampler.timesteps]
    return Walk(tuple(timesteps), tuple(widths[t] for t in timesteps))


class GivenNoise:
    """The noise of a seed, so that every contender can be given the same."""

    def __init__(self, seed: int, shape: tuple[int, ...]) -> None:
        self.seed, self._shape, self._source = seed, shape, SeededNoise(seed)

    def start(self) -> Images:
        """The initial state, float32 [B, C, H, W]."""
        return self._draw(INITIAL, 0)

    def of_call(self, call: int) -> Images:
        """Fresh noise of a call, of the same shape."""
        return self._draw(PER_CALL, call)

    def _draw(self, stream: int, call: int) -> Images:
        out = np.empty(self._shape, np.float32)
        self._source.fill(out, stream, call)
        return out


Draw = Callable[[GivenNoise | None], Images]
"""Draws a batch, with the given noise or with a contender's own; the final state, not clipped."""


class Contender(ABC):
    """One way to run a strategy, opened for one batch size at a time.

    Attributes:
        name: Unique among the contenders.
        library: The module without which it cannot run.
        precision: What it computes in; known for certain once it is open.
        full_only: Whether it has nothing but the full width.
        batch: Images at a time.
        widths: Those it serves, narrowest first.
    """

    library = "torch"
    full_only = False

    def __init__(self, bundle: Bundle, name: str, precision: str = "fp32") -> None:
        self.bundle, self.name, self.precision = bundle, name, precision
        self.spec = bundle.manifest.spec
        self.batch = 0
        self.widths: tuple[int, ...] = ()

    def open(self, batch: int, widths: Sequence[int]) -> None:
        """Get ready: every width has answered once, so that whatever is compiled at the first call is compiled."""
        self.batch = batch
        self.widths = (self.spec.base_channels,) if self.full_only else tuple(widths)
        self._open()
        noise = GivenNoise(0, self.shape)
        for width in self.widths:
            self.predict(width, 0, noise)

    @property
    def shape(self) -> tuple[int, ...]:
        """[B, C, H, W]."""
        return self.batch, *self.spec.sample_shape

    @abstractmethod
    def _open(self) -> None:
        """Load everything for ``batch`` and ``widths``."""

    @abstractmethod
    def predict(self, width: int, t: int, noise: GivenNoise) -> Images:
        """The predicted noise of ``noise.start()`` at one timestep."""

    @abstractmethod
    def prepare(self, walk: Walk) -> Draw:
        """Whatever is done once for a walk; the rest recurs with every batch of images."""

    @abstractmethod
    def close(self) -> None:
        """Release everything; it can be opened again."""

    def _variant(self, width: int) -> Variant:
        return next(variant for variant in self.bundle.manifest.variants if variant.width == width)


class Ours(Contender):
    """``Pipeline`` as a user opens it; it chooses backend and precision itself."""

    library = "ddsm_engine"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, "ddsm-engine", "auto")

    def open(self, batch: int, widths: Sequence[int]) -> None:
        """As every contender; the precision is known once an engine is open."""
        super().open(batch, widths)
        self.precision = self._pipe.precision

    def _open(self) -> None:
        self._pipe = Pipeline.from_bundle(self.bundle.path)

    def predict(self, width: int, t: int, noise: GivenNoise) -> Images:
        """A run of one call whose update keeps nothing but the network's output."""
        timesteps = self.spec.timesteps
        plan = self._pipe.plan(Strategy.uniform(self._variant(width).id, timesteps), "ddim")
        one = replace(some_calls(plan, [timesteps - 1 - t]), update=np.array([[[0, 1, 0, 0]]], np.float32))
        (batch,) = self._pipe.batches(one, num_images=self.batch, batch_size=self.batch, seed=noise.seed)
        return batch.x_final

    def prepare(self, walk: Walk) -> Draw:
        """Compile the plan."""
        ids, calls = tuple(self._variant(width).id for width in walk.widths), len(walk.widths)
        strategy = Strategy(ids, axis="call", sampler="ddim", steps=calls)
        plan = self._pipe.plan(strategy, "ddim", calls, eta=1.0)

        def draw(noise: GivenNoise | None) -> Images:
            seed = 0 if noise is None else noise.seed
            (batch,) = self._pipe.batches(plan, num_images=self.batch, batch_size=self.batch, seed=seed)
            return batch.x_final

        return draw

    def close(self) -> None:
        """Close the pipeline."""
        self._pipe.close()


class Sliced(Contender):
    """The supernet sliced at run time, as DDSM was published; see ``dynamic_torch``."""

    def __init__(self, bundle: Bundle, network: DynamicUNet, precision: PeerPrecision) -> None:
        super().__init__(bundle, f"torch, sliced at run time, {precision}", precision)
        self._network, self._autocast = network, precision

    def _open(self) -> None:
        """The network serves every width and batch size as it is."""

    def predict(self, width: int, t: int, noise: GivenNoise) -> Images:
        """One forward at the width."""
        loop, mults = self._loop(Walk((t, 0), (width, width)))
        timestep = torch.full((self.batch,), t, dtype=torch.int64)
        return loop.predict(torch.from_numpy(noise.start()), timestep, mults).numpy()

    def prepare(self, walk: Walk) -> Draw:
        """Make the tables."""
        loop, mults = self._loop(walk)

        def draw(noise: GivenNoise | None) -> Images:
            if noise is None:
                return loop.run(torch.randn(self.shape), mults).numpy()
            start = torch.from_numpy(noise.start())
            return loop.run(start, mults, noise=lambda _, call: torch.from_numpy(noise.of_call(call))).numpy()

        return draw

    def _loop(self, walk: Walk) -> tuple[DynamicLoop, list[float]]:
        mults = [1.0] * self.spec.timesteps
        for t, width in zip(walk.timesteps, walk.widths, strict=True):
            mults[t] = width / self.spec.base_channels
        schedule = self.bundle.manifest.noise_schedule
        return DynamicLoop(self._network, schedule, walk.timesteps, self._autocast), mults

    def close(self) -> None:
        """Nothing was opened."""


class Numpy(Contender):
    """A network that takes and returns numpy arrays, in the loop that people write around one."""

    def _open(self) -> None:
        self._rows = self.bundle.time_table(self.bundle.full)[range(self.spec.timesteps)]
        self._alphas: list[float] = self.bundle.manifest.noise_schedule.alphas_cumprod.tolist()
        self._random = np.random.default_rng(0)
        self._load()

    @abstractmethod
    def _load(self) -> None:
        """Load the network of every width."""

    @abstractmethod
    def _network(self, width: int, x: Images, features: Images) -> Images:
        """The predicted noise."""

    def _step(self, width: int, x: Images, t: int) -> Images:
        return self._network(width, x, np.repeat(self._rows[t : t + 1], self.batch, axis=0))

    def predict(self, width: int, t: int, noise: GivenNoise) -> Images:
        """One call of the width's network."""
        return self._step(width, noise.start(), t)

    def prepare(self, walk: Walk) -> Draw:
        """Nothing is done ahead."""

        def normals(_: int) -> Images:
            return self._random.standard_normal(self.shape, dtype=np.float32)

        def draw(noise: GivenNoise | None) -> Images:
            start, fresh = (normals(0), normals) if noise is None else (noise.start(), noise.of_call)
            return ancestral(walk, self._alphas, start, self._step, fresh)

        return draw


class OnnxRuntime(Numpy):
    """One session per width, with the library's defaults."""

    library = "onnxruntime"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, "ONNX Runtime per width")

    def _load(self) -> None:
        # Read when it is imported; unset, it reports sessions to its maker.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime as ort

        self._sessions = {width: ort.InferenceSession(self._file(width)) for width in self.widths}

    def _file(self, width: int) -> str:
        return str(self.bundle.artefact(self._variant(width)))

    def _network(self, width: int, x: Images, features: Images) -> Images:
        eps: Images = self._sessions[width].run(None, {"sample": x, "time_features": features})[0]
        return eps

    def close(self) -> None:
        """Release the sessions."""
        self._sessions.clear()


class OpenVINO(Numpy):
    """One compiled model per width, reshaped to the batch, with the library's defaults."""

    library = "openvino"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, "OpenVINO per width", "auto")

    def _load(self) -> None:
        import openvino as ov

        core = ov.Core()
        self._compiled: dict[int, Any] = {}
        for width in self.widths:
            variant = self._variant(width)
            model = core.read_model(self.bundle.artefact(variant))
            model.reshape({tensor.name: list(tensor.at_batch(self.batch)) for tensor in variant.inputs})
            self._compiled[width] = core.compile_model(model, "CPU")
        hint = self._compiled[self.widths[0]].get_property("INFERENCE_PRECISION_HINT")
        self.precision = {ov.Type.f32: "fp32", ov.Type.f16: "fp16", ov.Type.bf16: "bf16"}[hint]

    def _network(self, width: int, x: Images, features: Images) -> Images:
        eps: Images = self._compiled[width]({"sample": x, "time_features": features})[0]
        return eps

    def close(self) -> None:
        """Release the compiled models."""
        self._compiled.clear()


class Compiled(Contender):
    """``torch.compile`` of one static sub-network per width, channels-last."""

    def __init__(self, bundle: Bundle, precision: PeerPrecision, backend: str = "inductor") -> None:
        super().__init__(bundle, f"torch.compile per width, {precision}", precision)
        self._dtype, self._backend = DTYPES[precision], backend

    def _open(self) -> None:
        weights, table = self.bundle.weights(self.bundle.full), self.bundle.time_table(self.bundle.full)
        self._rows = torch.from_numpy(table[range(self.spec.timesteps)]).to(self._dtype)
        self._alphas: list[float] = self.bundle.manifest.noise_schedule.alphas_cumprod.tolist()
        self._networks: dict[int, Callable[..., Tensor]] = {}
        for width in self.widths:
            network = network_from_weights(weights, self.spec, width).to(self._dtype)
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            # What it cannot compile as one graph, it would otherwise run eagerly without a word.
            self._networks[width] = torch.compile(network, fullgraph=True, dynamic=False, backend=self._backend)

    def _step(self, width: int, x: Tensor, t: int) -> Tensor:
        features = self._rows[t].expand(self.batch, -1)
        try:
            eps = self._networks[width](x.to(self._dtype, memory_format=torch.channels_last), features)
        except RuntimeError as error:
            raise BackendError(f"torch.compile failed at width {width}: {one_line(error)}") from error
        return eps.float()

    def predict(self, width: int, t: int, noise: GivenNoise) -> Images:
        """One call of the width's network."""
        with torch.inference_mode():
            return self._step(width, torch.from_numpy(noise.start()), t).contiguous().numpy()

    def prepare(self, walk: Walk) -> Draw:
        """Nothing is done ahead."""

        def draw(noise: GivenNoise | None) -> Images:
            start = torch.randn(self.shape) if noise is None else torch.from_numpy(noise.start())

            def fresh(call: int) -> Tensor:
                return torch.randn(self.shape) if noise is None else torch.from_numpy(noise.of_call(call))

            with torch.inference_mode():
                return ancestral(walk, self._alphas, start, self._step, fresh).contiguous().numpy()

        return draw

    def close(self) -> None:
        """Release the networks, and let torch forget them: it compiles one function only so often."""
        self._networks.clear()
        torch.compiler.reset()


class Diffusers(Contender):
    """``UNet2DModel`` with the supernet's weights and ``DDIMScheduler``, channels-last: the full width alone."""

    library = "diffusers"
    full_only = True

    def __init__(self, bundle: Bundle, precision: PeerPrecision) -> None:
        super().__init__(bundle, f"diffusers, full width, {precision}", precision)
        self._dtype = DTYPES[precision]

    def _open(self) -> None:
        weights = self.bundle.weights(self.bundle.full)
        network = diffusers_unet(network_from_weights(weights, self.spec, self.spec.base_channels)).to(self._dtype)
        self._network = network.to(memory_format=torch.channels_last)

    def _step(self, x: Tensor, t: int | Tensor) -> Tensor:
        eps: Tensor = self._network(x.to(self._dtype, memory_format=torch.channels_last), t).sample
        return eps.float()

    def predict(self, width: int, t: int, noise: GivenNoise) -> Images:  # noqa: ARG002 - there is but one
        """One call."""
        with torch.inference_mode():
            return self._step(torch.from_numpy(noise.start()), t).contiguous().numpy()

    def prepare(self, walk: Walk) -> Draw:
        """Set the scheduler's timesteps."""
        from diffusers import DDIMScheduler

        schedule = self.bundle.manifest.noise_schedule
        scheduler = DDIMScheduler(
            num_train_timesteps=schedule.timesteps,
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            clip_sample=False,
        )
        scheduler.set_timesteps(len(walk.timesteps))

        def draw(noise: GivenNoise | None) -> Images:
            x = torch.randn(self.shape) if noise is None else torch.from_numpy(noise.start())
            with torch.inference_mode():
                for call, t in enumerate(scheduler.timesteps):
                    given = None if noise is None else torch.from_numpy(noise.of_call(call))
                    x = scheduler.step(self._step(x, t), t, x, eta=1.0, variance_noise=given).prev_sample
            return x.contiguous().numpy()

        return draw

    def close(self) -> None:
        """Release the weights."""
        del self._network


def ancestral(
    walk: Walk,
    alphas: Sequence[float],
    x: Array,
    predict: Callable[[int, Array, int], Array],
    normals: Callable[[int], Array],
) -> Array:
    """The loop that people write (Song et al. 2021, equation 12, η = 1), on numpy arrays or torch tensors.

    Args:
        walk: The calls.
        alphas: ᾱ of every timestep, index 0 the clean end.
        x: The initial state, [B, C, H, W].
        predict: (width, state, timestep) → predicted noise.
        normals: Fresh noise of a call.
    """
    for call, (t, width) in enumerate(zip(walk.timesteps, walk.widths, strict=True)):
        eps = predict(width, x, t)
        here, after = alphas[t], 1.0 if t == walk.timesteps[-1] else alphas[walk.timesteps[call + 1]]
        sigma = math.sqrt((1 - after) / (1 - here) * (1 - here / after))
        x_0 = (x - math.sqrt(1 - here) * eps) / math.sqrt(here)
        x = math.sqrt(after) * x_0 + math.sqrt(1 - after - sigma**2) * eps
        if sigma:
            x = x + sigma * normals(call)
    return x
