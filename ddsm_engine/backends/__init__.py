"""Backends by name; each library is imported only when its backend is opened."""

import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType

from ddsm_engine.backends.device import Device, DeviceEngine, StagedEngine, no_gpu
from ddsm_engine.backends.engine import Engine, EngineOptions
from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.engine_cache import EngineCache, Target
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.environment import cores
from ddsm_engine.untrusted import brief
from ddsm_kernels.unet_cpu import compiler

BACKENDS = ("openvino", "onnxruntime", "native", "torch")
"""Those that run on a CPU, in the order ``auto`` prefers them."""

GPU_BACKENDS = ("tensorrt", "tensorrt-rtx", "torch-compile")
"""Those that run on nothing but a GPU."""

CHOICES = ("auto", *BACKENDS, *GPU_BACKENDS)
"""What a user may name."""

ON_GPU = ("tensorrt", "torch", "onnxruntime")
"""What ``auto`` takes on a GPU, in this order."""

REFERENCE = "torch"
"""Cuts its networks from the weights, eager and slow: what the others, which read the artefacts, are compared with."""

MODULES = {"tensorrt-rtx": "tensorrt_rtx", "torch-compile": "torch"}
"""The module that a backend needs, where it has another name."""

DEVICES = ("auto", "cpu", "cuda")

INSTALL = {
    "openvino": "pip install 'ddsm-engine[cpu]'",
    "onnxruntime": "pip install 'ddsm-engine[cpu]'",
    "native": "sudo apt-get install g++",
    "torch": "pip install 'ddsm-engine[export]'",
    "tensorrt": "pip install 'ddsm-engine[gpu]' --extra-index-url https://pypi.nvidia.com",
    "tensorrt-rtx": "pip install tensorrt-rtx-cu13",
    "torch-compile": "pip install 'ddsm-engine[export]'",
}


def device_of(backend: str, device: object = "auto") -> str:
    """Where a backend runs: ``auto`` is the GPU for those that run on nothing else, and otherwise the CPU.

    Args:
        backend: Which, or ``auto``.
        device: One of ``DEVICES``, as torch spells it, too: ``cuda:0`` or a ``torch.device``.

    Raises:
        BackendError: none of these; of several GPUs it is always the first that is visible.
    """
    name = str(device).removesuffix(":0")
    if name not in DEVICES:
        raise BackendError(
            f"expected the device {', '.join(DEVICES)}, found {brief(str(device))}; of several GPUs choose one with "
            f"CUDA_VISIBLE_DEVICES"
        )
    if name != "auto":
        return name
    return "cuda" if backend in GPU_BACKENDS else "cpu"


def is_installed(backend: str) -> bool:
    """Whether the library of a backend, or its compiler, is installed; whether it works is another question."""
    if backend == "native":
        return compiler() is not None
    return importlib.util.find_spec(MODULES.get(backend, backend)) is not None


def installed_backends() -> tuple[str, ...]:
    """The backends for a CPU whose library is installed, preferred first."""
    return tuple(name for name in BACKENDS if is_installed(name))


def artefact_backends(device: str = "cpu") -> tuple[str, ...]:
    """What is compared where nothing was asked for: all that a device has installed, on the CPU but the reference."""
    if device == "cuda":
        return tuple(name for name in ON_GPU if is_installed(name))
    return tuple(name for name in installed_backends() if name != REFERENCE)


def reads(backend: str, bundle: Bundle) -> bool:
    """Whether a backend for the CPU reads a bundle's artefacts: ONNX Runtime has no bf16 there."""
    return backend != "onnxruntime" or all(variant.precision != "bf16" for variant in bundle.manifest.variants)


def choose_backend(name: str, device: str) -> str:
    """Resolve ``auto`` and check that the library is there.

    Raises:
        BackendError: an unknown name, or nothing installed that could run.
    """
    if name == "auto":
        # Where nobody measured, OpenVINO: nothing else computes in bf16 on a CPU.
        usable = [backend for backend in (ON_GPU if device == "cuda" else BACKENDS) if is_installed(backend)]
        if not usable:
            raise BackendError(f"no backend is installed for device {device}: {INSTALL['onnxruntime']}")
        return usable[0]
    if name not in BACKENDS + GPU_BACKENDS:
        raise BackendError(f"unknown backend {name!r}; expected auto, {', '.join(BACKENDS + GPU_BACKENDS)}")
    if device == "cuda" and name not in ON_GPU + GPU_BACKENDS:
        raise BackendError(f"the backend {name} runs on the CPU, found --device cuda; take one of {', '.join(ON_GPU)}")
    if name in GPU_BACKENDS and device != "cuda":
        raise BackendError(f"the backend {name} runs on a GPU, found --device {device}; take --device cuda")
    if not is_installed(name):
        raise BackendError(f"the backend {name} is not installed: {INSTALL[name]}")
    return name


def prepare(backend: str) -> None:
    """Do once what a backend needs before any engine: compile our own kernels, which shows whether the compiler works.

    Raises:
        BackendError: it cannot be done.
    """
    if backend == "native":
        from ddsm_engine.backends.native import library

        library()


def open_device(backend: str) -> Device:
    """A stream on the GPU.

    Args:
        backend: Who asks, for the refusal.

    Raises:
        BackendError: there is no GPU, or what reaches it is not installed.
    """
    device: Device = _cuda(backend).open_device()
    return device


def _cuda(backend: str) -> ModuleType:
    try:
        from ddsm_engine.backends import cuda
    except ImportError as error:
        raise no_gpu(backend, f"no way to reach one ({error})") from error
    return cuda


def engine_target(name: str, options: EngineOptions, batch: int) -> Target:
    """Everything beside the variant that an engine of ``open_engine`` depends on, and with it how long it takes.

    Raises:
        BackendError: the backend, device or precision is not there.
    """
    name = choose_backend(name, options.device)
    if options.device == "cuda":
        return _gpu_target(name, options, batch)
    match name:
        case "openvino":
            from ddsm_engine.backends.openvino import target
        case "onnxruntime":
            from ddsm_engine.backends.onnxruntime import target
        case "native":
            from ddsm_engine.backends.native import target
        case _:
            from ddsm_engine.backends.torch import target
    return target(options, batch)


def _gpu_target(name: str, options: EngineOptions, batch: int) -> Target:
    gpu = _cuda(name).properties()
    if name in ("tensorrt", "tensorrt-rtx"):
        from ddsm_engine.backends.tensorrt import target

        return target(name, options, batch, gpu)
    if name == "onnxruntime":
        from ddsm_engine.backends.onnxruntime_cuda import target as onnxruntime_target

        return onnxruntime_target(options, batch, gpu)
    from ddsm_engine.backends.torch_cuda import target as torch_target

    return torch_target(options, batch, gpu, compiled=name == "torch-compile")


def open_engine(
    name: str, bundle: Bundle, variant: Variant, batch: int, options: EngineOptions, device: Device | None = None
) -> Engine:
    """Open one variant for one batch size; its file is verified first.

    Args:
        name: The backend.
        bundle: Where the variant is.
        variant: What to open.
        batch: Images per call.
        options: Device, precision and threads.
        device: The stream that an engine on a GPU shares with others; None opens one for it alone.

    Raises:
        BackendError: the backend, device or precision is not there, or the artefact does not load.
        BundleError: the artefact is damaged.
    """
    name = choose_backend(name, options.device)
    if options.device == "cuda":
        return _open_on_gpu(name, bundle, [variant], batch, options, device)[variant.id]
    match name:
        case "openvino":
            from ddsm_engine.backends.openvino import OpenVINOEngine, target

            shapes = {tensor.name: tensor.at_batch(batch) for tensor in variant.inputs}
            built = EngineCache(bundle, target(options, batch)).load(variant)
            # A built engine vouches for the artefact it was made from, which then need not be read.
            model = bundle.artefact(variant) if built is None else bundle.path / variant.file
            return OpenVINOEngine(model, shapes, options, built)
        case "onnxruntime":
            from ddsm_engine.backends.onnxruntime import OnnxRuntimeEngine

            if variant.precision == "bf16":
                raise BackendError(f"ONNX Runtime has no bf16 on a CPU, which {variant.id} is in; --backend openvino")
            return OnnxRuntimeEngine(bundle.artefact(variant), options)
        case "native":
            from ddsm_engine.backends.native import open_native

            return open_native(bundle, [variant], batch, options)[variant.id]
        case "torch":
            from ddsm_engine.backends.torch import TorchEngine, cut_network

            return TorchEngine(cut_network(bundle, variant), options)
    raise AssertionError(f"{name} runs on no CPU")


def _open_on_gpu(
    name: str,
    bundle: Bundle,
    variants: Sequence[Variant],
    batch: int,
    options: EngineOptions,
    device: Device | None,
) -> dict[str, Engine]:
    """Engines on one stream, one after the other: each takes all of the GPU while it is opened."""
    shared = device is not None
    device = device if device is not None else open_device(name)
    opened: dict[str, StagedEngine] = {}
    # A stream that was opened for these engines closes with the last of them.
    still_open = {variant.id for variant in variants}

    def closed(variant: str) -> None:
        still_open.discard(variant)
        if not still_open and not shared:
            device.close()

    try:
        with device.current():
            for variant in variants:
                loaded = _device_engine(name, bundle, variant, batch, options, device)
                opened[variant.id] = StagedEngine(device, loaded, partial(closed, variant.id))
    except BaseException:
        for engine in opened.values():
            engine.close()
        for variant in variants:
            closed(variant.id)
        raise
    return dict(opened)


def _device_engine(
    name: str, bundle: Bundle, variant: Variant, batch: int, options: EngineOptions, device: Device
) -> DeviceEngine:
    match name:
        case "tensorrt" | "tensorrt-rtx":
            from ddsm_engine.backends.tensorrt import open_tensorrt

            return open_tensorrt(name, bundle, variant, batch, options, device)
        case "onnxruntime":
            from ddsm_engine.backends.onnxruntime_cuda import OnnxRuntimeCudaEngine

            return OnnxRuntimeCudaEngine(device, bundle.artefact(variant), variant, batch, options)
        case "torch" | "torch-compile":
            from ddsm_engine.backends.torch import cut_network
            from ddsm_engine.backends.torch_cuda import TorchCudaEngine

            is_compiled = name == "torch-compile"
            return TorchCudaEngine(device, cut_network(bundle, variant), batch, options, compiled=is_compiled)
    raise AssertionError(f"{name} runs on no GPU")


def open_engines(
    name: str,
    bundle: Bundle,
    variants: Sequence[Variant],
    batch: int,
    options: EngineOptions,
    device: Device | None = None,
) -> dict[str, Engine]:
    """Open several variants, by id, as ``open_engine`` does: side by side, for compiling one keeps one core busy.

    Those of the native backend share their weights.

    Raises:
        BackendError, BundleError: as ``open_engine``; those that did open are closed.
    """
    if options.device == "cuda":
        return _open_on_gpu(choose_backend(name, options.device), bundle, variants, batch, options, device)
    if choose_backend(name, options.device) == "native":
        from ddsm_engine.backends.native import open_native

        return dict(open_native(bundle, variants, batch, options))
    with ThreadPoolExecutor(cores()) as pool:
        opening = {v.id: pool.submit(open_engine, name, bundle, v, batch, options) for v in variants}
    try:
        return {identifier: future.result() for identifier, future in opening.items()}
    except BaseException:
        for future in opening.values():
            if future.exception() is None:
                future.result().close()
        raise
