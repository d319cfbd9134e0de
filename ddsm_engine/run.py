"""``python -m ddsm_engine.run --strategy …``: draw images from a bundle."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ddsm_engine.backends import CHOICES, DEVICES
from ddsm_engine.backends.engine import PRECISIONS
from ddsm_engine.cli import guarded
from ddsm_engine.errors import OutputError
from ddsm_engine.files import atomic_path, clear_leftovers, refuse_existing, write_atomically
from ddsm_engine.images import check_channels, grid, save_png
from ddsm_engine.pipeline import DEFAULT_BATCH, Batch, Pipeline, choose_batch_size, find_bundle
from ddsm_engine.plan import Plan
from ddsm_engine.samplers import NAMES
from ddsm_engine.search.budget import PREFIX, strategy_within
from ddsm_engine.strategy import Strategy
from ddsm_engine.trace import HOST, Trace
from ddsm_engine.untrusted import brief, parse_json, read_bytes

RUN_FILE = "run.json"
MAX_RUN_BYTES = 1 << 24
"""Of that file; a strategy of 65,536 segments takes half of it."""

DECISIVE = {"format", "bundle", "seed", "table", "batch_size", "backend", "device", "precision"}
"""What in that file decides over the images; the rest says in words what the table is, of which there are several."""


def parser() -> argparse.ArgumentParser:
    """The options of ``run``."""
    p = argparse.ArgumentParser(
        prog="python -m ddsm_engine.run", description="Draw images from a bundle, swapping sub-networks per timestep."
    )
    p.add_argument(
        "--strategy",
        required=True,
        help="a strategy file, the name of one in the bundle, uniform:4/8, or budget:200ms: the best that was searched "
        "for and takes no longer, per image",
    )
    p.add_argument("--bundle", help="the bundle (default: the one that holds the strategy, else the only one here)")
    p.add_argument(
        "--sampler", metavar="NAME|FILE.json",
        help=f"{', '.join(NAMES)}, with a grid behind a colon where wanted (heun:karras), or the scheduler_config.json "
        "of a diffusers scheduler (default: the bundle's own, else ddpm)",
    )  # fmt: skip
    p.add_argument("--steps", type=int, help="steps of the sampler (default for ddpm and ddim: every timestep)")
    p.add_argument("--eta", type=float, help="DDIM's share of fresh noise, 0 to 1 (default 0)")
    p.add_argument(
        "--clip-sample", type=float, nargs="?", const=1.0, metavar="BOUND",
        help="clip the predicted clean image to ± BOUND (1 if not given); DDSM was published without",
    )  # fmt: skip
    p.add_argument("--num-images", type=int, default=16)
    p.add_argument("--batch-size", type=int, help=f"images at a time (default: at most {DEFAULT_BATCH})")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--backend", choices=CHOICES, default="auto")
    p.add_argument("--device", choices=DEVICES, default="auto")
    p.add_argument("--precision", choices=PRECISIONS, default="auto")
    p.add_argument("--threads", type=int, default=0, help="threads per engine (default: the backend's choice)")
    p.add_argument("-o", "--output", type=Path, default=Path("images.png"), help=".png = a grid, .npz, or a folder")
    p.add_argument("--resume", action="store_true", help="finish a folder of images that was interrupted")
    p.add_argument("--force", action="store_true", help="replace an output that exists")
    p.add_argument("--trace", type=Path, metavar="FILE.json", help="write what ran and how long it took")
    p.add_argument("-v", "--verbose", action="store_true", help="print the plan and every segment")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parser().parse_args(argv)
    return guarded(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Draw and write images.

    Raises:
        DdsmError: anything that does not fit; an output is then as it was.
    """
    output: Path = arguments.output
    if output.suffix not in (".png", ".npz", ""):
        raise OutputError(f"{output} must end in .png (a grid), .npz (an array) or nothing (a folder of PNGs)")
    if arguments.resume and (output.suffix or arguments.force):
        raise OutputError("--resume finishes a folder of images (-o FOLDER), and excludes --force")
    if arguments.resume and output.exists():
        clear_leftovers(output)
    else:
        refuse_existing(output, force=arguments.force, marker=None if output.suffix else RUN_FILE)
    if arguments.trace is not None:
        _refuse_over_images(arguments.trace, output)
        refuse_existing(arguments.trace, force=arguments.force)
    bundle = find_bundle(arguments.strategy, arguments.bundle, Path.cwd())
    with Pipeline.from_bundle(
        bundle,
        backend=arguments.backend,
        device=arguments.device,
        precision=arguments.precision,
        threads=arguments.threads,
    ) as pipeline:
        if output.suffix != ".npz":
            check_channels(pipeline.bundle.manifest.spec.sample_shape[0])
        job = _Job(pipeline, arguments)
        (job.into_folder if output.suffix == "" else job.into_file)(output)
        trace = pipeline.trace(job.finished, job.batch_size)
    if arguments.trace is not None:
        write_atomically(arguments.trace, (json.dumps(trace.to_json(), indent=1) + "\n").encode())
    _report(trace, job.plan, output, verbose=arguments.verbose)


def _refuse_over_images(trace: Path, output: Path) -> None:
    """Refuse a trace that would replace images, or what a folder of them says they are."""
    file, images = trace.resolve(), output.resolve()
    is_theirs = output.suffix != "" or file.suffix == ".png" or file.name == RUN_FILE
    if file == images or (images in file.parents and is_theirs):
        raise OutputError(f"--trace {trace} would lie over the images of {output}; choose another name for it")


class _Job:
    """One run of the command: draws batch by batch and keeps what is finished."""

    def __init__(self, pipeline: Pipeline, arguments: argparse.Namespace) -> None:
        a = arguments
        self.pipeline, self.arguments = pipeline, arguments
        self.batch_size = choose_batch_size(a.num_images, a.batch_size)
        self.strategy = self._strategy()
        self.plan = pipeline.plan(self.strategy, a.sampler, a.steps, eta=a.eta, clip_sample=a.clip_sample)
        self.finished: list[Batch] = []

    def _strategy(self) -> Strategy:
        a, pipeline = self.arguments, self.pipeline
        if not a.strategy.startswith(PREFIX):
            return pipeline.strategy(a.strategy)
        found = strategy_within(
            pipeline.bundle, a.strategy,
            backend=a.backend, options=pipeline.options, batch=self.batch_size,
            given={
                # A sampler's name depends on no number of steps.
                "sampler": None if a.sampler is None else pipeline.sampler(a.sampler, a.steps or 10).name,
                "steps": a.steps, "eta": a.eta, "clip_sample": a.clip_sample,
            },
        )  # fmt: skip
        print(f"{a.strategy}: {found.name}, {found.predicted_ms:.1f} ms an image expected", file=sys.stderr)
        return found.strategy

    def into_file(self, output: Path) -> None:
        """One grid or one array, whole or not at all; after Ctrl-C it holds the images that were finished."""
        interrupted = self._draw(lambda batch: None, existing=set())
        images = np.clip(np.concatenate([batch.x_final for batch in self.finished]), -1, 1)
        with atomic_path(output, replace=self.arguments.force) as temporary:
            if output.suffix == ".npz":
                np.savez(temporary, images=images)
            else:
                save_png(grid(images), temporary)
        if interrupted:
            raise KeyboardInterrupt

    def into_folder(self, folder: Path) -> None:
        """One PNG an image; ``run.json`` records what they are.

        A new folder appears with ``run.json`` in it and grows batch by batch, so that a killed run can be resumed. One
        that is replaced stays until the new one is finished, or interrupted with images to keep.
        """
        if self.arguments.force and folder.exists():
            with atomic_path(folder) as temporary:
                interrupted = self._fill(temporary)
        else:
            interrupted = self._fill(folder)
        if interrupted:
            raise KeyboardInterrupt

    def _fill(self, folder: Path) -> bool:
        """Draw the images that a folder lacks; returns whether Ctrl-C ended it early."""
        identity = self._identity()
        existing: set[int] | None = None
        if self.arguments.resume and folder.exists():
            _check_identity(folder / RUN_FILE, identity)
            existing = {number for number in range(self.arguments.num_images) if (folder / _picture(number)).is_file()}

        def save(batch: Batch) -> None:
            if existing is None and not self.finished:
                with atomic_path(folder, replace=False) as temporary:
                    temporary.mkdir()
                    (temporary / RUN_FILE).write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
            for offset, image in enumerate(batch.x_final):
                save_png(image, folder / _picture(batch.first_image + offset))

        return self._draw(save, existing or set())

    def _draw(self, save: Callable[[Batch], None], existing: set[int]) -> bool:
        """Draw what does not exist yet; returns whether Ctrl-C ended it early (with something to keep)."""
        a = self.arguments
        total = len(self.plan.variants) * -(-a.num_images // self.batch_size)
        with tqdm(total=total, unit="call", disable=not sys.stderr.isatty()) as bar:

            def advance(calls: int) -> None:
                before = len(self.plan.variants) * len(self.finished)
                bar.update(before + calls - bar.n)

            batches = self.pipeline.batches(
                self.plan,
                num_images=a.num_images,
                batch_size=self.batch_size,
                seed=a.seed,
                on_progress=advance,
                skip=existing.issuperset,
            )
            try:
                for batch in batches:
                    save(batch)
                    self.finished.append(batch)
                    advance(0)
                    if bar.disable:
                        done = batch.first_image + len(batch.x_final)
                        print(f"{done} of {a.num_images} images, {batch.latency_ms / 1e3:.2f} s", file=sys.stderr)
            except KeyboardInterrupt:
                if not self.finished:
                    raise
                return True
        return False

    def _identity(self) -> dict[str, Any]:
        """What every image of a folder has in common; a resumed run must agree with it where ``DECISIVE`` says so."""
        a = self.arguments
        return {
            "format": "ddsm-run",
            "bundle": self.pipeline.bundle.manifest.checksum,
            "strategy": self.strategy.to_json()["segments"],
            "sampler": self.plan.sampler,
            "steps": a.steps,
            "eta": a.eta,
            "clip_sample": a.clip_sample,
            "seed": a.seed,
            "table": self.plan.checksum,
            "batch_size": self.batch_size,
            "backend": self.pipeline.settle_backend(self.plan, self.batch_size),
            "device": self.pipeline.options.device,
            "precision": a.precision,
        }


def _picture(number: int) -> str:
    return f"{number:06d}.png"


def _check_identity(file: Path, identity: dict[str, Any]) -> None:
    """Refuse to resume a folder that holds other images."""
    try:
        recorded = parse_json(read_bytes(file, MAX_RUN_BYTES))
    except (OSError, ValueError) as error:
        raise OutputError(f"{file} cannot be read, so its folder cannot be resumed: {error}") from error
    if not isinstance(recorded, dict):
        raise OutputError(f"{file} is no record of a run, so its folder cannot be resumed: it holds {brief(recorded)}")
    recorded = {"device": "cpu", **recorded}  # a run of before it was recorded
    different = [key for key in identity if identity[key] != recorded.get(key)]
    if DECISIVE.intersection(different):
        raise OutputError(f"{file} records another {', '.join(different)}; resume with the same, or choose another -o")


def _report(trace: Trace, plan: Plan, output: Path, *, verbose: bool) -> None:
    if verbose:
        print(f"plan: {plan}")
        for s in trace.segments:
            print(
                f"batch {s.batch} {s.variant} calls {s.first_call}…{s.first_call + s.calls - 1}  {s.latency_ms:.2f} ms"
                f"  swap {s.swap_ms:.3f} ms"
            )
    way = "" if trace.execution == HOST else f" as {trace.execution}"
    print(
        f"{output}: {trace.images} images in {trace.latency_ms / 1e3:.2f} s, {trace.images_per_s:.2f} images/s "
        f"({trace.backend} {trace.precision}{way}, batch {trace.batch_size}, engines opened in "
        f"{trace.open_ms / 1e3:.2f} s)"
    )


if __name__ == "__main__":
    sys.exit(main())
