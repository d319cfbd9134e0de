"""Supernet, or experts → bundle: cut, export, compare, and let the folder appear whole or not at all."""

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ddsm_engine.bundle import (
    MANIFEST,
    SCHEDULER_CONFIG,
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
from ddsm_export.checkpoints import Expert
from ddsm_export.cost import count_cost
from ddsm_export.onnx import ArtefactPrecision, choose_opset, onnx_from_subnetwork
from ddsm_export.parity import measure_parity
from ddsm_export.supernet import Supernet, save_supernet, save_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What to export.

    Attributes:
        widths: Channels of the first level, or None for every width among 2/8 … 8/8 that the spec allows.
        precision: Of the artefacts.
        opset: ONNX opset, or None for the one that fits the precision.
    """

    widths: Sequence[int] | None = None
    precision: ArtefactPrecision = "fp32"
    opset: int | None = None


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
            variants.append(_export_variant(supernet, width, f"w{width:03d}", folder, options))
            report(_progress_line(_label(supernet.spec, variants[-1]), variants[-1], time.perf_counter() - started))
        save_supernet(supernet, folder / WEIGHTS)
        for name, strategy in (strategies or {}).items():
            strategy.resolve(variants)
            strategy.save(folder / "strategies" / f"{name}.yaml")
        (folder / "README.md").write_text(card(supernet.spec, variants, supernet.provenance), encoding="utf-8")
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
            provenance={"supernet": dict(supernet.provenance)},
        )
        _write_manifest(manifest, folder, options)


def export_experts(
    experts: Sequence[Expert],
    output: Path,
    options: ExportOptions,
    *,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Write one bundle of networks that were trained each by itself; the scheduler in it is the first one's.

    Args:
        experts: What to export, each at its only width; they agree in what ``read_experts`` asks of them.
        output: The bundle's folder.
        options: Precision and opset.
        force: Replace a bundle that is there; it stays until the new one is whole, and is deleted last.
        report: Gets one line per expert.

    Raises:
        OutputError: the output exists.
        SpecError: an expert whose architecture cannot be built.
        BackendError: an artefact that differs from its network.
    """
    refuse_existing(output, force=force, marker=MANIFEST)
    with atomic_path(output, replace=force) as folder:
        (folder / "variants").mkdir(parents=True)
        variants = []
        for expert in experts:
            started, network = time.perf_counter(), expert.network
            cut = _export_variant(network, network.spec.base_channels, expert.id, folder, options)
            weights = f"variants/{expert.id}/{WEIGHTS}"
            # Without a supernet's header: what was not trained to be sliced is not to be exported as if it were.
            save_tensors(dict(network.weights), folder / weights)
            variants.append(replace(cut, width_mult=None, spec=network.spec, weights=weights))
            report(_progress_line(_label(network.spec, variants[-1]), variants[-1], time.perf_counter() - started))
        variants.sort(key=lambda variant: variant.macs)
        spec = {expert.id: expert.network.spec for expert in experts}[variants[-1].id]
        provenance = {expert.id: dict(expert.network.provenance) for expert in experts}
        (folder / "README.md").write_text(card(spec, variants, provenance), encoding="utf-8")
        (folder / SCHEDULER_CONFIG).parent.mkdir()
        (folder / SCHEDULER_CONFIG).write_text(
            json.dumps(dict(experts[0].scheduler_config), indent=1) + "\n", encoding="utf-8"
        )
        written = ["README.md", SCHEDULER_CONFIG, *(f"variants/{variant.id}/{WEIGHTS}" for variant in variants)]
        manifest = Manifest(
            spec=spec,
            noise_schedule=experts[0].network.noise_schedule,
            prediction_type=experts[0].prediction_type,
            variants=tuple(variants),
            files=tuple(_file_info(folder, path) for path in written),
            provenance={"experts": provenance},
        )
        _write_manifest(manifest, folder, options)


def _write_manifest(manifest: Manifest, folder: Path, options: ExportOptions) -> None:
    """Add when and with what the bundle was made."""
    made = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "opset": choose_opset(options.precision, options.opset),
        "versions": {name: version(name) for name in ("ddsm-engine", "torch", "onnx", "onnxscript")},
    }
    manifest = replace(manifest, provenance={**manifest.provenance, **made})
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=1) + "\n", encoding="utf-8")


def _export_variant(supernet: Supernet, width: int, identifier: str, folder: Path, options: ExportOptions) -> Variant:
    spec = supernet.spec
    relative = f"variants/{identifier}/model.onnx"
    artefact = folder / relative
    artefact.parent.mkdir()
    opset = choose_opset(options.precision, options.opset)
    network = subnetwork(spec, supernet.weights, width)
    onnx_from_subnetwork(copy.deepcopy(network), artefact, precision=options.precision, opset=opset)
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


def _label(spec: UNetSpec, variant: Variant) -> str:
    return spec.label(variant.width) if variant.spec is None else str(variant.width)


def _progress_line(label: str, variant: Variant, seconds: float) -> str:
    return (
        f"{variant.id}  {label:>10}  {gflops(variant.macs):6.3f} GFLOPs  "
        f"{variant.size_bytes / 1e6:6.1f} MB  parity {variant.parity.relative_l2:.1e}  {seconds:4.1f} s"
    )


def card(spec: UNetSpec, variants: Sequence[Variant], provenance: Mapping[str, Any]) -> str:
    """The bundle's README: a table of its variants and where the weights come from.

    Args:
        spec: The architecture of the last variant.
        variants: The cheapest first.
        provenance: Of the weights, as JSON values.
    """
    widest = variants[-1]
    what = "sub-networks" if widest.spec is None else "networks"
    choice = spec.label(widest.width).split("(")[1][:-1] if widest.spec is None else widest.id
    rows = "\n".join(
        f"| {v.id} | {_label(spec, v)} | {gflops(v.macs):.3f} | {gflops(v.conv_linear_macs):.3f} | {v.params:,} | "
        f"{v.size_bytes / 1e6:.1f} | {v.parity.relative_l2:.1e} |"
        for v in variants
    )
    return (
        f"# Bundle of static {what}\n\n"
        f"{spec.image_size}x{spec.image_size}, {spec.channels} channels, {spec.timesteps} timesteps"
        f"{'' if widest.spec else f', {spec.groups} groups in every norm'}.\n\n"
        f"| variant | width | GFLOPs (true) | GFLOPs (conv+linear) | parameters | MB | parity, relative L2 |\n"
        f"|---|---|---|---|---|---|---|\n{rows}\n\n"
        f"Parity compares the file with the {'torch' if widest.spec else 'sliced torch'} network on random inputs "
        f"({variants[0].parity.backend}, tolerance {variants[0].parity.tolerance:.0e}).\n\n"
        f"Draw images: `python -m ddsm_engine.run --bundle . --strategy uniform:{choice} -o images.png`\n\n"
        f"## Where the weights come from\n\n```json\n{json.dumps(dict(provenance), indent=1)}\n```\n"
    )
