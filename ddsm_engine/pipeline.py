"""Bundle + strategy → images: the object a user holds."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index
from pathlib import Path
from types import TracebackType
from typing import SupportsIndex

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.backends import choose_backend, device_of, open_device, open_engines
from ddsm_engine.backends.device import Device, StagedEngine
from ddsm_engine.backends.engine import EngineOptions, Precision
from ddsm_engine.bundle import MANIFEST, Bundle
from ddsm_engine.device_scheduler import DeviceScheduler, OnProgress, takes
from ddsm_engine.errors import BackendError, BundleError, SamplerError
from ddsm_engine.measure.choice import fastest_backend
from ddsm_engine.noise import INITIAL, SeededNoise
from ddsm_engine.plan import Plan, compile_plan
from ddsm_engine.samplers import Sampler, SamplerLike, make_sampler
from ddsm_engine.scheduler import OnCall, Scheduler
from ddsm_engine.strategy import Strategy, parse_uniform
from ddsm_engine.trace import HOST, Trace, TraceSegment, segments_from_clock
from ddsm_engine.untrusted import brief

Images = NDArray[np.float32]

DEFAULT_BATCH = 16
"""Images at a time when the caller does not say: past it, images per second hardly rise on a CPU."""


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """What a run returns.

    Attributes:
        images: float32 [N, C, H, W], clipped to [-1, 1].
        x_final: float32 [N, C, H, W], the state after the last call, not clipped.
        trace: What ran and how long it took.
    """

    images: Images
    x_final: Images
    trace: Trace


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A finished batch of a run.

    Attributes:
        first_image: Number of its first image.
        x_final: float32 [n, C, H, W], not clipped; padding is cut off.
        segments: Its part of the trace.
        latency_ms: Wall time.
        engine_ms: Wall time inside the engines; on a GPU without the host, between the ends of the updates.
        execution: How it ran; see ``Trace``.
    """

    first_image: int
    x_final: Images
    segments: tuple[TraceSegment, ...]
    latency_ms: float
    engine_ms: float
    execution: str = HOST


class Pipeline:
    """Draws images from a bundle.

    Engines stay open between calls, one per variant and batch size. A pipeline serves one thread at a time (its buffers
    belong to the run in progress) and says so when two meet; open one per thread instead.
    """

    def __init__(self, bundle: Bundle, backend: str, options: EngineOptions) -> None:
        self.bundle, self.backend, self.options = bundle, choose_backend(backend, options.device), options
        self.open_ms = 0.0
        self._is_auto = backend == "auto"
        self._settled: dict[tuple[tuple[str, ...], int], str] = {}
        self._schedulers: dict[tuple[str, int], Scheduler] = {}
        # On a GPU: its stream, and beside each scheduler one that runs without the host.
        self._device: Device | None = None
        self._on_device: dict[tuple[str, int], DeviceScheduler] = {}
        self._lock = threading.Lock()
        self._is_closing = False

    @classmethod
    def from_bundle(
        cls,
        path: Path | str,
        *,
        backend: str = "auto",
        device: str = "auto",
        precision: Precision = "auto",
        threads: int = 0,
    ) -> "Pipeline":
        """Open a bundle.

        Args:
            path: The bundle's folder.
            backend: One of ``ddsm_engine.backends``, or ``auto``: the one that was measured to be the fastest (``ddsm
                bench --save``), and where nothing was OpenVINO, or TensorRT on a GPU.
            device: ``cpu``, ``cuda``, or ``auto``: where the backend runs. One that is absent is refused, never
                replaced.
            precision: ``auto`` takes bf16 where the CPU has matrix tiles for it, ``fp32`` is exact.
            threads: Threads per engine; 0 leaves it to the backend.

        Raises:
            BundleError: no bundle, or a damaged one.
            BackendError: a backend that is not installed.
        """
        options = EngineOptions(device=device_of(backend, device), precision=precision, threads=threads)
        return cls(Bundle.open(path), backend, options)

    def strategy(self, text: str | Path) -> Strategy:
        """Find a strategy: ``uniform:4/8``, the name of one in the bundle, or a file.

        Raises:
            StrategyError: unreadable.
            BundleError: neither a file nor a name the bundle knows.
        """
        if str(text).startswith("uniform:"):
            return parse_uniform(str(text), self.bundle.manifest.spec.timesteps)
        path = Path(text)
        return Strategy.load(path if path.is_file() else self.bundle.strategy_file(str(text)))

    def plan(
        self,
        strategy: Strategy | str | Path,
        sampler: SamplerLike | None = None,
        steps: int | None = None,
        *,
        eta: float | None = None,
        clip_sample: float | None = None,
    ) -> Plan:
        """The calls that a run of these arguments makes; see ``__call__``."""
        resolved = strategy if isinstance(strategy, Strategy) else self.strategy(strategy)
        calls = self.sampler(**resolved.sampling(sampler, steps, eta=eta, clip_sample=clip_sample))
        return compile_plan(resolved, calls, self.bundle.manifest.variants, self.bundle.time_tables())

    def sampler(
        self,
        sampler: SamplerLike | None = None,
        steps: int | None = None,
        *,
        eta: float | None = None,
        clip_sample: float | None = None,
    ) -> Sampler:
        """The table of a sampler for the networks of this bundle; see ``__call__``."""
        return make_sampler(
            (self.bundle.scheduler_config() or "ddpm") if sampler is None else sampler,
            self.bundle.manifest.noise_schedule,
            steps,
            prediction_type=self.bundle.manifest.prediction_type,
            eta=eta,
            clip_sample=clip_sample,
        )

    def settle_backend(self, plan: Plan, batch_size: int) -> str:
        """Settle which backend runs a plan, and keep it in ``backend``; ``auto`` asks what was measured."""
        if self._is_auto:
            asked = plan.variants, batch_size
            if asked not in self._settled:  # the tables are files, and every batch asks
                fastest = fastest_backend(self.bundle, plan.variants, self.options, batch_size)
                self._settled[asked] = fastest or choose_backend("auto", self.options.device)
            self.backend = self._settled[asked]
        return self.backend

    def __call__(
        self,
        strategy: Strategy | str | Path,
        sampler: SamplerLike | None = None,
        steps: int | None = None,
        *,
        num_images: int = 1,
        batch_size: int | None = None,
        seed: int = 0,
        eta: float | None = None,
        clip_sample: float | None = None,
        x_T: Images | None = None,
        noise: Callable[[int], Images] | None = None,
        callback: OnCall | None = None,
    ) -> Result:
        """Draw images.

        Args:
            strategy: A strategy, ``uniform:4/8``, the name of one in the bundle, or a file.
            sampler: ``ddim``, ``heun:karras``, the path of a diffusers ``scheduler_config.json``, or such a config as
                a mapping; see ``ddsm_engine.samplers``. None takes that of a strategy over calls, else the bundle's own
                config, or DDPM where it has none.
            steps: Steps of the sampler; None means all timesteps, which only DDPM and DDIM take.
            num_images: How many.
            batch_size: How many at a time; a last partial batch is padded, so an image does not depend on it.
            seed: Noise of image *i* of a seed is the same whatever the batch.
            eta: DDIM's share of fresh noise.
            clip_sample: Clip the predicted clean image to ± this; DDSM was published without.
            x_T: Replaces the initial noise, [num_images, C, H, W].
            noise: ``noise(i)`` replaces the noise of the i-th executed call, [num_images, C, H, W].
            callback: ``callback(call, t, x)`` sees every batch's unclipped state after every call.

        Raises:
            DdsmError: an argument that does not fit the bundle, or a value that is not finite.
        """
        return self.draw(
            self.plan(strategy, sampler, steps, eta=eta, clip_sample=clip_sample),
            num_images=num_images,
            batch_size=batch_size,
            seed=seed,
            x_T=x_T,
            noise=noise,
            callback=callback,
        )

    def draw(
        self,
        plan: Plan,
        *,
        num_images: int = 1,
        batch_size: int | None = None,
        seed: int = 0,
        x_T: Images | None = None,
        noise: Callable[[int], Images] | None = None,
        callback: OnCall | None = None,
    ) -> Result:
        """Draw images by a plan; the arguments are those of ``__call__``.

        Raises:
            DdsmError: an argument that does not fit the bundle, or a value that is not finite.
        """
        size = choose_batch_size(num_images, batch_size)
        source = None
        if x_T is not None or noise is not None:
            source = _InjectedNoise(seed, x_T, noise, (num_images, *self.bundle.manifest.spec.sample_shape))
        batches = list(
            self.batches(plan, num_images=num_images, batch_size=size, seed=seed, callback=callback, source=source)
        )
        x_final = np.concatenate([batch.x_final for batch in batches])
        return Result(np.clip(x_final, -1, 1), x_final, self.trace(batches, size))

    def batches(
        self,
        plan: Plan,
        *,
        num_images: int,
        batch_size: int,
        seed: int = 0,
        callback: OnCall | None = None,
        on_progress: OnProgress | None = None,
        source: "_InjectedNoise | None" = None,
        skip: Callable[[range], bool] = lambda images: False,
    ) -> Iterator[Batch]:
        """Run a plan batch by batch; every variant of it is opened before the first call.

        On a GPU a batch runs without the host, unless noise or callbacks of the caller's, or dynamic thresholding, need
        it between the calls.

        Args:
            plan: See ``plan``.
            num_images: How many in all.
            batch_size: How many at a time.
            seed: Of the noise.
            callback: As in ``__call__``.
            on_progress: Called now and then with the number of this batch's calls that are done.
            source: Injected noise, or None for the seed's.
            skip: Asked with the numbers of a batch's images; True leaves it out.
        """
        batch_size = choose_batch_size(num_images, batch_size)
        seeded = SeededNoise(seed)
        with self._alone():
            scheduler = self._scheduler(plan, batch_size)
            on_device = None
            if callback is None and source is None and takes(plan):
                on_device = self._on_device.get((self.backend, batch_size))
            for number, first in enumerate(range(0, num_images, batch_size)):
                count = min(batch_size, num_images - first)
                if skip(range(first, first + count)):
                    continue
                self._refuse_if_closing()
                started = time.perf_counter()
                if on_device is None:
                    on_call = self._watched(callback, on_progress)
                    clock = scheduler.run(plan, (source or seeded).starting_at(first), on_call)
                else:
                    clock = on_device.run(plan, seeded.starting_at(first), on_progress=on_progress)
                latency_ms = (time.perf_counter() - started) * 1e3
                engine_ms = float((clock[:, 1] - clock[:, 0]).sum()) / 1e6
                segments = tuple(segments_from_clock(plan, number, clock))
                x, execution = (scheduler.x, HOST) if on_device is None else (on_device.x, on_device.execution)
                yield Batch(first, x[:count].copy(), segments, latency_ms, engine_ms, execution)

    def answer(self, plan: Plan, call: int, x: Images, *, batch_size: int) -> Images:
        """What the variant of one call says of samples of your own, without the update that would follow.

        Args:
            plan: See ``plan``.
            call: Which of its calls.
            x: [N, C, H, W]; the last batch is padded.
            batch_size: How many at a time.
        """
        with self._alone():
            scheduler = self._scheduler(plan, batch_size)
            output, batch = np.empty_like(x), np.zeros_like(scheduler.x)
            for first in range(0, len(x), batch_size):
                count = len(x[first : first + batch_size])
                batch[:count] = x[first : first + count]
                output[first : first + count] = scheduler.answer(plan, call, batch)[:count]
        return output

    def trace(self, batches: list[Batch], batch_size: int) -> Trace:
        """The trace of finished batches."""
        return Trace(
            segments=tuple(segment for batch in batches for segment in batch.segments),
            latency_ms=sum(batch.latency_ms for batch in batches),
            engine_ms=sum(batch.engine_ms for batch in batches),
            open_ms=self.open_ms,
            images=sum(len(batch.x_final) for batch in batches),
            batch_size=batch_size,
            backend=self.backend,
            precision=self.precision,
            execution=batches[-1].execution if batches else HOST,
        )

    @property
    def precision(self) -> str:
        """What the open engines compute in; the requested precision while none is open."""
        for (backend, _), scheduler in self._schedulers.items():
            if backend == self.backend:
                for engine in scheduler.engines.values():
                    return engine.precision
        return self.options.precision

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the buffers for one run."""
        if not self._lock.acquire(blocking=False):
            raise BackendError(
                "this Pipeline is in the middle of another run: of another thread (open one Pipeline per thread), or "
                "one whose callback or `batches` is not finished"
            )
        try:
            yield
        finally:
            self._lock.release()
            if self._is_closing:
                self.close()

    def _refuse_if_closing(self) -> None:
        if self._is_closing:
            raise BackendError("the pipeline was closed while it ran; close it after the last batch")

    def _watched(self, callback: OnCall | None, on_progress: OnProgress | None) -> OnCall:
        """The caller's callbacks, and the end of a run whose pipeline was closed meanwhile."""

        def on_call(call: int, t: float, x: Images) -> None:
            if callback is not None:
                callback(call, t, x)
            if on_progress is not None:
                on_progress(call + 1)
            self._refuse_if_closing()

        return on_call

    def _scheduler(self, plan: Plan, batch_size: int) -> Scheduler:
        spec = self.bundle.manifest.spec
        key = self.settle_backend(plan, batch_size), batch_size
        scheduler = self._schedulers.get(key)
        if scheduler is None:
            scheduler = self._schedulers[key] = Scheduler((batch_size, *spec.sample_shape))
        started = time.perf_counter()
        known = self.bundle.variants
        missing = [known[name] for name in dict.fromkeys(plan.variants) if name not in scheduler.engines]
        if missing and self.options.device == "cuda":
            if self._device is None:
                self._device = open_device(self.backend)
            if key not in self._on_device:
                self._on_device[key] = DeviceScheduler(self._device, scheduler.x.shape)
        opened = open_engines(self.backend, self.bundle, missing, batch_size, self.options, self._device)
        try:
            for name, engine in opened.items():
                features = self.bundle.spec(known[name]).time_features
                if isinstance(engine, StagedEngine):
                    self._on_device[key].add(name, engine.engine, features)
                scheduler.add(name, engine, features)  # last: what it holds is not opened again
        except BaseException:
            for name in opened.keys() - scheduler.engines.keys():
                opened[name].close()
            raise
        self.open_ms += (time.perf_counter() - started) * 1e3
        return scheduler

    def close(self) -> None:
        """Close every engine; the next run opens them again.

        No engine is closed within a call: a run in progress is refused its next one, and closes them as it ends.
        """
        self._is_closing = True  # before the lock is tried, so that who holds it sees this when done
        if not self._lock.acquire(blocking=False):
            return
        try:
            while self._on_device:
                self._on_device.popitem()[1].close()
            while self._schedulers:
                self._schedulers.popitem()[1].close()
            if self._device is not None:
                self._device.close()
                self._device = None
            self._is_closing = False
        finally:
            self._lock.release()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _InjectedNoise:
    """The caller's noise where given, the seed's elsewhere; a padded batch gets zeros behind the last image."""

    def __init__(
        self,
        seed: int,
        x_T: Images | None,
        noise: Callable[[int], Images] | None,
        shape: tuple[int, ...],
    ) -> None:
        self.seeded, self.x_T, self.noise, self.shape, self.first = SeededNoise(seed), x_T, noise, shape, 0
        if x_T is not None:
            self._check(x_T, "x_T")

    def _check(self, array: Images, name: str) -> None:
        if np.shape(array) != self.shape:
            raise SamplerError(f"{name} must have the shape {self.shape}, found {np.shape(array)}")

    def starting_at(self, first_image: int) -> "_InjectedNoise":
        self.seeded, self.first = self.seeded.starting_at(first_image), first_image
        return self

    def fill(self, out: Images, stream: int, call: int) -> None:
        given = self.x_T if stream == INITIAL else self.noise(call) if self.noise else None
        if given is None:
            self.seeded.fill(out, stream, call)
            return
        self._check(given, "x_T" if stream == INITIAL else f"noise({call})")
        rows = given[self.first : self.first + len(out)]
        out[: len(rows)] = rows
        out[len(rows) :] = 0


def choose_batch_size(num_images: int, wanted: int | None) -> int:
    """The number of images to draw at a time: the wanted one, or ``DEFAULT_BATCH`` for as many images.

    Raises:
        SamplerError: no image, an empty batch, or no whole number.
    """
    given = num_images, num_images if wanted is None else wanted
    if not all(isinstance(number, SupportsIndex) and index(number) >= 1 for number in given):
        raise SamplerError(
            f"expected at least one image and a batch of one, found {brief(given[0])} and {brief(given[1])}"
        )
    return min(index(num_images), DEFAULT_BATCH) if wanted is None else index(wanted)


def find_bundle(strategy: str, given: str | None, folder: Path) -> Path:
    """The bundle to run: the given one, else the one that holds the strategy, else the only one in the folder.

    Raises:
        BundleError: none or several.
    """
    if given is not None:
        return Path(given)
    if Path(strategy).is_file():
        holder = Path(strategy).resolve().parent.parent
        if (holder / MANIFEST).is_file():
            return holder
    found = [folder] if (folder / MANIFEST).is_file() else sorted(m.parent for m in folder.glob(f"*/{MANIFEST}"))
    if len(found) != 1:
        raise BundleError(
            f"expected one bundle in {folder}, found {len(found)}; name one with --bundle, or make one with "
            f"ddsm-export SUPERNET.pt"
        )
    return found[0]
