"""Candidates drawn and judged. What was drawn once is kept in a folder, so that a search which was stopped goes on."""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ddsm_engine.backends import engine_target
from ddsm_engine.bundle import checksum_of
from ddsm_engine.errors import OutputError
from ddsm_engine.files import atomic_path
from ddsm_engine.pipeline import Batch, Pipeline
from ddsm_engine.plan import Plan, plan_calls
from ddsm_engine.quality import Metric, Rows
from ddsm_engine.samplers import Sampler
from ddsm_engine.untrusted import open_safetensors, parse_json, read_bytes

log = logging.getLogger(__name__)

JOURNAL, ROWS = "journal.jsonl", "rows"
MAX_JOURNAL_BYTES = 1 << 28

PARTS = 5
"""Seeds that the images of a search come from, as many of each: what one seed would have chosen is known for five."""

Calls = tuple[str, ...]
"""The variant of every call, first executed call first."""


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A batch of a candidate's images as a metric knows them.

    Attributes:
        rows: [N, F], see ``ddsm_engine.quality.Metric.describe``.
        ms_per_image: Wall time of the run over the images of a batch; None where they were kept: the machine may have
            been another one then.
    """

    rows: Rows
    ms_per_image: float | None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the images of a search say of a candidate.

    Attributes:
        value: The metric over all images.
        parts: The metric over those of each seed.
    """

    value: float
    parts: tuple[float, ...]


class Trials:
    """Draws candidates with the same noise for all, describes their images, and keeps the descriptions.

    Attributes:
        pipeline: What draws.
        sampler: The calls that a candidate has a variant for.
        metric: What judges.
        batch_size: Images at a time.
        evaluations: Origin of a candidate → image evaluations of a network that were needed for those of it, kept ones
            included.
    """

    def __init__(
        self, pipeline: Pipeline, sampler: Sampler, metric: Metric, folder: Path | None, *, batch_size: int
    ) -> None:
        """Open a folder of trials, or begin one; None keeps nothing."""
        self.pipeline, self.sampler, self.metric, self.batch_size = pipeline, sampler, metric, batch_size
        self.evaluations: dict[str, int] = {}
        self._folder = folder
        self._tables = pipeline.bundle.time_tables()
        self._journal = {} if folder is None else _read_journal(folder / JOURNAL)
        self._asked: dict[str, Judgement] = {}
        self._origins: dict[Calls, str] = {}

    def plan(self, calls: Sequence[str]) -> Plan:
        """The plan of a candidate."""
        return plan_calls(calls, self.sampler, self._tables)

    def judge(
        self, calls: Calls, origin: str, *, seed: int, images: int, cost: float, report: Callable[[str], None]
    ) -> Judgement:
        """The metric of a candidate on the images of a search; drawn and written to the journal if it was not yet.

        Args:
            calls: See ``Calls``.
            origin: Which part of the search asks, for the journal.
            seed: The first of ``PARTS`` seeds.
            images: Of all seeds together, a multiple of ``PARTS``.
            cost: For the journal.
            report: Told one line for every candidate that is drawn.

        Raises:
            MetricError: a distance that is no number.
        """
        key = self._key(self.plan(calls), seed, images)
        if key in self._asked:
            return self._asked[key]
        self._origins[calls] = origin
        self.evaluations[origin] = self.evaluations.get(origin, 0) + images * len(calls)
        entry = self._journal.get(key)
        if entry is None:
            each = [self.draw(calls, seed=seed + part, images=images // PARTS) for part in range(PARTS)]
            found = Judgement(
                self.metric.distance(np.concatenate(each)), tuple(self.metric.distance(rows) for rows in each)
            )
            self._write({
                "key": key, "origin": origin, "calls": run_lengths(calls), "cost": cost, "seed": seed,
                "images": images, "value": found.value, "parts": list(found.parts),
            })  # fmt: skip
            report(f"{origin}: {found.value:.3f} at {cost:.4g}, {spell_calls(calls)}")
        else:
            found = Judgement(entry["value"], tuple(entry["parts"]))
        self._asked[key] = found
        return found

    def origin(self, calls: Calls) -> str:
        """Which part of the search was the first to ask for a candidate that was judged."""
        return self._origins[calls]

    def draw(self, calls: Calls, *, seed: int, images: int) -> Rows:
        """Describe the first ``images`` images of a seed, batch by batch; kept ones are not drawn again."""
        batches = [self.draw_batch(calls, seed, first, count) for first, count in self.batches(images)]
        return np.concatenate([batch.rows for batch in batches])

    def batches(self, images: int) -> list[tuple[int, int]]:
        """(first image, number of images) of each batch of so many images."""
        size = self.batch_size
        return [(first, min(size, images - first)) for first in range(0, images, size)]

    def draw_batch(self, calls: Calls, seed: int, first: int, count: int) -> Drawn:
        """Describe ``count`` images of a seed from the ``first`` one on: a batch, or what is left of the last one."""
        plan, file = self.plan(calls), None
        if self._folder is not None:
            file = self._folder / ROWS / f"{self._key(plan, seed, count, first=first)[:32]}.safetensors"
            if (kept := _read_rows(file)) is not None:
                return Drawn(kept, None)
        (batch,) = self.pipeline.batches(
            plan,
            num_images=first + count,
            batch_size=self.batch_size,
            seed=seed,
            skip=lambda numbers: numbers.stop <= first,
        )
        rows = self.metric.describe(np.clip(batch.x_final, -1, 1))
        if file is not None:
            with atomic_path(file) as temporary:
                save_file({"rows": rows}, temporary)
        return Drawn(rows, self._ms_per_image(batch))

    def time_batch(self, calls: Calls) -> float:
        """Milliseconds an image of one batch, drawn for nothing else."""
        (batch,) = self.pipeline.batches(self.plan(calls), num_images=self.batch_size, batch_size=self.batch_size)
        return self._ms_per_image(batch)

    def _ms_per_image(self, batch: Batch) -> float:
        return batch.latency_ms / self.batch_size  # a padded batch takes as long as a whole one

    def _key(self, plan: Plan, seed: int, images: int, *, first: int = 0) -> str:
        """A checksum of everything that an answer depends on."""
        backend = self.pipeline.settle_backend(plan, self.batch_size)
        return checksum_of({
            "bundle": self.pipeline.bundle.manifest.checksum,
            "plan": plan.checksum,
            "metric": dict(self.metric.identity),
            "target": dict(engine_target(backend, self.pipeline.options, self.batch_size)),
            "seed": seed,
            "first": first,
            "images": images,
        })  # fmt: skip

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._journal[entry["key"]] = dict(entry)
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def run_lengths(calls: Sequence[str]) -> list[list[str | int]]:
    """``[["w064", 12], ["w032", 38]]``: what journals and reports say of a candidate."""
    return [[variant, len(list(group))] for variant, group in groupby(calls)]


def spell_calls(calls: Sequence[str]) -> str:
    """A candidate in a line: ``w032×38, w064×12``."""
    parts = [f"{variant}×{count}" for variant, count in run_lengths(calls)]
    return ", ".join(parts if len(parts) <= 8 else [*parts[:7], f"… {len(parts) - 7} more"])


def _read_rows(file: Path) -> Rows | None:
    """What was kept, or None; a damaged file is drawn again."""
    if not file.is_file():
        return None
    try:
        with open_safetensors(file, "np") as opened:
            return np.asarray(opened.get_tensor("rows"))
    except (OSError, SafetensorError) as error:
        log.warning("%s is damaged and is drawn again: %s", file, error)
        return None


def _read_journal(file: Path) -> dict[str, dict[str, Any]]:
    """The entries by key; a last line that a kill cut short is cut off.

    Raises:
        OutputError: a file that is no journal.
    """
    if not file.exists():
        return {}
    try:
        whole, newline, rest = read_bytes(file, MAX_JOURNAL_BYTES).rpartition(b"\n")
        entries = [parse_json(line) for line in whole.splitlines()]
        found = {entry["key"]: entry for entry in entries if isinstance(entry["value"], float)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{file} is no journal of a search: {error}; choose another --output") from error
    if rest:
        os.truncate(file, len(whole) + len(newline))
    return found
