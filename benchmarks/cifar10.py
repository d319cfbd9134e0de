"""The network that the benchmarks run: DDSM's for CIFAR-10, with random weights.

Time depends neither on the weights nor, beyond the norms, on the groups.
"""

import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Final

import torch

from ddsm_engine.bundle import MANIFEST, Bundle, Variant
from ddsm_engine.errors import BundleError
from ddsm_engine.networks.slicing import empty_unet
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.plan import Plan
from ddsm_engine.spec import EIGHTHS, UNetSpec
from ddsm_export.bundling import ExportOptions, export_bundle
from ddsm_export.supernet import Supernet

STRATEGY: Final = Path(__file__).parents[1] / "tests" / "data" / "ddsm_cifar10_strategy.yaml"
"""The published one: 28 swaps, four widths."""

SEED: Final = 20231005

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
    return Supernet(spec, schedule, weights, {"source": "random weights of the benchmarks", "seed": SEED})


@contextmanager
def cifar10_bundle(folder: Path | None, eighths: Sequence[int] = EIGHTHS, spec: UNetSpec = CIFAR10) -> Iterator[Bundle]:
    """The bundle in ``folder``, exported first if it is not there; without a folder a temporary one.

    Raises:
        BundleError: the folder holds the bundle of another network, or lacks a width.
    """
    with tempfile.TemporaryDirectory(prefix="ddsm-cifar10-") as temporary:
        path = folder or Path(temporary) / "cifar10.bundle"
        widths = [spec.base_channels * k // 8 for k in eighths]
        if not (path / MANIFEST).is_file():
            say(f"exporting {len(widths)} widths to {path}")
            export_bundle(random_supernet(spec, SCHEDULE), path, ExportOptions(widths=widths), report=say)
        bundle = Bundle.open(path)
        present = {variant.width for variant in bundle.manifest.variants}
        if bundle.manifest.spec != spec or not set(widths) <= present:
            raise BundleError(f"{path} is a bundle of another network or lacks a width; name another --bundle folder")
        yield bundle


def eighths_of(bundle: Bundle, variant: Variant) -> Fraction:
    """A variant's width in eighths of the full one."""
    return Fraction(8 * variant.width, bundle.manifest.spec.base_channels)


def variants_of(bundle: Bundle, eighths: Sequence[int]) -> list[Variant]:
    """The variants of these eighths of the full width, narrowest first."""
    return [variant for variant in bundle.manifest.variants if eighths_of(bundle, variant) in eighths]


def some_calls(plan: Plan, calls: Sequence[int]) -> Plan:
    """The plan with only these of its calls."""
    rows = list(calls)
    return replace(
        plan,
        variants=tuple(plan.variants[call] for call in rows),
        timesteps=plan.timesteps[rows],
        time_features=tuple(plan.time_features[call] for call in rows),
        to_x_0=plan.to_x_0[rows],
        update=plan.update[rows],
    )


def say(line: str) -> None:
    """Progress, beside what the command prints."""
    print(line, file=sys.stderr, flush=True)
