"""Torch on the GPU, for what is measured of torch itself: ceilings and peers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from ddsm_engine.errors import BackendError
from ddsm_engine.measure.timing import Timing, summarise
from ddsm_engine.untrusted import one_line

DEVICE: Final = "cuda"
REPEATS: Final = 30


def cuda_torch() -> Any:  # noqa: ANN401 - a module
    """Torch, where it is installed and sees a GPU; float32 then means float32, not TF32.

    Raises:
        BackendError: neither.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise BackendError("torch is not installed: pip install 'ddsm-engine[export]'") from error
    if not torch.cuda.is_available():
        raise BackendError("torch sees no GPU here; install a build of it for CUDA")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Make a refusal of torch's complaints, out of memory included.

    Raises:
        BackendError: it complained.
    """
    try:
        yield
    except RuntimeError as error:
        raise BackendError(f"{what} failed: {one_line(error)}") from error


def time_events(call: Callable[[], object]) -> Timing:
    """Time a call by CUDA events around each, after a warm-up."""
    torch = cuda_torch()
    for _ in range(3):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return summarise([start.elapsed_time(end) for start, end in events])


def pooled_bytes() -> int:
    """GPU memory that torch holds in pools of somebody's own, which is where its engines' activations are.

    0 where torch is not there or sees no GPU.
    """
    try:
        torch = cuda_torch()
    except BackendError:
        return 0
    torch.cuda.empty_cache()
    segments = torch.cuda.memory_snapshot()
    return sum(int(segment["total_size"]) for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0))
