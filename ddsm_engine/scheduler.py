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
"""Called after each call with its number, its timestep and the unclipped sample. The next call reads that array, with
whatever was written into it, and overwrites it."""


class Scheduler:
    """Runs plans over engines that all read and write the same buffers, bound once.

    Not for two threads at once: the buffers belong to the run in progress.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Allocate what a run needs.

        Args:
            shape: [B, C, H, W] of a batch.
        """
        self.engines: dict[str, Engine] = {}
        self.x = np.zeros(shape, np.float32)
        self._output, self._x_0, self._noise, self._scratch = (np.zeros(shape, np.float32) for _ in range(4))
        self.features: dict[str, NDArray[np.float32]] = {}
        # Slots of the state behind the sample, and where their next values are written while the old ones are read.
        self._kept: list[NDArray[np.float32]] = []
        self._spare: list[NDArray[np.float32]] = []

    def add(self, variant: str, engine: Engine, time_features: int) -> None:
        """Let an engine, opened for this batch size, serve a variant, which reads ``time_features`` columns."""
        features = self.features[variant] = np.zeros((len(self.x), time_features), np.float32)
        engine.bind({"sample": self.x, "time_features": features}, {"out_sample": self._output})
        self.engines[variant] = engine

    def close(self) -> None:
        """Close every engine."""
        while self.engines:
            self.engines.popitem()[1].close()

    def run(self, plan: Plan, noise: NoiseSource, on_call: OnCall | None = None) -> NDArray[np.int64]:
        """Run every call; the final sample, unclipped, is left in ``x``.

        Returns:
            [calls, 2], start and end of every engine call, nanoseconds.

        Raises:
            BackendError: the sample or an engine's output is not finite, naming the call and the variant.
        """
        while len(self._kept) < plan.update.shape[1] - 1:
            self._kept.append(np.zeros_like(self.x))
            self._spare.append(np.zeros_like(self.x))
        clock = np.zeros((len(plan.variants), 2), np.int64)
        untried = set(plan.variants)
        noise.fill(self.x, INITIAL, 0)
        if plan.start != 1:
            np.multiply(self.x, np.float32(plan.start), out=self.x)
        for call, variant in enumerate(plan.variants):
            np.copyto(self.features[variant], plan.time_features[call])
            if variant in untried:
                self._output.fill(np.nan)  # an engine that silently writes nothing is caught by the check below
                untried.remove(variant)
            clock[call, 0] = time.perf_counter_ns()
            self.engines[variant].run()
            clock[call, 1] = time.perf_counter_ns()
            self._update(plan, call, noise)
            if not _is_finite(self.x):
                raise not_finite(plan, call)
            if on_call is not None:
                on_call(call, float(plan.timesteps[call]), self.x)
        return clock

    def answer(self, plan: Plan, call: int, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """What a call's variant says of samples [B, C, H, W], without the update; the next call overwrites it."""
        variant = plan.variants[call]
        np.copyto(self.x, x)
        np.copyto(self.features[variant], plan.time_features[call])
        self.engines[variant].run()
        return self._output

    def _update(self, plan: Plan, call: int, noise: NoiseSource) -> None:
        """Replace every slot by its row of the table: a sum over the slots, the output, x_0 and noise."""
        if plan.bound is not None:
            _sum(plan.to_x_0[call].tolist(), [self.x, self._output], self._x_0, self._scratch)
            plan.bound.apply(self._x_0)
        of_x, *rows = plan.update[call].tolist()
        if of_x[-1] or any(row[-1] for row in rows):
            noise.fill(self._noise, PER_CALL, call)
        terms = [self.x, *self._kept[: len(rows)], self._output, self._x_0, self._noise]
        for row, spare in zip(rows, self._spare, strict=False):
            _sum(row, terms, spare, self._scratch)
        _sum(of_x, terms, self.x, self._scratch)  # last, for the others read the sample that it overwrites
        self._kept, self._spare = self._spare, self._kept


def not_finite(plan: Plan, call: int) -> BackendError:
    """The refusal of a call that left a value that is not finite."""
    return BackendError(
        f"call {call} (timestep {plan.timesteps[call]:g}) of variant {plan.variants[call]} left a value that is not "
        f"finite; try --precision fp32, or check the bundle with its weights"
    )


def _sum(
    row: list[float], terms: list[NDArray[np.float32]], out: NDArray[np.float32], scratch: NDArray[np.float32]
) -> None:
    """Write row · terms; ``out`` may be the first term. A row of zeros is a slot that is not read again."""
    is_first = True
    for coefficient, term in zip(row, terms, strict=True):
        if not coefficient:
            continue
        if is_first and coefficient == 1:
            np.copyto(out, term)
        elif is_first:
            np.multiply(term, coefficient, out=out)
        else:
            np.multiply(term, coefficient, out=scratch)
            np.add(out, scratch, out=out)
        is_first = False


def _is_finite(x: NDArray[np.float32]) -> bool:
    # The dot product is one fast pass and is finite for every sane state; only a doubtful one is looked at in full.
    return bool(np.isfinite(np.dot(x.ravel(), x.ravel()))) or bool(np.isfinite(x).all())
