"""Float images in [-1, 1] to pictures people can open."""

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddsm_engine.errors import OutputError
from ddsm_engine.files import write_atomically


def to_uint8(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[N, C, H, W] in [-1, 1] → [N, H, W, C], rounded to the nearest of 256 levels."""
    levels = np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(0, 2, 3, 1))


def grid(images: NDArray[np.float32], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Lay images out in rows.

    Args:
        images: [N, C, H, W] in [-1, 1]; of more than three channels the first three are shown (see ``check_channels``).
        columns: Images per row; None for a square.
        gap: Pixels between them.
    """
    pixels = to_uint8(images)
    count, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for index, picture in enumerate(pixels):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    return _picture(canvas)


def save_png(image: NDArray[np.float32] | Image.Image, path: Path) -> None:
    """Write one image ([C, H, W] in [-1, 1], or a picture) as PNG, whole or not at all."""
    write_atomically(path, png_of(image if isinstance(image, Image.Image) else _picture(to_uint8(image[None])[0])))


def png_of(picture: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG")
    return encoded.getvalue()


def check_channels(channels: int) -> None:
    """Refuse images that no PNG shows as they are.

    Raises:
        OutputError: neither one channel nor three.
    """
    if channels not in (1, 3):
        raise OutputError(f"a PNG shows one channel or three, found images of {channels}; write an array: -o FILE.npz")


def _picture(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3])
