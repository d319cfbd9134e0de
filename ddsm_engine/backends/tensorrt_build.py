"""TensorRT's builder: from the ONNX file of a variant to an engine for one batch size.

Precision is the file's: networks are strongly typed, and float32 is not rounded to TF32. The same code drives
TensorRT-RTX, which builds on a machine without a GPU.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TextIO

from ddsm_engine.backends.tensorrt import Log, printable
from ddsm_engine.errors import BackendError, OutputError


@dataclass(frozen=True, slots=True)
class Built:
    """What a build gave.

    Attributes:
        engine: The serialised engine.
        timings: What was measured on the way, for the next build; None where none was asked for.
        seconds: Wall time.
    """

    engine: bytes
    timings: bytes | None
    seconds: float


def build_engine(
    trt: Any,  # noqa: ANN401 - a module without types
    onnx: bytes,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    log: TextIO,
    timings: bytes | None = None,
    progress: Callable[[str], None] = lambda phase: None,
) -> Built:
    """Build an engine.

    Args:
        trt: What ``import_tensorrt`` returned.
        onnx: The network, weights inside.
        shapes: Of every input, batch included.
        log: Gets what the library says, but for its chatter.
        timings: Of an earlier build by this version on this GPU, trusted; empty where there is none; None neither takes
            nor gives any, as TensorRT-RTX, which measures nothing.
        progress: Gets the name of every phase as it begins, from any thread.

    Raises:
        BackendError: there is no GPU, the network cannot be read, has other inputs, or no engine comes out.
        OutputError: the log cannot be written.
    """
    started, said = time.perf_counter(), Log(trt, log)
    try:
        builder = trt.Builder(said.listener)
    except TypeError as error:  # it could not be made
        raise BackendError(f"TensorRT's builder does not start here: {said.reason()}; see {log.name}") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, said.listener)
    if not parser.parse(onnx):
        raise BackendError(f"TensorRT cannot read the network: {_parse_error(parser)}; see {log.name}")
    _fix_shapes(trt, network, shapes)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.max_aux_streams = 0  # engines share one stream, and a stream of its own asks for a block of its own
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # TensorRT-RTX: only these are always capturable
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if timings is not None:
        _take_timings(config, timings)
    engine = _build(trt, builder, network, config, progress)
    if engine is None:
        raise BackendError(f"TensorRT builds no engine of this network: {said.reason()}; see {log.name}")
    if said.failure is not None:
        raise OutputError(f"{log.name} cannot be written: {said.failure}") from said.failure
    measured = None if timings is None else bytes(config.get_timing_cache().serialize())
    return Built(engine, measured, time.perf_counter() - started)


def _parse_error(parser: Any) -> str:  # noqa: ANN401
    """The parser's first error and the node that it is about: those after it follow from it."""
    if not parser.num_errors:
        return "it gave no reason"
    first = parser.get_error(0)
    node = f"node {first.node_name()} ({first.node_operator()}): " if first.node() >= 0 else ""
    return printable(f"{node}{first.desc()}")


def _fix_shapes(trt: Any, network: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:  # noqa: ANN401
    """Give every input its static shape: there is then nothing to optimise for a range, and no profile to choose.

    Raises:
        BackendError: the network has other inputs.
    """
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    found = {tensor.name: tuple(tensor.shape) for tensor in tensors if tensor.dtype == trt.DataType.FLOAT}
    fits = len(tensors) == len(found) and found.keys() == shapes.keys()
    if not fits or not all(_takes(found[name], shape) for name, shape in shapes.items()):
        raise BackendError(
            f"expected the float32 inputs {dict(shapes)}, found {printable(str(found))}; export the bundle again"
        )
    for tensor in tensors:
        tensor.shape = shapes[tensor.name]


def _takes(sizes: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a network takes arrays of this shape; a size that it leaves open is -1."""
    return len(sizes) == len(shape) and all(size in (-1, wanted) for size, wanted in zip(sizes, shape, strict=True))


def _take_timings(config: Any, timings: bytes) -> None:  # noqa: ANN401
    cache = config.create_timing_cache(timings)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _build(
    trt: Any,  # noqa: ANN401
    builder: Any,  # noqa: ANN401
    network: Any,  # noqa: ANN401
    config: Any,  # noqa: ANN401
    progress: Callable[[str], None],
) -> bytes | None:
    """Build in another thread: in this one an interrupt would be lost, as it meets code that Python does not see."""
    is_cancelled = False
    methods = {
        "phase_start": lambda _, phase, parent, steps: progress(phase),
        "phase_finish": lambda _, phase: None,
        "step_complete": lambda _, phase, step: not is_cancelled,
    }
    config.progress_monitor = monitor = type("Monitor", (trt.IProgressMonitor,), methods)()
    with ThreadPoolExecutor(1) as pool:
        try:
            serialized = pool.submit(builder.build_serialized_network, network, config).result()
        finally:
            is_cancelled = True
    del monitor  # it must outlive the build
    return None if serialized is None else bytes(serialized)
