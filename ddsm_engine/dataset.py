"""Real images from what people have: a folder, an array, Fashion-MNIST's IDX files, CIFAR-10's binary batches."""

import gzip
import math
import tokenize
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from ddsm_engine.errors import DataError
from ddsm_engine.untrusted import UNREADABLE, one_line, open_archive

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
CIFAR_RECORD = 1 + 3 * 32 * 32
IDX_UINT8_IMAGES = 0x00000803

MAX_BYTES = 1 << 34
"""Of all images together, in memory: 1.3 million of 64 x 64 in colour."""
MAX_EXPANSION, EXPANSION_FREE = 64, 1 << 26
"""A compressed file may unpack to this many times its size, and to 64 MiB in any case; deflate itself reaches 1032."""
MAX_PIXELS = 1 << 25
"""Of one picture in a folder: 100 MB in colour before it is made small."""
MAX_PADDING = 4
"""Times that padding may enlarge an array's height or width."""
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""The suffix does not decide: Pillow's other readers (one of them starts a program) are never tried."""

_UNREADABLE = (*UNREADABLE, SyntaxError, tokenize.TokenError, Image.DecompressionBombError)
"""The headers of arrays are Python, which numpy parses."""


def load_images(path: Path, *, channels: int, image_size: int) -> NDArray[np.uint8]:
    """Load every image.

    Args:
        path: A folder of images; a folder of ``data_batch_*.bin`` (CIFAR-10's binary version); an ``.npz`` or ``.npy``
            array, uint8 [N, H, W] or [N, H, W, C]; an IDX file (``train-images-idx3-ubyte``, plain or gzip).
        channels: 1 or 3; pictures in a folder are converted, those of 16 bits a channel to their upper eight.
        image_size: Arrays smaller than this are padded with their darkest value (28 → 32), larger ones refused;
            pictures in a folder are cropped to a centred square and resized.

    Returns:
        uint8 [N, channels, image_size, image_size].

    Raises:
        DataError: nothing readable, or shapes that do not fit.
    """
    if not (path.is_dir() or path.is_file()):
        raise DataError(
            f"{path} does not exist, or is a pipe or a device; expected a folder of images, an .npz, an IDX file or "
            f"CIFAR-10 batches"
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # a library's remarks on a file, beside our one line
            images = _read(path, channels, image_size)
    except _UNREADABLE as error:
        raise DataError(f"{path} could not be read as images: {one_line(error)}") from error
    if images.dtype != np.uint8 or len(images) == 0:
        raise DataError(f"{path} must hold uint8 images, found {images.dtype} with {len(images)} of them")
    if images.shape[1] != channels:
        raise DataError(f"{path} holds images of {images.shape[1]} channels; the network takes {channels}")
    return _pad_to(images, image_size, path)


def _read(path: Path, channels: int, image_size: int) -> NDArray[np.uint8]:
    if path.is_dir():
        batches = [batch for batch in sorted(path.glob("data_batch_*.bin")) if batch.is_file()]
        return _read_cifar(batches) if batches else _read_folder(path, channels, image_size)
    return _read_array(path) if path.suffix in {".npz", ".npy"} else _read_idx(path)


def _pad_to(images: NDArray[np.uint8], size: int, path: Path) -> NDArray[np.uint8]:
    height, width = images.shape[2:]
    if height > size or width > size:
        raise DataError(f"{path} holds images of {width}x{height}; the network takes {size}x{size}")
    if size > MAX_PADDING * min(height, width):
        raise DataError(f"{path} holds images of {width}x{height}; padding them to {size}x{size} is mostly padding")
    _check_size(len(images) * images.shape[1] * size * size, path)
    top, left = (size - height) // 2, (size - width) // 2
    margins = ((0, 0), (0, 0), (top, size - height - top), (left, size - width - left))
    padded: NDArray[np.uint8] = np.pad(images, margins, constant_values=0)
    return padded


def _read_folder(folder: Path, channels: int, image_size: int) -> NDArray[np.uint8]:
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    _check_size(len(files) * channels * image_size**2, folder)
    return np.stack([_read_picture(file, channels, image_size) for file in files])


def _read_picture(file: Path, channels: int, image_size: int) -> NDArray[np.uint8]:
    try:
        with Image.open(file, formats=PICTURE_FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"it has {picture.width}x{picture.height} pixels, expected at most {MAX_PIXELS}")
            square = min(picture.size)
            left, top = (picture.width - square) // 2, (picture.height - square) // 2
            centre = _eight_bits(picture).convert("L" if channels == 1 else "RGB")
            centre = centre.crop((left, top, left + square, top + square))
            pixels = np.asarray(centre.resize((image_size, image_size), Image.Resampling.LANCZOS))
    except _UNREADABLE as error:
        raise DataError(f"{file} is not a readable image: {one_line(error)}") from error
    first: NDArray[np.uint8] = _channels_first(pixels[None])[0]
    return first


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of 16 bits by its upper eight, as Pillow reads colour; converted by it, most of it is white."""
    if not picture.mode.startswith("I;16"):
        return picture
    return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))


def _read_array(path: Path) -> NDArray[np.uint8]:
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            return _channels_first(_read_npy(file, path.stat().st_size, path))
    with open_archive(path) as archive:
        members = {item.filename.removesuffix(".npy"): item for item in archive.infolist()}
        if "images" not in members and len(members) != 1:
            found = [name[:40] for name in members][:8]
            raise DataError(f"{path} must hold an array named 'images' (or only one array), found {found}")
        member = members.get("images") or next(iter(members.values()))
        if not member.filename.endswith(".npy"):
            raise DataError(f"{path} must hold an array, found bytes of the name {member.filename[:60]!r}")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"its array is compressed by method {member.compress_type}; use numpy.savez")
        with archive.open(member) as stream:
            return _channels_first(_read_npy(stream, _most_unpacked(path), path))


def _read_npy(stream: IO[bytes], most: int, path: Path) -> NDArray[np.uint8]:
    """Read a ``.npy`` of uint8; what its header announces is compared with ``most`` before the data are read."""
    version = npy.read_magic(stream)
    read_header: Callable[[IO[bytes]], tuple[tuple[int, ...], bool, np.dtype]] | None = {
        (1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0
    }.get(version)  # fmt: skip
    if read_header is None:
        raise ValueError(f"its array has format version {version}")
    shape, columns_first, dtype = read_header(stream)
    if dtype != np.uint8:
        raise ValueError(f"it must hold uint8 images, found {str(dtype)[:60]}")
    expected = math.prod(shape)
    if min(shape, default=1) < 0 or expected > most:
        raise ValueError(f"its array announces the shape {str(shape)[:60]}, more than the file can hold")
    _check_size(expected, path)
    data = stream.read(expected)
    if len(data) != expected:
        raise ValueError(f"its array announces {expected} bytes and holds {len(data)}")
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if columns_first else "C")


def _most_unpacked(path: Path) -> int:
    return max(EXPANSION_FREE, MAX_EXPANSION * path.stat().st_size)


def _check_size(size: int, path: Path) -> None:
    if size > MAX_BYTES:
        raise DataError(f"{path} holds images of {size} bytes as the network takes them, expected at most {MAX_BYTES}")


def _channels_first(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[-1] in (1, 3):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    raise ValueError(f"images must be [N, H, W] or [N, H, W, 1 or 3], found shape {images.shape}")


def _read_idx(path: Path) -> NDArray[np.uint8]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        magic, count, height, width = (int.from_bytes(file.read(4), "big") for _ in range(4))
        if magic != IDX_UINT8_IMAGES or not 0 < height <= 1024 or not 0 < width <= 1024:
            raise DataError(
                f"{path} is not an IDX file of images (magic {magic:#010x}, expected {IDX_UINT8_IMAGES:#010x})"
            )
        expected = count * height * width
        most = _most_unpacked(path) if path.suffix == ".gz" else path.stat().st_size
        if expected > most:
            raise DataError(f"{path} announces {count} images ({expected} bytes), more than the file can hold")
        _check_size(expected, path)
        data = file.read(expected + 1)
    if len(data) != expected:
        raise DataError(f"{path} announces {count} images ({expected} bytes) and holds {len(data)} bytes or more")
    return np.frombuffer(data, dtype=np.uint8).reshape(count, 1, height, width)


def _read_cifar(batches: list[Path]) -> NDArray[np.uint8]:
    images = []
    _check_size(sum(batch.stat().st_size for batch in batches), batches[0].parent)
    for batch in batches:
        data = np.fromfile(batch, dtype=np.uint8)
        if data.size == 0 or data.size % CIFAR_RECORD:
            raise DataError(f"{batch} is not a CIFAR-10 binary batch ({data.size} bytes, records of {CIFAR_RECORD})")
        images.append(data.reshape(-1, CIFAR_RECORD)[:, 1:].reshape(-1, 3, 32, 32))
    return np.concatenate(images)
