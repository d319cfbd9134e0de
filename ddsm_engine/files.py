"""Files that appear whole or not at all."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddsm_engine.errors import OutputError


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write; it takes the name ``target`` only if the block ends well.

    Works for a file and for a folder (make the folder yourself). A folder must not exist under the final name.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        temporary = scratch / target.name
        yield temporary
        _give_ordinary_modes(temporary, scratch)
        flush_to_disk(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_atomically(target: Path, data: bytes) -> None:
    """Write one file whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(data)


def _give_ordinary_modes(path: Path, scratch: Path) -> None:
    """Let the user's umask decide who may read: some writers make private files and would leave them so."""
    ordinary = scratch / ".mode"
    ordinary.touch()
    mode = ordinary.stat().st_mode
    for item in _tree(path):
        if item.is_file():
            item.chmod(mode)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or every file of a folder, is on the disk: a rename must not overtake its content."""
    for item in _tree(path):
        _sync(item)


def _tree(path: Path) -> list[Path]:
    return [path, *path.rglob("*")] if path.is_dir() else [path]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_existing(path: Path, *, force: bool) -> None:
    """Refuse, before any work is done, an output that exists or that could not be written.

    Raises:
        OutputError: it exists and ``force`` was not asked for, or its folder is none or is read-only.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"{path} cannot be written: {folder} is not a folder that you may write to")
    if not force and (path.exists() or path.is_symlink()):
        raise OutputError(f"{path} exists already; choose another output or add --force to replace it")


@contextmanager
def set_aside(target: Path) -> Iterator[None]:
    """Move what is in the way aside; delete it when the block ends well, put it back when it does not."""
    if not (target.exists() or target.is_symlink()):
        yield
        return
    holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".replaced", dir=target.parent))
    aside = holder / target.name
    os.replace(target, aside)
    try:
        yield
    except BaseException:
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(aside, target)
        raise
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
