"""What would a user run otherwise? Torch eager and compiled, and the loop of TensorRT's own diffusion demo.

All of them draw by the same calls of the same plan at one width, in bf16 and channels-last: the loop that people write.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.measure.gpu.answers import Images, check_callable
from ddsm_engine.measure.gpu.device_timing import figures
from ddsm_engine.measure.gpu.strategies import Setting, make_plans, uniform
from ddsm_engine.measure.gpu.torch_gpu import DEVICE, cuda_torch, refusing
from ddsm_engine.measure.gpu.work import Row, Work, variant_of
from ddsm_engine.measure.timing import Timing, time_in_turns
from ddsm_engine.plan import Plan

EAGER: Final = "eager"
REDUCED: Final = "torch.compile reduce-overhead"
TUNED: Final = "torch.compile max-autotune"
SYNCHRONISED: Final = "graph per step, synchronised"
"""As TensorRT's demo has it: inputs copied into fixed places, the captured network launched, and the host waits."""

PEERS: Final = (EAGER, REDUCED, SYNCHRONISED, TUNED)
"""In the order in which they are wanted most: the last one's compilation takes minutes."""

WIDTHS: Final = (8, 4, 2)
CALLS: Final = {1: 50, 256: 10}
"""Calls of a timed loop by batch size."""

PRECISION: Final = "bf16"
SECONDS: Final = 2.0
"""Of timing one loop, about."""

Predict = Callable[[Any, Any], Any]
"""(x [B, C, H, W], time features [B, F]) → predicted noise; tensors on the GPU, bf16."""


def measure(work: Work) -> None:
    """Check and time every peer at three widths and two batch sizes.

    Raises:
        BundleError: no bundle of 32x32.
        BackendError: torch sees no GPU.
    """
    cuda_torch()
    bundle = work.bundle(32)
    for peer in PEERS:
        for batch, calls in CALLS.items():
            plans = make_plans(bundle, Setting(size=32, batch=batch, calls=calls, eighths=WIDTHS))
            for eighths in WIDTHS:
                variant, plan = variant_of(bundle, eighths), plans[uniform(eighths)]
                key = {"peer": peer, "batch": batch, "eighths": eighths}
                work.take(key, partial(measure_peer, peer, bundle, variant, batch, plan))


def measure_peer(peer: str, bundle: Bundle, variant: Variant, batch: int, plan: Plan) -> Row:
    """Make a peer ready, let it answer, and time its loop.

    Raises:
        BackendError: it answers something else.
    """
    torch = cuda_torch()
    started = time.perf_counter()
    with refusing(peer), prepared(peer, bundle, variant, batch) as predict, torch.inference_mode():

        def answer(sample: Images, features: Images) -> Images:
            found: Images = predict(*(_move(array) for array in (sample, features))).float().contiguous().cpu().numpy()
            return found

        relative_l2 = check_callable(bundle, variant, answer, batch, PRECISION, peer)
        opened_s = time.perf_counter() - started
        timing = time_in_turns(
            {peer: partial(draw, predict, plan, batch, bundle.manifest.spec.sample_shape)},
            repeats=30, warmup=2, budget_s=SECONDS,
        )[peer]  # fmt: skip
    return {"precision": PRECISION, "relative_l2": relative_l2, "opened_s": opened_s, **figures(per_call(timing, plan))}


def per_call(timing: Timing, plan: Plan) -> Timing:
    """A loop's timing as that of one of its calls."""
    calls = len(plan.variants)
    return Timing(timing.median_ms / calls, timing.p20_ms / calls, timing.p80_ms / calls, timing.repeats)


def draw(predict: Predict, plan: Plan, batch: int, shape: tuple[int, ...]) -> Any:  # noqa: ANN401 - a tensor
    """The loop, with the update of the plan; returns when the images are there."""
    torch = cuda_torch()
    x = torch.randn(batch, *shape, device=DEVICE).mul_(plan.start)
    rows = [_move(features[None]).expand(batch, -1).contiguous() for features in plan.time_features]
    for features, ((of_x, of_eps, _, of_noise),) in zip(rows, plan.update.tolist(), strict=True):
        eps = predict(x.to(torch.bfloat16, memory_format=torch.channels_last), features).float()
        x = of_x * x + of_eps * eps
        if of_noise:
            x = x + of_noise * torch.randn_like(x)
    torch.cuda.synchronize()
    return x


@contextmanager
def prepared(peer: str, bundle: Bundle, variant: Variant, batch: int) -> Iterator[Predict]:
    """A peer, ready to predict; what it compiled is forgotten at the end."""
    torch = cuda_torch()
    network = network_of(bundle, variant)
    try:
        if peer == EAGER:
            yield network
        elif peer == SYNCHRONISED:
            yield captured(network, bundle, variant, batch)
        else:
            mode = peer.removeprefix("torch.compile ")
            compiled = torch.compile(network, mode=mode, fullgraph=True, dynamic=False)

            def predict(x: Any, features: Any) -> Any:  # noqa: ANN401 - tensors
                torch.compiler.cudagraph_mark_step_begin()  # the last answer may be overwritten
                return compiled(x, features)

            yield predict
    finally:
        torch.compiler.reset()
        torch.cuda.empty_cache()


def network_of(bundle: Bundle, variant: Variant) -> Any:  # noqa: ANN401 - a module
    """The static network of a width."""
    from ddsm_engine.backends.torch import cut_network

    torch = cuda_torch()
    network: Any = cut_network(bundle, variant)
    return network.to(DEVICE, torch.bfloat16).to(memory_format=torch.channels_last)


def captured(network: Predict, bundle: Bundle, variant: Variant, batch: int) -> Predict:
    """The network as a graph that is launched and waited for."""
    torch = cuda_torch()
    spec = bundle.spec(variant)
    x = torch.zeros(batch, *spec.sample_shape, device=DEVICE, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    features = torch.zeros(batch, spec.time_features, device=DEVICE, dtype=torch.bfloat16)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.inference_mode():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose their kernels, outside of the capture
                network(x, features)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            eps = network(x, features)

    def predict(own_x: Any, own_features: Any) -> Any:  # noqa: ANN401 - tensors
        x.copy_(own_x)
        features.copy_(own_features)
        graph.replay()
        torch.cuda.current_stream().synchronize()
        return eps

    return predict


def _move(array: Images) -> Any:  # noqa: ANN401 - a tensor
    torch = cuda_torch()
    tensor = torch.from_numpy(array).to(DEVICE, torch.bfloat16)
    return tensor.contiguous(memory_format=torch.channels_last) if array.ndim == 4 else tensor
