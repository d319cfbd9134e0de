"""Supernet → bundle: cut, export, compare, and let the folder appear whole or not at all."""

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from ddsm_engine.bundle import (
    MANIFEST,
    TIME_TABLE,
    TIME_TABLE_KEY,
    WEIGHTS,
    FileInfo,
    Manifest,
    Variant,
    denoiser_inputs,
    denoiser_outputs,
)
from ddsm_engine.cost import gflops
from ddsm_engine.errors import SpecError
from ddsm_engine.files import atomic_path, refuse_existing, sha256_of
from ddsm_engine.networks.slicing import subnetwork
from ddsm_engine.spec import UNetSpec
from ddsm_engine.strategy import Strategy
from ddsm_export.cost import count_cost
from ddsm_export.onnx import DEFAULT_OPSET, onnx_from_subnetwork
from ddsm_export.parity import measure_parity
from ddsm_export.supernet import Supernet, save_supernet, save_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What to export.

    Attributes:
        widths: Channels of the first level, or None for every width among 2/8 … 8/8 that the spec allows.
        precision: Of the artefacts.
        opset: ONNX opset.
    """

    widths: Sequence[int] | None = None
    precision: Literal["fp32", "fp16"] = "fp32"
    opset: int = DEFAULT_OPSET


def choose_widths(spec: UNetSpec, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """The widths to export, narrowest first.

    Raises:
        SpecError: a width asked for that cannot be cut, or none that can.
    """
    for width in wanted or ():
        spec.check_width(width)
    chosen = tuple(sorted(set(wanted))) if wanted else spec.widths()
    if not chosen:
        reasons = "; ".join(f"{spec.label(w)}: {spec.why_not(w)}" for w in spec.eighths())
        raise SpecError(f"no width of this architecture can be cut: {reasons}")
    return chosen


def export_bundle(
    supernet: Supernet,
    output: Path,
    options: ExportOptions,
    *,
    strategies: Mapping[str, Strategy] | None = None,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the bundle of a supernet.

    Args:
        supernet: What to cut.
        output: The bundle's folder.
        options: Widths, precision, opset.
        strategies: Strategy files to put into the bundle, by name.
        force: Replace a bundle that is there; it stays until the new one is whole, and is deleted last.
        report: Gets one line per width.

    Raises:
        OutputError: the output exists.
        SpecError: a width that cannot be cut.
        BackendError: an artefact that differs from its network.
    """
    refuse_existing(output, force=force, marker=MANIFEST)
    widths = choose_widths(supernet.spec, options.widths)
    with atomic_path(output, replace=force) as folder:
        (folder / "variants").mkdir(parents=True)
        variants = []
        for width in widths:
            started = time.perf_counter()
            variants.append(_export_variant(supernet, width, folder, options))
            report(_progress_line(supernet.spec, variants[-1], time.perf_counter() - started))
        save_supernet(supernet, folder / WEIGHTS)
        for name, strategy in (strategies or {}).items():
            strategy.resolve(variants)
            strategy.save(folder / "strategies" / f"{name}.yaml")
        (folder / "README.md").write_text(card(supernet, variants), encoding="utf-8")
        if supernet.time_table is not None:
            save_tensors({TIME_TABLE_KEY: supernet.time_table}, folder / TIME_TABLE)
        written = [
            WEIGHTS,
            "README.md",
            *([TIME_TABLE] if supernet.time_table is not None else []),
            *(f"strategies/{name}.yaml" for name in strategies or {}),
        ]
        manifest = Manifest(
            spec=supernet.spec,
            noise_schedule=supernet.noise_schedule,
            prediction_type="epsilon",
            variants=tuple(variants),
            files=tuple(_file_info(folder, path) for path in written),
            provenance={
                "supernet": dict(supernet.provenance),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "opset": options.opset,
                "versions": {name: version(name) for name in ("ddsm-engine", "torch", "onnx", "onnxscript")},
            },
        )
        (folder / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=1) + "\n", encoding="utf-8")


def _export_variant(supernet: Supernet, width: int, folder: Path, options: ExportOptions) -> Variant:
    spec = supernet.spec
    identifier = f"w{width:03d}"
    relative = f"variants/{identifier}/model.onnx"
    artefact = folder / relative
    artefact.parent.mkdir()
    network = subnetwork(spec, supernet.weights, width)
    onnx_from_subnetwork(copy.deepcopy(network), artefact, precision=options.precision, opset=options.opset)
    parity = measure_parity(artefact, network, supernet.time_features, options.precision)
    cost = count_cost(spec, width)
    info = _file_info(folder, relative)
    return Variant(
        id=identifier,
        role="denoiser",
        precision=options.precision,
        inputs=denoiser_inputs(spec),
        outputs=denoiser_outputs(spec),
        file=relative,
        sha256=info.sha256,
        size_bytes=info.size_bytes,
        macs=cost.macs,
        conv_linear_macs=cost.conv_linear_macs,
        params=cost.params,
        width=width,
        width_mult=width / spec.base_channels,
        parity=parity,
    )


def _file_info(folder: Path, relative: str) -> FileInfo:
    file = folder / relative
    return FileInfo(path=relative, sha256=sha256_of(file), size_bytes=file.stat().st_size)


def _progress_line(spec: UNetSpec, variant: Variant, seconds: float) -> str:
    return (
        f"{variant.id}  {spec.label(variant.width):>10}  {gflops(variant.macs):6.3f} GFLOPs  "
        f"{variant.size_bytes / 1e6:6.1f} MB  parity {variant.parity.relative_l2:.1e}  {seconds:4.1f} s"
    )


def card(supernet: Supernet, variants: Sequence[Variant]) -> str:
    """The bundle's README: a table of its variants and where the weights come from."""
    spec = supernet.spec
    rows = "\n".join(
        f"| {v.id} | {spec.label(v.width)} | {gflops(v.macs):.3f} | {gflops(v.conv_linear_macs):.3f} | {v.params:,} | "
        f"{v.size_bytes / 1e6:.1f} | {v.parity.relative_l2:.1e} |"
        for v in variants
    )
    provenance = json.dumps(dict(supernet.provenance), indent=1)
    return (
        f"# Bundle of static sub-networks\n\n"
        f"{spec.image_size}x{spec.image_size}, {spec.channels} channels, {spec.timesteps} timesteps, "
        f"{spec.groups} groups in every norm.\n\n"
        f"| variant | width | GFLOPs (true) | GFLOPs (conv+linear) | parameters | MB | parity, relative L2 |\n"
        f"|---|---|---|---|---|---|---|\n{rows}\n\n"
        f"Parity compares the file with the sliced torch network on random inputs "
        f"({variants[0].parity.backend}, tolerance {variants[0].parity.tolerance:.0e}).\n\n"
        f"Draw images: `python -m ddsm_engine.run --bundle . --strategy uniform:"
        f"{spec.label(variants[-1].width).split('(')[1][:-1]} -o images.png`\n\n"
        f"## Where the weights come from\n\n```json\n{provenance}\n```\n"
    )
