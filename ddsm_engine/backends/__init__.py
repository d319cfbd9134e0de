"""Backends by name; each library is imported only when its backend is opened."""

import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ddsm_engine.backends.engine import Engine, EngineOptions
from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.engine_cache import EngineCache, Target
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.environment import cores

BACKENDS = ("openvino", "onnxruntime", "torch")
"""In the order ``auto`` prefers them."""

REFERENCE = "torch"
"""Cuts its networks from the weights, eager and slow: what the others, which read the artefacts, are compared with."""

INSTALL = {
    "openvino": "pip install 'ddsm-engine[cpu]'",
    "onnxruntime": "pip install 'ddsm-engine[cpu]'",
    "torch": "pip install 'ddsm-engine[export]'",
}


def installed_backends() -> tuple[str, ...]:
    """The backends whose library is installed, preferred first."""
    return tuple(name for name in BACKENDS if importlib.util.find_spec(name) is not None)


def artefact_backends() -> tuple[str, ...]:
    """Those of them that read a bundle's artefacts: all but the reference."""
    return tuple(name for name in installed_backends() if name != REFERENCE)


def choose_backend(name: str, device: str) -> str:
    """Resolve ``auto`` and check that the library is there.

    Raises:
        BackendError: an unknown name, or nothing installed that could run.
    """
    if name == "auto":
        # Where nobody measured, OpenVINO: nothing else computes in bf16 on a CPU. On a GPU only the others apply.
        usable = [b for b in installed_backends() if device == "cpu" or b != "openvino"]
        if not usable:
            raise BackendError(f"no backend is installed for device {device}: {INSTALL['onnxruntime']}")
        return usable[0]
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; expected auto, {', '.join(BACKENDS)}")
    if name not in installed_backends():
        raise BackendError(f"the backend {name} is not installed: {INSTALL[name]}")
    return name


def engine_target(name: str, options: EngineOptions, batch: int) -> Target:
    """Everything beside the variant that an engine of ``open_engine`` depends on, and with it how long it takes.

    Raises:
        BackendError: the backend, device or precision is not there.
    """
    match choose_backend(name, options.device):
        case "openvino":
            from ddsm_engine.backends.openvino import target
        case "onnxruntime":
            from ddsm_engine.backends.onnxruntime import target
        case _:
            from ddsm_engine.backends.torch import target
    return target(options, batch)


def open_engine(name: str, bundle: Bundle, variant: Variant, batch: int, options: EngineOptions) -> Engine:
    """Open one variant for one batch size; its file is verified first.

    Raises:
        BackendError: the backend, device or precision is not there, or the artefact does not load.
        BundleError: the artefact is damaged.
    """
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

            return OnnxRuntimeEngine(bundle.artefact(variant), options)
        case "torch":
            from ddsm_engine.backends.torch import TorchEngine, network_from_weights

            network = network_from_weights(bundle.weights(variant), bundle.spec(variant), variant.width)
            return TorchEngine(network, options)
    raise BackendError(f"unknown backend {name!r}; expected {', '.join(BACKENDS)}")


def open_engines(
    name: str, bundle: Bundle, variants: Sequence[Variant], batch: int, options: EngineOptions
) -> dict[str, Engine]:
    """Open several variants, by id, as ``open_engine`` does: side by side, for compiling one keeps one core busy.

    Raises:
        BackendError, BundleError: as ``open_engine``; those that did open are closed.
    """
    with ThreadPoolExecutor(cores()) as pool:
        opening = {v.id: pool.submit(open_engine, name, bundle, v, batch, options) for v in variants}
    try:
        return {identifier: future.result() for identifier, future in opening.items()}
    except BaseException:
        for future in opening.values():
            if future.exception() is None:
                future.result().close()
        raise
