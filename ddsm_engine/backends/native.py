"""Our own kernels on a CPU, compiled by the machine's compiler on first use; cut from the bundle's weights, in fp32.

``ddsm_kernels.unet_cpu`` runs operations; which ones a network has, and in which order, is written here. It is the
network of ``ddsm_engine.networks.unet``, whose names its weights have.
"""

import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from ddsm_engine.backends.engine import Arrays, EngineOptions, describe_target, fp32_alone
from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.engine_cache import Target, user_cache_folder
from ddsm_engine.errors import BackendError, OutputError
from ddsm_engine.files import atomic_path
from ddsm_engine.measure.environment import cores, cpu
from ddsm_engine.spec import UNetSpec
from ddsm_engine.untrusted import TensorFile, one_line, open_safetensors, shapes_of
from ddsm_kernels.unet_cpu import (
    CompilerError,
    Floats,
    Image,
    Layer,
    Library,
    Program,
    Runnable,
    compile_library,
    file_name,
    source_version,
)


@lru_cache(maxsize=1)
def library() -> Library:
    """The kernels, compiled for this processor and kept in the user's cache folder.

    Raises:
        BackendError: there is no compiler, or it does not compile them.
    """
    model, features = cpu()
    try:
        return load_library(user_cache_folder() / "kernels", " ".join((model, *features)))
    except CompilerError as error:
        why = one_line(error)
        raise BackendError(f"the native backend has no kernels: {why}; --backend openvino needs none") from error


def load_library(folder: Path, processor: str) -> Library:
    """Load what was compiled for a processor before, or compile it and keep it.

    Where nothing can be kept, it is compiled again for the next process.

    Raises:
        CompilerError: it cannot be compiled or loaded.
    """
    kept = folder / file_name(processor)
    if kept.is_file():
        return Library(kept)
    try:
        with atomic_path(kept) as made:
            return compile_library(made)
    except (OSError, OutputError):
        with tempfile.TemporaryDirectory(prefix="ddsm-") as temporary:
            return compile_library(Path(temporary, kept.name))


def resolve_precision(options: EngineOptions) -> str:
    """What an engine with these options computes in.

    Raises:
        BackendError: the precision is not there.
    """
    return fp32_alone(
        options,
        f"the native backend computes in fp32, found --precision {options.precision}; use --backend openvino for bf16",
    )


def target(options: EngineOptions, batch: int) -> Target:
    """What an engine with these options depends on beside the model."""
    return describe_target("native", source_version(), resolve_precision(options), options, batch)


class Weights:
    """The supernet's weights as widths read them: leading blocks, packed once for the widest that asks first."""

    def __init__(self, opened: TensorFile, path: Path) -> None:
        """Read from an open file; ``path`` is for refusals."""
        self._opened, self._path, self._shapes = opened, path, shapes_of(opened)
        self._layers: dict[str, Layer] = {}

    def cut(self, name: str, *shape: int) -> Floats:
        """The leading block of a weight.

        Raises:
            BackendError: there is no such weight, or a smaller one.
        """
        found = self._shapes.get(name, ())
        if len(found) != len(shape) or any(full < part for full, part in zip(found, shape, strict=True)):
            raise BackendError(f"{self._path} does not hold the weights of this supernet; export the bundle again")
        whole = self._opened.get_tensor(name)[tuple(slice(part) for part in shape)]
        return np.ascontiguousarray(whole, np.float32)

    def layer(self, name: str, *shape: int, flat: bool = False) -> Layer:
        """The weights of a convolution or linear layer; ``flat`` is one row for every output.

        A narrower width reads the leading part of what a wider one has packed.
        """
        if name not in self._layers:
            weight = self.cut(f"{name}.weight", *shape)
            self._layers[name] = Layer(library(), weight.reshape(shape[0], -1) if flat else weight)
        return self._layers[name]


class _UNet:
    """Writes the operations of one width."""

    def __init__(self, program: Program, weights: Weights, spec: UNetSpec, width: int) -> None:
        self._program, self._weights, self._spec = program, weights, spec
        self._levels = [spec.conv_channels(spec.base_channels * mult, width) for mult in spec.channel_mults]
        self._base = spec.conv_channels(spec.base_channels, width)
        self._time_dim = spec.linear_channels(spec.time_dim, width)
        self._skips: list[tuple[Image, int]] = []

    def write(self) -> None:
        """All operations, from the caller's arrays to the caller's array."""
        program, spec = self._program, self._spec
        last = len(self._levels) - 1
        shifts = self._project_time()
        pixels = program.gather(spec.channels, spec.image_size)
        heads = self._channels_before_skips()
        h = self._skip(self._base, spec.image_size, heads.pop())
        layer = self._weights.layer("head", self._base, spec.channels, 3, 3, flat=True)
        program.convolve(pixels, h, layer, self._weights.cut("head.bias", self._base))
        program.release(pixels)
        position = 0
        for level, channels in enumerate(self._levels):
            for _ in range(spec.num_res_blocks):
                out = self._skip(channels, h.size, heads.pop())
                self._block(h, out, f"down.{position}", shifts, attention=level in spec.attention_levels)
                h, position = out, position + 1
            if level != last:
                out = self._skip(channels, h.size // 2, heads.pop())
                padding = 0 if spec.asymmetric_downsample else 1
                self._conv(h, out, f"down.{position}.conv", stride=2, padding=padding)
                h, position = out, position + 1
        middle = program.image(self._levels[-1], h.size)
        self._block(h, middle, "middle.0", shifts, attention=True)
        self._block(middle, self._before_skip(), "middle.1", shifts, attention=False)
        program.release(middle)
        self._tail(self._go_up(shifts))

    def _go_up(self, shifts: dict[str, Image]) -> Image:
        program, spec = self._program, self._spec
        position = 0
        for level, channels in reversed(list(enumerate(self._levels))):
            for left in reversed(range(spec.num_res_blocks + 1)):
                x, _ = self._skips.pop()
                out = self._before_skip() if left else program.image(channels, x.size)
                self._block(x, out, f"up.{position}", shifts, attention=level in spec.attention_levels)
                program.release(x)
                position += 1
            if level:
                self._conv(out, self._before_skip(), f"up.{position}.conv", doubled=True)
                program.release(out)
                position += 1
        return out

    def _tail(self, h: Image) -> None:
        program = self._program
        self._norm(h, h, "tail.norm", silu=True)
        out = program.image(self._spec.channels, h.size)
        self._conv(h, out, "tail.conv")
        program.scatter(out)

    # A skip is made where it will be read: behind the channels that it is appended to.

    def _channels_before_skips(self) -> list[int]:
        """The running channels that each skip is appended to, in the order in which skips are read."""
        running, before = self._levels[-1], []
        for channels in reversed(self._levels):
            for _ in range(self._spec.num_res_blocks + 1):
                before.append(running)
                running = channels
        return before

    def _skip(self, channels: int, size: int, before: int) -> Image:
        whole = self._program.image(before + channels, size)
        self._skips.append((whole, before))
        return whole.part(before, channels)

    def _before_skip(self) -> Image:
        """Where the running channels belong that the next skip is appended to."""
        whole, before = self._skips[-1]
        return whole.part(0, before)

    def _block(self, x: Image, out: Image, name: str, shifts: dict[str, Image], *, attention: bool) -> None:
        program = self._program
        normal = program.image(x.channels, x.size)
        self._norm(x, normal, f"{name}.norm1", silu=True)
        h = program.image(out.channels, x.size)
        self._conv(normal, h, f"{name}.conv1", shift=shifts[name])
        program.release(normal)
        self._norm(h, h, f"{name}.norm2", silu=True)
        if x.channels != out.channels:
            self._linear(x, out, f"{name}.shortcut")
            x = out
        self._conv(h, out, f"{name}.conv2", residual=x)
        program.release(h)
        if attention:
            self._attention(out, f"{name}.attention")

    def _attention(self, x: Image, name: str) -> None:
        program, channels = self._program, x.channels
        normal, projected = program.image(channels, x.size), program.image(3 * channels, x.size)
        self._norm(x, normal, f"{name}.norm", silu=False)
        for place, projection in enumerate("qkv"):
            self._linear(normal, projected.part(place * channels, channels), f"{name}.{projection}")
        program.attend(projected, normal, channels // (self._spec.head_channels or channels))
        self._linear(normal, x, f"{name}.out", residual=x)
        program.release(normal)
        program.release(projected)

    def _norm(self, x: Image, out: Image, name: str, *, silu: bool) -> None:
        scale, offset = (self._weights.cut(f"{name}.{kind}", x.channels) for kind in ("weight", "bias"))
        groups, epsilon = self._spec.groups, self._spec.norm_eps
        self._program.normalise(x, out, scale, offset, groups=groups, epsilon=epsilon, silu=silu)

    def _conv(
        self,
        x: Image,
        out: Image,
        name: str,
        *,
        residual: Image | None = None,
        shift: Image | None = None,
        stride: int = 1,
        padding: int = 1,
        doubled: bool = False,
    ) -> None:
        layer = self._weights.layer(name, out.channels, x.channels, 3, 3)
        bias = self._weights.cut(f"{name}.bias", out.channels)
        self._program.convolve(
            x, out, layer, bias, residual=residual, shift=shift, stride=stride, padding=padding, doubled=doubled
        )

    def _linear(self, x: Image, out: Image, name: str, residual: Image | None = None) -> None:
        """A convolution of 1 x 1."""
        layer = self._weights.layer(name, out.channels, x.channels, 1, 1, flat=True)
        self._program.convolve(x, out, layer, self._weights.cut(f"{name}.bias", out.channels), residual=residual)

    def _project_time(self) -> dict[str, Image]:
        """The projections of the time embedding by block: one product for all of them."""
        program, weights, cut, dim = self._program, self._weights, self._weights.cut, self._time_dim
        first, second = program.image(dim, 1), program.image(dim, 1)
        layer = weights.layer("time.linear1", dim, self._spec.time_features)
        program.convolve(None, first, layer, cut("time.linear1.bias", dim), silu=True)
        layer = weights.layer("time.linear2", dim, dim)
        program.convolve(first, second, layer, cut("time.linear2.bias", dim), silu=True)
        blocks = self._blocks()
        projections = program.image(sum(blocks.values()), 1)
        rows = [cut(f"{name}.time.weight", channels, dim) for name, channels in blocks.items()]
        bias = np.concatenate([cut(f"{name}.time.bias", channels) for name, channels in blocks.items()])
        program.convolve(second, projections, Layer(library(), np.concatenate(rows)), bias)
        starts = np.cumsum([0, *blocks.values()]).tolist()
        return {name: projections.part(start, n) for (name, n), start in zip(blocks.items(), starts, strict=False)}

    def _blocks(self) -> dict[str, int]:
        """Output channels of the residual blocks, by name."""
        count, last = self._spec.num_res_blocks, len(self._levels) - 1
        down = {
            f"down.{level * (count + 1) + i}": channels
            for level, channels in enumerate(self._levels)
            for i in range(count)
        }
        middle = {f"middle.{i}": self._levels[-1] for i in range(2)}
        up = {
            f"up.{(last - level) * (count + 2) + i}": channels
            for level, channels in enumerate(self._levels)
            for i in range(count + 1)
        }
        return down | middle | up


def open_native(
    bundle: Bundle, variants: Sequence[Variant], batch: int, options: EngineOptions
) -> dict[str, "NativeEngine"]:
    """Engines by id. Widths of one supernet read the same packed weights: all take little more than the widest.

    Raises:
        BundleError: the weights are damaged.
        BackendError: they are not this supernet's, there are no kernels, or the precision is not there.
    """
    resolve_precision(options)
    files: dict[Path, list[Variant]] = {}
    for variant in sorted(variants, key=lambda variant: -variant.width):
        files.setdefault(bundle.weights(variant), []).append(variant)
    opened: dict[str, NativeEngine] = {}
    for path, of_file in files.items():
        try:
            with open_safetensors(path, "np") as file:
                weights = Weights(file, path)
                for variant in of_file:
                    program = Program(library(), batch, options.threads or cores())
                    _UNet(program, weights, bundle.spec(variant), variant.width).write()
                    opened[variant.id] = NativeEngine(variant, batch, program.finish())
        except (SafetensorError, TypeError) as error:  # numpy has no bfloat16
            raise BackendError(f"{path} cannot be read as this supernet's weights: {error}") from error
    return opened


class NativeEngine:
    """One variant for one batch size, reading and writing bound host buffers."""

    precision = "fp32"

    def __init__(self, variant: Variant, batch: int, network: Runnable) -> None:
        """Take over what ``open_native`` made."""
        self._shapes = {t.name: t.at_batch(batch) for t in (*variant.inputs, *variant.outputs)}
        self.network = network
        self._bound: list[NDArray[Any]] = []

    def bind(self, inputs: Arrays, outputs: Arrays) -> None:
        """Use these arrays from now on.

        Raises:
            BackendError: the network has no such input or output, or one of another shape.
        """
        arrays = {**inputs, **outputs}
        for name, array in arrays.items():
            expected = self._shapes.get(name)
            if array.shape != expected or array.dtype != np.float32 or not array.flags.c_contiguous:
                raise BackendError(f"the network takes no {name} {list(array.shape)}; export the bundle again")
        self._bound = list(arrays.values())
        sample, features, output = (arrays[name] for name in ("sample", "time_features", "out_sample"))
        self.network.bind(sample=sample, features=features, output=output)

    def run(self) -> None:
        """One forward pass."""
        self.network.run()

    def close(self) -> None:
        """Release the weights."""
        self._bound.clear()
        del self.network
