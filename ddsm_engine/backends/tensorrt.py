"""TensorRT, and TensorRT-RTX by the same code: engines that were built ahead, run on the device's stream.

An engine is native code for one GPU, driver and version of the library; only one that this user built for exactly these
is handed to it. Nothing is built here: that takes minutes, and `ddsm build` does it.

Only what TensorRT 10 and 11 share is used, which a test holds against both. They raise nothing: they return False or
None, and say why in a line of log.
"""

import importlib
from collections.abc import Mapping
from typing import Any, TextIO

from ddsm_engine.backends import INSTALL, MODULES
from ddsm_engine.backends.device import Device, DeviceProperties, describe_gpu_target
from ddsm_engine.backends.engine import EngineOptions, artefact_precision
from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.engine_cache import EngineCache, Target
from ddsm_engine.errors import BackendError
from ddsm_engine.untrusted import one_line

LIBRARIES = ("tensorrt", "tensorrt-rtx")
"""The backends that are served here."""

MOST_ERRORS = 8
"""Of the library's errors that are kept: the last ones."""

REASONS = (
    ("incompatible device", "it was built on another kind of GPU"),
    ("does not support this compute capability", "this kind of GPU is not supported"),
    ("expecting library version", "it was built by another version of the library"),
    ("not compatible with this version", "it was built by another version of the library"),
    ("version tag does not match", "it was built by another version of the library"),
    ("archive size", "it is cut short"),
    ("magic tag does not match", "it is no engine"),
    ("out of memory", "the GPU's memory is full: end what else runs there, or use a smaller --batch-size"),
    ("outofmemory", "the GPU's memory is full: end what else runs there, or use a smaller --batch-size"),
    ("insufficient driver", "the driver is older than the library needs: update it"),
)
"""Part of a line of the library's log, in lower case → what it means."""

FACTS = {
    "version": "version",
    "device": "GPU",
    "compute_capability": "compute capability",
    "driver": "driver",
    "precision": "precision",
    "batch": "batch",
}
"""What of a target an engine may be for, beside the wanted → as people call it."""


def import_tensorrt(name: str) -> Any:  # noqa: ANN401 - a module without types
    """The library of a backend.

    Args:
        name: One of ``LIBRARIES``.

    Raises:
        BackendError: it is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module(MODULES.get(name, name))
    except ModuleNotFoundError as error:
        raise BackendError(f"the backend {name} is not installed ({error.name} is missing): {INSTALL[name]}") from error
    except (ImportError, OSError) as error:  # a library of its own that is not there
        raise BackendError(f"the backend {name} cannot be loaded: {one_line(error)}; {INSTALL[name]}") from error


class Log:
    """What the library says: its last errors are kept for ours, and all but its chatter goes to a file, if given."""

    def __init__(self, trt: Any, file: TextIO | None = None) -> None:  # noqa: ANN401
        """Make the library's ``listener``, which must outlive everything that it is handed to."""
        self.errors: list[str] = []
        self.failure: OSError | None = None
        self._file = file
        self._levels = {
            trt.ILogger.INTERNAL_ERROR: "internal error",
            trt.ILogger.ERROR: "error",
            trt.ILogger.WARNING: "warning",
            trt.ILogger.INFO: "info",
        }
        # Its base class is only known here.
        self.listener = type("Listener", (trt.ILogger,), {"log": lambda _, *said: self._take(*said)})()

    def _take(self, severity: object, text: str) -> None:
        """One line. The library's threads call this, and what is raised here is lost: a failure is kept instead."""
        level = self._levels.get(severity)
        if level is None:
            return
        if "error" in level:
            self.errors = [*self.errors, text][-MOST_ERRORS:]
        try:
            if self._file is not None:
                self._file.write(f"{level}: {text}\n")
        except OSError as error:
            self.failure = error

    def reason(self) -> str:
        """Why the library refused: what is known of its last errors, and the last one's words."""
        if not self.errors:
            return "it gave no reason"
        known = [meaning for error in self.errors for words, meaning in REASONS if words in error.lower()]
        return "; ".join([*known[:1], f"it says: {printable(self.errors[-1])}"])


def printable(text: str) -> str:
    """The library's words, which quote an engine or a network, short and on one line."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))[:300]


def built_target(name: str, precision: str, batch: int, gpu: DeviceProperties | None) -> Target:
    """What an engine is built for and found by; the variant's own facts are in its seal.

    Args:
        name: The backend. Engines of ``tensorrt-rtx`` are made ready for the GPU when they are loaded, and fit any.
        precision: Of the artefact.
        batch: Images per call.
        gpu: The one that it is built on and runs on; only ``tensorrt-rtx`` needs none.

    Raises:
        BackendError: the library is not there.
    """
    on = None if name == "tensorrt-rtx" else gpu
    return {
        "backend": name,
        "version": str(import_tensorrt(name).__version__),
        "device": on.name if on else "any",
        "compute_capability": on.compute_capability if on else "any",
        "driver": on.driver if on else "any",
        "precision": precision,
        "batch": batch,
    }


def target(name: str, options: EngineOptions, batch: int, gpu: DeviceProperties) -> Target:
    """What the time of a call depends on beside the model. ``auto`` is what the bundle was exported in.

    Raises:
        BackendError: the library is not there.
    """
    return describe_gpu_target(name, str(import_tensorrt(name).__version__), options.precision, gpu, batch)


def open_tensorrt(
    name: str, bundle: Bundle, variant: Variant, batch: int, options: EngineOptions, device: Device
) -> "TensorRTEngine":
    """Load the engine that was built for this variant, batch size, GPU, driver and version; none other is read.

    Raises:
        BackendError: there is none, it is damaged or another's, or the library refuses it.
    """
    precision = artefact_precision(options, variant)
    trt = import_tensorrt(name)
    cache = EngineCache(bundle, built_target(name, precision, batch, device.properties))
    again = f"`ddsm build {bundle.path} --backend {name} --batch-size {batch}`"
    try:
        built = cache.find(variant)
    except BackendError as error:
        raise BackendError(f"{error}; build it anew: {again}") from error
    if built is None:
        nearest = _nearest(cache, variant)
        wanted = ", ".join(f"{word} {cache.target[fact]}" for fact, word in FACTS.items())
        found = f"one for {', '.join(f'{FACTS[fact]} {is_for}' for fact, is_for in nearest.items())}"
        instead = f", or run with --batch-size {nearest['batch']}" if [*nearest] == ["batch"] else ""
        raise BackendError(
            f"{variant.id} has no engine of {name} for this machine and call: expected one for {wanted}; found "
            f"{found if nearest else 'none'}; build it: {again}{instead}"
        )
    try:
        return TensorRTEngine(device, trt, built, shapes_at(variant, batch), precision)
    except BackendError as error:
        raise BackendError(f"{variant.id}: its engine cannot be opened: {error}; to build it anew: {again}") from error


def shapes_at(variant: Variant, batch: int) -> dict[str, tuple[int, ...]]:
    """The shape of every input and output of a variant at a batch size."""
    return {info.name: info.at_batch(batch) for info in (*variant.inputs, *variant.outputs)}


def _nearest(cache: EngineCache, variant: Variant) -> Mapping[str, str]:
    """What the engine that differs least from the wanted one says that it is for, as far as it differs.

    Of those for other batch sizes alone, it is that of the next larger one, which pads a batch, or else the largest.
    """
    wanted = cache.target
    differences = [
        {fact: found.get(fact, "unknown") for fact in FACTS if found.get(fact) != str(wanted[fact])}
        for found in cache.other_targets(variant)
    ]

    def farness(difference: Mapping[str, str]) -> tuple[int, bool, int]:
        batch = difference.get("batch", "")
        more = (int(batch) if batch.isdecimal() else 0) - int(wanted["batch"])
        return len(difference), more < 0, abs(more)

    return min(differences, key=farness, default={})


class TensorRTEngine:
    """One variant at one batch size; what it needs while it runs lies in the block that all engines share."""

    def __init__(
        self,
        device: Device,
        trt: Any,  # noqa: ANN401
        engine: bytes,
        shapes: Mapping[str, tuple[int, ...]],
        precision: str,
    ) -> None:
        """Deserialise an engine.

        Args:
            device: Where; it is current.
            trt: What ``import_tensorrt`` returned.
            engine: What was built: native code, of a source that is trusted.
            shapes: Of every input and output.
            precision: What it computes in.

        Raises:
            BackendError: the library refuses it, or it takes other inputs or outputs.
        """
        self.precision, self._device = precision, device
        self._log = Log(trt)
        try:
            self._runtime = trt.Runtime(self._log.listener)
        except TypeError as error:  # it could not be made
            raise BackendError(f"TensorRT could not start its runtime: {self._log.reason()}") from error
        self._engine = self._expect(self._runtime.deserialize_cuda_engine(engine), "load it")
        self._check_tensors(trt, shapes)
        # The block is counted first: a context without memory of its own must be given that much before it runs.
        self._scratch_bytes = int(self._engine.device_memory_size_v2)
        device.scratch.reserve(self._scratch_bytes)
        self._scratch: int | None = None
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._context = self._expect(self._engine.create_execution_context(strategy), "make room for it")
        self._names = frozenset(shapes)

    def _expect(self, result: Any, what: str) -> Any:  # noqa: ANN401
        """Pass on what the library returned, unless it is its way of refusing."""
        if result is None or result is False:
            raise BackendError(f"TensorRT could not {what}: {self._log.reason()}")
        return result

    def _check_tensors(self, trt: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:  # noqa: ANN401
        """A wrong shape would be read or written beyond its array's end."""
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        found = {name: tuple(self._engine.get_tensor_shape(name)) for name in names}
        if found != dict(shapes):
            raise BackendError(f"expected inputs and outputs {dict(shapes)}, found {printable(str(found))}")
        if others := [name for name in names if self._engine.get_tensor_dtype(name) != trt.DataType.FLOAT]:
            raise BackendError(f"expected float32 inputs and outputs, found another type for {printable(others[0])}")

    @property
    def is_capturable(self) -> bool:
        """TensorRT's engines without conditions and loops always are; TensorRT-RTX has to be asked."""
        asked = getattr(self._context, "is_stream_capturable", None)
        return asked is None or bool(asked(self._device.stream))

    def place(self, addresses: Mapping[str, int]) -> None:
        """Use these addresses from now on.

        Raises:
            BackendError: not those of its inputs and outputs, or the library refuses one.
        """
        if addresses.keys() != self._names:
            raise BackendError(f"expected addresses of {sorted(self._names)}, found those of {sorted(addresses)}")
        for name, address in addresses.items():
            self._expect(self._context.set_tensor_address(name, address), f"use {address:#x} as {name}")

    def enqueue(self) -> None:
        """Put one forward pass on the stream.

        Raises:
            BackendError: it was refused.
        """
        address = self._device.scratch.address
        if address != self._scratch:
            self._log.errors.clear()
            self._context.set_device_memory(address, self._scratch_bytes)
            if self._log.errors:  # it returns nothing
                self._expect(None, "use the block of memory that engines share")
            self._scratch = address
        self._expect(self._context.execute_async_v3(self._device.stream), "enqueue a call")

    def close(self) -> None:
        """Release the engine; its context must go before it, and both before what they were made by."""
        del self._context, self._engine, self._runtime
