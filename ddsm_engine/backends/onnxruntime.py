"""ONNX Runtime: the same ONNX files on a CPU; ``onnxruntime_cuda`` has them on a GPU."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

# Since 1.29 it reports sessions to its maker, unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from ddsm_engine.backends.engine import Arrays, EngineOptions, describe_target, fp32_alone
from ddsm_engine.engine_cache import Target
from ddsm_engine.errors import BackendError
from ddsm_engine.untrusted import one_line

LOAD_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    UnicodeDecodeError,  # its own words, about a damaged file
)


def resolve_precision(options: EngineOptions) -> str:
    """What an engine with these options computes in.

    Raises:
        BackendError: the precision is not there.
    """
    return fp32_alone(
        options,
        f"ONNX Runtime has no {options.precision} arithmetic on a CPU; use --precision fp32 or --backend openvino",
    )


def target(options: EngineOptions, batch: int) -> Target:
    """What an engine with these options depends on beside the model."""
    return describe_target("onnxruntime", ort.__version__, resolve_precision(options), options, batch)


def check_shapes(kind: str, shapes: Mapping[str, Sequence[int]], nodes: Sequence[ort.NodeArg]) -> None:
    """Compare the inputs or outputs of a network with what it will be given.

    The library itself would find out in the first call, and print lines of its own.

    Raises:
        BackendError: the network has no such input or output, or one of another shape.
    """
    known = {node.name: node for node in nodes}
    for name in known.keys() | shapes.keys():
        node, shape = known.get(name), shapes.get(name)
        if node is None or shape is None or node.type != "tensor(float)" or not _takes(node.shape, shape):
            found = "none" if node is None else f"{node.type} {str(node.shape)[:100]}"
            wanted = "none" if shape is None else f"tensor(float) {list(shape)}"
            raise BackendError(
                f"expected the {kind} {name[:60]!r} of the network to be {wanted}, found {found}; export the "
                f"bundle again"
            )


class OnnxRuntimeEngine:
    """One ONNX file in one session on the CPU, reading and writing bound host buffers."""

    def __init__(self, model: Path, options: EngineOptions) -> None:
        """Open a session.

        Raises:
            BackendError: the file does not load, or the precision is not offered.
        """
        self.precision = resolve_precision(options)
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        # Every session has threads of its own. Those of the variant before would still spin when the next one's begin:
        # the first call after a swap took 50 to 90 % longer.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        settings.log_severity_level = 4  # what is wrong is said once, by the error
        try:
            # Where it refuses a file, its own fallback would print lines of its own and try again.
            self._session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"], enable_fallback=0)
        except LOAD_ERRORS as error:
            raise BackendError(f"ONNX Runtime cannot open {model}: {one_line(error)}") from error
        self._binding = self._session.io_binding()
        self._bound: list[ort.OrtValue] = []

    def bind(self, inputs: Arrays, outputs: Arrays) -> None:
        """Use these arrays from now on.

        Raises:
            BackendError: the network has no such input or output, or one of another shape.
        """
        for kind, arrays, nodes in (
            ("input", inputs, self._session.get_inputs()),
            ("output", outputs, self._session.get_outputs()),
        ):
            check_shapes(kind, {name: array.shape for name, array in arrays.items()}, nodes)
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        self._bound = [ort.OrtValue.ortvalue_from_numpy(array) for array in [*inputs.values(), *outputs.values()]]
        for name, value in zip(inputs, self._bound, strict=False):
            self._binding.bind_ortvalue_input(name, value)
        for name, value in zip(outputs, self._bound[len(inputs) :], strict=True):
            self._binding.bind_ortvalue_output(name, value)

    def run(self) -> None:
        """One forward pass."""
        try:
            self._session.run_with_iobinding(self._binding)
        except (*LOAD_ERRORS, RuntimeError) as error:
            raise BackendError(f"ONNX Runtime failed in a call: {one_line(error)}") from error

    def close(self) -> None:
        """Release the session."""
        self._bound.clear()
        del self._binding, self._session


def _takes(sizes: Sequence[int | str | None], shape: Sequence[int]) -> bool:
    """Whether a node takes arrays of this shape; a size that the file leaves open, the batch, is a name."""
    return len(sizes) == len(shape) and all(
        size == wanted for size, wanted in zip(sizes, shape, strict=True) if isinstance(size, int)
    )
