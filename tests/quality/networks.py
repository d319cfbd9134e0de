"""Small feature networks, and images, for the tests of metrics."""

from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from ddsm_engine.quality import Images

SHAPE = (3, 8, 8)


def noise(count: int, shape: tuple[int, ...] = SHAPE, seed: int = 0, bright: float = 0.0) -> Images:
    """Uniform pixels in [-1, 1], lifted."""
    images = np.random.default_rng(seed).uniform(-1, 1, (count, *shape))
    return np.clip(images + bright, -1, 1).astype(np.float32)


def weights(features: int = 5, pixels: int = 3 * 8 * 8) -> NDArray[np.float32]:
    return np.random.default_rng(9).standard_normal((pixels, features)).astype(np.float32)


def onnx_network(
    path: Path,
    matrix: NDArray[np.float32],
    *,
    shape: tuple[int, ...] = SHAPE,
    batch: str | int = "batch",
    axis: int = 1,
) -> Path:
    """Flatten and multiply."""
    nodes = [helper.make_node("Flatten", ["x"], ["flat"], axis=axis), helper.make_node("MatMul", ["flat", "w"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "features",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(matrix, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def torchscript_network(path: Path, network: nn.Module, example: torch.Tensor | None = None) -> Path:
    with torch.no_grad():
        traced = torch.jit.trace(network.eval(), torch.zeros(2, *SHAPE) if example is None else example)  # type: ignore[no-untyped-call]
    traced.save(str(path))
    return path
