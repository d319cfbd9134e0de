"""The reference interpreter of a plan: the only loop over calls in Python."""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.backends.engine import Engine
from ddsm_engine.errors import BackendError
from ddsm_engine.noise import INITIAL, PER_CALL, NoiseSource
from ddsm_engine.plan import Plan

OnCall = Callable[[int, float, NDArray[np.float32]], None]
"""Called after each call with its number, its timestep and the unclipped state, which the next call overwrites."""


class Scheduler:
    """Runs plans over engines that all read and write the same buffers, bound once.

    Not for two threads at once: the buffers belong to the run in progress.
    """

    def __init__(self, shape: tuple[int, ...], features: int) -> None:
        """Allocate what a run needs.

        Args:
            shape: [B, C, H, W] of a batch.
            features: Columns of the time table.
        """
        self.engines: dict[str, Engine] = {}
        self.x = np.zeros(shape, np.float32)
        self.eps = np.zeros(shape, np.float32)
        self.features = np.zeros((shape[0], features), np.float32)
        self._scratch = np.zeros(shape, np.float32)
        self._noise = np.zeros(shape, np.float32)

    def add(self, variant: str, engine: Engine) -> None:
        """Let an engine, opened for this batch size, serve a variant."""
        engine.bind({"sample": self.x, "time_features": self.features}, {"out_sample": self.eps})
        self.engines[variant] = engine

    def close(self) -> None:
        """Close every engine."""
        while self.engines:
            self.engines.popitem()[1].close()

    def run(self, plan: Plan, noise: NoiseSource, on_call: OnCall | None = None) -> NDArray[np.int64]:
        """Run every call; the final state, unclipped, is left in ``x``.

        Returns:
            [calls, 2], start and end of every engine call, nanoseconds.

        Raises:
            BackendError: the state or an engine's output is not finite, naming the call and the variant.
        """
        clock = np.zeros((len(plan.variants), 2), np.int64)
        untried = set(plan.variants)
        noise.fill(self.x, INITIAL, 0)
        for call, variant in enumerate(plan.variants):
            np.copyto(self.features, plan.time_features[call])
            if variant in untried:
                self.eps.fill(np.nan)  # an engine that silently writes nothing is caught by the check below
                untried.remove(variant)
            clock[call, 0] = time.perf_counter_ns()
            self.engines[variant].run()
            clock[call, 1] = time.perf_counter_ns()
            self._update(plan, call, noise)
            if not _is_finite(self.x):
                raise BackendError(
                    f"call {call} (timestep {plan.timesteps[call]:g}) of variant {variant} left a value that is not "
                    f"finite; try --precision fp32, or check the bundle with its weights"
                )
            if on_call is not None:
                on_call(call, float(plan.timesteps[call]), self.x)
        return clock

    def _update(self, plan: Plan, call: int, noise: NoiseSource) -> None:
        """Replace ``x`` by update · (x, eps, x_0, noise), in place."""
        of_x, of_eps, of_x_0, of_noise = plan.update[call]
        if plan.clip is not None:
            np.multiply(self.x, plan.to_x_0[call, 0], out=self._noise)
            np.multiply(self.eps, plan.to_x_0[call, 1], out=self._scratch)
            np.add(self._noise, self._scratch, out=self._scratch)
            np.clip(self._scratch, -plan.clip, plan.clip, out=self._scratch)
            np.multiply(self._scratch, of_x_0, out=self._scratch)
        np.multiply(self.x, of_x, out=self.x)
        if plan.clip is not None:
            np.add(self.x, self._scratch, out=self.x)
        np.multiply(self.eps, of_eps, out=self.eps)
        np.add(self.x, self.eps, out=self.x)
        if of_noise:
            noise.fill(self._noise, PER_CALL, call)
            np.multiply(self._noise, of_noise, out=self._noise)
            np.add(self.x, self._noise, out=self.x)


def _is_finite(x: NDArray[np.float32]) -> bool:
    # The dot product is one fast pass and is finite for every sane state; only a doubtful one is looked at in full.
    return bool(np.isfinite(np.dot(x.ravel(), x.ravel()))) or bool(np.isfinite(x).all())
