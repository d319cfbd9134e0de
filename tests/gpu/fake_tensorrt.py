"""The part of TensorRT that TensorRT 10 and 11 share and the project uses, as a module without a GPU behind it.

It refuses as the real one does, by returning False or None after a line of log; ``faults`` names the calls that do. An
engine is JSON, and computes on a ``FakeDevice``: sample * mean of the time features + bias.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any

from tests.gpu.fake import FakeDevice

__version__ = "10.13.0.35"

OUTPUT = "out_sample"


@dataclass
class State:
    """What stands behind the library.

    Attributes:
        device: Where engines run; None on a machine without a GPU.
        faults: The calls that refuse → what the library says when they do.
        inputs: Of the network that the next ONNX file holds.
        bias: Of the network that is built next.
        calls: What was asked of the library, in order, that no result shows.
    """

    device: FakeDevice | None = None
    faults: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    bias: float = 0.25
    calls: list[tuple[Any, ...]] = field(default_factory=list)


state = State()


def refused(call: str, logger: "ILogger") -> bool:
    words = state.faults.get(call)
    if words:
        logger.log(ILogger.ERROR, words)
    return words is not None


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: int, text: str) -> None:
        raise NotImplementedError


class IProgressMonitor:
    def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
        raise NotImplementedError

    def phase_finish(self, phase: str) -> None:
        raise NotImplementedError

    def step_complete(self, phase: str, step: int) -> bool:
        raise NotImplementedError


class DataType(Enum):
    FLOAT, HALF = range(2)


class ExecutionContextAllocationStrategy(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(Enum):
    TF32 = 7


# --- running ----------------------------------------------------------------------------------------------------------


def engine_bytes(
    shapes: Mapping[str, tuple[int, ...]], *, scratch: int = 4096, bias: float = 0.25, dtype: str = "FLOAT"
) -> bytes:
    return json.dumps({"shapes": shapes, "scratch": scratch, "bias": bias, "dtype": dtype}).encode()


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        assert state.device is not None, "the real one ends the process where there is no GPU"
        if refused("Runtime", logger):
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> "ICudaEngine | None":
        if refused("deserialize_cuda_engine", self.logger):
            return None
        try:
            return ICudaEngine(json.loads(data), self.logger)
        except ValueError:
            self.logger.log(ILogger.ERROR, "IRuntime::deserializeCudaEngine: Size does not match archive size")
            return None


class ICudaEngine:
    def __init__(self, content: dict[str, Any], logger: ILogger) -> None:
        self._content, self._logger = content, logger
        self._names: list[str] = list(content["shapes"])
        self.device_memory_size_v2: int = content["scratch"]
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(self._content["shapes"][name])

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._content["dtype"]]

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> "IExecutionContext | None":
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        if refused("create_execution_context", self._logger):
            return None
        return IExecutionContext(self._content, self._logger)


class IExecutionContext:
    def __init__(self, content: dict[str, Any], logger: ILogger) -> None:
        self._content, self._logger = content, logger
        self._addresses: dict[str, int] = {}
        self._scratch: tuple[int, int] | None = None

    def set_device_memory(self, address: int, size: int) -> None:
        if not refused("set_device_memory", self._logger):
            assert size >= self._content["scratch"]
            self._scratch = address, size
            state.calls.append(("set_device_memory", address))

    def set_tensor_address(self, name: str, address: int) -> bool:
        if refused("set_tensor_address", self._logger):
            return False
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        device, shapes = state.device, self._content["shapes"]
        assert device is not None
        assert stream == device.stream
        if self._scratch is None or self._addresses.keys() != shapes.keys():
            self._logger.log(ILogger.ERROR, "IExecutionContext::enqueueV3: a tensor or the memory has no address")
            return False
        if refused("execute_async_v3", self._logger):
            return False
        addresses, (scratch, size) = dict(self._addresses), self._scratch

        def work() -> None:
            device.view(scratch, (size,), "uint8").fill(0x5A)
            sample, features = (device.view(addresses[n], tuple(shapes[n])) for n in ("sample", "time_features"))
            factor = features.mean(axis=1).reshape(-1, 1, 1, 1)
            device.view(addresses[OUTPUT], tuple(shapes[OUTPUT]))[:] = sample * factor + self._content["bias"]

        device.record(work)
        return True


# --- building ---------------------------------------------------------------------------------------------------------


class ITensor:
    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape, self.dtype = name, shape, DataType.FLOAT


class INetworkDefinition:
    def __init__(self) -> None:
        self._inputs: list[ITensor] = []

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]


class ParserError:
    def node(self) -> int:
        return 3

    def node_name(self) -> str:
        return "conv_1"

    def node_operator(self) -> str:
        return "Conv"

    def desc(self) -> str:
        return state.faults["parse"]


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._logger = network, logger
        self.num_errors = 0

    def parse(self, onnx: bytes) -> bool:
        if refused("parse", self._logger):
            self.num_errors = 1
            return False
        self._network._inputs += [ITensor(name, (-1, *shape[1:])) for name, shape in state.inputs.items()]
        return True

    def get_error(self, index: int) -> ParserError:
        return ParserError()


class IHostMemory(bytes):
    pass


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> IHostMemory:
        return IHostMemory(self._content)


class IBuilderConfig:
    max_aux_streams = 7
    progress_monitor: IProgressMonitor

    def __init__(self) -> None:
        self._flags = {BuilderFlag.TF32}
        self._timings = ITimingCache(b"")

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(flag)

    def create_timing_cache(self, content: bytes) -> ITimingCache | None:
        return None if content == b"no timings" else ITimingCache(content)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        state.calls.append(("timings", bytes(cache.serialize())))
        if cache._content == b"of another GPU":
            return False
        self._timings = cache
        return True

    def get_timing_cache(self) -> ITimingCache:
        return self._timings


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        if state.device is None:
            logger.log(ILogger.ERROR, "createInferBuilder: Error Code 6: CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags: int) -> INetworkDefinition:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        assert BuilderFlag.TF32 not in config._flags, "float32 is float32"
        assert config.max_aux_streams == 0
        self._logger.log(ILogger.INFO, "Detected 2 inputs and 1 output network tensors.")
        self._logger.log(ILogger.VERBOSE, "chatter")
        config.progress_monitor.phase_start("Timing tactics", None, 2)
        goes_on = all(config.progress_monitor.step_complete("Timing tactics", step) for step in range(2))
        config.progress_monitor.phase_finish("Timing tactics")
        if not goes_on or refused("build_serialized_network", self._logger):
            return None
        shapes = {tensor.name: tensor.shape for tensor in network._inputs}
        config._timings = ITimingCache(config._timings._content + b"+measured")
        return IHostMemory(engine_bytes(shapes | {OUTPUT: shapes["sample"]}, bias=state.bias))


CLASSES: Mapping[str, Callable[..., Any]] = {
    name: value for name, value in list(globals().items()) if isinstance(value, type) and value.__module__ == __name__
}
