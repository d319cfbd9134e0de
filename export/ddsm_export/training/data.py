"""Training images from what people have: a folder, an array, Fashion-MNIST's IDX files, CIFAR-10's binary batches."""

import gzip
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ddsm_engine.errors import DdsmError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
CIFAR_RECORD = 1 + 3 * 32 * 32
IDX_UINT8_IMAGES = 0x00000803

# What readers of arrays and archives raise on bytes that were not written for them.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
)


class DataError(DdsmError):
    """Training images that cannot be read or do not fit."""


def load_images(path: Path, *, channels: int, image_size: int) -> NDArray[np.uint8]:
    """Load every training image.

    Args:
        path: A folder of images; a folder of ``data_batch_*.bin`` (CIFAR-10's binary version); an ``.npz`` or ``.npy``
            array, uint8 [N, H, W] or [N, H, W, C]; an IDX file (``train-images-idx3-ubyte``, plain or gzip).
        channels: 1 or 3; pictures in a folder are converted.
        image_size: Arrays smaller than this are padded with their darkest value (28 → 32), larger ones refused;
            pictures in a folder are cropped to a centred square and resized.

    Returns:
        uint8 [N, channels, image_size, image_size].

    Raises:
        DataError: nothing readable, or shapes that do not fit.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; expected a folder of images, an .npz, an IDX file or CIFAR-10 batches")
    try:
        if path.is_dir():
            batches = sorted(path.glob("data_batch_*.bin"))
            images = _read_cifar(batches) if batches else _read_folder(path, channels, image_size)
        elif path.suffix in {".npz", ".npy"}:
            images = _read_array(path)
        else:
            images = _read_idx(path)
    except _UNREADABLE as error:
        detail = str(error) or type(error).__name__
        raise DataError(f"{path} could not be read as training images: {detail}") from error
    if images.dtype != np.uint8 or len(images) == 0:
        raise DataError(f"{path} must hold uint8 images, found {images.dtype} with {len(images)} of them")
    if images.shape[1] != channels:
        raise DataError(f"{path} holds images of {images.shape[1]} channels; the network takes {channels}")
    return _pad_to(images, image_size, path)


def _pad_to(images: NDArray[np.uint8], size: int, path: Path) -> NDArray[np.uint8]:
    height, width = images.shape[2:]
    if height > size or width > size:
        raise DataError(f"{path} holds images of {width}x{height}; the network takes {size}x{size}")
    top, left = (size - height) // 2, (size - width) // 2
    margins = ((0, 0), (0, 0), (top, size - height - top), (left, size - width - left))
    return np.pad(images, margins, constant_values=0)


def _read_folder(folder: Path, channels: int, image_size: int) -> NDArray[np.uint8]:
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return np.stack([_read_picture(file, channels, image_size) for file in files])


def _read_picture(file: Path, channels: int, image_size: int) -> NDArray[np.uint8]:
    try:
        with Image.open(file) as picture:
            square = min(picture.size)
            left, top = (picture.width - square) // 2, (picture.height - square) // 2
            centre = picture.convert("L" if channels == 1 else "RGB").crop((left, top, left + square, top + square))
            pixels = np.asarray(centre.resize((image_size, image_size), Image.Resampling.LANCZOS))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{file} is not a readable image: {error}") from error
    return _channels_first(pixels[None])[0]


def _read_array(path: Path) -> NDArray[np.uint8]:
    with path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            names = loaded.files
            if "images" not in names and len(names) != 1:
                raise DataError(f"{path} must hold an array named 'images' (or only one array), found {names}")
            loaded = loaded["images" if "images" in names else names[0]]
    if not isinstance(loaded, np.ndarray):
        raise DataError(f"{path} must hold an array, found {type(loaded).__name__}")
    return _channels_first(loaded)


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
        data = file.read(expected + 1)
    if len(data) != expected:
        raise DataError(f"{path} announces {count} images ({expected} bytes) and holds {len(data)} bytes")
    return np.frombuffer(data, dtype=np.uint8).reshape(count, 1, height, width)


def _read_cifar(batches: list[Path]) -> NDArray[np.uint8]:
    images = []
    for batch in batches:
        data = np.fromfile(batch, dtype=np.uint8)
        if data.size == 0 or data.size % CIFAR_RECORD:
            raise DataError(f"{batch} is not a CIFAR-10 binary batch ({data.size} bytes, records of {CIFAR_RECORD})")
        images.append(data.reshape(-1, CIFAR_RECORD)[:, 1:].reshape(-1, 3, 32, 32))
    return np.concatenate(images)
