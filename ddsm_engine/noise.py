"""Noise that depends on the seed, the image and the call alone: never on batch size, neighbours or restarts.

Philox4x32-10 (Salmon et al. 2011) is a function from a counter and a key to four random words; Box-Muller turns them
into normals. key = the 64 bits of the seed; counter = (element block, call, image, stream).
"""

from collections.abc import Sequence
from operator import index
from typing import Protocol, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from ddsm_engine.errors import SamplerError
from ddsm_engine.untrusted import brief

INITIAL, PER_CALL = 0, 1
"""Streams: the initial state x_T, and the fresh noise of a call."""

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
ROUNDS = 10


Words = NDArray[np.uint64]


def philox4x32(words: Sequence[Words], scratch: Sequence[Words], seed: int) -> None:
    """Ten rounds of Philox4x32, in place.

    Args:
        words: The counter, four arrays of one shape, each value below 2**32; overwritten by the four random words.
        scratch: Two arrays of that shape.
        seed: The key: low word first, 64 bits.
    """
    c0, c1, c2, c3 = words
    product0, product1 = scratch
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(ROUNDS):
        np.multiply(c0, _MULTIPLIERS[0], out=product0)
        np.multiply(c2, _MULTIPLIERS[1], out=product1)
        np.right_shift(product1, _SHIFT, out=c0)
        np.bitwise_xor(c0, c1, out=c0)
        np.bitwise_xor(c0, np.uint64(key0), out=c0)
        np.right_shift(product0, _SHIFT, out=c2)
        np.bitwise_xor(c2, c3, out=c2)
        np.bitwise_xor(c2, np.uint64(key1), out=c2)
        np.bitwise_and(product1, _LOW, out=c1)
        np.bitwise_and(product0, _LOW, out=c3)
        key0, key1 = (key0 + _WEYL[0]) & 0xFFFFFFFF, (key1 + _WEYL[1]) & 0xFFFFFFFF


class NoiseSource(Protocol):
    """Fills a batch with the noise of one call."""

    def fill(self, out: NDArray[np.float32], stream: int, call: int) -> None:
        """Overwrite ``out`` [B, C, H, W]."""
        ...


AHEAD = 16
"""Images of noise drawn at a time: numpy takes as long to begin a pass over one small image as to make it."""


class SeededNoise:
    """The noise of the images ``first_image … first_image + B - 1`` of a seed.

    Small batches draw several calls at once and keep what the next calls will ask for.

    Raises:
        SamplerError: a seed that is no whole number of 64 bits.
    """

    def __init__(self, seed: int, first_image: int = 0) -> None:
        if not isinstance(seed, SupportsIndex) or not 0 <= index(seed) < 1 << 64:
            raise SamplerError(f"a seed is a whole number from 0 to 2**64 - 1, found {brief(seed)}")
        self.seed, self.first_image = index(seed), first_image  # numpy's own would overflow
        self._buffers: _Buffers | None = None
        self._drawn = INITIAL, range(0)

    def starting_at(self, first_image: int) -> "SeededNoise":
        """The same seed's noise from another image on."""
        return SeededNoise(self.seed, first_image)

    def fill(self, out: NDArray[np.float32], stream: int, call: int) -> None:
        """Overwrite ``out`` [B, C, H, W], C-contiguous, with standard normals."""
        images, elements = len(out), out[0].size
        ahead = 1 if stream == INITIAL else max(1, AHEAD // images)
        shape = (ahead, images, -(-elements // 4))
        if self._buffers is None or self._buffers.shape != shape:
            self._buffers, self._drawn = _Buffers(shape), (stream, range(0))
        drawn, calls = self._drawn
        if drawn != stream or call not in calls:
            calls = range(call, call + shape[0])
            self._buffers.draw(self.seed, self.first_image, stream, call)
            self._drawn = stream, calls
        out.reshape(images, -1)[...] = self._buffers.normals[call - calls.start, :, :elements]


class _Buffers:
    """Everything that drawing needs, allocated once: a run draws thousands of times."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        """Allocate for [calls, images, blocks of four elements]."""
        self.shape = shape
        self._words = [np.empty(shape, np.uint64) for _ in range(4)]
        self._scratch = [np.empty(shape, np.uint64) for _ in range(2)]
        self._radius, self._angle, self._wave = (np.empty(shape, np.float32) for _ in range(3))
        self._pairs = np.empty((*shape, 4), np.float32)
        self.normals = self._pairs.reshape(*shape[:2], -1)
        counters = np.ogrid[tuple(slice(size) for size in shape)]
        self._calls, self._images, self._blocks = (counter.astype(np.uint64) for counter in counters)

    def draw(self, seed: int, first_image: int, stream: int, first_call: int) -> None:
        """Fill ``normals`` [calls, images, 4 * blocks]."""
        block, call, image, stream_word = self._words
        block[...] = self._blocks
        np.add(self._calls, np.uint64(first_call), out=call)
        np.add(self._images, np.uint64(first_image), out=image)
        stream_word.fill(stream)
        philox4x32(self._words, self._scratch, seed)
        radius, angle, wave = self._radius, self._angle, self._wave
        for pair in (0, 2):
            # (word + 1/2) / 2**32 lies in (0, 1], so the logarithm is finite.
            np.copyto(radius, self._words[pair], casting="unsafe")
            np.add(radius, np.float32(0.5), out=radius)
            np.multiply(radius, np.float32(2.0**-32), out=radius)
            np.log(radius, out=radius)
            np.multiply(radius, np.float32(-2), out=radius)
            np.sqrt(radius, out=radius)
            np.copyto(angle, self._words[pair + 1], casting="unsafe")
            np.multiply(angle, np.float32(2.0**-32 * 2 * np.pi), out=angle)
            np.multiply(radius, np.cos(angle, out=wave), out=self._pairs[..., pair])
            np.multiply(radius, np.sin(angle, out=wave), out=self._pairs[..., pair + 1])
