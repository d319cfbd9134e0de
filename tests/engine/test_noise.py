from typing import Any

import numpy as np
import pytest

from ddsm_engine.errors import SamplerError
from ddsm_engine.noise import INITIAL, PER_CALL, SeededNoise, philox4x32

# Known answers published with Random123 (kat_vectors, philox4x32 with 10 rounds): counter, key → output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: str, key: str, expected: str) -> None:
    words = [np.array([int(word, 16)], dtype=np.uint64) for word in counter.split()]
    low, high = (int(word, 16) for word in key.split())
    philox4x32(words, [np.empty_like(words[0]) for _ in range(2)], low | high << 32)
    assert [int(word[0]) for word in words] == [int(word, 16) for word in expected.split()]


def draw(seed: int, first: int, count: int, call: int = 3, stream: int = PER_CALL) -> np.ndarray:
    out = np.full((count, 3, 5, 7), np.nan, np.float32)  # 105 elements: not a multiple of a block of four
    SeededNoise(seed, first).fill(out, stream, call)
    return out


def test_an_image_s_noise_does_not_depend_on_its_batch() -> None:
    whole = draw(7, 0, 9)
    assert np.array_equal(draw(7, 4, 3), whole[4:7])
    assert np.array_equal(draw(7, 8, 1), whole[8:])


def test_what_was_drawn_ahead_is_what_each_call_would_draw_by_itself() -> None:
    noise, out = SeededNoise(7, 2), np.empty((3, 3, 5, 7), np.float32)
    # In order, with a jump ahead and one back, another stream between, and past a block of calls.
    for stream, call in [(INITIAL, 0), (PER_CALL, 0), (PER_CALL, 1), (INITIAL, 1), *((PER_CALL, c) for c in range(40))]:
        noise.fill(out, stream, call)
        assert np.array_equal(out, draw(7, 2, 3, call=call, stream=stream))
    for call in (900, 901, 5):
        noise.fill(out, PER_CALL, call)
        assert np.array_equal(out, draw(7, 2, 3, call=call))


def test_a_seed_serves_batches_of_any_size_in_turn() -> None:
    noise = SeededNoise(7)
    for count in (1, 16, 40, 2):
        out = np.empty((count, 3, 5, 7), np.float32)
        noise.fill(out, PER_CALL, 9)
        assert np.array_equal(out, draw(7, 0, 40, call=9)[:count])


def test_seed_call_image_and_stream_each_give_other_noise() -> None:
    base = draw(7, 0, 2)
    others = [
        draw(8, 0, 2),
        draw(7, 2, 2),
        draw(7, 0, 2, call=4),
        draw(7, 0, 2, stream=INITIAL),
        draw(7 + (1 << 32), 0, 2),
    ]
    assert all(abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 0.3 for other in others)


def test_the_noise_is_standard_normal() -> None:
    out = np.empty((64, 3, 32, 32), np.float32)
    SeededNoise(1).fill(out, PER_CALL, 0)
    values = out.astype(np.float64).ravel()
    # 196,608 values: the standard error of the mean is 0.0023, of the variance 0.0032, of the kurtosis 0.011.
    assert abs(values.mean()) < 0.01
    assert abs(values.var() - 1) < 0.015
    assert abs((values**4).mean() - 3) < 0.06
    assert np.abs(values).max() < 7
    pairs = np.corrcoef(values[0::2], values[1::2])[0, 1]
    assert abs(pairs) < 0.02, "the two normals of a Box-Muller pair are independent"


@pytest.mark.parametrize("seed", [-1, 1 << 64, np.int8(-1), 1.5, "7", None])
def test_a_seed_that_is_no_number_of_64_bits_is_refused(seed: Any) -> None:
    with pytest.raises(SamplerError, match=r"from 0 to 2.* found"):
        SeededNoise(seed)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_a_seed_may_be_numpy_s(kind: Any) -> None:
    assert np.array_equal(draw(kind(7), 2, 2), draw(7, 2, 2))
