"""Files and folders that appear whole or not at all, whatever kills the process that writes them.

New content is written in a temporary sibling, as ``.NAME.RANDOM.ddsm-partial/new/NAME``, and takes its name by one
rename. The sibling is locked for as long as its process lives; the next command that writes the same name clears what
it finds unlocked.
"""

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ddsm_engine.errors import OutputError

SUFFIX = ".ddsm-partial"
_NEW, _OLD = "new", "old"
"""In a temporary sibling: the folder with what is written, and what it replaces where names cannot be exchanged."""

_AT_FDCWD, _NO_REPLACE, _EXCHANGE = -100, 1, 2  # linux/fcntl.h, linux/fs.h
_DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_OFFERED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
_A_FOLDER_ITSELF = os.O_DIRECTORY | os.O_NOFOLLOW
"""A pipe of a folder's name is refused, where opening it would wait for a writer."""


@contextmanager
def atomic_path(target: Path, *, replace: bool = True, private: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling to write, a file or a folder; it takes the name ``target`` if the block ends well.

    A kill at any moment leaves what was there before, or all of the new content.

    Args:
        target: The final name. Missing parents are made.
        replace: Whether what has this name at the end gives way and is deleted last. Only a folder replaces a folder.
        private: Whether only this user may read it; otherwise the user's umask decides.

    Raises:
        OutputError: something has this name and must not be replaced, or the disk is full; what was there is untouched.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked_sibling(target) as sibling:
        temporary = sibling / _NEW / target.name
        try:
            temporary.parent.mkdir()
            yield temporary
            _give_modes(temporary, 0o600 if private else _ordinary_mode(sibling))
            flush_to_disk(temporary)
            _put_in_place(temporary, target, replace=replace)
            _sync(target.parent)
        except OSError as error:
            if error.errno not in _DISK_IS_FULL:
                raise
            raise OutputError(f"{target} could not be written, and what was there is kept: {error.strerror}") from error


def write_atomically(target: Path, data: bytes) -> None:
    """Write one file whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(data)


@contextmanager
def _locked_sibling(target: Path) -> Iterator[Path]:
    sibling, lock = _make_locked_sibling(target)
    try:
        yield sibling
    finally:
        shutil.rmtree(sibling, ignore_errors=True)
        os.close(lock)


def _make_locked_sibling(target: Path) -> tuple[Path, int]:
    while True:
        sibling = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=SUFFIX, dir=target.parent))
        # Between its making and its locking, another process may take it for a dead one's and delete it.
        with suppress(FileNotFoundError):
            lock = os.open(sibling, os.O_RDONLY)
            _try_lock(lock, fcntl.LOCK_EX)
            if sibling.exists():
                return sibling, lock
            os.close(lock)


def _try_lock(descriptor: int, operation: int) -> bool:
    """Lock an open folder; the system lets go when it is closed or the process ends, however it ends.

    Returns:
        False where the file system has no locks: nobody can then tell the living from the dead, and leftovers stay.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


@contextmanager
def only_one_process(folder: Path) -> Iterator[None]:
    """Hold a folder for this process while the block runs.

    Raises:
        OutputError: another process holds it.
    """
    with _opened(folder, os.O_DIRECTORY) as lock:
        try:
            _try_lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{folder} is in use by another process; wait for it, or choose another") from error
        yield


@contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete what killed processes left in a folder while they wrote ``name`` (None: anything).

    Where the file system cannot exchange two folders, a kill may have come between moving the old one aside and giving
    the new one its name; the old one then gets its name back. What is no folder, or somebody else's, is left.
    """
    for sibling in sorted(folder.glob(f".*{SUFFIX}")):
        written = sibling.name[1:].removesuffix(SUFFIX).rpartition(".")[0]
        if name not in (None, written):
            continue
        # Its process is alive, another one cleared it first, or it is somebody else's: none of that stops a command.
        with suppress(OSError), _opened(sibling, _A_FOLDER_ITSELF) as lock:
            if not _try_lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                continue
            if _is_there(sibling / _OLD) and not _is_there(folder / written):
                os.replace(sibling / _OLD, folder / written)
            shutil.rmtree(sibling)


def _put_in_place(temporary: Path, target: Path, *, replace: bool) -> None:
    try:
        if not replace:
            _rename_to_a_free_name(temporary, target)
        elif temporary.is_dir() and _is_there(target):
            _exchange(temporary, target)
        else:
            os.replace(temporary, target)
    except FileExistsError as error:
        raise OutputError(f"{target} exists already, made by another process meanwhile; it was kept") from error
    except IsADirectoryError as error:
        raise _in_the_way(target) from error


def _in_the_way(folder: Path) -> OutputError:
    return OutputError(f"{folder} is a folder, which no file replaces; choose another output")


def _rename_to_a_free_name(source: Path, target: Path) -> None:
    if _rename_with(_NO_REPLACE, source, target):
        return
    if _is_there(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.replace(source, target)


def _exchange(temporary: Path, target: Path) -> None:
    """Swap two names in one step, or in the two that ``clear_leftovers`` can finish."""
    if _rename_with(_EXCHANGE, temporary, target):
        return
    aside = temporary.parents[1] / _OLD
    os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(aside, target)
        raise


def _rename_with(flag: int, source: Path, target: Path) -> bool:
    """Linux's ``renameat2``; False where the system or the file system does not offer it."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_OFFERED:
        return False
    raise OSError(code, os.strerror(code), str(target))


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _ordinary_mode(sibling: Path) -> int:
    """What the umask lets a new file be: some writers make private files and would leave them so."""
    ordinary = sibling / ".mode"
    ordinary.touch()
    return ordinary.stat().st_mode


def _give_modes(path: Path, mode: int) -> None:
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
    with _opened(path) as descriptor:
        os.fsync(descriptor)


def refuse_existing(path: Path, *, force: bool, marker: str | None = None) -> None:
    """Refuse, before any work is done, an output that exists or that could not be written; clear leftovers of it.

    Args:
        path: The output.
        force: Whether it may be replaced.
        marker: A file that every folder of this kind holds. A folder without it (unless empty) is somebody's own and is
            not replaced, whatever ``force`` says; None where the output is a file, which replaces no folder at all.

    Raises:
        OutputError: it exists and must not be replaced, or its folder is none or is read-only.
    """
    if path.name in ("", ".."):
        raise OutputError(f"{path} is no name for an output; give it one of its own")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"{path} cannot be written: {folder} is not a folder that you may write to")
    clear_leftovers(path.parent, path.name)
    if not force and _is_there(path):
        raise OutputError(f"{path} exists already; choose another output or add --force to replace it")
    if path.is_dir():
        if marker is None:
            raise _in_the_way(path)
        if any(path.iterdir()) and not (path / marker).is_file():
            raise OutputError(
                f"{path} is a folder that holds something else, and is not replaced; choose another output"
            )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
