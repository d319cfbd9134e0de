"""The bundles that ``ddsm bench --suite gpu`` is run on: the CIFAR-10 network at three image sizes, random weights.

    python -m benchmarks.gpu_bundles -o gpu
    ddsm bench gpu/*.bundle --suite gpu -o gpu.json
    python -m benchmarks.gpu_bundles --update-readme benchmarks/results/FILE.json

That of 32x32 has all seven widths and the published strategy; the others have 2/8, 4/8 and 8/8, and that of 64x64 two
stand-ins for published strategies that are not at hand, which save as much.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Final

from benchmarks._report import README, ROOT, has_block, update_readmes
from benchmarks.cifar10 import CIFAR10, SCHEDULE, STRATEGY, random_supernet, say
from ddsm_engine.bundle import MANIFEST, Bundle
from ddsm_engine.cli import guarded
from ddsm_engine.measure.gpu.suite import load
from ddsm_engine.measure.gpu.targets import PUBLISHED, STAND_INS, Result, verdict_table
from ddsm_engine.spec import EIGHTHS, UNetSpec
from ddsm_engine.strategy import Choice, Strategy
from ddsm_export.bundling import ExportOptions, export_bundle
from ddsm_export.cost import count_cost
from ddsm_export.onnx import ArtefactPrecision

NAME: Final = "gpu_suite"
"""Of the block in the READMEs, and what the name of a committed result ends with: ``results/*-gpu_suite.json``."""

SIZES: Final[Mapping[int, Sequence[int]]] = {32: EIGHTHS, 64: (2, 4, 8), 128: (2, 4, 8)}
"""Eighths of the full width by image size."""

SAVINGS: Final = dict(zip(STAND_INS, (0.61, 0.76), strict=True))
"""Of true MACs: what DDSM reports for CelebA-HQ 64 and ImageNet 64."""

CYCLES: Final = 4
"""Of a stand-in: so often it goes from the full width to the narrowest and back."""

SHOWN: Final = Path("gpu")
"""Where the commands of the READMEs have the bundles."""

NO_RESULT: Final = Path()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu_bundles", description=(__doc__ or "").partition("\n")[0])
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="gets a bundle for each image size")
    where.add_argument(
        "--update-readme", type=Path, nargs="?", const=NO_RESULT, metavar="FILE",
        help="only rewrite the tables, from this result; without one they say what was not run",
    )  # fmt: skip
    p.add_argument(
        "--precision", choices=("fp32", "fp16", "bf16"), default="fp16",
        help="of the artefacts, which TensorRT and ONNX Runtime compute in (default: fp16)",
    )  # fmt: skip
    arguments = p.parse_args(argv)
    if arguments.output is not None:
        return guarded(partial(make_bundles, arguments.output, arguments.precision))
    file = arguments.update_readme
    return guarded(lambda: update_readmes(NAME, blocks(None if file == NO_RESULT else load(file))))


# --- the bundles ------------------------------------------------------------------------------------------------------


def make_bundles(folder: Path, precision: ArtefactPrecision, sizes: Mapping[int, Sequence[int]] = SIZES) -> None:
    """Export what is not there yet.

    Raises:
        BundleError: what is there is no bundle.
    """
    for size, eighths in sizes.items():
        path = folder / f"cifar10-{size}.bundle"
        if (path / MANIFEST).is_file():
            say(f"{Bundle.open(path).path} is there")
            continue
        spec = replace(CIFAR10, image_size=size)
        widths = [spec.base_channels * k // 8 for k in eighths]
        say(f"exporting {len(widths)} widths to {path}")
        options = ExportOptions(widths=widths, precision=precision)
        export_bundle(random_supernet(spec, SCHEDULE), path, options, strategies=strategies_of(size), report=say)


def strategies_of(size: int) -> dict[str, Strategy]:
    """The strategies of the bundle for an image size, by name."""
    if size == 32:
        return {PUBLISHED: Strategy.load(STRATEGY)}
    spec = replace(CIFAR10, image_size=size)
    return {name: stand_in(spec, saving) for name, saving in SAVINGS.items()} if size == 64 else {}


def stand_in(spec: UNetSpec, saving: float) -> Strategy:
    """A strategy that saves this share of the true MACs: some 8/8, and as much 4/8 as 2/8.

    It is nobody's search result, and says so.
    """
    full, half, quarter = (macs_of(spec, eighths) for eighths in (8, 4, 2))
    narrow = (half + quarter) / 2 / full
    of_full = (1 - saving - narrow) / (1 - narrow)
    of_narrow = (1 - of_full) / 2
    shares = ((8, of_full), (4, of_narrow / 2), (2, of_narrow), (4, of_narrow / 2))
    choices: list[Choice] = []
    end = 0.0
    for eighths, share in shares * CYCLES:
        end += share * spec.timesteps / CYCLES
        choices += [Fraction(eighths, 8)] * (round(end) - len(choices))
    return Strategy(tuple(choices), provenance={"kind": "stand-in", "saves": saving, "searched": False})


@cache
def macs_of(spec: UNetSpec, eighths: int) -> int:
    """True MACs of a width, per image."""
    return count_cost(spec, spec.base_channels * eighths // 8).macs


# --- the READMEs ------------------------------------------------------------------------------------------------------


def blocks(result: Result | None) -> dict[Path, str]:
    """What stands between the markers of which README; the project's own shows it once it has the markers."""
    shown = verdict_table(result, [SHOWN / "*.bundle"], Path(f"{SHOWN}.json"))
    readmes = [readme for readme in (README, ROOT / "README.md") if has_block(readme.read_text("utf-8"), NAME)]
    return dict.fromkeys(readmes, shown)


if __name__ == "__main__":
    sys.exit(main())
