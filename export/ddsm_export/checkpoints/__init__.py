"""Where do a network's weights come from? One module per foreign format; this one tells files apart by content."""

from dataclasses import asdict
from pathlib import Path

from ddsm_engine.errors import CheckpointError
from ddsm_export.checkpoints.ddsm import Weights, read_checkpoint
from ddsm_export.checkpoints.diffusers import Expert, read_experts
from ddsm_export.checkpoints.flagfile import VAR_TYPES, Facts, facts_from_flagfile
from ddsm_export.supernet import Supernet, load_supernet

__all__ = [
    "VAR_TYPES",
    "Expert",
    "Facts",
    "Weights",
    "facts_from_flagfile",
    "open_supernet",
    "read_checkpoint",
    "read_experts",
]


def open_supernet(path: Path, facts: Facts, weights: Weights = "ema") -> Supernet:
    """Read a supernet from the project's own file or from a training checkpoint, whatever the file is called.

    Args:
        path: A file of ``save_supernet``, or what ``read_checkpoint`` reads.
        facts: What is known beside the file; mandatory for a checkpoint, cross-checked against the project's own file.
        weights: Which set of a checkpoint to take; the project's own file holds one.

    Raises:
        CheckpointError: a file that cannot be read, does not fit, or contradicts ``facts``.
    """
    if not path.is_file():
        raise CheckpointError(f"expected a supernet or a training checkpoint at {path}, found no such file")
    if not _is_safetensors(path):
        return read_checkpoint(path, facts, weights)
    supernet = load_supernet(path)
    contradictions = facts.contradictions(asdict(supernet.noise_schedule) | asdict(supernet.spec))
    if contradictions:
        raise CheckpointError(
            f"{path} records its own architecture and noise schedule, and is contradicted by "
            f"{'; '.join(contradictions)}: leave these out"
        )
    if weights == "net" and supernet.provenance.get("weights") != "net":
        raise CheckpointError(f"{path} holds one set of weights, not the raw ones: leave out --weights net")
    return supernet


def _is_safetensors(path: Path) -> bool:
    """The format has no magic number: eight bytes of header length, little-endian, then a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8
