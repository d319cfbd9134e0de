"""How images are drawn, beside the strategy: what ``evaluate`` and ``search`` take alike."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_engine.backends import CHOICES, DEVICES, device_of
from ddsm_engine.backends.engine import PRECISIONS, EngineOptions
from ddsm_engine.bundle import checksum_of
from ddsm_engine.errors import StrategyError
from ddsm_engine.files import atomic_path
from ddsm_engine.pipeline import DEFAULT_BATCH, Pipeline
from ddsm_engine.plan import Plan
from ddsm_engine.quality import Images, Metric, choose_metric
from ddsm_engine.samplers import Sampler
from ddsm_engine.strategy import Strategy, spell_sampler

log = logging.getLogger(__name__)

INSTEAD_SEED, INSTEAD_IMAGES = 1 << 32, 256
"""Images of the full width that stand for real ones where there are none: their number, and what is added to the seed,
so that no candidate is drawn from their noise."""


def add_sampling_options(p: argparse.ArgumentParser) -> None:
    """The options."""
    p.add_argument(
        "--sampler", metavar="NAME|FILE.json", help="as of ddsm run (default: a strategy's or the bundle's own)"
    )
    p.add_argument("--steps", type=int, help="steps of the sampler")
    p.add_argument("--eta", type=float, help="DDIM's share of fresh noise, 0 to 1 (default 0)")
    p.add_argument("--clip-sample", type=float, nargs="?", const=1.0, metavar="BOUND", help="as of ddsm run")
    p.add_argument("--batch-size", type=int, default=DEFAULT_BATCH, help=f"images at a time (default {DEFAULT_BATCH})")
    p.add_argument("--backend", choices=CHOICES, default="auto")
    p.add_argument("--device", choices=DEVICES, default="auto")
    p.add_argument("--precision", choices=PRECISIONS, default="auto")
    p.add_argument("--threads", type=int, default=0, help="threads per engine (default: the backend's choice)")


def engine_options(arguments: argparse.Namespace) -> EngineOptions:
    """Device, precision and threads."""
    return EngineOptions(
        device=device_of(arguments.backend, arguments.device), precision=arguments.precision, threads=arguments.threads
    )


@dataclass(frozen=True)
class Sampling:
    """A pipeline and how it draws.

    Attributes:
        pipeline: What draws.
        options: Of the sampler, as ``Pipeline.sampler`` takes them.
        batch_size: Images at a time.
    """

    pipeline: Pipeline
    options: dict[str, Any]
    batch_size: int

    @classmethod
    def of(cls, pipeline: Pipeline, arguments: argparse.Namespace, strategies: Sequence[Strategy] = ()) -> "Sampling":
        """What the options say, and the strategies over calls where these name no sampler.

        Raises:
            StrategyError: the strategies belong to several samplers.
        """
        given = {name: getattr(arguments, name) for name in ("sampler", "steps", "eta", "clip_sample")}
        over_calls = {spell_sampler(s): s.sampling(**given) for s in strategies if s.axis == "call"}
        found = list(over_calls.values())
        if any(other != found[0] for other in found):
            belong = " and to ".join(sorted(over_calls))
            raise StrategyError(f"the strategies belong to {belong}; take those of one sampler together")
        return cls(pipeline, found[0] if found else given, arguments.batch_size)

    @cached_property
    def sampler(self) -> Sampler:
        """The table of calls."""
        return self.pipeline.sampler(**self.options)

    def plan(self, strategy: Strategy) -> Plan:
        """The run of a strategy."""
        return self.pipeline.plan(strategy, **self.options)

    def uniform(self, variant: str) -> Plan:
        """The run in which one variant serves every call."""
        return self.plan(Strategy.uniform(variant, self.pipeline.bundle.manifest.spec.timesteps))

    def images(self, plan: Plan, *, seed: int, count: int) -> Images:
        """Images [N, C, H, W] of a run, clipped to [-1, 1]."""
        return self.pipeline.draw(plan, num_images=count, batch_size=self.batch_size, seed=seed).images

    def metric(self, arguments: argparse.Namespace, keep: Path | None = None) -> Metric:
        """The metric that the options of ``ddsm_engine.quality.add_options`` mean.

        Args:
            arguments: The options, and ``seed``.
            keep: A folder where images of the full width are kept, if any have to be drawn to compare with.
        """
        return choose_metric(
            self.pipeline.bundle,
            kind=arguments.metric,
            data=arguments.data,
            features=arguments.features,
            inception=arguments.inception,
            instead=lambda: self._full_width(arguments.seed + INSTEAD_SEED, keep),
        )

    def _full_width(self, seed: int, keep: Path | None) -> Images:
        plan = self.uniform(self.pipeline.bundle.full.id)
        key = checksum_of({"bundle": self.pipeline.bundle.manifest.checksum, "plan": plan.checksum, "seed": seed})
        file = None if keep is None else keep / f"full-width-{key[:12]}.npy"
        if file is not None and file.is_file():
            try:
                return np.asarray(np.load(file, allow_pickle=False), np.float32)
            except (OSError, ValueError, EOFError) as error:
                log.warning("%s is damaged and is drawn again: %s", file, error)
        images = self.images(plan, seed=seed, count=INSTEAD_IMAGES)
        if file is not None:
            with atomic_path(file) as temporary, temporary.open("wb") as opened:
                np.save(opened, images)
        return images
