"""How much of a strategy's GFLOPs becomes time, what does a swap cost, and is a run more than its calls?

Every strategy that the bundle holds, beside uniform runs, on every backend, in every way that a run can be put on the
GPU. The ways must leave the same bits; what does not is not timed.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.backends import open_device
from ddsm_engine.backends.device import StagedEngine
from ddsm_engine.bundle import Bundle
from ddsm_engine.cost import gflops
from ddsm_engine.device_scheduler import CHAIN, GRAPHS, LAUNCHES, LOOP, DeviceScheduler
from ddsm_engine.measure.gpu.answers import SEED, check_engine
from ddsm_engine.measure.gpu.device_timing import figures
from ddsm_engine.measure.gpu.subnetworks import open_on_device, time_engine
from ddsm_engine.measure.gpu.swaps import swap_gaps
from ddsm_engine.measure.gpu.work import Row, Work, variant_of
from ddsm_engine.measure.timing import Timing, time_in_turns
from ddsm_engine.noise import SeededNoise
from ddsm_engine.plan import Plan, compile_plan, plan_calls
from ddsm_engine.samplers import make_sampler
from ddsm_engine.strategy import Strategy

FULL: Final = "uniform 8/8"

WAYS: Final = (GRAPHS, LOOP, CHAIN, LAUNCHES)
"""In the order in which they are wanted most, should the time not be enough."""

ONE_LAUNCH: Final = (LOOP, CHAIN)

REPEATS: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is run.

    Attributes:
        size: Of the images.
        batch: How many at a time.
        calls: Of a run: DDIM with η = 1, which draws noise as often as the published DDPM does.
        eighths: The uniform runs, the full width among them.
        seconds: Of timing one way on one backend, about.
    """

    size: int
    batch: int
    calls: int
    eighths: Sequence[int] = (8,)
    seconds: float = 6.0


def measure(work: Work, setting: Setting) -> None:
    """Run every strategy of the bundle on every backend in every way.

    Raises:
        BundleError: no bundle of this image size.
        BackendError: no backend runs here.
    """
    bundle = work.bundle(setting.size)
    plans = make_plans(bundle, setting)
    for backend in work.backends():
        measure_backend(work, bundle, backend, plans, setting)


def measure_backend(work: Work, bundle: Bundle, backend: str, plans: Mapping[str, Plan], setting: Setting) -> None:
    """Run the plans on one backend in every way; its engines are opened when the first of them is run."""
    with ExitStack() as stack:

        @cache
        def runs() -> Runs:
            return stack.enter_context(closing(Runs(bundle, backend, setting.batch, plans)))

        def measure_way(way: str) -> Row:
            return runs().measure(way, setting.seconds)

        for way in WAYS:
            key = {"size": setting.size, "batch": setting.batch, "backend": backend, "execution": way}
            work.take(key, partial(measure_way, way))


def make_plans(bundle: Bundle, setting: Setting) -> dict[str, Plan]:
    """The uniform runs, and the strategies over timesteps that come with the bundle."""
    manifest, tables = bundle.manifest, bundle.time_tables()
    sampler = make_sampler(
        "ddim", manifest.noise_schedule, setting.calls, prediction_type=manifest.prediction_type, eta=1.0
    )
    plans = {
        uniform(k): plan_calls([variant_of(bundle, k).id] * sampler.calls, sampler, tables) for k in setting.eighths
    }
    for name in bundle.strategies():
        strategy = Strategy.load(bundle.strategy_file(name))
        if strategy.axis == "timestep":
            plans[name] = compile_plan(strategy, sampler, manifest.variants, tables)
    return plans


def uniform(eighths: int) -> str:
    """What the run of one width is called."""
    return f"uniform {eighths}/8"


class Runs:
    """The plans on one backend: engines that answered rightly, and what plain launches make of every plan."""

    def __init__(self, bundle: Bundle, backend: str, batch: int, plans: Mapping[str, Plan]) -> None:
        """Open, check and run each plan once.

        Raises:
            BackendError: an engine that does not open, or answers something else.
        """
        self.bundle, self.batch, self.plans = bundle, batch, plans
        self._stack = ExitStack()
        try:
            self.device = open_device(backend)
            self._stack.callback(self.device.close)
            staged = self._open(backend)
            self.precision = next(iter(staged.values())).precision
            self.scheduler = DeviceScheduler(self.device, (batch, *bundle.manifest.spec.sample_shape))
            self._stack.callback(self.scheduler.close)
            for identifier, engine in staged.items():
                variant = bundle.variants[identifier]
                self.scheduler.add(identifier, engine.engine, bundle.spec(variant).time_features)
            self.launched = {name: self._run(plan, LAUNCHES)[1] for name, plan in plans.items()}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the scheduler, then the engines."""
        self._stack.close()

    def measure(self, way: str, seconds: float) -> Row:
        """Compare the bits of every plan with those of plain launches; then time all plans in turns.

        Raises:
            BackendError: the way does not work here.
        """
        for name, plan in self.plans.items():
            if self._run(plan, way)[1] != self.launched[name]:
                return {"bit_exact": False, "error": f"{name} left other bits than plain launches; it was not timed"}
        clocks: dict[str, list[NDArray[np.int64]]] = {name: [] for name in self.plans}

        def run(name: str) -> None:
            clocks[name].append(self._run(self.plans[name], way)[0])

        calls = {name: partial(run, name) for name in self.plans}
        timings = time_in_turns(calls, repeats=REPEATS, warmup=0, budget_s=seconds)
        isolated = self._time_isolated()  # right after the runs, on a GPU that is as warm
        runs = {name: self._describe(name, timings, clocks[name], isolated) for name in self.plans}
        return {"precision": self.precision, "bit_exact": True, "isolated_ms": isolated, "runs": runs}

    def _open(self, backend: str) -> dict[str, StagedEngine]:
        used = dict.fromkeys(variant for plan in self.plans.values() for variant in plan.variants)
        staged: dict[str, StagedEngine] = {}
        for identifier in used:
            variant = self.bundle.variants[identifier]
            staged[identifier] = open_on_device(self.bundle, variant, backend, self.batch, self.device)
            self._stack.callback(staged[identifier].close)
            check_engine(self.bundle, variant, staged[identifier], self.batch, backend)
        return staged

    def _run(self, plan: Plan, way: str) -> tuple[NDArray[np.int64], bytes]:
        clock = self.scheduler.run(plan, SeededNoise(SEED), execution=way)
        return clock, self.scheduler.x.tobytes()

    def _time_isolated(self) -> dict[str, float]:
        """Milliseconds of a call of each variant, nothing but itself between two of them."""
        with self.device.current():
            return {name: time_engine(self.device, own)[1].median_ms for name, own in self.scheduler.engines.items()}

    def _describe(
        self,
        name: str,
        timings: Mapping[str, Timing],
        clocks: Sequence[NDArray[np.int64]],
        isolated: Mapping[str, float],
    ) -> Row:
        plan, timing = self.plans[name], timings[name]
        isolated_ms = sum(isolated[variant] for variant in plan.variants)
        return {
            "calls": len(plan.variants),
            **figures(timing),
            "device_ms": float(np.median([clock[-1, 1] - clock[0, 0] for clock in clocks])) / 1e6,
            "isolated_ms": isolated_ms,
            "over_isolated": timing.median_ms / isolated_ms,
            "gflops_per_s": self._gflops(plan) * self.batch / timing.median_ms * 1e3,
            **speed_up(self._gflops(plan), timing.median_ms, self._gflops(self.plans[FULL]), timings[FULL].median_ms),
            "swap": swap_gaps(plan.variants, clocks),
        }

    def _gflops(self, plan: Plan) -> float:
        """True GFLOPs of a run, per image."""
        return gflops(sum(self.bundle.variants[variant].macs for variant in plan.variants))


def speed_up(own_gflops: float, own_ms: float, full_gflops: float, full_ms: float) -> dict[str, Any]:
    """What the arithmetic promises over the full width, what the clock says, and the part of it that arrived: R."""
    theoretical, realised = full_gflops / own_gflops, full_ms / own_ms
    return {"theoretical": theoretical, "realised": realised, "r": realised / theoretical}
