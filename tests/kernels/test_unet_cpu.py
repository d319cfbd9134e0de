"""Every operation of our kernels for a CPU against torch in float64; whole networks are in the backends' tests."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ddsm_engine.backends import open_engine
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.backends.native import library, load_library
from ddsm_engine.bundle import Bundle
from ddsm_engine.parity import answer, distance, make_probes
from ddsm_kernels.unet_cpu import (
    CONVOLVE,
    FLAGS,
    WINOGRAD,
    CompilerError,
    Image,
    Layer,
    Library,
    Memory,
    Program,
    compiler,
    source_version,
)
from tests.tolerances import FORWARD

Floats = NDArray[np.float32]
TOLERANCE = 2e-6
"""Relative L2 of one operation in float32 (observed up to 4e-7; 9e-7 through Winograd's differences)."""
RNG = np.random.default_rng(7)


def normal(*shape: int) -> Floats:
    return RNG.standard_normal(shape).astype(np.float32)


def error(found: Floats, expected: torch.Tensor) -> float:
    exact = expected.double().numpy()
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


class Bench:
    """A program whose images are filled and read by hand."""

    def __init__(self, batch: int = 2, threads: int = 2) -> None:
        self.program, self.batch = Program(library(), batch, threads), batch
        self.values: dict[Image, Floats] = {}

    def image(self, values: Floats, before: int = 0, behind: int = 0) -> Image:
        """[B, C, H, W] in memory, as a part of something wider."""
        channels, size = values.shape[1:3]
        part = self.program.image(before + channels + behind, size).part(before, channels)
        self.values[part] = values
        return part

    def run(self, *found: Image) -> list[Floats]:
        """Fill what was given, run, and read as [B, C, H, W]."""
        runnable = self.program.finish()
        memory = next(iter(runnable.arrays))

        def view(image: Image) -> Floats:
            pixels = self.batch * image.size**2
            whole = np.lib.stride_tricks.as_strided(
                memory[image.start :], (pixels, image.channels), (4 * image.stride, 4)
            )
            return np.moveaxis(whole.reshape(self.batch, image.size, image.size, -1), 3, 1)

        for image, values in self.values.items():
            view(image)[...] = values
        runnable.run()
        return [view(image).copy() for image in found]


def as_double(array: Floats) -> torch.Tensor:
    return torch.from_numpy(array).double()


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("columns", "n"), [(16, 16), (40, 24), (12, 20), (9, 8), (64, 48), (3, 17)])
@pytest.mark.parametrize("size", [4, 8, 14])
@pytest.mark.parametrize("wider_by", [0, 11])
def test_a_convolution_with_all_that_may_follow_it(batch: int, columns: int, n: int, size: int, wider_by: int) -> None:
    bench = Bench(batch)
    x, weight, bias = normal(batch, n, size, size), normal(columns, n, 3, 3), normal(columns)
    residual, shift = normal(batch, columns, size, size), normal(batch, columns, 1, 1)
    neighbours = normal(batch, columns + 5, size, size)
    out = bench.image(neighbours)
    wider = normal(columns + wider_by, n + wider_by, 3, 3)
    wider[:columns, :n] = weight
    layer = Layer(library(), wider)
    bench.program.convolve(
        bench.image(x, before=3, behind=4), out.part(2, columns), layer, bias,
        residual=bench.image(residual, before=1), shift=bench.image(shift, behind=2), silu=True,
    )  # fmt: skip
    tiles = batch * (-(-size // 4)) ** 2
    kind = WINOGRAD if tiles >= 12 and min(columns, n) >= 8 else CONVOLVE
    assert [operation["kind"] for operation in bench.program.operations] == [kind]
    (found,) = bench.run(out)
    expected = F.conv2d(as_double(x), as_double(weight), as_double(bias), padding=1) + as_double(shift)
    assert error(found[:, 2:-3], F.silu(expected + as_double(residual))) < TOLERANCE
    assert np.array_equal(found[:, :2], neighbours[:, :2]), "what lies beside is another's"
    assert np.array_equal(found[:, -3:], neighbours[:, -3:])


@pytest.mark.parametrize("size", [2, 4, 8])
def test_every_pixel_may_be_read_as_four(size: int) -> None:
    bench = Bench()
    x, weight, bias = normal(2, 16, size, size), normal(24, 16, 3, 3), normal(24)
    out = bench.program.image(24, 2 * size)
    bench.program.convolve(bench.image(x), out, Layer(library(), weight), bias, doubled=True)
    (found,) = bench.run(out)
    doubled = F.interpolate(as_double(x), scale_factor=2.0, mode="nearest")
    assert error(found, F.conv2d(doubled, as_double(weight), as_double(bias), padding=1)) < TOLERANCE


@pytest.mark.parametrize("padding", [0, 1])
def test_a_stride_of_two_pads_on_both_sides_or_behind(padding: int) -> None:
    bench = Bench()
    x, weight, bias = normal(2, 16, 8, 8), normal(16, 16, 3, 3), normal(16)
    out = bench.program.image(16, 4)
    bench.program.convolve(bench.image(x), out, Layer(library(), weight), bias, stride=2, padding=padding)
    (found,) = bench.run(out)
    padded = F.pad(as_double(x), (padding, 1, padding, 1))
    assert error(found, F.conv2d(padded, as_double(weight), as_double(bias), stride=2)) < TOLERANCE


def test_a_product_of_pixels_may_be_added_to_itself() -> None:
    bench = Bench()
    x, y, weight, bias = normal(2, 20, 5, 5), normal(2, 12, 5, 5), normal(12, 20), normal(12)
    out = bench.image(y)
    bench.program.convolve(bench.image(x), out, Layer(library(), weight), bias, residual=out)
    (found,) = bench.run(out)
    assert error(found, F.conv2d(as_double(x), as_double(weight)[:, :, None, None], as_double(bias)) + as_double(y)) < (
        TOLERANCE
    )


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("channels", "groups", "size"), [(16, 4, 8), (20, 4, 13), (24, 8, 32), (12, 1, 3)])
def test_a_norm_of_channels_far_from_zero(channels: int, groups: int, size: int, silu: bool) -> None:
    bench = Bench()
    x = normal(2, channels, size, size) + 1000 * normal(1, channels // groups, 1, 1).repeat(groups, axis=1)
    x = x.astype(np.float32)
    scale, offset = normal(channels), normal(channels)
    image = bench.image(x, before=3)
    bench.program.normalise(image, image, scale, offset, groups=groups, epsilon=1e-5, silu=silu)
    (found,) = bench.run(image)
    expected = F.group_norm(as_double(x), groups, as_double(scale), as_double(offset), 1e-5)
    assert error(found, F.silu(expected) if silu else expected) < TOLERANCE


@pytest.mark.parametrize("size", [3, 4, 16])
@pytest.mark.parametrize(("channels", "heads"), [(16, 1), (24, 2), (20, 5)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_attention_even_where_one_key_takes_all(channels: int, heads: int, size: int, spread: float) -> None:
    bench = Bench()
    projected = normal(2, 3 * channels, size, size)
    projected[:, : 2 * channels] *= spread
    out = bench.program.image(channels, size)
    bench.program.attend(bench.image(projected), out, heads)
    (found,) = bench.run(out)
    q, k, v = (
        part.reshape(2, heads, channels // heads, -1).transpose(2, 3)
        for part in as_double(projected).chunk(3, dim=1)
    )  # fmt: skip
    expected = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(out_shape := (2, channels, size, size))
    assert found.shape == out_shape
    assert error(found, expected) < (TOLERANCE if spread == 1 else 2e-4), "scores of 1e4 have 1e-3 of rounding"


def test_activations_saturate_and_pass_on_what_is_not_a_number() -> None:
    values = np.array([0, -0.0, 1e-30, 5, -5, 80, -80, 1e4, -1e4, 3e38, -3e38, np.inf, np.nan], np.float32)
    bench = Bench(1)
    out = bench.program.image(13, 1)
    bench.program.convolve(
        bench.image(normal(1, 1, 1, 1)), out, Layer(library(), np.zeros((13, 1), np.float32)), values, silu=True
    )
    (found,) = bench.run(out)
    expected = F.silu(torch.from_numpy(values).double()).numpy()
    assert np.isnan(found[0, -1, 0, 0])
    assert np.allclose(found[0, :-1, 0, 0], expected[:-1], rtol=1e-6, atol=1e-30)


def test_the_caller_s_planes_are_read_and_written() -> None:
    program = Program(library(), 3, 2)
    x, weight, bias = normal(3, 2, 6, 6), normal(4, 2, 3, 3), normal(4)
    out = program.image(4, 6)
    program.convolve(program.gather(2, 6), out, Layer(library(), weight.reshape(4, -1)), bias)
    program.scatter(out)
    y = np.full((3, 4, 6, 6), np.nan, np.float32)
    runnable = program.finish()
    runnable.bind(sample=x, output=y)
    runnable.run()
    assert error(y, F.conv2d(as_double(x), as_double(weight), as_double(bias), padding=1)) < TOLERANCE


def test_the_number_of_threads_changes_no_bit() -> None:
    x, weight, bias = normal(2, 24, 16, 16), normal(40, 24, 3, 3), normal(40)
    answers = []
    for threads in (1, 2, 3, 7):
        bench = Bench(2, threads)
        out, normed, attended = (bench.program.image(n, 16) for n in (40, 40, 8))
        bench.program.convolve(bench.image(x), out, Layer(library(), weight), bias)
        bench.program.normalise(out, normed, bias, bias, groups=4, epsilon=1e-5, silu=True)
        bench.program.attend(normed.part(1, 24), attended, 1)
        answers.append(bench.run(normed, attended))
    for others in answers[1:]:
        assert all(np.array_equal(one, other) for one, other in zip(answers[0], others, strict=True))


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 200), st.integers(0, 1 << 16)), max_size=60))
@settings(deadline=None)
def test_places_never_overlap_and_come_back(steps: list[tuple[bool, int, int]]) -> None:
    memory, taken = Memory(), dict[int, int]()
    for gives_back, count, which in steps:
        if gives_back and taken:
            start = sorted(taken)[which % len(taken)]
            memory.give_back(start)
            del taken[start]
        else:
            start = memory.take(count)
            assert start % 16 == 0
            assert start + count <= memory.size
            assert all(start + count <= other or other + size <= start for other, size in taken.items())
            taken[start] = count
    size = memory.size
    for start in taken:
        memory.give_back(start)
    if size:
        assert memory.take(size) == 0, "all gaps are one again"


OTHER_PROCESSORS = {
    # What a processor with AVX-512, with NEON, or with SSE alone would compile, made for the one at hand.
    "16 lanes": ("-D__AVX512F__",),
    "4 lanes, 32 registers": ("-U__AVX2__", "-U__AVX512F__", "-D__aarch64__"),
    "4 lanes": ("-U__AVX2__", "-U__AVX512F__"),
}


@pytest.mark.parametrize("flags", OTHER_PROCESSORS.values(), ids=OTHER_PROCESSORS)
def test_vectors_of_other_processors_compute_the_same_networks(
    flags: tuple[str, ...], bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Defining what a compiler defines itself is fine where no header reads it; -O1 compiles in half the time.
    monkeypatch.setattr("ddsm_kernels.unet_cpu.FLAGS", ("-O1", *FLAGS[1:], *flags))
    other = load_library(tmp_path, "as others see it")
    assert (other.lanes, other.rows) == (16, 12) if "-D__AVX512F__" in flags else (4, 6)
    monkeypatch.setattr("ddsm_engine.backends.native.library", lambda: other)
    options = EngineOptions(precision="fp32", threads=2)
    for name in ("w012", "w028"):
        variant = bundle.variants[name]
        probes = make_probes(bundle.spec(variant), bundle.time_table(variant))
        expected, found = (
            answer(partial(open_engine, backend, bundle, variant, options=options), probes)
            for backend in ("torch", "native")
        )
        for one, reference in zip(found, expected, strict=True):
            assert distance(one, reference)[0] <= FORWARD["native"]


# --- the compiler -----------------------------------------------------------------------------------------------------


def test_what_was_compiled_is_kept_for_one_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []

    def pretend(command: list[str]) -> None:
        made.append(command)
        (kept,) = Path(os.environ["XDG_CACHE_HOME"]).glob("ddsm-engine/kernels/*.so")
        Path(command[-1]).write_bytes(kept.read_bytes())

    library()
    monkeypatch.setattr("ddsm_kernels.unet_cpu._compile", pretend)
    for processor, compiled in (("one", 1), ("one", 1), ("another", 2)):
        assert load_library(tmp_path / "kernels", processor).lanes == library().lanes
        assert len(made) == compiled
    assert len(list((tmp_path / "kernels").iterdir())) == 2
    (tmp_path / "file").write_text("")
    assert load_library(tmp_path / "file", "one").rows == library().rows, "kept nowhere, used all the same"


@pytest.mark.parametrize(
    ("cxx", "message"),
    [
        ("no-such-compiler", "found no C\\+\\+ compiler"),
        ("false", "false cannot compile unet_cpu.cpp: exit 1"),
        (
            f"{sys.executable} -c 'import sys; sys.exit(\"fatal error: omp.h\")'",
            "cannot compile .*: fatal error: omp.h",
        ),
        ("true", "cannot be loaded"),
    ],
)
def test_a_compiler_that_does_not_work_is_named(
    cxx: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", cxx)
    assert (compiler() is None) == (cxx == "no-such-compiler")
    with pytest.raises(CompilerError, match=message):
        load_library(tmp_path, "x")
    assert not list(tmp_path.iterdir())


def test_a_library_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.cpp").write_text('extern "C" int nothing() { return 0; }')
    command = compiler()
    assert command is not None
    subprocess.run([*command, "-shared", "-fPIC", tmp_path / "x.cpp", "-o", tmp_path / "x.so"], check=True)
    with pytest.raises(CompilerError, match="cannot be loaded"):
        Library(tmp_path / "x.so")


def test_another_source_is_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_version()
    (tmp_path / "x.cpp").write_text("// other")
    monkeypatch.setattr("ddsm_kernels.unet_cpu.SOURCE", tmp_path / "x.cpp")
    assert source_version() != before
