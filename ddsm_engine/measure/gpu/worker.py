"""One part in a process of its own: a part that breaks the GPU's context, or hangs, takes no other one with it."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ddsm_engine.bundle import Bundle
from ddsm_engine.cli import guarded
from ddsm_engine.errors import BundleError
from ddsm_engine.measure.gpu.parts import PARTS
from ddsm_engine.measure.gpu.work import Work


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = argparse.ArgumentParser(prog="python -m ddsm_engine.measure.gpu.worker", description="Measure one part.")
    p.add_argument("part", choices=PARTS)
    p.add_argument("bundles", type=Path, nargs="+")
    p.add_argument("--seconds", type=float, required=True)
    p.add_argument("--rows", type=Path, required=True, help="JSON lines; goes on with those that it holds")
    arguments = p.parse_args(argv)
    return guarded(
        lambda: PARTS[arguments.part].measure(Work(open_bundles(arguments.bundles), arguments.seconds, arguments.rows))
    )


def open_bundles(paths: Sequence[Path]) -> Mapping[int, Bundle]:
    """The bundles by image size.

    Raises:
        BundleError: no bundle, a damaged one, or two of one size.
    """
    bundles: dict[int, Bundle] = {}
    for path in paths:
        bundle = Bundle.open(path)
        size = bundle.manifest.spec.image_size
        if size in bundles:
            raise BundleError(f"{path} and {bundles[size].path} are both for images of {size}x{size}; give one of them")
        bundles[size] = bundle
    return bundles


if __name__ == "__main__":
    sys.exit(main())
