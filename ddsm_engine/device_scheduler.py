"""A run on a GPU without the host: the plan lies in device memory, and each call finds its place there by itself.

What ``scheduler.Scheduler`` does between two calls is one kernel here (``ddsm_kernels.update``), captured together with
the network before it; a swap is another graph. Four ways to put a run on the stream, the first that works is taken:

- ``loop``: one launch for the whole run, whose graph chooses the next variant itself (CUDA 12.8);
- ``chain``: one launch of a graph that holds every call, for short runs;
- ``graphs``: one launch a call;
- ``launches``: the engine's own launches, where it cannot be captured.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.backends.device import Block, Captured, Device, DeviceEngine, Graph
from ddsm_engine.errors import BackendError
from ddsm_engine.noise import PER_CALL, SeededNoise
from ddsm_engine.plan import Plan
from ddsm_engine.samplers import Clip
from ddsm_engine.scheduler import not_finite
from ddsm_kernels import update

LOOP, CHAIN, GRAPHS, LAUNCHES = EXECUTIONS = ("loop", "chain", "graphs", "launches")

CHAIN_CALLS = 64
"""A chain of more calls is only made when asked for: a graph holds some 200 kernels a call, all of them copied."""

LOOP_CUDA = (12, 8)
"""The first CUDA whose graphs have a SWITCH."""

POLL_S = 2e-4
"""How long the host sleeps between two looks at a run."""

log = logging.getLogger(__name__)

OnProgress = Callable[[int], None]
"""Called now and then with the number of calls that are done."""


def takes(plan: Plan) -> bool:
    """Whether a plan can run without the host: dynamic thresholding sorts, which no row of coefficients can."""
    return plan.update.shape[1] <= update.MAX_SLOTS and (plan.bound is None or isinstance(plan.bound, Clip))


class DeviceScheduler:
    """Runs plans over engines that all read and write the same device memory.

    Not for two threads at once, as its device is not.
    """

    def __init__(self, device: Device, shape: tuple[int, ...]) -> None:
        """Allocate what every run needs.

        Args:
            device: Where the engines are.
            shape: [B, C, H, W] of a batch.

        Raises:
            BackendError: out of memory, or the update cannot be compiled; nothing is kept.
        """
        self.device, self.x = device, np.zeros(shape, np.float32)
        self.engines: dict[str, DeviceEngine] = {}
        self.execution = ""
        self._features: dict[str, int] = {}
        self._graphs = _Graphs()
        self._owned: list[int] = []
        self._tables: _Tables | None = None
        # What plans need more or less of: slots of the state, columns of time features.
        self._slots, self._feature_buffer = Block(device), Block(device)
        try:
            with device.current():
                self._output = self._allocate(self.x.nbytes)
                self._run, self._state = self._allocate(update.RUN.itemsize), self._allocate(update.STATE.itemsize)
                self._flags, self._flags_address = device.shared(2)
                source = self._compile()
        except BaseException:
            self.close()
            raise
        blocks = update.blocks(len(self.x), self.x[0].size)
        self._update: Callable[[], None] = partial(
            device.launch, source, update.KERNEL, blocks, update.THREADS, self._run
        )

    def add(self, variant: str, engine: DeviceEngine, time_features: int) -> None:
        """Let an engine, opened for this batch size, serve a variant, which reads ``time_features`` columns."""
        with self.device.current():
            self._forget()
        self._features[variant], self.engines[variant] = time_features, engine

    def run(
        self,
        plan: Plan,
        noise: SeededNoise,
        *,
        execution: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> NDArray[np.int64]:
        """Run every call; the final sample, unclipped, is left in ``x`` and the way it was run in ``execution``.

        An interrupt (Ctrl-C) ends the run after the calls that are already on the stream, within a loop after the
        current one.

        Args:
            plan: One that ``takes`` says can be run.
            noise: The seed's; any other noise lies in host memory.
            execution: One of ``EXECUTIONS``; None: the first that works.
            on_progress: See ``OnProgress``.

        Returns:
            [calls, 2], start and end of every call with its update, nanoseconds of the device's own clock.

        Raises:
            BackendError: the sample or an engine's output is not finite, or the device refused something.
        """
        with self.device.current():
            self._place(plan)
            way = self._settle(plan, execution)
            tables = self._upload(plan)
            self._begin(plan, noise, tables, way)
            try:
                way.launch()
                while not self.device.is_done():
                    time.sleep(POLL_S)
                    if on_progress is not None:
                        on_progress(int(self._flags[0]))
            except BaseException:
                self._flags[1] = 1
                self.device.synchronize()
                raise
            self.device.synchronize()
            return self._end(plan, tables)

    def close(self) -> None:
        """Release everything but the engines, which whoever opened them closes."""
        with self.device.current():
            self.device.synchronize()
            self._forget()
            if self._tables is not None:
                self._tables.free(self.device)
            for address in self._owned:
                self.device.free(address)
            self._slots.free()
            self._feature_buffer.free()
            self._owned, self._tables = [], None

    def _compile(self) -> str:
        """Make the update ready before it is captured: with what steers a loop, where the driver has that."""
        self._has_loop = self.device.properties.cuda >= LOOP_CUDA
        if self._has_loop:
            try:
                self.device.compile(update.source(with_loop=True), update.KERNEL)
            except BackendError as error:
                log.warning("the run cannot be put on the GPU as one launch, but will be slower: %s", error)
                self._has_loop = False
        source = update.source(with_loop=self._has_loop)
        self.device.compile(source, update.KERNEL)
        return source

    # --- the ways -----------------------------------------------------------------------------------------------------

    def _settle(self, plan: Plan, execution: str | None) -> "_Ready":
        """Choose the way of a run and make it ready.

        Raises:
            BackendError: the one that was asked for does not work, or none does.
        """
        if execution is not None and execution not in EXECUTIONS:
            raise BackendError(f"unknown execution {execution!r}; expected {', '.join(EXECUTIONS)}")
        for way in self._ways(plan) if execution is None else [execution]:
            try:
                ready = self._ready(way, plan)
            except BackendError as error:
                if execution is not None or way == LAUNCHES:
                    raise
                if way not in self._graphs.refused:  # once is loud enough
                    log.warning("the run cannot be put on the GPU as %s, but will be slower: %s", _SPELLED[way], error)
                    self._graphs.refused.add(way)
            else:
                self.execution = way
                return ready
        raise AssertionError("launches always work, or say why not")

    def _ways(self, plan: Plan) -> Sequence[str]:
        if not all(self.engines[variant].is_capturable for variant in plan.variants):
            return [LAUNCHES]
        ways = [GRAPHS, LAUNCHES]
        if len(plan.variants) <= CHAIN_CALLS:
            ways.insert(0, CHAIN)
        if self._has_loop:
            ways.insert(0, LOOP)
        return [way for way in ways if way not in self._graphs.refused]

    def _ready(self, way: str, plan: Plan) -> "_Ready":
        """Make one way ready; what is ready already is kept.

        Raises:
            BackendError: it does not work.
        """
        used = _used(plan)
        if way == LOOP and not self._has_loop:
            raise BackendError(
                f"a run cannot be put on this GPU as one launch: CUDA {'.'.join(map(str, LOOP_CUDA))} can"
            )
        self._try(used)
        if way == LAUNCHES:
            return self._one_by_one(plan, self._update, {variant: self._enqueuing(variant) for variant in used})
        graphs = self._graphs
        for variant in ("", *used):
            if variant not in graphs.captured:
                graphs.captured[variant] = self._capture(variant)
        if way == GRAPHS:
            for variant in ("", *used):
                if variant not in graphs.calls:
                    call = self._chained([variant]) if variant else graphs.captured[""]
                    graphs.calls[variant] = self.device.instantiate(call)
            return self._one_by_one(plan, graphs.calls[""].launch, {v: graphs.calls[v].launch for v in used})
        # A loop finds the variants of its calls in the tables; a chain is made of them.
        key = (way, *(plan.variants if way == CHAIN else used))
        if key not in graphs.runs:
            graphs.runs[key] = self._whole(way, key[1:])
        graph, handles = graphs.runs[key]
        return _Ready(graph.launch, handles)

    def _try(self, variants: Iterable[str]) -> None:
        """Call every engine once, as they must be before they are captured."""
        for variant in variants:
            if variant not in self._graphs.answers:
                self._graphs.answers[variant] = self._answer(variant, self.engines[variant].enqueue)

    def _whole(self, way: str, variants: Sequence[str]) -> tuple[Graph, tuple[int, int] | None]:
        """A run as one graph, and its handles if it is a loop."""
        captured = self._graphs.captured
        if way == CHAIN:
            return self.device.instantiate(self.device.chain([captured[""], self._chained(variants)])), None
        # The update comes first in each round, and once more than the networks do: it begins a run, too.
        loop = self.device.loop(captured[""], [captured[variant] for variant in variants])
        return self.device.instantiate(loop.captured), (loop.more, loop.body)

    def _chained(self, variants: Sequence[str]) -> Captured:
        """Calls with their updates."""
        captured = self._graphs.captured
        return self.device.chain([captured[part] for variant in variants for part in (variant, "")])

    def _enqueuing(self, variant: str) -> Callable[[], None]:
        engine = self.engines[variant]

        def call() -> None:
            engine.enqueue()
            self._update()

        return call

    def _one_by_one(self, plan: Plan, start: Callable[[], None], calls: Mapping[str, Callable[[], None]]) -> "_Ready":
        def launch() -> None:
            start()
            for variant in plan.variants:
                calls[variant]()

        return _Ready(launch)

    def _forget(self) -> None:
        """Let go of everything that was captured: addresses or engines have changed."""
        self._graphs.close()
        self._graphs = _Graphs()

    # --- engines ------------------------------------------------------------------------------------------------------

    def _place(self, plan: Plan) -> None:
        """Give every engine the common addresses; others may have used it elsewhere since."""
        self._slots.reserve(plan.update.shape[1] * self.x.nbytes)
        self._feature_buffer.reserve(4 * len(self.x) * max(self._features.values()))
        places = self.device.scratch.address, self._slots.address, self._feature_buffer.address
        if places != self._graphs.places:  # graphs know where these were
            self._forget()
            self._graphs.places = places
        addresses = {
            "sample": self._slots.address,
            "time_features": self._feature_buffer.address,
            "out_sample": self._output,
        }
        for variant in _used(plan):
            self.engines[variant].place(addresses)

    def _answer(self, variant: str, enqueue: Callable[[], None]) -> NDArray[np.float32]:
        """What one call makes of zeros; engines need a call before they are captured, too.

        Raises:
            BackendError: it left the output as it was, or wrote what is not finite.
        """
        self.device.fill(self._slots.address, self.x.nbytes, 0)
        self.device.fill(self._feature_buffer.address, self._feature_buffer.size_bytes, 0)
        self.device.fill(self._output, self.x.nbytes, 0xFF)  # NaN
        enqueue()
        output = np.empty_like(self.x)
        self.device.download(output, self._output)
        if not np.isfinite(output).all():
            raise BackendError(
                f"the engine of {variant} wrote nothing, or values that are not finite; build it again, or try "
                f"--precision fp32"
            )
        return output

    def _capture(self, variant: str) -> Captured:
        """The engine's part of a variant's call, or for ``""`` the update.

        An engine's is replayed once, and must give the bits that it gave uncaptured.

        Raises:
            BackendError: it cannot be captured, or its graph does nothing or something else.
        """
        if not variant:
            return self.device.capture(self._update)
        captured = self.device.capture(self.engines[variant].enqueue)
        if not captured.nodes:
            raise BackendError(f"the graph of {variant} is empty: its engine is on another device or stream")
        graph = self.device.instantiate(captured)
        try:
            replayed = self._answer(variant, graph.launch)
        finally:
            graph.close()
        if replayed.tobytes() != self._graphs.answers[variant].tobytes():
            raise BackendError(f"the graph of {variant} does not compute what its engine computes")
        return captured

    # --- tables -------------------------------------------------------------------------------------------------------

    def _upload(self, plan: Plan) -> "_Tables":
        used = _used(plan)
        if self._tables is None or self._tables.plan is not plan:
            if self._tables is not None:
                self._tables.free(self.device)
            self._tables = None
            self._tables = _Tables(self.device, plan, [used.index(variant) for variant in plan.variants])
        return self._tables

    def _begin(self, plan: Plan, noise: SeededNoise, tables: "_Tables", way: "_Ready") -> None:
        """Write what the kernel's argument points to."""
        run, state = np.zeros(1, update.RUN), np.zeros(1, update.STATE)
        state["first_bad"] = update.NOTHING_BAD
        for name, value in tables.addresses.items():
            run[name] = value
        run["seed"], run["first_image"] = noise.seed, noise.first_image
        run["slots"], run["features"] = self._slots.address, self._feature_buffer.address
        run["output"] = self._output
        run["state"], run["progress"], run["stop"] = self._state, self._flags_address, self._flags_address + 4
        run["images"], run["elements"] = len(self.x), self.x[0].size
        run["slot_count"], run["calls"] = plan.update.shape[1], len(plan.variants)
        if isinstance(plan.bound, Clip):
            run["is_bounded"], run["bound"] = 1, plan.bound.limit
        if way.handles is not None:
            run["is_loop"] = 1
            run["more"], run["body"] = way.handles
        self.device.upload(self._run, run)
        self.device.upload(self._state, state)
        self.device.fill(self._output, self.x.nbytes, 0xFF)  # what a run without networks would leave is not finite
        self._flags[:] = 0

    def _end(self, plan: Plan, tables: "_Tables") -> NDArray[np.int64]:
        state = np.zeros(1, update.STATE)
        ends = np.zeros(len(plan.variants) + 1, np.uint64)
        self.device.download(state, self._state)
        self.device.download(ends, tables.addresses["clock"])
        self.device.download(self.x, self._slots.address)
        if int(state["next"][0]) != len(ends):
            raise BackendError(f"the run ended after {int(state['next'][0]) - 1} of {len(plan.variants)} calls")
        bad = int(state["first_bad"][0])
        if bad != update.NOTHING_BAD:
            raise not_finite(plan, max(bad - 1, 0))
        clock = ends.astype(np.int64)
        return np.stack([clock[:-1], clock[1:]], axis=1)

    def _allocate(self, size_bytes: int) -> int:
        address = self.device.allocate(size_bytes)
        self._owned.append(address)
        return address


_SPELLED = {LOOP: "one launch", CHAIN: "one launch of a chain", GRAPHS: "one launch a call"}


def _used(plan: Plan) -> tuple[str, ...]:
    """The variants of a plan in an order that other plans over the same ones share, and with it their loop."""
    return tuple(sorted(set(plan.variants)))


@dataclass(frozen=True, slots=True)
class _Ready:
    """A run that can be launched, and the handles of the conditions if it is a loop: whether and where it goes on."""

    launch: Callable[[], None]
    handles: tuple[int, int] | None = None


@dataclass(slots=True)
class _Graphs:
    """What was captured for the addresses and engines in use.

    Attributes:
        answers: Variant → what its engine makes of zeros.
        captured: Variant → its engine's part of a call; ``""`` is the update.
        calls: Variant → its call with the update, ready to be launched; ``""`` is the update alone.
        runs: Whole runs by way and variants, with the handles of a loop.
        refused: Ways that did not work.
        places: Where the engines' scratch, the slots and the features were.
    """

    answers: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    captured: dict[str, Captured] = field(default_factory=dict)
    calls: dict[str, Graph] = field(default_factory=dict)
    runs: dict[tuple[str, ...], tuple[Graph, tuple[int, int] | None]] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    places: tuple[int, ...] = ()

    def close(self) -> None:
        """Release the graphs."""
        for graph in [*self.calls.values(), *(graph for graph, _ in self.runs.values())]:
            graph.close()


class _Tables:
    """A plan in device memory; see ``ddsm_kernels.update.RUN``."""

    def __init__(self, device: Device, plan: Plan, bodies: Sequence[int]) -> None:
        self.plan = plan
        self.addresses: dict[str, int] = {}
        try:
            for name, table in tables_of(plan, bodies).items():
                self.addresses[name] = device.allocate(table.nbytes)
                device.upload(self.addresses[name], table)
        except BackendError:
            self.free(device)
            raise

    def free(self, device: Device) -> None:
        """Give the memory back."""
        for address in self.addresses.values():
            device.free(address)
        self.addresses.clear()


def tables_of(plan: Plan, bodies: Sequence[int]) -> dict[str, NDArray[Any]]:
    """What a plan is to the kernel.

    Args:
        plan: See ``takes``.
        bodies: [calls], number of the body of a loop that computes the variant of each call.

    Returns:
        ``rows``, ``coefficients``, ``feature_rows`` and an empty ``clock``; see ``ddsm_kernels.update``.
    """
    slots = plan.update.shape[1]
    start, of_start = update.start_row(plan.start, slots)
    rows = np.zeros(len(plan.variants), update.ROW)
    rows["body"], rows["stream"], rows["call"] = bodies, PER_CALL, np.arange(len(rows))
    rows["has_noise"] = plan.update[:, :, -1].any(axis=1)
    rows["to_x_0"] = plan.to_x_0
    # Most calls of a strategy read the same rows again only in other runs, so they are laid out by call.
    rows["features"] = [len(features) for features in plan.time_features]
    rows["feature_offset"] = np.cumsum([0, *rows["features"][:-1]])
    return {
        "rows": np.concatenate([start, rows]),
        "coefficients": np.ascontiguousarray(np.concatenate([of_start, plan.update]).astype(np.float32)),
        "feature_rows": np.concatenate(plan.time_features).astype(np.float32),
        "clock": np.zeros(len(rows) + 1, np.uint64),
    }
