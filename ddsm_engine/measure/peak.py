"""What could this machine do at best? Its own matrix-product rate, the denominator of every MFU."""

import importlib.util
from collections.abc import Callable

import numpy as np

from ddsm_engine.measure.timing import time_in_turns

SIZE = 2048


def matmul_peak_gflops(precision: str = "fp32", threads: int = 0, device: str = "cpu") -> float:
    """Measured GFLOP/s of a large square matrix product.

    Args:
        precision: ``fp32``, or ``bf16`` where OpenVINO computes in it; on a GPU ``fp16``, too.
        threads: Threads; 0 leaves it to the library.
        device: ``cpu`` or ``cuda``.

    Raises:
        BackendError: on a GPU, which torch measures: it is not installed, or sees none.
    """
    if device == "cuda":
        from ddsm_engine.measure.gpu.ceilings import matrix_product

        return float(matrix_product(precision)["gflops_per_s"])
    calls: dict[str, Callable[[], object]] = {}
    has_openvino = importlib.util.find_spec("openvino") is not None
    # numpy takes every core, whatever is asked for.
    if precision == "fp32" and not (threads and has_openvino):
        a = np.random.default_rng(0).standard_normal((SIZE, SIZE), dtype=np.float32)
        b, out = a.T.copy(), np.empty_like(a)
        calls["numpy"] = lambda: np.matmul(a, b, out=out)
    if has_openvino:
        calls["openvino"] = _openvino_matmul(precision, threads)
    # The better of the libraries present is the machine's peak: a slow one would flatter the MFU.
    best_ms = min(timing.p20_ms for timing in time_in_turns(calls, repeats=7, warmup=1, budget_s=5.0).values())
    return 2 * SIZE**3 / best_ms / 1e6


def _openvino_matmul(precision: str, threads: int) -> Callable[[], object]:
    import openvino as ov
    from openvino import opset13 as ops

    from ddsm_engine.backends.openvino import PRECISIONS, core

    x = ops.parameter([SIZE, SIZE], np.float32)
    weight = np.random.default_rng(1).standard_normal((SIZE, SIZE), dtype=np.float32)
    model = ov.Model([ops.matmul(x, ops.constant(weight), transpose_a=False, transpose_b=False)], [x])
    config = {"INFERENCE_PRECISION_HINT": PRECISIONS[precision], "NUM_STREAMS": 1}
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    request = core().compile_model(model, "CPU", config).create_infer_request()
    request.set_input_tensor(ov.Tensor(np.ones((SIZE, SIZE), np.float32)))
    infer: Callable[[], object] = request.infer
    return infer
