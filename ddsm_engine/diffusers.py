"""diffusers over a bundle: the pipeline that people know, and the network class that a sub-network needs there.

The only module of the run time that imports diffusers, and beside the torch backend the only one that imports torch.
"""

from collections.abc import Callable, Mapping, Sequence
from inspect import isclass
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import torch

# ModelMixin is unused here, but diffusers loads a class of another module only if that module holds its base class.
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,  # noqa: F401
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.models.embeddings import Timesteps
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from torch import Tensor, nn

from ddsm_engine.backends.engine import Precision
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import BackendError, BundleError, CheckpointError, OutputError, SamplerError
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.pipeline import Pipeline, choose_batch_size
from ddsm_engine.strategy import Strategy
from ddsm_engine.untrusted import brief, one_line

OUTPUT_TYPES = ("pil", "np", "numpy", "pt")

OnStepEnd = Callable[["DDSMPipeline", int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]
"""``callback_on_step_end`` of diffusers: the pipeline, the number of the call, its timestep, and the tensors asked for;
what it returns under ``latents`` replaces the state."""


class SubNetworkUNet2DModel(UNet2DModel):
    """``UNet2DModel`` with a time projection that is wider than its first level.

    Every width of a supernet reads all columns of the one time table, where ``UNet2DModel`` has as many as its first
    level has channels. The config has one field more, ``time_features``: the columns. Import this module before
    ``DDPMPipeline.from_pretrained`` meets such a folder: diffusers loads no class of a module that is not imported.
    """

    def __init__(self, *, time_features: int, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.register_to_config(time_features=time_features)
        self.time_proj = Timesteps(time_features, self.config.flip_sin_to_cos, self.config.freq_shift)
        self.time_embedding.linear_1 = nn.Linear(time_features, self.time_embedding.linear_1.out_features)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        # diffusers reads the fields of a config from one signature, and ours are spread over two.
        keys: set[str] = UNet2DModel._get_init_keys(input_class) | UNet2DModel._get_init_keys(UNet2DModel)
        return keys

    @classmethod
    def from_pretrained(cls, path: str | Path, *, output_loading_info: bool = False, **kwargs: Any) -> Any:  # noqa: ANN401
        """Load a folder, refusing what diffusers itself would fill with random numbers or leave out with a warning.

        Args:
            path: The folder, or the name of a repository.
            output_loading_info: Whether to return (network, what was loaded).
            kwargs: As those of ``UNet2DModel.from_pretrained``.

        Raises:
            CheckpointError: weights that are missing, or that the network does not have.
        """
        network, loaded = super().from_pretrained(path, output_loading_info=True, **kwargs)
        for what in ("missing", "unexpected", "mismatched"):
            if names := loaded[f"{what}_keys"]:
                raise CheckpointError(f"{path} does not hold this network's weights: {what} {brief(sorted(names))}")
        return (network, loaded) if output_loading_info else network


def ddpm_scheduler(schedule: NoiseSchedule, prediction_type: str) -> DDPMScheduler:
    """The scheduler of diffusers that samples as DDSM was published: ancestral, every timestep, nothing clipped."""
    return DDPMScheduler(
        num_train_timesteps=schedule.timesteps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule=schedule.type,
        variance_type=schedule.variance_type,
        prediction_type=prediction_type,
        clip_sample=False,
    )


def scheduler_of(bundle: Bundle) -> SchedulerMixin:
    """The scheduler that a bundle carries, or DDPM as DDSM was published where it carries none.

    Raises:
        BundleError: a damaged one, or one that diffusers does not have.
    """
    config = bundle.scheduler_config()
    if config is None:
        return ddpm_scheduler(bundle.manifest.noise_schedule, bundle.manifest.prediction_type)
    name = config.get("_class_name")
    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    is_scheduler = isclass(kind) and issubclass(kind, SchedulerMixin)
    if not is_scheduler:
        raise BundleError(f"{bundle.path} was exported with the scheduler {brief(name)}, which this diffusers lacks")
    try:
        return kind.from_config(config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise BundleError(f"{bundle.path} has a scheduler that diffusers refuses: {one_line(error)}") from error


class DDSMPipeline(DiffusionPipeline):
    """Draws images from a bundle, called as diffusers' own unconditional pipelines are.

    ``scheduler`` is a scheduler of diffusers and is replaced as usual, ``pipe.scheduler =
    DDIMScheduler.from_config(pipe.scheduler.config)``: its class and config say how the engines are walked through, its
    ``step`` is not called. The networks are ``engines``, a ``ddsm_engine.Pipeline``, which stay open between calls.
    """

    _callback_tensor_inputs = ("latents",)

    def __init__(self, engines: Pipeline, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(engines=engines, scheduler=scheduler)

    @classmethod
    def from_pretrained(
        cls,
        bundle: Path | str,
        *,
        backend: str = "auto",
        device: str | torch.device = "auto",
        precision: Precision = "auto",
        threads: int = 0,
    ) -> "DDSMPipeline":
        """Open a bundle; the arguments are those of ``ddsm_engine.Pipeline.from_bundle``; a device may be torch's.

        Its scheduler is the one that the bundle carries, or DDPM as DDSM was published.

        Raises:
            BundleError: no bundle, a damaged one, or a scheduler that diffusers does not have.
            BackendError: a backend that is not installed, or a device that is none.
        """
        engines = Pipeline.from_bundle(
            bundle, backend=backend, device=str(device), precision=precision, threads=threads
        )
        return cls(engines, scheduler_of(engines.bundle))

    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        strategy: Strategy | str | Path | None = None,
        eta: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,  # noqa: FBT001, FBT002 - as in diffusers
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images; noise is drawn in diffusers' order, so that its pipelines make the same images of a seed.

        Args:
            batch_size: How many images; they run at once.
            generator: Of the noise, or one per image; None draws from torch's own.
            num_inference_steps: Steps of the scheduler. None: those that the strategy was made for if it is one over
                calls, else every timestep for DDPM and 50 for the others.
            strategy: A strategy, ``uniform:4/8``, the name of one in the bundle, or a file. None: the bundle's strategy
                if it has exactly one, else the variant that costs most at every call.
            eta: DDIM's share of fresh noise, 0 to 1.
            output_type: ``pil``, ``np`` (float32 [N, H, W, C] in [0, 1]) or ``pt`` (float32 [N, C, H, W] in [0, 1]).
            return_dict: Whether to return an ``ImagePipelineOutput`` rather than a tuple.
            callback_on_step_end: Called after every call of a network as ``(pipe, step_index, timestep, tensors)``. A
                returned dictionary's ``latents`` replace the state. Whatever the scheduler, they are the sample as the
                network reads it (variance preserving), where diffusers scales some schedulers' by √(1 + σ²).
            callback_on_step_end_tensor_inputs: The tensors it is given; there are ``latents`` only.

        Raises:
            DdsmError: an argument that does not fit, or a value that is not finite.
        """
        choose_batch_size(batch_size, batch_size)
        if output_type not in OUTPUT_TYPES:
            raise SamplerError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, found {brief(output_type)}")
        if unknown := [name for name in callback_on_step_end_tensor_inputs if name != "latents"]:
            raise SamplerError(f"callback_on_step_end_tensor_inputs has 'latents' only, found {brief(unknown)}")
        chosen = self._strategy(strategy)
        steps = self._steps(chosen) if num_inference_steps is None else num_inference_steps
        sampler = {**self.scheduler.config, "_class_name": type(self.scheduler).__name__}
        plan = self.engines.plan(chosen, sampler, steps, eta=eta)
        shape = (batch_size, *self.engines.bundle.manifest.spec.sample_shape)
        noise = _noise_of(generator, shape)
        # These schedulers draw in every call, and multiply by 0 where a step adds no noise.
        draws_always = bool(eta) or plan.sampler.startswith("sde-")

        with self.progress_bar(total=len(plan.variants)) as bar:

            def on_call(call: int, t: float, x: NDArray[Any]) -> None:
                if draws_always and not plan.update[call, :, -1].any():
                    noise()
                if callback_on_step_end is not None:
                    latents = torch.from_numpy(x.copy())
                    given = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    timestep = torch.tensor(int(t) if t.is_integer() else t)
                    returned = callback_on_step_end(self, call, timestep, given) or {}
                    x[...] = _checked(returned.get("latents", latents), latents)
                bar.update()

            result = self.engines.draw(
                plan,
                num_images=batch_size,
                batch_size=batch_size,
                x_T=noise(),
                noise=lambda _: noise(),
                callback=on_call,
            )
        images = _images(torch.from_numpy(result.x_final), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _strategy(self, given: Strategy | str | Path | None) -> Strategy:
        if given is not None:
            return given if isinstance(given, Strategy) else self.engines.strategy(given)
        bundle = self.engines.bundle
        names = list(bundle.strategies())
        if len(names) == 1:
            return Strategy.load(bundle.strategy_file(names[0]))
        return Strategy((bundle.full.id,) * bundle.manifest.spec.timesteps, provenance={"kind": "uniform"})

    def _steps(self, strategy: Strategy) -> int:
        """The defaults of diffusers' DDPM and DDIM pipelines."""
        timesteps = self.engines.bundle.manifest.spec.timesteps
        every = isinstance(self.scheduler, DDPMScheduler)
        return strategy.steps or (timesteps if every else min(50, timesteps))

    @property
    def device(self) -> torch.device:
        """Where the engines run; the state between their calls is on the host."""
        return torch.device(self.engines.options.device)

    def to(
        self,
        *args: object,
        device: object = None,
        dtype: object = None,
        silence_dtype_warnings: bool = False,  # noqa: ARG002
    ) -> "DDSMPipeline":
        """Stay: engines are opened for one device and precision.

        Raises:
            BackendError: another device than theirs, or another number type than float32, that of the images.
        """
        here = str(self.device)
        for wanted in (*args, device, dtype):
            if wanted not in (None, torch.float32) and str(wanted) not in (here, f"{here}:0"):
                raise BackendError(
                    f"the engines run on {here} and exchange float32, and cannot be moved to {brief(wanted)}: open the "
                    f"bundle anew with from_pretrained(bundle, device=…, precision=…)"
                )
        return self

    def save_pretrained(self, *_: object, **__: object) -> NoReturn:
        """Refuse: what there is to save is the bundle.

        Raises:
            OutputError: always.
        """
        raise OutputError(f"this pipeline is the bundle {self.engines.bundle.path}: copy that folder instead")

    def close(self) -> None:
        """Close every engine; the next call opens them again."""
        self.engines.close()


def _noise_of(
    generator: torch.Generator | list[torch.Generator] | None, shape: tuple[int, ...]
) -> Callable[[], NDArray[Any]]:
    """Standard normals, float32 of the shape at every call, drawn as diffusers' pipelines draw them."""
    generators = generator if isinstance(generator, list) else [generator]
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise SamplerError(f"expected one generator, or one for each of {shape[0]} images, found {len(generator)}")
    device = generators[0].device if generators[0] is not None else None
    return lambda: randn_tensor(shape, generator=generator, device=device, dtype=torch.float32).cpu().numpy()


def _checked(latents: Tensor, expected: Tensor) -> NDArray[Any]:
    if not isinstance(latents, Tensor) or latents.shape != expected.shape:
        found = tuple(latents.shape) if isinstance(latents, Tensor) else brief(latents)
        raise SamplerError(f"callback_on_step_end must return latents of {tuple(expected.shape)}, found {found}")
    return latents.detach().float().cpu().numpy()


def _images(x_final: Tensor, output_type: str) -> Any:  # noqa: ANN401 - a list of pictures, an array or a tensor
    images = (x_final / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    array = images.permute(0, 2, 3, 1).numpy()
    return DiffusionPipeline.numpy_to_pil(array) if output_type == "pil" else array
