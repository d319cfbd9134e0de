"""The kernel distance against a sum over pairs; its bias, and that of its resamples."""

import numpy as np
import pytest
from numpy.typing import NDArray

from ddsm_engine.quality import kernel as module
from ddsm_engine.quality.kernel import REAL_ROWS, Kernel, sample

Rows = NDArray[np.float32]


def normals(seed: int, rows: int, shift: float = 0.0) -> Rows:
    return (np.random.default_rng(seed).standard_normal((rows, 5)) + shift).astype(np.float32)


def distance(rows: Rows, real: Rows) -> float:
    return float(Kernel.to(real)(rows, np.ones((1, len(rows)), np.int64))[0])


def spelt_out(x: Rows, y: Rows, source: NDArray[np.int64] | None = None) -> float:
    """The estimate as a sum over pairs, one by one; pairs of one source image are left out."""
    names = np.arange(len(x)) if source is None else source

    def k(a: Rows, b: Rows) -> float:
        return float((sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3)

    def within(rows: Rows, names: NDArray[np.int64]) -> float:
        different = [k(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if names[i] != names[j]]
        return sum(different) / len(different)

    across = [k(a, b) for a in x for b in y]
    return within(x, names) + within(y, np.arange(len(y))) - 2 * sum(across) / len(across)


@pytest.mark.parametrize(("rows", "others"), [(2, 2), (7, 7), (4, 11)])
def test_it_is_the_sum_over_pairs(rows: int, others: int) -> None:
    x, y = normals(1, rows), normals(2, others, 0.5)
    assert distance(x, y) == pytest.approx(spelt_out(x, y), rel=1e-12)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normals(1, 23), normals(2, 31, 0.5)
    whole = distance(x, y)
    monkeypatch.setattr(module, "BLOCK", 5)
    assert distance(x, y) == pytest.approx(whole, rel=1e-12)


def test_a_resampled_image_does_not_meet_itself() -> None:
    x, y = normals(1, 9), normals(2, 8, 0.5)
    random = np.random.default_rng(0)
    picked = [random.integers(0, 9, 9) for _ in range(4)]
    counts = np.array([np.bincount(each, minlength=9) for each in picked])
    expected = [spelt_out(x[each], y, each) for each in picked]
    assert Kernel.to(y)(x, counts) == pytest.approx(expected, rel=1e-12)


def test_resamples_are_no_farther_off_than_the_images_are() -> None:
    """Were an image paired with its copies, they would be by about 1 here."""
    x, y = normals(1, 30), normals(2, 400)
    counts = np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), size=4000)
    found = Kernel.to(y)(x, counts)
    assert abs(found.mean() - distance(x, y)) < 4 * found.std() / 4000**0.5 + 0.02


def test_it_has_no_bias() -> None:
    """However few the rows: the biased estimate would be near 1 here."""
    each = [distance(normals(seed, 16), normals(1000 + seed, 16)) for seed in range(300)]
    assert abs(np.mean(each)) < 4 * np.std(each) / len(each) ** 0.5 < 0.5


def test_it_grows_with_a_shift() -> None:
    alike, near, far = (distance(normals(1, 800), normals(2, 2000, shift)) for shift in (0.0, 0.3, 0.9))
    assert abs(alike) < 0.05 < near < far


@pytest.mark.parametrize("count", [2, 100, REAL_ROWS, 60_000])
def test_the_real_images_that_are_kept_are_always_the_same_and_differ(count: int) -> None:
    kept = sample(count)
    assert (kept == sample(count)).all()
    assert len(set(kept.tolist())) == len(kept) == min(count, REAL_ROWS)
    assert kept.min() >= 0
    assert kept.max() < count
