"""What do seven resident variants take? Weights seven times over, activations once."""

from contextlib import ExitStack
from functools import partial
from typing import Final

from ddsm_engine.backends import open_device
from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.errors import BackendError
from ddsm_engine.measure.gpu.answers import check_engine
from ddsm_engine.measure.gpu.subnetworks import open_on_device
from ddsm_engine.measure.gpu.torch_gpu import cuda_torch, pooled_bytes
from ddsm_engine.measure.gpu.work import Row, Work

BATCH: Final = 256


def measure(work: Work) -> None:
    """Open the full width, then all others beside it, on every backend.

    Raises:
        BundleError: no bundle of 32x32.
        BackendError: no backend runs here.
    """
    bundle = work.bundle(32)
    for backend in work.backends():
        work.take({"batch": BATCH, "backend": backend}, partial(measure_resident, bundle, backend))


def measure_resident(bundle: Bundle, backend: str) -> Row:
    """Bytes that the engines share for their activations and, where torch can ask the driver, of all that is in use.

    The full width asks for most. A backend that shares nothing (``is_shared`` false) is not judged by it.

    Raises:
        BackendError: an engine that does not open, or answers something else.
    """
    first, *others = sorted(bundle.manifest.variants, key=lambda variant: -variant.macs)
    with ExitStack() as stack:
        device = open_device(backend)
        stack.callback(device.close)
        pooled_before, before = pooled_bytes(), used_bytes()

        def hold(variant: Variant) -> tuple[int, int | None]:
            staged = open_on_device(bundle, variant, backend, BATCH, device)
            stack.callback(staged.close)
            check_engine(bundle, variant, staged, BATCH, backend)
            return device.scratch.size_bytes + pooled_bytes() - pooled_before, used_bytes()

        largest, used_by_largest = hold(first)
        after = [hold(variant) for variant in others]
    seven, used_by_seven = after[-1]
    return {
        "variants": 1 + len(others),
        "is_shared": largest > 0,
        "activation_bytes_of_the_largest": largest,
        "activation_bytes_of_all": seven,
        "used_bytes_before": before,
        "used_bytes_with_the_largest": used_by_largest,
        "used_bytes_with_all": used_by_seven,
        "artefact_bytes": sum(variant.size_bytes for variant in bundle.manifest.variants),
    }


def used_bytes() -> int | None:
    """GPU memory in use by anybody; None where torch is not there to ask."""
    try:
        free, total = cuda_torch().cuda.mem_get_info()
    except BackendError:
        return None
    return int(total - free)
