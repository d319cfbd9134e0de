"""Files that somebody else wrote: how much of one is read, and what it may say.

The bounds are for memory and time. No reader of the project holds more of a foreign file than its own bound allows.
"""

import errno
import io
import json
import math
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from reprlib import Repr
from typing import Any, Literal, Protocol

from safetensors import SafetensorError, safe_open

MAX_JSON_DEPTH = 32
"""Objects and lists within each other; a manifest has 5."""

MAX_HEADER_BYTES = 4 << 20
"""Of a safetensors file; the state of a training on the CIFAR-10 network has 150 kB. The library takes 100 MB, which
cost it gigabytes."""

MAX_DIRECTORY_BYTES = 4 << 20
"""Of an archive's list of its files; a checkpoint of 10,000 tensors has 1e6. Its end claims any size, and the libraries
read as much at once."""

UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    RuntimeError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What the libraries' readers of archives, arrays and tensors raise on bytes that were not written for them."""

_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 60
_REPR.maxlong = 40


def brief(value: object) -> str:
    """``repr``, short enough for one line whatever the value."""
    return _REPR.repr(value)


def word(name: object) -> str:
    """A name as it stands in a sentence: ``brief`` without quotes."""
    return brief(str(name))[1:-1]


def words(names: Collection[object], most: int = 3) -> str:
    """So many names of a list, and how many more there are."""
    shown = ", ".join(word(name) for name in islice(names, most)) or "none"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def one_line(error: BaseException) -> str:
    """A library's words about a file, short and on one line; the error's name where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_bytes(path: Path, most: int) -> bytes:
    """Read a file of at most ``most`` bytes.

    Raises:
        OSError: it cannot be read, or is a pipe or a device, on which reading might never end.
        ValueError: it is larger; no more than ``most + 1`` bytes were read.
    """
    with _ordinary(path).open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"expected at most {most} bytes, found more")
    return data


def parse_json(data: bytes | str, *, infinity: bool = False) -> Any:  # noqa: ANN401 - any JSON value
    """Parse JSON strictly: UTF-8 without a mark, each key once, finite numbers, at most ``MAX_JSON_DEPTH`` levels.

    Args:
        data: The text.
        infinity: Take the words Infinity and -Infinity, which are no JSON but what Python's own library writes.

    Raises:
        ValueError: anything else.
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    constant = _infinity if infinity else _refuse_constant
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [child for item in level for child in _children(item)]
    if level:
        raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} levels deep")
    return value


def _children(item: object) -> list[Any]:
    return list(item.values()) if isinstance(item, dict) else item if isinstance(item, list) else []


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"it has the key {brief(repeated)} twice")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _infinity(name: str) -> float:
    return _refuse_constant(name) if name == "NaN" else float(name)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


class TensorFile(Protocol):
    """An open safetensors file: the part of the library's untyped object that the project uses."""

    def metadata(self) -> dict[str, str] | None:
        """The words in its header."""

    def keys(self) -> list[str]:
        """The names of its tensors."""

    def get_slice(self, name: str) -> Any:  # noqa: ANN401 - numpy's or torch's
        """A tensor's header."""

    def get_tensor(self, name: str) -> Any:  # noqa: ANN401
        """Read a tensor."""


@contextmanager
def open_safetensors(path: Path, framework: Literal["np", "pt"]) -> Iterator[TensorFile]:
    """Open a safetensors file once the size of its header is known to be sane; a tensor is read when it is asked for.

    Raises:
        SafetensorError: it is none, is damaged, or has a header of more than ``MAX_HEADER_BYTES``.
        OSError: it cannot be read, or is a pipe or a device.
    """
    with _ordinary(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise SafetensorError(f"its header has {length} bytes, expected at most {MAX_HEADER_BYTES}")
    with safe_open(path, framework=framework) as opened:
        yield opened


def shapes_of(opened: TensorFile) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, from the header: known before a tensor is read.

    Raises:
        SafetensorError: a tensor of anything but floating-point numbers of 16, 32 or 64 bits.
    """
    shapes = {}
    for name in opened.keys():  # noqa: SIM118 - not a mapping
        header = opened.get_slice(name)
        if header.get_dtype() not in ("F16", "BF16", "F32", "F64"):
            raise SafetensorError(f"{brief(name)} holds {header.get_dtype()}, expected floating-point numbers")
        shapes[name] = tuple(header.get_shape())
    return shapes


class ArchiveFile(io.BufferedReader):
    """The bytes of a zip archive; whatever the archive claims, more than ``most`` at once are not there.

    That looks like a file that was cut, which zipfile and torch's reader refuse; through the latter, which is C++, an
    exception would not pass whole.
    """

    most = MAX_DIRECTORY_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        """Read so many bytes; without a number, the rest."""
        return b"" if size is not None and size > self.most else super().read(size)

    def readinto(self, buffer: Any, /) -> int:  # noqa: ANN401 - the library's signature
        """Fill a buffer."""
        return 0 if len(buffer) > self.most else super().readinto(buffer)


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive once the size of its directory is known to be sane.

    Raises:
        BadZipFile: it is none, is damaged, or has a directory of more than ``MAX_DIRECTORY_BYTES``.
        OSError: it cannot be read, or is a pipe or a device.
    """
    with ArchiveFile(io.FileIO(_ordinary(path))) as file, zipfile.ZipFile(file) as archive:
        file.most = sys.maxsize
        yield archive


def _ordinary(path: Path) -> Path:
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder says so itself
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return path
