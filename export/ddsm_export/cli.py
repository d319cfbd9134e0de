"""``ddsm-export SUPERNET.pt``: a trained supernet, or diffusers' folders → a bundle of static networks."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddsm_engine.bundle import MANIFEST, Bundle
from ddsm_engine.cli import guarded
from ddsm_engine.errors import CheckpointError, OutputError, SpecError, StrategyError
from ddsm_engine.files import refuse_existing
from ddsm_engine.spec import UNetSpec
from ddsm_engine.strategy import parse_fraction
from ddsm_engine.untrusted import brief, words

if TYPE_CHECKING:
    from ddsm_export.checkpoints import Expert, Facts

BESIDE_A_CHECKPOINT = (
    "weights", "flagfile", "groups", "image_size", "beta_1", "beta_T", "var_type", "conv_multiple", "linear_multiple",
)  # fmt: skip
"""Options that say which part of a checkpoint is meant, or what it cannot tell."""


def parser() -> argparse.ArgumentParser:
    """The options of ``ddsm-export``."""
    p = argparse.ArgumentParser(
        prog="ddsm-export", description="Cut a trained supernet into static sub-networks and write them as a bundle."
    )
    p.add_argument(
        "sources", nargs="+", type=Path, metavar="SUPERNET",
        help="a DDSM training checkpoint, a bare state dict, or our .safetensors; or one or more folders of diffusers' "
        "UNet2DModel, each of which becomes a variant as it is",
    )  # fmt: skip
    p.add_argument("-o", "--output", type=Path, help="the bundle's folder (default: <name>.bundle)")
    p.add_argument("--weights", choices=("ema", "net"), default="ema", help="which weights of a checkpoint")
    p.add_argument("--widths", help="comma-separated, as channels (32,64) or eighths (2/8,4/8); default: all that work")
    p.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the ONNX files")
    p.add_argument("--opset", type=int, choices=range(17, 23), help="17 to 21 (default: 18); 22 and only 22 with bf16")
    p.add_argument("--force", action="store_true", help="replace a bundle that exists")
    p.add_argument(
        "--to", nargs=2, metavar=("FORMAT", "DIR"),
        help="instead of a bundle, write the sub-networks (of a bundle, too) for another library: diffusers DIR",
    )  # fmt: skip
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
    if arguments.to is not None:
        export_to_diffusers(arguments)
        return
    if any(source.is_dir() for source in arguments.sources):
        export_folders(arguments)
        return
    source = only_source(arguments)
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


def only_source(arguments: argparse.Namespace) -> Path:
    """The file or folder to export, where several make no sense.

    Raises:
        CheckpointError: there are several.
    """
    if len(arguments.sources) > 1:
        raise CheckpointError(
            f"only folders of diffusers go together into one bundle, found {len(arguments.sources)} sources with "
            f"{next(source for source in arguments.sources if not source.is_dir())}: export each supernet by itself"
        )
    return Path(arguments.sources[0])


def export_folders(arguments: argparse.Namespace) -> None:
    """Write one bundle of the networks in diffusers' folders, each a variant as it was trained.

    Raises:
        DdsmError: anything that does not fit; nothing is then written.
    """
    sources: list[Path] = arguments.sources
    if not all(source.is_dir() for source in sources):
        only_source(arguments)
    _refuse_options(arguments, ("weights", "widths", "flagfile"), "is for supernets: leave it out with these folders")
    if arguments.output is None and len(sources) > 1:
        raise OutputError(f"{len(sources)} folders make one bundle, which needs a name: give -o NAME.bundle")
    place = sources[0] if sources[0].name.strip(".") else sources[0].resolve()
    output: Path = arguments.output or place.with_name(f"{place.name}.bundle")
    refuse_existing(output, force=arguments.force, marker=MANIFEST)
    from ddsm_export.bundling import ExportOptions, export_experts
    from ddsm_export.checkpoints import read_experts

    experts = read_experts(sources, known_facts(arguments))
    for other in experts[1:]:
        if differing := _differing(experts[0], other):
            print(f"the scheduler is that of {experts[0].id}; {other.id} differs in {differing}", file=sys.stderr)
    options = ExportOptions(precision=arguments.precision, opset=arguments.opset)
    export_experts(
        experts, output, options, force=arguments.force, report=lambda line: print(line, file=sys.stderr, flush=True)
    )
    print(f"{output}: {len(experts)} variants; look inside with: ddsm inspect {output}")


def _differing(one: "Expert", other: "Expert") -> str:
    """The fields in which the schedulers of two experts differ."""
    mine, theirs = one.scheduler_config, other.scheduler_config
    names = sorted((mine.keys() | theirs.keys()) - {"_diffusers_version"})
    names = [name for name in names if mine.get(name) != theirs.get(name)]
    return words(names, most=5)


def export_to_diffusers(arguments: argparse.Namespace) -> None:
    """``--to diffusers DIR``: the sub-networks of a supernet, or the variants of a bundle, as diffusers pipelines.

    Raises:
        DdsmError: anything that does not fit; nothing is then written.
    """
    format_name, output = arguments.to[0], Path(arguments.to[1])
    if format_name != "diffusers":
        raise OutputError(f"--to writes diffusers, found {format_name!r}")
    _refuse_options(arguments, ("output", "precision", "opset"), "is for bundles: leave it out with --to diffusers")
    from ddsm_export.bundling import choose_widths
    from ddsm_export.checkpoints import open_supernet
    from ddsm_export.diffusers import INDEX, diffusers_from_bundle, diffusers_from_supernet

    refuse_existing(output, force=arguments.force, marker=INDEX)
    if len(arguments.sources) > 1:
        raise OutputError(f"--to diffusers takes one supernet or bundle, found {len(arguments.sources)}")
    source: Path = arguments.sources[0]
    if (source / MANIFEST).is_file():
        _refuse_options(arguments, BESIDE_A_CHECKPOINT, "is for checkpoints, and a bundle knows it: leave it out")
        bundle = Bundle.open(source)
        if any(variant.width_mult is None for variant in bundle.manifest.variants):
            _refuse_options(arguments, ("widths",), "is for supernets, and this bundle holds none: leave it out")
        widths = arguments.widths and parse_widths(arguments.widths, bundle.manifest.spec)
        written = diffusers_from_bundle(bundle, output, widths, force=arguments.force)
    else:
        if source.is_dir():
            raise OutputError(f"{source} is not a bundle: {MANIFEST} is missing; make one of it first, without --to")
        supernet = open_supernet(source, known_facts(arguments), arguments.weights)
        widths = arguments.widths and parse_widths(arguments.widths, supernet.spec)
        written = diffusers_from_supernet(supernet, output, choose_widths(supernet.spec, widths), force=arguments.force)
    print(
        f"{output}: {', '.join(written)}; each loads with DDPMPipeline.from_pretrained, once ddsm_engine.diffusers is "
        f"imported (a full width: without)"
    )


def _refuse_options(arguments: argparse.Namespace, names: Iterable[str], why: str) -> None:
    for name in names:
        if getattr(arguments, name) != parser().get_default(name):
            raise OutputError(f"--{name.replace('_', '-')} {why}")


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
    source: Path = arguments.sources[0]
    beside = source.parent / "flagfile.txt"
    # Our own file and diffusers' folders record everything; a flagfile that lies beside one is another training's.
    lies_beside = beside.is_file() and source.is_file() and source.suffix != ".safetensors"
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
            value = parse_fraction(item.strip())
        except (StrategyError, ZeroDivisionError) as error:
            raise SpecError(f"--widths takes channels (32,64) or eighths (2/8,4/8), found {brief(item)}") from error
        exact = value * spec.base_channels if "/" in item or "." in item else value
        if exact.denominator != 1:
            raise SpecError(f"{item.strip()} of {spec.base_channels} channels is not a whole number")
        spec.check_width(int(exact))
        widths.append(int(exact))
    return tuple(widths)


if __name__ == "__main__":
    sys.exit(main())
