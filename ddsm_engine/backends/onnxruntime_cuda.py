"""ONNX Runtime on a GPU: one session per variant on the device's stream, reading and writing its memory in place.

A session captures its own graph, one for every set of addresses that it is given, and launches it itself: nobody else
can capture what it does (microsoft/onnxruntime#32081), so that a run is one launch a call. By its source, a launch of
such a graph waits for its end.
"""

import io
import logging
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# First: it keeps the library from reporting sessions to its maker.
from ddsm_engine.backends.onnxruntime import LOAD_ERRORS, check_shapes

# isort: split
import onnxruntime as ort

from ddsm_engine.backends.device import Device, DeviceProperties, describe_gpu_target
from ddsm_engine.backends.engine import EngineOptions, artefact_precision
from ddsm_engine.bundle import Variant
from ddsm_engine.engine_cache import Target
from ddsm_engine.errors import BackendError
from ddsm_engine.untrusted import one_line

log = logging.getLogger(__name__)

PROVIDER = "CUDAExecutionProvider"

GPU = 0
"""Which of those that ``CUDA_VISIBLE_DEVICES`` leaves: the device's."""

MOST_GRAPHS = 8
"""Sets of addresses whose graphs a session keeps; the oldest goes first."""

NO_GRAPH = -1
"""The number of a call that neither captures nor launches a graph; 0 is the library's own."""

BATCH_AXIS = "batch"
"""What artefacts call the dimension that they leave open."""


def providers() -> list[str]:
    """What computes here, once CUDA's libraries and cuDNN are loaded from where pip puts them, unknown to the linker.

    One that is not found is no error yet: what needs it will say so.
    """
    with redirect_stdout(io.StringIO()):  # it prints what it does not find
        ort.preload_dlls()
    return list(ort.get_available_providers())


def target(options: EngineOptions, batch: int, gpu: DeviceProperties) -> Target:
    """What the time of a call depends on beside the model. ``auto`` is what the bundle was exported in."""
    return describe_gpu_target("onnxruntime", ort.__version__, options.precision, gpu, batch)


@dataclass(frozen=True, slots=True)
class _Placement:
    """Addresses bound, and the options of calls with them, among which the number of their graph."""

    binding: ort.IOBinding
    options: ort.RunOptions
    graph: int


class OnnxRuntimeCudaEngine:
    """One ONNX file in one session at one batch size."""

    is_capturable = False

    def __init__(self, device: Device, model: Path, variant: Variant, batch: int, options: EngineOptions) -> None:
        """Open a session.

        Args:
            device: Where; it is current, now and whenever the engine is used.
            model: The variant's file.
            variant: What the file is.
            batch: Images per call.
            options: Their precision must be the file's own, or ``auto``.

        Raises:
            BackendError: the installed library has no CUDA, the precision is not the file's, or it does not load.
        """
        self.precision = artefact_precision(options, variant)
        if PROVIDER not in (offered := providers()):
            raise BackendError(
                f"ONNX Runtime offers no device 'cuda' here (providers: {', '.join(offered)}): "
                f"pip uninstall onnxruntime && pip install 'ddsm-engine[gpu]'; otherwise --device cpu"
            )
        self._device, self._model, self._batch = device, model, batch
        self._inputs = {tensor.name: tensor.at_batch(batch) for tensor in variant.inputs}
        self._outputs = {tensor.name: tensor.at_batch(batch) for tensor in variant.outputs}
        self._placements: dict[tuple[tuple[str, int], ...], _Placement] = {}
        self._addresses: dict[str, int] = {}
        self._graphs = 0
        self._captures = True
        try:
            self._session = self._open()
        except BackendError as refused:
            self._open_without_graphs(refused)
        check_shapes("input", self._inputs, self._session.get_inputs())
        check_shapes("output", self._outputs, self._session.get_outputs())

    def _open(self) -> ort.InferenceSession:
        settings = ort.SessionOptions()
        settings.log_severity_level = 4  # what is wrong is said once, by the error
        # What computes shapes would run on the CPU, which a graph cannot hold; with every size known, nothing is left.
        settings.add_free_dimension_override_by_name(BATCH_AXIS, self._batch)
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        choices = {
            "device_id": str(GPU),
            "user_compute_stream": str(self._device.stream),
            "enable_cuda_graph": str(int(self._captures)),
            "prefer_nhwc": "1",
            "use_tf32": "0",  # its convolutions would take 11 bits of float32
            # An exhaustive search times algorithms, and may choose others, with other bits, in the next process.
            "cudnn_conv_algo_search": "HEURISTIC",
            "cudnn_conv_use_max_workspace": "1",
            "arena_extend_strategy": "kSameAsRequested",  # of seven sessions, each has an arena of its own
        }
        try:
            # Its own fallback to the CPU would print lines of its own and go on.
            session = ort.InferenceSession(self._model, settings, providers=[(PROVIDER, choices)], enable_fallback=0)
        except (*LOAD_ERRORS, RuntimeError) as error:
            raise BackendError(f"ONNX Runtime cannot open {self._model}: {one_line(error)}") from error
        if session.get_providers()[:1] != [PROVIDER]:
            raise BackendError(f"ONNX Runtime fell back from {PROVIDER} to {session.get_providers()} for {self._model}")
        return session

    def _open_without_graphs(self, refused: BaseException) -> None:
        """Take a session that launches every kernel itself. The one before may have been left in a broken capture.

        Raises:
            BackendError: this one is refused, too.
        """
        self._placements.clear()
        self._captures = False
        self._session = self._open()
        name = self._model.parent.name
        log.warning("ONNX Runtime captures no graph of %s and runs slower: %s", name, one_line(refused))

    def place(self, addresses: Mapping[str, int]) -> None:
        """Use these addresses from now on.

        Raises:
            BackendError: not those of its inputs and outputs.
        """
        names = self._inputs.keys() | self._outputs.keys()
        if addresses.keys() != names:
            raise BackendError(f"expected addresses of {sorted(names)}, found those of {sorted(addresses)}")
        self._addresses = dict(addresses)

    def _placement(self) -> _Placement:
        """The binding of the addresses in use; a graph holds for those that it was captured with alone."""
        key = tuple(sorted(self._addresses.items()))
        if key not in self._placements:
            if len(self._placements) == MOST_GRAPHS:
                oldest = self._placements.pop(next(iter(self._placements)))
                if self._captures:
                    self._session.release_captured_graph(oldest.graph)
            self._placements[key] = self._bind()
        return self._placements[key]

    def _bind(self) -> _Placement:
        binding = self._session.io_binding()
        for name, shape in self._inputs.items():
            binding.bind_input(name, "cuda", GPU, np.float32, shape, self._addresses[name])
        for name, shape in self._outputs.items():
            binding.bind_output(name, "cuda", GPU, np.float32, shape, self._addresses[name])
        self._graphs += 1
        graph = self._graphs if self._captures else NO_GRAPH
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return _Placement(binding, options, graph)

    def enqueue(self) -> None:
        """Put one forward pass on the stream; the first one with new addresses captures, which takes several.

        Raises:
            BackendError: it was refused.
        """
        try:
            self._run()
        except (*LOAD_ERRORS, RuntimeError) as error:
            if not self._captures:
                raise BackendError(f"ONNX Runtime failed in a call: {one_line(error)}") from error
            self._open_without_graphs(error)
            self.enqueue()

    def _run(self) -> None:
        placement = self._placement()
        self._session.run_with_iobinding(placement.binding, placement.options)

    def close(self) -> None:
        """Release the session, and with it its graphs."""
        self._placements.clear()
        del self._session
