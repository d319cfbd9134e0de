"""``ddsm-export SUPERNET.pt``: a trained supernet → a bundle of static sub-networks."""

import argparse
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from ddsm_engine.bundle import MANIFEST
from ddsm_engine.cli import guarded
from ddsm_engine.errors import SpecError
from ddsm_engine.files import refuse_existing
from ddsm_engine.spec import UNetSpec

if TYPE_CHECKING:
    from ddsm_export.checkpoints import Facts


def parser() -> argparse.ArgumentParser:
    """The options of ``ddsm-export``."""
    p = argparse.ArgumentParser(
        prog="ddsm-export", description="Cut a trained supernet into static sub-networks and write them as a bundle."
    )
    p.add_argument("supernet", type=Path, help="a DDSM training checkpoint, a bare state dict, or our .safetensors")
    p.add_argument("-o", "--output", type=Path, help="the bundle's folder (default: <name>.bundle)")
    p.add_argument("--weights", choices=("ema", "net"), default="ema", help="which weights of a checkpoint")
    p.add_argument("--widths", help="comma-separated, as channels (32,64) or eighths (2/8,4/8); default: all that work")
    p.add_argument("--precision", choices=("fp32", "fp16"), default="fp32", help="of the ONNX files")
    p.add_argument("--opset", type=int, choices=range(17, 22), default=18)
    p.add_argument("--force", action="store_true", help="replace a bundle that exists")
    facts = p.add_argument_group(
        "what a published checkpoint cannot tell", "from flagfile.txt beside it, or given here; never guessed"
    )
    facts.add_argument("--flagfile", type=Path, help="the training's flagfile (default: flagfile.txt beside SUPERNET)")
    facts.add_argument("--groups", type=int, help="groups of every norm: 32, or 16 with --slimmable_g16")
    facts.add_argument("--image-size", type=int, help="pixels, height and width")
    facts.add_argument("--beta-1", type=float, help="beta of the clean end (1e-4 as published)")
    facts.add_argument("--beta-T", type=float, help="beta of the noisy end (0.02 as published)")
    facts.add_argument("--var-type", choices=("fixedlarge", "fixedsmall"), help="reverse-process variance")
    facts.add_argument("--conv-multiple", type=int, help="rounding of sliced convolutions (published: 8)")
    facts.add_argument("--linear-multiple", type=int, help="rounding of sliced linears (published: 16)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parser().parse_args(argv)
    return guarded(lambda: export(arguments))


def export(arguments: argparse.Namespace) -> None:
    """Read, cut, export, compare, write.

    Raises:
        DdsmError: anything that does not fit; nothing is then written.
    """
    source: Path = arguments.supernet
    output: Path = arguments.output or source.with_suffix(".bundle")
    refuse_existing(output, force=arguments.force, marker=MANIFEST)
    # Imported here so that --help and a wrong path answer at once, without torch.
    from ddsm_export.bundling import ExportOptions, export_bundle
    from ddsm_export.checkpoints import open_supernet

    supernet = open_supernet(source, known_facts(arguments), arguments.weights)
    spec = supernet.spec
    widths = None if arguments.widths is None else parse_widths(arguments.widths, spec)
    for width in spec.eighths() if widths is None else ():
        if reason := spec.why_not(width):
            print(f"leaving out {spec.label(width)}: {reason}", file=sys.stderr)
    options = ExportOptions(widths=widths, precision=arguments.precision, opset=arguments.opset)
    export_bundle(
        supernet, output, options, force=arguments.force, report=lambda line: print(line, file=sys.stderr, flush=True)
    )
    print(f"{output}: {sum(1 for _ in output.glob('variants/*'))} variants; look inside with: ddsm inspect {output}")


def known_facts(arguments: argparse.Namespace) -> "Facts":
    """What the options and the flagfile say of the checkpoint; options win."""
    from ddsm_export.checkpoints import VAR_TYPES, Facts, facts_from_flagfile

    options = Facts(
        groups=arguments.groups,
        image_size=arguments.image_size,
        beta_start=arguments.beta_1,
        beta_end=arguments.beta_T,
        variance_type=VAR_TYPES.get(arguments.var_type),
        conv_multiple=arguments.conv_multiple,
        linear_multiple=arguments.linear_multiple,
    )
    beside = arguments.supernet.with_name("flagfile.txt")
    # Our own file records everything itself; a flagfile that happens to lie beside it is another training's.
    lies_beside = beside.is_file() and arguments.supernet.suffix != ".safetensors"
    flagfile = arguments.flagfile or (beside if lies_beside else None)
    return options if flagfile is None else options.over(facts_from_flagfile(flagfile))


def parse_widths(text: str, spec: UNetSpec) -> tuple[int, ...]:
    """``32,64`` or ``2/8,4/8`` → channels of the first level.

    Raises:
        SpecError: not a width, or one that cannot be cut.
    """
    widths = []
    for item in text.split(","):
        try:
            value = Fraction(item.strip())
        except (ValueError, ZeroDivisionError) as error:
            raise SpecError(f"--widths takes channels (32,64) or eighths (2/8,4/8), found {item!r}") from error
        exact = value * spec.base_channels if "/" in item or "." in item else value
        if exact.denominator != 1:
            raise SpecError(f"{item.strip()} of {spec.base_channels} channels is not a whole number")
        spec.check_width(int(exact))
        widths.append(int(exact))
    return tuple(widths)


if __name__ == "__main__":
    sys.exit(main())
