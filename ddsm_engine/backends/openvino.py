"""OpenVINO: the default on a CPU; computes in bf16 where the CPU has matrix tiles for it.

A batch is split over streams, each with threads of its own: one network over all threads makes them wait for each other
after every layer.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from ddsm_engine.backends.engine import Arrays, EngineOptions, describe_target
from ddsm_engine.backends.openvino_norms import channels_last_norms
from ddsm_engine.engine_cache import Target
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.environment import cores
from ddsm_engine.untrusted import one_line

PRECISIONS = {"fp32": ov.Type.f32, "bf16": ov.Type.bf16}

# Engines are opened side by side. The bindings find numpy when they first hand over an array, under two locks; two
# threads that are the first at once wait for each other for ever. While a module is imported there is one.
ov.op.Constant(np.zeros(1, np.float32)).get_data()

_CORE = ov.Core()


def core() -> ov.Core:
    """The process's one OpenVINO core: plugins are loaded once."""
    return _CORE


def resolve_precision(options: EngineOptions) -> str:
    """What an engine with these options computes in.

    Raises:
        BackendError: the precision is not there.
    """
    capabilities = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if options.precision == "auto":
        return "bf16" if "BF16" in capabilities else "fp32"
    if options.precision == "fp16":
        raise BackendError("OpenVINO computes in fp32 or bf16 on a CPU, found --precision fp16")
    if options.precision == "bf16" and "BF16" not in capabilities:
        raise BackendError(f"this CPU has no bf16 arithmetic (it has {', '.join(capabilities)}); --precision fp32")
    return options.precision


def choose_streams(batch: int, threads: int) -> int:
    """Into how many equal parts a batch is split: as many as threads can work on, one image each at least."""
    return max(parts for parts in range(1, min(batch, threads) + 1) if batch % parts == 0)


def target(options: EngineOptions, batch: int) -> Target:
    """What an engine with these options depends on beside the model; a compiled one also on what the CPU can do."""
    target = describe_target("openvino", ov.__version__, resolve_precision(options), options, batch)
    capabilities = " ".join(core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return {**target, "streams": choose_streams(batch, options.threads or cores()), "capabilities": capabilities}


class OpenVINOEngine:
    """One ONNX file compiled for one batch size, reading and writing bound host buffers."""

    def __init__(
        self, model: Path, shapes: dict[str, tuple[int, ...]], options: EngineOptions, built: bytes | None = None
    ) -> None:
        """Compile, or load what was compiled before.

        Args:
            model: The ONNX file.
            shapes: Every input's shape at the batch size to compile for; a static shape runs faster than a dynamic one.
            options: Device, precision and threads.
            built: What ``export`` returned for this model, these shapes and options, on this machine.

        Raises:
            BackendError: the precision is not there, or the file does not compile.
        """
        self.precision = resolve_precision(options)
        (batch,) = {shape[0] for shape in shapes.values()}
        streams = choose_streams(batch, options.threads or cores())
        config: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": streams,
            "INFERENCE_PRECISION_HINT": PRECISIONS[self.precision],
        }
        if options.threads:
            config["INFERENCE_NUM_THREADS"] = options.threads
        try:
            if built is None:
                network = core().read_model(model)
                network.reshape({name: [batch // streams, *shape[1:]] for name, shape in shapes.items()})
                # One image gains nothing and is ready in half the time; what bf16 leaves of variances is not known yet.
                if batch > 1 and self.precision == "fp32":
                    channels_last_norms(network)
                self._compiled = core().compile_model(network, "CPU", config)
            else:
                self._compiled = core().import_model(built, "CPU", config)
            self._requests = [self._compiled.create_infer_request() for _ in range(streams)]
        except (RuntimeError, UnicodeDecodeError) as error:  # the latter: its own words, about a damaged file
            raise BackendError(f"OpenVINO cannot open {model}: {one_line(error)}") from error
        self._bound: list[ov.Tensor] = []

    def bind(self, inputs: Arrays, outputs: Arrays) -> None:
        """Use these arrays from now on.

        Raises:
            BackendError: the network has no such input or output, or one of another shape.
        """
        self._bound.clear()
        for name, array in [*inputs.items(), *outputs.items()]:
            for request, part in zip(self._requests, np.array_split(array, len(self._requests)), strict=True):
                tensor = ov.Tensor(part, shared_memory=True)
                try:
                    request.set_tensor(name, tensor)
                except RuntimeError as error:
                    raise BackendError(
                        f"the network takes no {name} {list(tensor.shape)}; export the bundle again ({one_line(error)})"
                    ) from error
                self._bound.append(tensor)

    def run(self) -> None:
        """One forward pass."""
        try:
            for request in self._requests:
                request.start_async()
            for request in self._requests:
                request.wait()
        except RuntimeError as error:
            raise BackendError(f"OpenVINO failed in a call: {one_line(error)}") from error

    def export(self) -> bytes:
        """The compiled network, for ``built`` on this machine with this version of OpenVINO."""
        exported: io.BytesIO = self._compiled.export_model()
        return exported.getvalue()

    def close(self) -> None:
        """Release the compiled network."""
        self._bound.clear()
        self._requests.clear()
        del self._compiled
