"""Sub-networks as diffusers knows them: its names of their parameters, its config, and the folders it loads."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError
from torch import Tensor

from ddsm_engine.backends.torch import cut_network
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import BackendError, BundleError, OutputError
from ddsm_engine.files import atomic_path, refuse_existing
from ddsm_engine.networks.slicing import subnetwork
from ddsm_engine.networks.unet import UNet
from ddsm_engine.spec import UNetSpec
from ddsm_engine.time_table import TimeTable
from ddsm_export.supernet import Supernet

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, UNet2DModel

FORMAT = "ddsm-diffusers"
INDEX = "networks.json"
"""Lists the folders beside it; by it a folder of ours is known."""

TOLERANCE: Final = 1e-5
"""Largest relative L2 between diffusers' network and ours: sums are in another order (observed up to 2e-6), and a time
table's last bits are another library's (up to 2.5e-6 on the CIFAR-10 network)."""

IN_BLOCK: Final = {
    "norm1": "norm1", "conv1": "conv1", "time": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
    "shortcut": "conv_shortcut", "norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0",
}  # fmt: skip
OUTSIDE: Final = {
    "time.linear1": "time_embedding.linear_1", "time.linear2": "time_embedding.linear_2", "head": "conv_in",
    "tail.norm": "conv_norm_out", "tail.conv": "conv_out",
}  # fmt: skip


def diffusers_name(spec: UNetSpec, name: str) -> str:
    """What diffusers calls a parameter of ``ddsm_engine.networks.unet.UNet``."""
    layer, _, kind = name.rpartition(".")
    if layer in OUTSIDE:
        return f"{OUTSIDE[layer]}.{kind}"
    part, number, *inner = layer.split(".")
    if part == "middle":
        place, k = "mid_block", int(number)
    else:
        # A level is its residual blocks and, but for the last one, the layer that halves or doubles the image.
        level, k = divmod(int(number), spec.num_res_blocks + (1 if part == "down" else 2))
        place = f"{part}_blocks.{level}"
    if inner == ["conv"]:
        return f"{place}.{part}samplers.0.conv.{kind}"
    holder = "attentions" if inner[0] == "attention" else "resnets"
    return f"{place}.{holder}.{k}.{IN_BLOCK[inner[-1]]}.{kind}"


def unet_config(spec: UNetSpec, width: int) -> dict[str, Any]:
    """The config of a ``UNet2DModel`` that computes what the sub-network of a width computes.

    Where the time table has another number of columns than the first level has channels, the config has a field more,
    ``time_features``, and is that of ``ddsm_engine.diffusers.SubNetworkUNet2DModel``.
    """
    levels = range(len(spec.channel_mults))
    channels = [spec.conv_channels(spec.base_channels * mult, width) for mult in spec.channel_mults]
    config = {
        "sample_size": spec.image_size,
        "in_channels": spec.channels,
        "out_channels": spec.channels,
        "block_out_channels": channels,
        "layers_per_block": spec.num_res_blocks,
        "down_block_types": ["AttnDownBlock2D" if k in spec.attention_levels else "DownBlock2D" for k in levels],
        "up_block_types": ["AttnUpBlock2D" if k in spec.attention_levels else "UpBlock2D" for k in reversed(levels)],
        "downsample_padding": 0 if spec.asymmetric_downsample else 1,
        "norm_num_groups": spec.groups,
        "norm_eps": spec.norm_eps,
        "attention_head_dim": spec.head_channels,  # always written: the default is 8, not one head
        "time_embedding_dim": spec.linear_channels(spec.time_dim, width),
        "freq_shift": spec.time_freq_shift,
        "flip_sin_to_cos": False,
        "dropout": spec.dropout,
    }
    return config if spec.time_features == channels[0] else config | {"time_features": spec.time_features}


def diffusers_unet(network: UNet) -> "UNet2DModel":
    """A sub-network as diffusers' ``UNet2DModel``: another program for the same function.

    Weights are shared where their layout is the same.
    """
    from diffusers import UNet2DModel

    from ddsm_engine.diffusers import SubNetworkUNet2DModel

    config = unet_config(network.spec, network.width)
    with torch.device("meta"):
        unet = (SubNetworkUNet2DModel if "time_features" in config else UNet2DModel)(**config)
    weights = {diffusers_name(network.spec, name): weight.detach() for name, weight in network.named_parameters()}
    for name, parameter in unet.named_parameters():
        weights[name] = weights[name].reshape(parameter.shape)  # a 1x1 convolution there is a linear layer
    # All sines stand before all cosines, where the supernet's table interleaves them.
    columns = weights["time_embedding.linear_1.weight"]
    weights["time_embedding.linear_1.weight"] = torch.cat([columns[:, 0::2], columns[:, 1::2]], dim=1)
    unet.load_state_dict(weights, strict=True, assign=True)
    return unet.eval().requires_grad_(requires_grad=False)


def diffusers_from_supernet(
    supernet: Supernet, output: Path, widths: Iterable[int], *, force: bool = False
) -> tuple[str, ...]:
    """Write sub-networks of a supernet as diffusers pipelines; see ``write_diffusers``.

    Args:
        supernet: What to cut.
        output: The folder that the pipelines' folders lie in.
        widths: Channels of the first level.
        force: Replace what an earlier export wrote there.

    Returns:
        The names of the pipelines' folders.

    Raises:
        SpecError: a width that cannot be cut.
        OutputError, BackendError: as ``write_diffusers``.
    """
    from ddsm_engine.diffusers import ddpm_scheduler

    networks = (
        (f"w{width:03d}", subnetwork(supernet.spec, supernet.weights, width), supernet.time_features)
        for width in widths
    )
    scheduler = ddpm_scheduler(supernet.noise_schedule, "epsilon")
    return write_diffusers(networks, scheduler, output, provenance=supernet.provenance, force=force)


def diffusers_from_bundle(
    bundle: Bundle, output: Path, widths: Sequence[int] | None = None, *, force: bool = False
) -> tuple[str, ...]:
    """Write the variants of a bundle as diffusers pipelines, with its scheduler; see ``write_diffusers``.

    Args:
        bundle: Where the weights lie.
        output: The folder that the pipelines' folders lie in.
        widths: Which variants, by the channels of their first level; None for all.
        force: Replace what an earlier export wrote there.

    Returns:
        The names of the pipelines' folders, which are the variants' ids.

    Raises:
        BundleError: a width that the bundle does not have, or a file that is damaged.
        OutputError, BackendError: as ``write_diffusers``.
    """
    from ddsm_engine.diffusers import scheduler_of

    variants = bundle.manifest.variants
    if absent := sorted(set(widths or ()) - {variant.width for variant in variants}):
        raise BundleError(f"{bundle.path} has no width {absent[0]}; it has {', '.join(map(bundle.label, variants))}")
    networks = (
        (v.id, cut_network(bundle, v), bundle.time_table(v)) for v in variants if widths is None or v.width in widths
    )
    provenance = bundle.manifest.provenance
    return write_diffusers(networks, scheduler_of(bundle), output, provenance=provenance, force=force)


def write_diffusers(
    networks: Iterable[tuple[str, UNet, TimeTable]],
    scheduler: "SchedulerMixin",
    output: Path,
    *,
    provenance: Mapping[str, Any],
    force: bool = False,
) -> tuple[str, ...]:
    """Write a folder of pipelines that ``diffusers.DDPMPipeline.from_pretrained`` loads, whole or not at all.

    Args:
        networks: The name of a folder, the sub-network that goes into it, and what that reads of a timestep.
        scheduler: Goes into every folder.
        output: The folder that they lie in.
        provenance: Where the weights come from, as JSON values.
        force: Replace what an earlier export wrote there.

    Returns:
        The names of the folders.

    Raises:
        OutputError: the output exists, or cannot be written.
        BackendError: diffusers' network answers something else than ours.
    """
    from diffusers import DDPMPipeline

    refuse_existing(output, force=force, marker=INDEX)
    classes = {}
    with atomic_path(output, replace=force) as folder:
        folder.mkdir()
        for name, network, table in networks:
            unet = diffusers_unet(network)
            _check(name, unet, network, table)
            classes[name] = type(unet).__name__
            try:
                DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder / name)
            except SafetensorError as error:
                raise OutputError(f"{output / name} could not be written: {error}") from error
        index = {"format": FORMAT, "networks": classes, "provenance": dict(provenance)}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return tuple(classes)


def _check(name: str, unet: "UNet2DModel", network: UNet, table: TimeTable) -> None:
    """Refuse to write a network that is not ours: a time table of another formula, say, is nowhere in the config."""
    timesteps = [0, table.timesteps // 2, table.timesteps - 1]
    sample = torch.randn(3, *network.spec.sample_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected: Tensor = network(sample, torch.from_numpy(table[timesteps]))
        found: Tensor = unet(sample, torch.tensor(timesteps)).sample
    distance = float((found - expected).norm() / expected.norm())
    if not distance <= TOLERANCE:
        raise BackendError(
            f"{name} as diffusers computes it differs from the sub-network by {distance:.2e} (relative L2), expected "
            f"at most {TOLERANCE:.0e}: nothing was written"
        )
