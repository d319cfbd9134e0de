"""How much faster is this than what people would otherwise do?

    python -m benchmarks.peers --bundle cifar10.bundle

The same strategy and the same weights through ``Pipeline``, and through what people would write without it: the
supernet sliced at run time as published; ``torch.compile``, ONNX Runtime and OpenVINO with one network per width in a
plain loop; and diffusers at full width. At batch 1, and each at the batch size that is best for it.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks import _peers_report
from benchmarks._comparison import PAUSE_S, TOLERANCES
from benchmarks._contenders import (
    Compiled,
    Contender,
    Diffusers,
    Draw,
    GivenNoise,
    OnnxRuntime,
    OpenVINO,
    Ours,
    Sliced,
    Walk,
    even_walk,
)
from benchmarks._report import Benchmark, Record
from benchmarks.cifar10 import CIFAR10, SCHEDULE, SEED, STRATEGY, cifar10_bundle, say
from benchmarks.dynamic_torch import DynamicUNet, dynamic_unet_from_bundle
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.environment import cpu
from ddsm_engine.measure.timing import Timing, time_in_turns
from ddsm_engine.parity import distance
from ddsm_engine.strategy import Strategy

STEPS: Final = 3
"""Calls of one width in a row, of which a step's time is the mean."""

RUNS: Final = 3
"""Of the strategy, in turns; the median counts."""

FEW_CALLS: Final = 10
"""Of the strategy, where a contender is so slow that one run is all there is time for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
        batches: Sizes to choose each contender's best from; 1 is always measured.
        calls: Calls of the strategy that are really run, evenly strided.
        repeats: Rounds in which a step is timed.
        budget_s: Seconds that one contender may take at one batch size, about.
        bf16: Whether contenders that ask for bf16 run.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    calls: int = 40
    repeats: int = 5
    budget_s: float = 300.0
    bf16: bool = True


def options(p: argparse.ArgumentParser) -> None:
    """What the command takes."""
    p.add_argument("--bundle", type=Path, help="folder to reuse, or to leave it in (default: temporary)")
    p.add_argument("--batch-size", type=_batches, default=(1, 2, 4, 8, 16), help="candidates (default: 1,2,4,8,16)")
    p.add_argument("--calls", type=_calls, default=40, help="of the strategy that are really run (default: 40)")
    p.add_argument("--repeats", type=_positive, default=5, help="rounds in which a step is timed (default: 5)")
    p.add_argument("--budget-s", type=float, default=300.0, help="per contender and batch size, about (default: 300)")
    p.add_argument("--bf16", action="store_true", help="run bf16 even on a processor without arithmetic for it")


def _batches(text: str) -> tuple[int, ...]:
    if re.fullmatch(r"[1-9]\d{0,2}(,[1-9]\d{0,2})*", text) is None:
        raise argparse.ArgumentTypeError("expected batch sizes such as 1,4,16")
    return tuple(sorted({1, *(int(part) for part in text.split(","))}))


def _calls(text: str) -> int:
    if not text.isdigit() or not FEW_CALLS <= int(text) <= SCHEDULE.timesteps:
        raise argparse.ArgumentTypeError(f"expected a whole number from {FEW_CALLS} to {SCHEDULE.timesteps}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("expected a whole number from 1")
    return int(text)


def measure(arguments: argparse.Namespace, record: Record, save: Callable[[], None]) -> None:
    """Measure every contender on the CIFAR-10 network."""
    settings = Settings(
        batches=arguments.batch_size,
        calls=arguments.calls,
        repeats=arguments.repeats,
        budget_s=arguments.budget_s,
        bf16=arguments.bf16 or has_bf16(cpu()[1]),
    )
    if importlib.util.find_spec("diffusers") is not None:
        record["environment"]["versions"]["diffusers"] = importlib.metadata.version("diffusers")
    strategy = Strategy.load(STRATEGY)
    eighths = sorted({int(8 * choice) for choice in strategy.choices if isinstance(choice, Fraction)} | {8})
    with cifar10_bundle(arguments.bundle, eighths, CIFAR10) as bundle, _fresh_inductor_cache():
        network = dynamic_unet_from_bundle(bundle)
        compare(bundle, strategy, settings, contenders(bundle, network), network, record, save)


def has_bf16(features: Sequence[str]) -> bool:
    """Whether a CPU with these features computes in bf16, instead of converting to and fro."""
    return "amx_bf16" in features or "avx512_bf16" in features


def contenders(bundle: Bundle, network: DynamicUNet) -> list[Contender]:
    """All of them, ours first."""
    return [
        Ours(bundle),
        Sliced(bundle, network, "fp32"),
        Sliced(bundle, network, "bf16"),
        Compiled(bundle, "fp32"),
        Compiled(bundle, "bf16"),
        OnnxRuntime(bundle),
        OpenVINO(bundle),
        Diffusers(bundle, "fp32"),
        Diffusers(bundle, "bf16"),
    ]


@contextmanager
def _fresh_inductor_cache() -> Iterator[None]:
    """What torch compiled in an earlier run is compiled again, or the time of it would mean nothing."""
    with tempfile.TemporaryDirectory(prefix="ddsm-inductor-") as folder:
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            if before is not None:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def compare(
    bundle: Bundle,
    strategy: Strategy,
    settings: Settings,
    all_contenders: Sequence[Contender],
    network: DynamicUNet,
    record: Record,
    save: Callable[[], None],
) -> None:
    """Fill the record: batch 1 first, then the steps of the other batch sizes, then the run at each one's best.

    Args:
        bundle: With every width of the strategy, and the full one.
        strategy: Over the bundle's timesteps.
        settings: What to measure.
        all_contenders: Ours first.
        network: The published one, with which all are compared.
        record: Filled in place.
        save: Called when batch 1 is complete, and at the end of every batch size's runs.

    Raises:
        BackendError: a contender that computes something else; it was not timed.
    """
    session = Session(bundle, strategy, settings, network)
    record |= session.head()
    found: dict[str, Record] = record["contenders"]
    running = []
    for contender in all_contenders:
        found[contender.name] = {"full_only": contender.full_only, "precision": contender.precision, "batches": {}}
        found[contender.name]["not_run"] = reason = why_not(contender, bf16=settings.bf16)
        if reason is None:
            running.append(contender)
    for batch in sorted({1, *settings.batches}):
        affordable = [c for c in running if batch == 1 or session.affords(found[c.name], batch)]
        with session.opened(affordable, batch, found) as ready:
            session.time_steps(ready, batch, found)
            if batch == 1:
                session.time_runs(ready, batch, found)
                save()
    for contender in running:
        found[contender.name]["best"] = session.best(found[contender.name])
    for batch in sorted({found[c.name]["best"] for c in running} - {1}):
        with session.opened([c for c in running if found[c.name]["best"] == batch], batch, found) as ready:
            session.time_runs(ready, batch, found)
        save()


def why_not(contender: Contender, *, bf16: bool) -> str | None:
    """Why a contender does not run here, or None where it does."""
    if importlib.util.find_spec(contender.library) is None:
        return f"{contender.library} is not installed"
    if contender.precision == "bf16" and not bf16:
        return "this CPU has no bf16 arithmetic"
    return None


@dataclass(frozen=True, slots=True)
class Ready:
    """An open contender that gave the right answers.

    Attributes:
        contender: Open.
        quick: Whether there is time for every repeat.
    """

    contender: Contender
    quick: bool


class Session:
    """One bundle, strategy and settings, and what the answers must be."""

    def __init__(self, bundle: Bundle, strategy: Strategy, settings: Settings, network: DynamicUNet) -> None:
        self.bundle, self.settings, self.spec = bundle, settings, bundle.manifest.spec
        self.reference = Sliced(bundle, network, "fp32")
        variants = {variant.id: variant.width for variant in bundle.manifest.variants}
        self.schedule = [variants[i] for i in strategy.resolve(bundle.manifest.variants)]
        self.full = self.spec.base_channels
        self.widths = sorted({*self.schedule, self.full})

    def head(self) -> Record:
        """What the record says beside its contenders."""
        labels = {str(width): self.spec.label(width).partition("(")[2].rstrip(")") for width in self.widths}
        return {
            "settings": asdict(self.settings),
            "timesteps": self.spec.timesteps,
            "groups": self.spec.groups,
            "full": str(self.full),
            "widths": labels,
            "mix": {str(width): count for width, count in sorted(Counter(self.schedule).items())},
            "contenders": {},
        }

    def walk(self, contender: Contender, calls: int) -> Walk:
        """The strategy's walk, or the full width's where there is no other."""
        return even_walk(self.bundle, [self.full] * len(self.schedule) if contender.full_only else self.schedule, calls)

    def affords(self, found: Record, batch: int) -> bool:
        """Whether a few calls at this batch size fit the budget, judged by batch 1."""
        step_s = found["batches"]["1"]["steps"][str(self.full)]["median_ms"] / 1e3 * batch
        return bool((2 * STEPS + FEW_CALLS) * step_s <= self.settings.budget_s)

    @contextmanager
    def opened(self, some: Sequence[Contender], batch: int, found: Mapping[str, Record]) -> Iterator[list[Ready]]:
        """Open contenders for a batch size and compare their answers; they are closed at the end."""
        ready: list[Ready] = []
        touched: list[Contender] = []
        self.reference.open(batch, self.widths)
        try:
            for contender in some:
                say(f"batch {batch}: opening {contender.name}")
                started = time.perf_counter()
                contender.open(batch, self.widths)
                open_s = time.perf_counter() - started
                touched.append(contender)
                relative_l2, step_s = self.check(contender)
                own = found[contender.name]
                own["precision"] = contender.precision
                own["batches"].setdefault(str(batch), {"open_s": open_s, "relative_l2": relative_l2})
                rounds = 2 * STEPS * (1 + self.settings.repeats) + RUNS * self.settings.calls
                ready.append(Ready(contender, quick=rounds * step_s <= self.settings.budget_s))
            yield ready
        finally:
            for contender in touched:
                contender.close()
            gc.collect()

    def check(self, contender: Contender) -> tuple[float, float]:
        """Compare the predicted noise of every width and the state after two calls with the published network's.

        Returns:
            The largest relative L2 difference, and the seconds of two calls, at most one step of the full width more.

        Raises:
            BackendError: a difference beyond ``TOLERANCES``.
        """
        noise, t = GivenNoise(SEED, contender.shape), self.spec.timesteps // 2
        answers = {
            f"the noise predicted at width {self.spec.label(width)}": (
                contender.predict(width, t, noise), self.reference.predict(width, t, noise)
            )
            for width in contender.widths
        }  # fmt: skip
        # The clean half at the narrowest width, so that the two calls of the walk differ.
        half = [self.full if contender.full_only else self.widths[0]] * t + [self.full] * t
        two = even_walk(self.bundle, half, 2)
        draw = contender.prepare(two)
        started = time.perf_counter()
        state = draw(noise)
        seconds = time.perf_counter() - started
        answers["the state after two calls of its loop"] = state, self.reference.prepare(two)(noise)
        worst, tolerance = 0.0, TOLERANCES[contender.precision]
        for what, (found, expected) in answers.items():
            difference, _ = distance(found, expected)
            if difference > tolerance:
                raise BackendError(
                    f"{contender.name}, batch {contender.batch}: {what} differs from the published network's by "
                    f"{difference:.2e} (relative L2, at most {tolerance:.0e}); it computes something else, so it was "
                    f"not timed"
                )
            worst = max(worst, difference)
        return worst, seconds

    def time_steps(self, ready: Sequence[Ready], batch: int, found: Mapping[str, Record]) -> None:
        """Time short runs of one width, in turns: the mean of their calls is a step."""
        for width in self.widths:
            say(f"batch {batch}: timing width {self.spec.label(width)}")
            walk = even_walk(self.bundle, [width] * len(self.schedule), STEPS)
            draws = {r.contender.name: (r, r.contender.prepare(walk)) for r in ready if width in r.contender.widths}
            for name, timing in self._in_turns(draws, self.settings.repeats, warmup=1).items():
                steps = found[name]["batches"][str(batch)].setdefault("steps", {})
                steps[str(width)] = _per(timing, STEPS * batch)

    def time_runs(self, ready: Sequence[Ready], batch: int, found: Mapping[str, Record]) -> None:
        """Time an even part of the strategy, in turns, and scale it to all of it."""
        say(f"batch {batch}: running the strategy")
        calls = {r.contender.name: self.settings.calls if r.quick else FEW_CALLS for r in ready}
        walks = {r.contender.name: self.walk(r.contender, calls[r.contender.name]) for r in ready}
        draws = {r.contender.name: (r, r.contender.prepare(walks[r.contender.name])) for r in ready}
        for name, timing in self._in_turns(draws, RUNS, warmup=0).items():
            own = found[name]["batches"][str(batch)]
            own["calls"], own["run"] = calls[name], asdict(timing)
            run = Counter(str(width) for width in walks[name].widths)
            step_ms = {width: own["steps"][width]["median_ms"] for width in own["steps"]}
            share = mean_step_ms(run, step_ms) / mean_step_ms(self._mix(found[name]), step_ms)
            own["s_per_image"] = timing.median_ms / 1e3 / batch / calls[name] / share * self.spec.timesteps
            own["images_per_s"] = 1 / own["s_per_image"]
            own["full_s_per_image"] = step_ms[str(self.full)] / 1e3 * self.spec.timesteps

    def best(self, found: Record) -> int:
        """The batch size with the most images per second, judged by the steps of its widths."""

        def per_image(batch: str) -> float:
            steps = found["batches"][batch]["steps"]
            return mean_step_ms(self._mix(found), {width: timing["median_ms"] for width, timing in steps.items()})

        return int(min(found["batches"], key=per_image))

    def _mix(self, found: Record) -> Mapping[str, int]:
        if found["full_only"]:
            return {str(self.full): len(self.schedule)}
        return Counter(str(width) for width in self.schedule)

    def _in_turns(self, draws: Mapping[str, tuple[Ready, Draw]], repeats: int, warmup: int) -> dict[str, Timing]:
        """Time the quick ones A B C A B C …; each of the others once, by itself."""
        turns: dict[str, Callable[[], object]] = {}
        for name, (one, draw) in draws.items():
            if one.quick:
                turns |= {f"pause before {name}": _pause, name: lambda draw=draw: draw(None)}  # type: ignore[misc]
        timings = time_in_turns(turns, repeats=repeats, warmup=warmup, budget_s=self.settings.budget_s)
        for name, (one, draw) in draws.items():
            if not one.quick:
                _pause()
                timings |= time_in_turns({name: lambda draw=draw: draw(None)}, repeats=1, warmup=0)  # type: ignore[misc]
        return {name: timings[name] for name in draws}


def mean_step_ms(calls: Mapping[str, int], step_ms: Mapping[str, float]) -> float:
    """Milliseconds of a step, on average over so many calls of each width."""
    return float(np.average([step_ms[width] for width in calls], weights=list(calls.values())))


def _per(timing: Timing, count: int) -> Record:
    return {key: value / count if key.endswith("_ms") else value for key, value in asdict(timing).items()}


def _pause() -> None:
    time.sleep(PAUSE_S)


BENCHMARK: Final = Benchmark(
    name="peers",
    doc=__doc__ or "",
    options=options,
    measure=measure,
    details=_peers_report.details,
    summary=_peers_report.summary,
    draw=_peers_report.draw,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
