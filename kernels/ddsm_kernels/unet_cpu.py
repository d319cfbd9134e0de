"""A U-Net's forward pass on a CPU, in C++ that the machine's own compiler makes for its own processor.

A ``Program`` is a flat list of operations over one block of memory, made once; ``unet_cpu.cpp`` runs it with one team
of threads. Activations are [images, pixels, channels] with a row stride, so that the parts of a concatenation are
written where they are read. The plain reference is the network in torch.
"""

import ctypes
import hashlib
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
COMPILE_S = 300

LINE = 16
"""Numbers in a cache line: where parts of the memory begin."""
PAGE = 1024
"""Numbers between two points of a tile are a multiple of it and one line more, here and in the source."""
TILE = 6
"""Winograd's F(4 x 4, 3 x 3) reads 6 x 6 pixels for 4 x 4."""
LEAST_TILES = 12
"""Below it a point of Winograd's has too few rows to pay for reading four times the weights."""
LEAST_CHANNELS = 8
BLOCK_BYTES = 2 << 20
"""What the tiles in work may take: they are written and read again, so they stay in the caches."""
NORM_PIXELS = 128
"""Of one part of a norm; parts do not depend on the number of threads, so neither does a sum."""

_POINTERS = ("in", "out", "weight", "bias", "residual", "shift", "zeros", "pixels", "scratch")
_COUNTS = ("batch", "height", "width", "in_channels", "out_channels", "in_ld", "out_ld", "residual_ld", "shift_ld",
           "packed_columns", "packed_channels", "taps", "groups", "heads", "has_silu", "block")  # fmt: skip
OPERATION = np.dtype(
    [
        ("kind", "i8"),
        *((name, "u8") for name in _POINTERS),
        *((name, "i8") for name in _COUNTS),
        ("epsilon", "f8"),
        ("scale", "f8"),
    ]
)
"""``struct Operation`` of the source."""
GATHER, SCATTER, CONVOLVE, WINOGRAD, NORMALISE, ATTEND = range(6)


class CompilerError(RuntimeError):
    """There is no compiler, or it does not compile the source, or what it made is not what was expected."""


def compiler() -> list[str] | None:
    """The C++ compiler: ``$CXX``, or the first one on the PATH; None where there is none."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        return chosen if shutil.which(chosen[0]) else None
    if sys.platform == "darwin":
        return None  # the one that is there has no OpenMP
    return next(([found] for name in COMPILERS if (found := shutil.which(name))), None)


def source_version() -> str:
    """What the source and its flags are: another version is compiled anew, and its times are others."""
    return hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:12]


class Library:
    """The compiled source."""

    def __init__(self, path: Path) -> None:
        """Load it.

        Raises:
            CompilerError: it cannot be loaded, or was made from another source.
        """
        try:
            c = ctypes.CDLL(str(path))
            integer, pointer = ctypes.c_int64, ctypes.c_void_p
            c.ddsm_size_of_operation.restype = c.ddsm_lanes.restype = c.ddsm_rows.restype = integer
            c.ddsm_pack.argtypes = [pointer, integer, integer, integer, pointer]
            c.ddsm_pack_winograd.argtypes = [pointer, integer, integer, pointer]
            c.ddsm_run.argtypes = [pointer, integer, integer]
            if c.ddsm_size_of_operation() != OPERATION.itemsize:
                raise CompilerError(f"{path} was made from another source; remove it")
        except (OSError, AttributeError) as error:
            raise CompilerError(f"{path} cannot be loaded: {error}") from error
        self._c = c
        self.lanes, self.rows = int(c.ddsm_lanes()), int(c.ddsm_rows())

    def pack(self, weight: Floats) -> Floats:
        """Weights [columns, n, taps…] as the panels that a product reads."""
        columns, n, *kernel = weight.shape
        taps = math.prod(kernel)
        packed = np.empty(taps * n * self.padded(columns), np.float32)
        self._c.ddsm_pack(weight.ctypes.data, columns, n, taps, packed.ctypes.data)
        return packed

    def pack_winograd(self, weight: Floats) -> Floats:
        """Weights [columns, n, 3, 3] as the panels of the 36 products of Winograd's convolution."""
        columns, n = weight.shape[:2]
        packed = np.empty(TILE**2 * n * self.padded(columns), np.float32)
        self._c.ddsm_pack_winograd(weight.ctypes.data, columns, n, packed.ctypes.data)
        return packed

    def run(self, operations: NDArray[Any], threads: int) -> None:
        """Run operations, one after the other, each on all threads."""
        self._c.ddsm_run(operations.ctypes.data, len(operations), threads)

    def padded(self, columns: int) -> int:
        """Columns of a product as they are stored: whole vectors."""
        return _up(columns, self.lanes)


def compile_library(path: Path) -> Library:
    """Compile the source into a file, and load it.

    Raises:
        CompilerError: there is no compiler, or what it makes cannot be loaded.
    """
    _compile([*_command(), *FLAGS, str(SOURCE), "-o", str(path)])
    return Library(path)


def file_name(processor: str) -> str:
    """What the compiled source is kept as.

    Args:
        processor: Name and features: what was compiled for one may not run on another.

    Raises:
        CompilerError: there is no compiler.
    """
    identity = "\n".join([source_version(), *_command(), processor])
    return f"unet_cpu-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"


def _command() -> list[str]:
    command = compiler()
    if command is None:
        raise CompilerError(f"found no C++ compiler ({', '.join(COMPILERS)}, or $CXX)")
    return command


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_S, check=False)  # noqa: S603 - the user's own compiler
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        said = lines[0].strip() if lines else f"exit {done.returncode}"
        raise CompilerError(f"{command[0]} cannot compile {SOURCE.name}: {said}")


@dataclass(frozen=True, slots=True)
class Image:
    """Activations in a program's memory, [images, size * size, channels].

    Attributes:
        start: The first number's place in the memory.
        stride: Numbers from one pixel to the next.
        channels: Numbers of a pixel.
        size: Height and width.
    """

    start: int
    stride: int
    channels: int
    size: int

    def part(self, first: int, channels: int) -> "Image":
        """Some of the channels, where they lie."""
        return replace(self, start=self.start + first, channels=channels)


class Layer:
    """The weights of a layer, packed when they are first needed, for it and for all that read their leading part."""

    def __init__(self, library: Library, weight: Floats) -> None:
        """Take [columns, n], or [columns, n, 3, 3]."""
        self.weight, self._library = np.ascontiguousarray(weight, np.float32), library

    @cached_property
    def panels(self) -> Floats:
        """For products."""
        return self._library.pack(self.weight)

    @cached_property
    def winograd(self) -> Floats:
        """For Winograd's convolution."""
        return self._library.pack_winograd(self.weight)


class Memory:
    """Places in one block of memory, given back when what lay there is no longer read."""

    def __init__(self) -> None:
        self.size = 0
        self._taken: dict[int, int] = {}
        self._free: list[tuple[int, int]] = []

    def take(self, count: int) -> int:
        """The start of the first gap that is wide enough."""
        count = _up(count, LINE)
        for index, (start, width) in enumerate(self._free):
            if width >= count:
                self._free[index : index + 1] = [(start + count, width - count)] if width > count else []
                break
        else:
            start, self.size = self.size, self.size + count
        self._taken[start] = count
        return start

    def give_back(self, start: int) -> None:
        """What was taken at ``start`` is free again."""
        self._free = sorted([*self._free, (start, self._taken.pop(start))])
        for index in range(len(self._free) - 1, 0, -1):
            (before, width), (after, more) = self._free[index - 1 : index + 1]
            if before + width == after:
                self._free[index - 1 : index + 1] = [(before, width + more)]


@dataclass(slots=True)
class Program:
    """The operations of one network for one batch size.

    Attributes:
        library: What runs them.
        batch: Images per call.
        threads: Threads of a call.
        memory: Where activations lie.
        operations: Fields of ``OPERATION`` by name; an ``Image`` or an array stands for its address.
        ends: Which operations read ``sample`` and ``features`` of the caller's, and which writes ``output``.
        scratch: Numbers that an operation needs for itself, at most.
        widest: Channels that are read as zeros outside of an image, at most.
    """

    library: Library
    batch: int
    threads: int
    memory: Memory = field(default_factory=Memory)
    operations: list[dict[str, Any]] = field(default_factory=list)
    ends: dict[str, int] = field(default_factory=dict)
    scratch: int = 0
    widest: int = 0
    _tables: dict[tuple[int, ...], NDArray[np.int32]] = field(default_factory=dict)

    def image(self, channels: int, size: int) -> Image:
        """New memory."""
        return Image(self.memory.take(self.batch * size * size * channels), channels, channels, size)

    def release(self, image: Image) -> None:
        """Nobody reads it any more: what is made next may lie there."""
        self.memory.give_back(image.start)

    def gather(self, channels: int, size: int) -> Image:
        """The 3 x 3 pixels around every pixel of the caller's [images, channels, size, size], as ``channels * 9``."""
        out = self.image(channels * 9, size)
        self.ends["sample"] = len(self.operations)
        self._add(GATHER, None, out, in_channels=channels)
        return out

    def scatter(self, x: Image) -> None:
        """Write the caller's [images, channels, size, size]."""
        self.ends["output"] = len(self.operations)
        self._add(SCATTER, x, None, in_channels=x.channels)

    def convolve(
        self,
        x: Image | None,
        out: Image,
        layer: Layer,
        bias: Floats,
        *,
        residual: Image | None = None,
        shift: Image | None = None,
        stride: int = 1,
        padding: int = 1,
        doubled: bool = False,
        silu: bool = False,
    ) -> None:
        """A convolution, or, with weights [out, in], a linear layer of every pixel.

        Args:
            x: Input; None are the caller's features, for a linear layer that reads them all.
            out: Output.
            layer: Weights, of which the leading part is read that fits input and output.
            bias: [out].
            residual: Added to the output; may be the output itself.
            shift: One pixel an image, added to every pixel of the output.
            stride: 1 or 2.
            padding: Zeros on the left and above; on the right and below there are as many as are read.
            doubled: Every pixel of the input is read as 2 x 2 pixels.
            silu: The activation comes last.
        """
        most_columns, most, *kernel = layer.weight.shape
        columns, n = out.channels, most if x is None else x.channels
        assert columns <= most_columns, "a layer has no more outputs than weights"
        assert n <= most, "a layer has no more inputs than weights"
        packed = self.library.padded(columns)
        fields: dict[str, Any] = {
            "in_channels": n, "out_channels": columns, "packed_channels": most, "packed_columns": most_columns,
            "taps": 1, "bias": bias, "has_silu": silu,
        }  # fmt: skip
        if residual is not None:
            fields |= {"residual": residual, "residual_ld": residual.stride}
        if shift is not None:
            fields |= {"shift": shift, "shift_ld": shift.stride}
        tiles = self.batch * (-(-out.size // 4)) ** 2
        self.widest = max(self.widest, n)
        if x is None:
            self.ends["features"] = len(self.operations)
        if not kernel:
            self._add(CONVOLVE, x, out, weight=layer.panels, **fields)
            return
        assert x is not None, "features have no neighbours"
        if stride == 1 and tiles >= LEAST_TILES and min(n, columns) >= LEAST_CHANNELS:
            block = BLOCK_BYTES // (4 * TILE**2 * (n + packed)) // self.library.rows * self.library.rows
            block = min(tiles, max(block, 2 * self.library.rows))
            self._need(TILE**2 * (_up(block * n, PAGE) + _up(block * packed, PAGE) + 2 * LINE))
            pixels = self._pixels(x.size, -(-out.size // 4), 4, TILE, padding, int(doubled))
            self._add(WINOGRAD, x, out, weight=layer.winograd, pixels=pixels, block=block, **fields)
        else:
            fields |= {"taps": 9, "pixels": self._pixels(x.size, out.size, stride, 3, padding, int(doubled))}
            self._add(CONVOLVE, x, out, weight=layer.panels, **fields)

    def normalise(
        self, x: Image, out: Image, scale: Floats, offset: Floats, *, groups: int, epsilon: float, silu: bool
    ) -> None:
        """A group norm, and the activation behind it; ``out`` may be ``x``."""
        parts = -(-(x.size**2) // NORM_PIXELS)
        self._need(self.batch * parts * 3 * x.channels + self.threads * 3 * self.library.padded(x.channels))
        self._add(
            NORMALISE, x, out, weight=scale, bias=offset, in_channels=x.channels, groups=groups, epsilon=epsilon,
            has_silu=silu, block=NORM_PIXELS,
        )  # fmt: skip

    def attend(self, x: Image, out: Image, heads: int) -> None:
        """Self-attention over the pixels; ``x`` has queries, keys and values, one after the other."""
        head, pixels = out.channels // heads, x.size**2
        keys = self.library.padded(pixels)
        packed = self.batch * heads * (head * keys + pixels * self.library.padded(head))
        self._need(packed + self.threads * 4 * self.library.rows * keys)
        self._add(ATTEND, x, out, out_channels=out.channels, heads=heads, scale=head**-0.5)

    def finish(self) -> "Runnable":
        """Take the memory and settle where everything lies."""
        return Runnable(self)

    def _add(self, kind: int, x: Image | None, out: Image | None, **fields: Any) -> None:  # noqa: ANN401
        """One more operation; a missing end is the caller's."""
        size = (out or x or Image(0, 0, 0, 1)).size
        operation: dict[str, Any] = {"kind": kind, "batch": self.batch, "height": size, "width": size, **fields}
        if x is not None:
            operation |= {"in": x, "in_ld": x.stride}
        elif kind == CONVOLVE:
            operation |= {"in_ld": fields["in_channels"]}
        if out is not None:
            operation |= {"out": out, "out_ld": out.stride}
        self.operations.append(operation)

    def _need(self, count: int) -> None:
        self.scratch = max(self.scratch, count)

    def _pixels(self, size: int, out: int, step: int, reach: int, padding: int, doubled: int) -> NDArray[np.int32]:
        """Which pixels are read: [batch * out * out, reach * reach], -1 outside of the image."""
        key = (size, out, step, reach, padding, doubled)
        if key not in self._tables:
            at = np.arange(out)[:, None] * step - padding + np.arange(reach)  # [out, reach]
            inside = (at >= 0) & (at < size << doubled)
            at >>= doubled
            pixels = at[:, None, :, None] * size + at[None, :, None, :]  # [out, out, reach, reach]
            pixels = np.where(inside[:, None, :, None] & inside[None, :, None, :], pixels, -1)
            of_images = np.arange(self.batch)[:, None, None, None, None] * size * size
            self._tables[key] = np.where(pixels < 0, -1, pixels + of_images).astype(np.int32)
        return self._tables[key]


class Runnable:
    """A finished program, with its memory."""

    def __init__(self, program: Program) -> None:
        self._library, self._threads, self._ends = program.library, program.threads, program.ends
        images, scratch, zeros = (_aligned(n) for n in (program.memory.size, program.scratch, program.widest + LINE))
        self._kept: dict[int, NDArray[Any]] = {id(array): array for array in (images, scratch, zeros)}
        self._table = np.zeros(len(program.operations), OPERATION)
        self._table["scratch"], self._table["zeros"] = scratch.ctypes.data, zeros.ctypes.data
        for row, operation in zip(self._table, program.operations, strict=True):
            for name, value in operation.items():
                if isinstance(value, Image):
                    row[name] = images.ctypes.data + value.start * images.itemsize
                elif isinstance(value, np.ndarray):
                    self._kept[id(value)] = value
                    row[name] = value.ctypes.data
                else:
                    row[name] = value

    @property
    def arrays(self) -> Collection[NDArray[Any]]:
        """Everything that it holds: activations first, weights, tables."""
        return self._kept.values()

    def bind(self, **arrays: Floats) -> None:
        """Read ``sample`` and ``features`` and write ``output`` of the caller's, which keeps them, from now on."""
        for name, array in arrays.items():
            self._table["out" if name == "output" else "in"][self._ends[name]] = array.ctypes.data

    def run(self) -> None:
        """One forward pass."""
        self._library.run(self._table, self._threads)


def _aligned(count: int) -> Floats:
    """Zeros, beginning at a cache line."""
    memory = np.zeros(count + LINE, np.float32)
    first = -(memory.ctypes.data // memory.itemsize) % LINE
    return memory[first : first + count]


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
