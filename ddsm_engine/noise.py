"""Noise that depends on the seed, the image and the call alone: never on batch size, neighbours or restarts.

Philox4x32-10 (Salmon et al. 2011) is a function from a counter and a key to four random words; Box-Muller turns them
into normals. key = the 64 bits of the seed; counter = (element block, call, image, stream).
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.errors import SamplerError

INITIAL, PER_CALL = 0, 1
"""Streams: the initial state x_T, and the fresh noise of a call."""

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
ROUNDS = 10


def philox4x32(counter: Sequence[NDArray[np.uint64]], seed: int) -> tuple[NDArray[np.uint64], ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: Four arrays of one shape, each value below 2**32.
        seed: The key: low word first, 64 bits.

    Returns:
        Four arrays of that shape, each value below 2**32.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(key0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(key1),
            product0 & _LOW,
        )
        key0, key1 = (key0 + _WEYL[0]) & 0xFFFFFFFF, (key1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


class NoiseSource(Protocol):
    """Fills a batch with the noise of one call."""

    def fill(self, out: NDArray[np.float32], stream: int, call: int) -> None:
        """Overwrite ``out`` [B, C, H, W]."""
        ...


class SeededNoise:
    """The noise of the images ``first_image … first_image + B - 1`` of a seed.

    Raises:
        SamplerError: a seed that does not fit 64 bits.
    """

    def __init__(self, seed: int, first_image: int = 0) -> None:
        if not 0 <= seed < 1 << 64:
            raise SamplerError(f"a seed is a whole number from 0 to 2**64 - 1, found {seed}")
        self.seed, self.first_image = seed, first_image

    def starting_at(self, first_image: int) -> "SeededNoise":
        """The same seed's noise from another image on."""
        return SeededNoise(self.seed, first_image)

    def fill(self, out: NDArray[np.float32], stream: int, call: int) -> None:
        """Overwrite ``out`` [B, C, H, W] with standard normals."""
        images, elements = len(out), out[0].size
        blocks = -(-elements // 4)
        counter = (
            np.broadcast_to(np.arange(blocks, dtype=np.uint64), (images, blocks)),
            np.full((1, 1), call, dtype=np.uint64),
            np.arange(self.first_image, self.first_image + images, dtype=np.uint64)[:, None],
            np.full((1, 1), stream, dtype=np.uint64),
        )
        words = philox4x32(counter, self.seed)
        normals = np.empty((images, blocks, 4), dtype=np.float32)
        for pair in (0, 2):
            # (word + 1/2) / 2**32 lies in (0, 1], so the logarithm is finite.
            uniform = (words[pair].astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
            radius = np.sqrt(np.float32(-2) * np.log(uniform))
            angle = words[pair + 1].astype(np.float32) * np.float32(2.0**-32 * 2 * np.pi)
            np.multiply(radius, np.cos(angle), out=normals[..., pair])
            np.multiply(radius, np.sin(angle), out=normals[..., pair + 1])
        out[...] = normals.reshape(images, -1)[:, :elements].reshape(out.shape)
