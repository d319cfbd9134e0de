"""``ddsm inspect``: what is in a bundle or a strategy?"""

import argparse
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from ddsm_engine.bundle import Bundle
from ddsm_engine.cli import guarded
from ddsm_engine.cost import PUBLISHED_CIFAR10_MMACS, gflops, theoretical_speedup
from ddsm_engine.spec import UNetSpec
from ddsm_engine.strategy import Strategy, spell


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    p = argparse.ArgumentParser(prog="ddsm inspect", description="Print what a bundle or a strategy holds.")
    p.add_argument("path", type=Path, help="a bundle or a strategy file")
    p.add_argument("--bundle", type=Path, help="cost a strategy with this bundle's variants")
    arguments = p.parse_args(argv)

    def command() -> None:
        if arguments.path.is_dir():
            print(describe_bundle(Bundle.open(arguments.path)))
        else:
            bundle = Bundle.open(arguments.bundle) if arguments.bundle else None
            print(describe_strategy(Strategy.load(arguments.path), bundle))

    return guarded(command)


def describe_bundle(bundle: Bundle) -> str:
    """A table of variants; every file named by the manifest is verified on the way."""
    manifest = bundle.manifest
    spec, schedule = manifest.spec, manifest.noise_schedule
    bundle.verify()
    bundle.scheduler_config()
    experts = any(variant.spec is not None for variant in manifest.variants)
    published = not experts and _is_published_cifar10(spec)
    betas = f"betas {schedule.beta_start:g} … {schedule.beta_end:g}"
    facts = [
        f"{spec.image_size}x{spec.image_size}x{spec.channels}",
        f"{spec.timesteps} timesteps",
        betas if schedule.type == "linear" else schedule.type,
        schedule.variance_type,
        "no supernet" if experts else f"{spec.groups} groups",
        *([] if manifest.prediction_type == "epsilon" else [f"predicts {manifest.prediction_type}"]),
    ]
    width = max(len(v.id) for v in manifest.variants)
    lines = [
        f"{bundle.path}: {', '.join(facts)}",
        "GFLOPs an image and call: true | conv+linear (no attention products)"
        + (" | published table" if published else ""),
        f"{'variant':{max(8, width)}} {'width':>10} {'true':>9} {'conv+lin':>9} {'published' if published else '':>9} "
        f"{'parameters':>11} {'bytes':>12} {'precision':>9} {'parity':>8}",
    ]
    for v in manifest.variants:
        constant = PUBLISHED_CIFAR10_MMACS.get(Fraction(v.width, spec.base_channels)) if published else None
        label = v.width if v.width_mult is None else bundle.label(v)
        lines.append(
            f"{v.id:{max(8, width)}} {label:>10} {gflops(v.macs):9.3f} {gflops(v.conv_linear_macs):9.3f} "
            f"{f'{gflops(constant * 1e6):.3f}' if constant else '':>9} {v.params:11,} {v.size_bytes:12,} "
            f"{v.precision:>9} {v.parity.relative_l2:8.1e}"
        )
    uniform = f"uniform:{bundle.full.id}" if experts else "uniform:4/8"
    lines.append(f"strategies: {', '.join(bundle.strategies()) or f'none ({uniform} needs none)'}")
    return "\n".join(lines)


def _is_published_cifar10(spec: UNetSpec) -> bool:
    """Whether the published table's constants are this network's."""
    shape = (spec.image_size, spec.channels, spec.base_channels, spec.channel_mults, spec.num_res_blocks)
    return shape == (32, 3, 128, (1, 2, 2, 2), 2) and spec.attention_levels == (1,)


def describe_strategy(strategy: Strategy, bundle: Bundle | None) -> str:
    """Runs, swaps and average cost of a strategy."""
    end = "the clean end, sampled last" if strategy.axis == "timestep" else "the first executed call"
    lines = [
        f"{len(strategy.choices)} entries over {strategy.axis}s (0 is {end}), {len(strategy.runs)} runs, "
        f"{strategy.swaps} swaps"
    ]
    if strategy.axis == "call":
        lines.append(f"for {strategy.sampler} with {strategy.steps} steps")
    lines += [f"  {run.first:5}…{run.last:<5} {spell(run.choice):>6}  x{run.length}" for run in strategy.runs]
    mmacs = strategy.published_mmacs()
    if mmacs is not None:
        lines.append(f"average by the published CIFAR-10 table: {gflops(mmacs * 1e6):.3f} GFLOPs")
    if bundle is not None:
        costliest = bundle.full.id if bundle.full.width_mult is None else "the full width"
        chosen = [bundle.variants[identifier] for identifier in strategy.resolve(bundle.manifest.variants)]
        for name, costs, full in (
            ("true", [v.macs for v in chosen], bundle.full.macs),
            ("conv+linear", [v.conv_linear_macs for v in chosen], bundle.full.conv_linear_macs),
        ):
            average = sum(costs) / len(costs)
            lines.append(
                f"average GFLOPs ({name}): {gflops(average):.3f}, {100 * (1 - average / full):.1f} % fewer than "
                f"{costliest}'s {gflops(full):.3f}: {theoretical_speedup(full, costs):.2f}x expected speed-up"
            )
    return "\n".join(lines)
