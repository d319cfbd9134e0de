"""On the paper's CIFAR-10 network, what do the static engines cost, against slicing at run time?

One run measures, at batch 1, on the CPU at hand:

- per width, one sampling step on OpenVINO, ONNX Runtime and the dynamic torch loop, in turns;
- with the published strategy, seconds per image, R beside the full width's MFU, and Net R;
- peak memory and cold start with every variant resident, in a fresh process per backend.

The weights are random (time does not depend on them) and never torch's default initialisation, whose last layers are so
small that every wrong network would pass the comparison that comes first: a wrong result is not fast.

    python -m benchmarks.cifar10_cpu                                # export, measure, write results/
    python -m benchmarks.cifar10_cpu --resume benchmarks/results/FILE.json
    python -m benchmarks.cifar10_cpu --update-readme benchmarks/results/FILE.json
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import _cifar10_report, _report
from benchmarks._report import Record
from benchmarks.dynamic_torch import DynamicLoop, DynamicUNet, PeerPrecision, dynamic_unet_from_bundle
from ddsm_engine.backends import open_engine
from ddsm_engine.backends.engine import Engine, EngineOptions
from ddsm_engine.bundle import MANIFEST, Bundle, Variant
from ddsm_engine.cli import guarded
from ddsm_engine.cost import gflops, theoretical_speedup
from ddsm_engine.errors import BackendError, BundleError, OutputError
from ddsm_engine.measure.environment import environment
from ddsm_engine.measure.peak import matmul_peak_gflops
from ddsm_engine.measure.timing import time_in_turns
from ddsm_engine.networks.slicing import empty_unet
from ddsm_engine.noise import INITIAL, PER_CALL, SeededNoise
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.pipeline import Pipeline
from ddsm_engine.plan import Plan, plan_calls
from ddsm_engine.sampler import ddim, ddpm
from ddsm_engine.scheduler import Scheduler
from ddsm_engine.spec import EIGHTHS, UNetSpec
from ddsm_engine.strategy import Strategy
from ddsm_export.bundling import ExportOptions, export_bundle
from ddsm_export.supernet import Supernet

ROOT: Final = Path(__file__).resolve().parent.parent
STRATEGY: Final = ROOT / "tests" / "data" / "ddsm_cifar10_strategy.yaml"
NAME: Final = "cifar10_cpu"

CIFAR10: Final = UNetSpec(
    image_size=32,
    channels=3,
    base_channels=128,
    channel_mults=(1, 2, 2, 2),
    attention_levels=(1,),
    num_res_blocks=2,
    groups=16,
    time_features=128,
    time_dim=512,
)
"""DDSM's CIFAR-10 network. The released weights have 32 groups, which only four of the seven widths allow."""

SCHEDULE: Final = NoiseSchedule(1e-4, 0.02, 1000)

PUBLISHED: Final = {
    "source": "DDSM, arXiv 2310.03337, table 2, CIFAR-10; batch size not stated, four widths, 32 groups",
    "device": "RTX 3090",
    "full_s": 0.93,
    "strategy_s": 0.59,
    "full_gflops_conv_linear": 12.14,
    "strategy_gflops_conv_linear": 6.20,
    "r": 0.81,
}
"""What the paper reports, seconds per image; R is (0.93 / 0.59) / (12.14 / 6.20)."""

TOLERANCES: Final = {"fp32": 2e-5, "bf16": 5e-2}
"""Relative L2 against the dynamic network in fp32. fp32 differs by the order of sums; bf16 keeps 8 bits of every
activation, some fifty times in a row."""

PEERS: Final[tuple[PeerPrecision, ...]] = ("fp32", "bf16")
SEED: Final = 20231005

PAUSE_S: Final = 0.02
"""Between contenders, not counted: worker threads that still spin for more work would take the next one's cores."""

PEER_BUDGET_S: Final = 120.0
MIN_PEER_CALLS: Final = 10
"""A peer whose full-width walk would take longer than the budget gets fewer calls: torch's bf16 takes seconds a step on
a processor without bf16 instructions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
        eighths: Widths of the table, in eighths of the full one.
        repeats: Rounds per width, at most (a round takes every contender once).
        budget_s: Seconds after which no further round of a width begins (three rounds at least).
        calls: Calls of the strategy runs: the schedule's length is DDPM as published; fewer is a strided DDIM.
        peer_calls: Calls that the dynamic loop really runs, at most; its seconds are scaled to ``calls``.
        threads: Threads per engine; 0 leaves it to the libraries.
    """

    eighths: tuple[int, ...] = EIGHTHS
    repeats: int = 30
    budget_s: float = 120.0
    calls: int = 1000
    peer_calls: int = 100
    threads: int = 0

    def to_json(self, spec: UNetSpec) -> Record:
        """The settings, and what of the network they are about."""
        values = json.loads(json.dumps(asdict(self)))
        return {**values, "batch": 1, "seed": SEED, "groups": spec.groups, "spec": spec.to_json()}


# The network and its bundle


def random_supernet(spec: UNetSpec, schedule: NoiseSchedule) -> Supernet:
    """A supernet whose weights keep activations of order one, biases and norm affines included."""
    generator = torch.Generator().manual_seed(SEED)
    weights = {}
    for name, parameter in empty_unet(spec, spec.base_channels).named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(".bias"):
            weights[name] = 0.2 * noise
        elif noise.ndim == 1:
            weights[name] = 1 + 0.3 * noise
        else:
            weights[name] = noise / math.sqrt(noise[0].numel())
    return Supernet(spec, schedule, weights, {"source": "random weights of benchmarks.cifar10_cpu", "seed": SEED})


@contextmanager
def cifar10_bundle(folder: Path | None, eighths: Sequence[int]) -> Iterator[Bundle]:
    """The bundle in ``folder``, exported first if it is not there; without a folder a temporary one.

    Raises:
        BundleError: the folder holds the bundle of another network, or lacks a width.
    """
    with tempfile.TemporaryDirectory(prefix="ddsm-cifar10-") as temporary:
        path = folder or Path(temporary) / "cifar10.bundle"
        widths = [CIFAR10.base_channels * k // 8 for k in eighths]
        if not (path / MANIFEST).is_file():
            _say(f"exporting {len(widths)} widths to {path}")
            export_bundle(random_supernet(CIFAR10, SCHEDULE), path, ExportOptions(widths=widths), report=_say)
        bundle = Bundle.open(path)
        present = {variant.width for variant in bundle.manifest.variants}
        if bundle.manifest.spec != CIFAR10 or not set(widths) <= present:
            raise BundleError(f"{path} is a bundle of another network or lacks a width; name another --bundle folder")
        yield bundle


# The whole measurement


def measure(
    bundle: Bundle,
    strategy: Strategy,
    settings: Settings,
    *,
    record: Record,
    save: Callable[[Record], None] = lambda record: None,
    network: DynamicUNet | None = None,
) -> Record:
    """Measure what the record does not hold yet; it is saved after every part.

    Args:
        bundle: What to measure; the full width must be in it for the strategy.
        strategy: Over the bundle's timesteps.
        settings: What to measure.
        record: See ``new_record``; filled in place.
        save: Called with the record after every part.
        network: The dynamic peer; None makes it from the bundle.

    Raises:
        BackendError: contenders that do not compute the same thing; nothing of that part was timed.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    network = network or dynamic_unet_from_bundle(bundle)
    base = bundle.manifest.spec.base_channels
    variants = {8 * variant.width // base: variant for variant in bundle.manifest.variants}
    for k in settings.eighths:
        if f"{k}/8" not in record["rows"]:
            _say(f"width {k}/8")
            record["rows"][f"{k}/8"] = measure_width(bundle, variants[k], network, settings)
            save(record)
    if not _offers(bundle, strategy):
        _say("the bundle lacks the full width or one of the strategy's: the strategy is left out")
    elif "strategy" not in record:
        _say(f"strategy, {settings.calls} calls")
        record["strategy"] = measure_strategy(bundle, strategy, network, settings)
        save(record)
    if "memory" not in record:
        _say("memory and cold start")
        record["memory"] = measure_memory(bundle, settings.threads)
        save(record)
    return record


def new_record(machine: str, settings: Settings, spec: UNetSpec) -> Record:
    """A result without any part measured."""
    head = {"benchmark": NAME, "format_version": 1, "machine": machine, "environment": environment()}
    return {**head, "settings": settings.to_json(spec), "published": PUBLISHED, "rows": {}}


def check_same_run(record: Record, fresh: Record) -> None:
    """Refuse to go on with a result of another machine or other settings: its parts could not be compared.

    Another commit is let through, and named in the result.

    Raises:
        OutputError: naming what differs.
    """
    keys = ("cpu", "cpu_features", "cores", "versions")
    differing = [key for key in keys if record["environment"][key] != fresh["environment"][key]]
    differing += [key for key, value in fresh["settings"].items() if record["settings"].get(key) != value]
    if differing:
        raise OutputError(f"the result was begun with another {', '.join(differing)}; start a new one")


# One width


def measure_width(bundle: Bundle, variant: Variant, network: DynamicUNet, settings: Settings) -> Record:
    """Compare, then time one sampling step of every contender in turns.

    Returns:
        ``macs``, ``conv_linear_macs``, ``auto`` (the contender that OpenVINO's default precision is), ``timings`` and
        ``relative_l2`` by contender.
    """
    manifest = bundle.manifest
    t = manifest.spec.timesteps // 2
    plan = _one_call(bundle, variant, t)
    x = _normals((1, *manifest.spec.sample_shape))
    steps: dict[str, Callable[[], object]] = {}
    outputs: dict[str, NDArray[np.float32]] = {}
    engines = _open_static(bundle, variant, settings.threads)
    try:
        for name, engine in engines.items():
            scheduler = Scheduler(x.shape, manifest.spec.time_features)
            scheduler.add(variant.id, engine)
            outputs[name] = _predict(scheduler, plan, x)
            steps[name] = _static_step(scheduler, plan, x)
        for precision in PEERS:
            loop = DynamicLoop(network, manifest.noise_schedule, _all_timesteps(manifest.spec), precision)
            mults = [variant.width_mult] * manifest.spec.timesteps
            outputs[f"torch dynamic {precision}"] = loop.predict(torch.from_numpy(x), torch.tensor([t]), mults).numpy()
            steps[f"torch dynamic {precision}"] = _dynamic_step(loop, x, t, mults)
        differences = check_answers(outputs, f"width {manifest.spec.label(variant.width)}")
        turns = dict(pair for name, step in steps.items() for pair in ((f"pause before {name}", _pause), (name, step)))
        timings = time_in_turns(turns, repeats=settings.repeats, budget_s=settings.budget_s)
    finally:
        for engine in engines.values():
            engine.close()
    return {
        "macs": variant.macs,
        "conv_linear_macs": variant.conv_linear_macs,
        "auto": next(iter(engines)),
        "timings": {name: asdict(timings[name]) for name in steps},
        "relative_l2": differences,
    }


def check_answers(outputs: Mapping[str, NDArray[np.float32]], where: str) -> dict[str, float]:
    """Compare every contender with the dynamic network in fp32; returns the relative L2 differences.

    Raises:
        BackendError: a difference beyond ``TOLERANCES``.
    """
    reference = outputs["torch dynamic fp32"].astype(np.float64)
    differences = {}
    for name, output in outputs.items():
        difference = float(np.linalg.norm(output - reference) / np.linalg.norm(reference))
        tolerance = TOLERANCES[name.rpartition(" ")[2]]
        # "not within" instead of "beyond": a NaN is not within anything.
        if not difference <= tolerance:
            raise BackendError(
                f"{where}: {name} differs from torch dynamic fp32 by {difference:.2e} (relative L2, at most "
                f"{tolerance:.0e}); they do not compute the same thing, so nothing was timed"
            )
        differences[name] = difference
    return differences


def _open_static(bundle: Bundle, variant: Variant, threads: int) -> dict[str, Engine]:
    """The static engines by name, OpenVINO in its default precision first, and in fp32 where that is another."""
    auto = open_engine("openvino", bundle, variant, 1, EngineOptions(threads=threads))
    engines = {f"openvino {auto.precision}": auto}
    exact = EngineOptions(precision="fp32", threads=threads)
    for backend in ("openvino", "onnxruntime"):
        if f"{backend} fp32" not in engines:
            engines[f"{backend} fp32"] = open_engine(backend, bundle, variant, 1, exact)
    return engines


def _one_call(bundle: Bundle, variant: Variant, t: int) -> Plan:
    """DDPM's call at one timestep."""
    schedule = bundle.manifest.noise_schedule
    whole = plan_calls([variant.id] * schedule.timesteps, ddpm(schedule), bundle.time_table())
    return _some_calls(whole, [schedule.timesteps - 1 - t])


def _some_calls(plan: Plan, calls: Sequence[int]) -> Plan:
    """The plan with only these of its calls."""
    rows = list(calls)
    return replace(
        plan,
        variants=tuple(plan.variants[call] for call in rows),
        timesteps=plan.timesteps[rows],
        time_features=plan.time_features[rows],
        to_x_0=plan.to_x_0[rows],
        update=plan.update[rows],
    )


class _FixedStart:
    """Every run starts at the same state: a step draws noise once, as it does in the middle of a run."""

    def __init__(self, x: NDArray[np.float32]) -> None:
        self._x, self._noise = x, SeededNoise(SEED)

    def fill(self, out: NDArray[np.float32], stream: int, call: int) -> None:
        if stream == INITIAL:
            np.copyto(out, self._x)
        else:
            self._noise.fill(out, stream, call)


def _predict(scheduler: Scheduler, plan: Plan, x: NDArray[np.float32]) -> NDArray[np.float32]:
    np.copyto(scheduler.x, x)
    np.copyto(scheduler.features, plan.time_features[0])
    scheduler.eps.fill(np.nan)
    scheduler.engines[plan.variants[0]].run()
    return scheduler.eps.copy()


def _static_step(scheduler: Scheduler, plan: Plan, x: NDArray[np.float32]) -> Callable[[], object]:
    start = _FixedStart(x)
    return lambda: scheduler.run(plan, start)


def _dynamic_step(loop: DynamicLoop, x: NDArray[np.float32], t: int, mults: Sequence[float]) -> Callable[[], object]:
    start, timestep = torch.from_numpy(x), torch.tensor([t])
    return lambda: loop.step(start, timestep, mults)


def _pause() -> None:
    time.sleep(PAUSE_S)


def _normals(shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.random.default_rng(SEED).standard_normal(shape, dtype=np.float32)


# The strategy


def measure_strategy(bundle: Bundle, strategy: Strategy, network: DynamicUNet, settings: Settings) -> Record:
    """Seconds per image at full width and with the strategy: ours really run, the dynamic loop on an even part.

    Returns:
        ``calls``, ``sampler``, ``ours`` and ``best_peer`` (names), ``contenders`` by name with ``full_s``,
        ``strategy_s``, ``theoretical``, ``theoretical_conv_linear``, ``realised``, ``r`` and ``mfu``,
        ``peak_gflops`` by precision, and ``net_r``.
    """
    spec = bundle.manifest.spec
    uniform = Strategy.uniform(1.0, spec.timesteps)
    sampler: dict[str, Any] = {"sampler": "ddpm"}
    if settings.calls != spec.timesteps:
        sampler = {"sampler": "ddim", "steps": settings.calls, "eta": 1.0}  # draws noise as often as DDPM
    with Pipeline.from_bundle(bundle.path, backend="openvino", threads=settings.threads) as pipeline:
        full, searched = (pipeline.plan(s, **sampler) for s in (uniform, strategy))
        difference = check_loop(pipeline, searched, _loop(bundle, network, searched, "fp32"), strategy)
        ours = f"openvino {pipeline.precision}"
        runs = {ours: (searched, _draw_s(pipeline, full), _draw_s(pipeline, searched))}
    for precision in PEERS:
        plan = _peer_plan(bundle, strategy, network, precision, settings)
        loop = _loop(bundle, network, plan, precision)
        full_s, strategy_s = (_walk_s(loop, spec, _width_mults(bundle, s)) for s in (uniform, strategy))
        runs[f"torch dynamic {precision}"] = (plan, full_s, strategy_s)
    precision_of_ours = ours.rpartition(" ")[2]
    peaks = {p: matmul_peak_gflops(p, settings.threads) for p in dict.fromkeys(("fp32", precision_of_ours))}
    contenders = {
        # A precision the processor has no units for can at best be as fast as fp32.
        name: _honest(bundle, *run, settings.calls, peaks.get(name.rpartition(" ")[2], peaks["fp32"]))
        for name, run in runs.items()
    }
    best_peer = min((name for name in contenders if name != ours), key=lambda name: contenders[name]["full_s"])
    net_s = contenders[best_peer]["full_s"] / contenders[ours]["strategy_s"]
    return {
        "calls": settings.calls,
        "sampler": sampler["sampler"],
        "provenance": dict(strategy.provenance),
        "swaps": len(searched.segments) - 1,
        "ours": ours,
        "best_peer": best_peer,
        "peak_gflops": peaks,
        "peak_of_ours": precision_of_ours,
        "relative_l2_of_loops": difference,
        "contenders": contenders,
        "net_r": net_s / contenders[ours]["theoretical"],
    }


def _honest(bundle: Bundle, plan: Plan, full_s: float, strategy_s: float, calls: int, peak_gflops: float) -> Record:
    """The honest metric of one contender.

    Args:
        bundle: What ran.
        plan: The calls that were really made with the strategy.
        full_s: Seconds of as many calls at full width.
        strategy_s: Seconds of the plan.
        calls: Number of calls to quote seconds for.
        peak_gflops: Measured GFLOP/s of a matrix product.
    """
    full, own = bundle.full, [bundle.variants[variant] for variant in plan.variants]
    theoretical = theoretical_speedup(full.macs, [variant.macs for variant in own])
    return {
        "calls": len(own),
        "full_s": full_s * calls / len(own),
        "strategy_s": strategy_s * calls / len(own),
        "theoretical": theoretical,
        "theoretical_conv_linear": theoretical_speedup(full.conv_linear_macs, [v.conv_linear_macs for v in own]),
        "realised": full_s / strategy_s,
        "r": full_s / strategy_s / theoretical,
        "mfu": gflops(full.macs) * len(own) / full_s / peak_gflops,
    }


def check_loop(pipeline: Pipeline, plan: Plan, loop: DynamicLoop, strategy: Strategy) -> float:
    """Run the first call of every variant and the last call on both, with the same noise; relative L2 of the states.

    Raises:
        BackendError: a difference beyond ``TOLERANCES``.
    """
    calls = sorted({*(plan.variants.index(variant) for variant in set(plan.variants)), len(plan.variants) - 1})
    few = _some_calls(plan, calls)
    (ours,) = pipeline.batches(few, num_images=1, batch_size=1, seed=SEED)
    seeded = SeededNoise(SEED)

    def noise(like: Tensor, call: int) -> Tensor:
        out = np.empty(like.shape, np.float32)
        seeded.fill(out, PER_CALL, call)
        return torch.from_numpy(out)

    start = np.empty(ours.x_final.shape, np.float32)
    seeded.fill(start, INITIAL, 0)
    timesteps = [int(t) for t in few.timesteps]
    found = loop.run(torch.from_numpy(start), _width_mults(pipeline.bundle, strategy), timesteps, noise)
    name = f"openvino {pipeline.precision}"
    return check_answers({"torch dynamic fp32": found.numpy(), name: ours.x_final}, "the sampling loop")[name]


def _loop(bundle: Bundle, network: DynamicUNet, plan: Plan, precision: PeerPrecision) -> DynamicLoop:
    return DynamicLoop(network, bundle.manifest.noise_schedule, [int(t) for t in plan.timesteps], precision)


def _draw_s(pipeline: Pipeline, plan: Plan) -> float:
    """Seconds of one image; every engine is opened and run once before."""
    first = [plan.variants.index(variant) for variant in dict.fromkeys(plan.variants)]
    for _ in pipeline.batches(_some_calls(plan, first), num_images=1, batch_size=1):
        pass
    (batch,) = pipeline.batches(plan, num_images=1, batch_size=1, seed=SEED)
    return batch.latency_ms / 1e3


def _walk_s(loop: DynamicLoop, spec: UNetSpec, mults: Sequence[float]) -> float:
    """Seconds of one walk of the dynamic loop, after two calls that are not counted."""
    start = torch.from_numpy(_normals((1, *spec.sample_shape)))
    loop.run(start, mults, loop.timesteps[:2])
    started = time.perf_counter()
    loop.run(start, mults)
    return time.perf_counter() - started


def _width_mults(bundle: Bundle, strategy: Strategy) -> list[float]:
    """Share of the full width per timestep, as the published file lists it."""
    return [bundle.variants[variant].width_mult for variant in strategy.resolve(bundle.manifest.variants)]


def _peer_plan(
    bundle: Bundle, strategy: Strategy, network: DynamicUNet, precision: PeerPrecision, settings: Settings
) -> Plan:
    """The even part of the timesteps that a peer visits: as many as asked for, fewer where a step takes too long."""
    spec, schedule = bundle.manifest.spec, bundle.manifest.noise_schedule
    probe = DynamicLoop(network, schedule, _all_timesteps(spec)[:2], precision)
    step_s = _walk_s(probe, spec, [1.0] * spec.timesteps) / 2
    affordable = max(MIN_PEER_CALLS, int(PEER_BUDGET_S / step_s))
    sampler = ddim(schedule, min(settings.peer_calls, affordable))
    ids = strategy.resolve(bundle.manifest.variants)
    return plan_calls([ids[int(t)] for t in sampler.timesteps], sampler, bundle.time_table())


def _offers(bundle: Bundle, strategy: Strategy) -> bool:
    present = {variant.width_mult for variant in bundle.manifest.variants}
    return {1.0, *(float(choice) for choice in strategy.choices if not isinstance(choice, str))} <= present


def _all_timesteps(spec: UNetSpec) -> list[int]:
    return list(range(spec.timesteps - 1, -1, -1))


# Memory and cold start

RESIDENT: Final = """
import json, sys, time
from pathlib import Path

import numpy as np

from ddsm_engine.backends import open_engine
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import Bundle

folder, backend, threads = sys.argv[1:]
started = time.perf_counter()
bundle = Bundle.open(Path(folder))
options = EngineOptions(threads=int(threads))
engines = [open_engine(backend, bundle, v, 1, options) for v in bundle.manifest.variants]
open_s = time.perf_counter() - started
spec = bundle.manifest.spec
sample, out = np.zeros((2, 1, *spec.sample_shape), np.float32)
for engine in engines:
    engine.bind({"sample": sample, "time_features": bundle.time_table()[[0]]}, {"out_sample": out})
    engine.run()
if "torch" in sys.modules:
    sys.exit("torch was imported; the figures would count it")
# Not ru_maxrss: a new process inherits its parent's, and the parent here has torch in it.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak_kib = int(status["VmHWM"].split()[0])
found = {"precision": engines[0].precision, "variants": len(engines), "open_s": open_s}
print(json.dumps({**found, "peak_rss_bytes": peak_kib << 10}))
"""
"""A process that opens every variant of a bundle, runs each once and says what that took; Linux."""


def measure_memory(bundle: Bundle, threads: int) -> Record:
    """Open every variant in a fresh process per backend.

    Returns:
        By contender: ``variants``, ``open_s`` (the library's import included) and ``peak_rss_bytes`` (the process's
        high-water mark, opening included).

    Raises:
        BackendError: the process failed.
    """
    found = {}
    for backend in ("openvino", "onnxruntime"):
        command = [sys.executable, "-c", RESIDENT, str(bundle.path.resolve()), backend, str(threads)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            raise BackendError(f"opening every variant on {backend} failed: {process.stderr.strip()[-300:]}")
        values = json.loads(process.stdout)
        found[f"{backend} {values.pop('precision')}"] = values
    return found


# The command


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.update_readme is not None:
        return guarded(lambda: _report.update_readmes(NAME, readme_blocks(_report.load(arguments.update_readme, NAME))))
    return guarded(lambda: _measure_and_write(arguments))


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.cifar10_cpu", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--bundle", type=Path, help="folder to reuse, or to leave it in (default: temporary)")
    p.add_argument("--widths", type=_eighths, default=EIGHTHS, help="such as 2/8,8/8 (default: all seven)")
    p.add_argument("--repeats", type=_positive, default=30, help="rounds per width, at most (default: 30)")
    p.add_argument("--calls", type=_calls, default=1000, help="of the strategy runs; fewer is DDIM (default: 1000)")
    p.add_argument("--peer-calls", type=_calls, default=100, help="of the dynamic loop, at most (default: 100)")
    p.add_argument("--budget-s", type=float, default=120.0, help="seconds per width, about (default: 120)")
    p.add_argument("--threads", type=int, default=0, help="per engine; 0 leaves it to the libraries")
    p.add_argument("--strategy", type=Path, default=STRATEGY, help="default: the published one")
    p.add_argument("--machine", help="name of this machine (default: from its processor)")
    where = p.add_mutually_exclusive_group()
    where.add_argument("-o", "--output", type=Path, help="JSON to write (default: benchmarks/results/DATE-MACHINE-…)")
    where.add_argument("--resume", type=Path, metavar="FILE", help="go on with this result, begun by the same command")
    where.add_argument("--update-readme", type=Path, metavar="FILE", help="only rewrite the tables from this result")
    return p


def _eighths(text: str) -> tuple[int, ...]:
    found = re.fullmatch(r"([2-8]/8)(,[2-8]/8)*", text)
    if found is None:
        raise argparse.ArgumentTypeError("expected widths such as 2/8,8/8")
    return tuple(sorted({int(part[0]) for part in text.split(",")}))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("expected a whole number from 1")
    return int(text)


def _calls(text: str) -> int:
    if not text.isdigit() or not 2 <= int(text) <= SCHEDULE.timesteps:
        raise argparse.ArgumentTypeError(f"expected a whole number from 2 to {SCHEDULE.timesteps}")
    return int(text)


def _measure_and_write(arguments: argparse.Namespace) -> None:
    settings = Settings(
        eighths=arguments.widths,
        repeats=arguments.repeats,
        budget_s=arguments.budget_s,
        calls=arguments.calls,
        peer_calls=min(arguments.peer_calls, arguments.calls),
        threads=arguments.threads,
    )
    where = environment()
    machine = arguments.machine or _report.machine_name(where["cpu"], where["cores"])
    record = new_record(machine, settings, CIFAR10)
    path = arguments.output or _report.path_of(record)
    if arguments.resume is not None:
        path, fresh = arguments.resume, record
        record = _report.load(path, NAME)
        check_same_run(record, fresh)
        record.setdefault("resumed", []).append({key: where[key] for key in ("date", "commit")})
    elif path.exists():
        raise OutputError(f"{path} exists already; go on with --resume {path}, or choose another --output")
    strategy = Strategy.load(arguments.strategy)
    with cifar10_bundle(arguments.bundle, settings.eighths) as bundle:
        measure(bundle, strategy, settings, record=record, save=lambda found: _save(found, path))
    print(f"\n{_cifar10_report.details(record)}\n\nwritten: {path} and its Markdown twin")


def _save(record: Record, path: Path) -> None:
    _report.save(record, path, _cifar10_report.details(record))


def readme_blocks(record: Record) -> dict[Path, str]:
    """What stands between the markers of which README."""
    return {
        ROOT / "README.md": _cifar10_report.summary(record),
        ROOT / "benchmarks" / "README.md": _cifar10_report.details(record),
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
