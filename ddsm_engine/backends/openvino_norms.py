"""Group norms that leave the convolutions' channels-last layout alone.

ONNX spells a group norm as Reshape [B, groups, C/groups * H * W] → MVN → Reshape. The reshape needs planar channels,
the convolutions compute channels-last, and OpenVINO copies every norm's input and output from one layout to the other,
which takes a fifth of the 2/8 network's time. Here the same norm is two reductions over the pixels and one multiply-add
per element, none of which minds the layout.

The mean is taken off before squares are summed: E[x²] - E[x]² saves a pass, and loses all digits of the variance of
channels whose mean is much larger than their spread.
"""

from dataclasses import dataclass

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops
from openvino.passes import ConstantFolding, Manager

Affine = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _GroupNorm:
    """A group norm as found in a graph: ``output`` = group_norm(``x`` [B, C, H, W]) * scale + shift.

    Attributes:
        x: What is normalised.
        output: What the rest of the graph reads.
        groups: Number of groups.
        epsilon: Added to the variance.
        scale: [C].
        shift: [C].
    """

    x: ov.Output
    output: ov.Output
    groups: int
    epsilon: float
    scale: Affine
    shift: Affine


def channels_last_norms(network: ov.Model) -> int:
    """Rewrite every group norm of a network whose shapes are all static, in place; another graph is left as it is.

    Returns:
        How many were rewritten.
    """
    folding = Manager()
    folding.register_pass(ConstantFolding())
    folding.run_passes(network)
    found = [norm for node in network.get_ordered_ops() if (norm := _match(node)) is not None]
    for norm in found:
        norm.output.replace(_rewritten(norm))
    network.validate_nodes_and_infer_types()
    return len(found)


def _match(mvn: ov.Node) -> _GroupNorm | None:
    """Read Reshape → MVN → (Multiply, Add)* → Reshape → (Multiply, Add)*; None for anything else."""
    if mvn.get_type_name() != "MVN" or _producer(mvn).get_type_name() != "Reshape":
        return None
    attributes, axes = mvn.get_attributes(), _constant(mvn.input(1))
    x = _producer(mvn).input(0).get_source_output()
    shape, grouped = list(x.get_shape()), list(mvn.get_output_shape(0))
    if len(shape) != 4 or len(grouped) != 3 or shape[:1] != grouped[:1] or shape[1] % grouped[1]:
        return None
    inside = attributes["normalize_variance"] and attributes["eps_mode"].lower() == "inside_sqrt"
    if axes is None or axes.ravel().tolist() not in ([2], [-1]) or not inside or x.get_element_type() != ov.Type.f32:
        return None
    channels, groups = shape[1], grouped[1]
    scale, shift = np.ones(channels), np.zeros(channels)
    node, is_whole = mvn, False
    while (following := _only_consumer(node)) is not None:
        kind = following.get_type_name()
        if kind == "Reshape" and list(following.get_output_shape(0)) == shape and not is_whole:
            is_whole = True
        elif kind in ("Multiply", "Add"):
            factor = _per_channel(following, node, channels, channels if is_whole else groups)
            if factor is None:
                break
            scale, shift = (scale * factor, shift * factor) if kind == "Multiply" else (scale, shift + factor)
        else:
            break
        node = following
    if not is_whole:
        return None
    return _GroupNorm(x, node.output(0), groups, attributes["eps"], scale.astype(np.float32), shift.astype(np.float32))


def _rewritten(norm: _GroupNorm) -> ov.Output:
    """The norm by reductions: over the pixels of every channel, then over the few channels of a group."""
    batch, channels, *_ = norm.x.get_shape()
    grouped = [batch, norm.groups, channels // norm.groups]

    def mean_of_groups(x: ov.Node) -> ov.Node:
        """[B, C, H, W] → [B, groups, 1]."""
        of_channels = ops.reduce_mean(x, np.array([2, 3]), keep_dims=False)
        return ops.reduce_mean(_reshape(of_channels, grouped), np.array([2]), keep_dims=True)

    def per_channel(x: ov.Node) -> ov.Node:
        """[B, groups, C/groups] → [B, C, 1, 1]."""
        return _reshape(x, [batch, channels, 1, 1])

    spread = np.zeros((1, *grouped[1:]), np.float32)  # adding it repeats a group's value for its channels
    centred = ops.subtract(norm.x, per_channel(ops.add(mean_of_groups(norm.x), spread)))
    variance = mean_of_groups(ops.multiply(centred, centred))
    inverse = ops.power(ops.add(variance, np.float32(norm.epsilon)), np.float32(-0.5))
    scaled = ops.multiply(centred, per_channel(ops.multiply(inverse, norm.scale.reshape(1, *grouped[1:]))))
    return ops.add(scaled, norm.shift.reshape(1, channels, 1, 1)).output(0)


def _reshape(x: ov.Node, shape: list[int]) -> ov.Node:
    return ops.reshape(x, np.array(shape), special_zero=False)


def _producer(node: ov.Node) -> ov.Node:
    return node.input(0).get_source_output().get_node()


def _constant(port: ov.Input) -> NDArray[np.float64] | None:
    node = port.get_source_output().get_node()
    return np.asarray(node.get_data()) if node.get_type_name() == "Constant" else None


def _only_consumer(node: ov.Node) -> ov.Node | None:
    targets = list(node.output(0).get_target_inputs())
    return targets[0].get_node() if len(targets) == 1 else None


def _per_channel(node: ov.Node, data: ov.Node, channels: int, length: int) -> NDArray[np.float64] | None:
    """The other operand of a product or sum, [C], if it is a constant along axis 1 alone."""
    others = [port for port in node.inputs() if port.get_source_output().get_node() != data]
    value = _constant(others[0]) if len(others) == 1 else None
    if value is None:
        return None
    rank = len(data.get_output_shape(0))
    shape = [1] * (rank - value.ndim) + list(value.shape)
    if (
        value.ndim > rank
        or any(size != 1 for axis, size in enumerate(shape) if axis != 1)
        or shape[1] not in (1, length)
    ):
        return None
    return np.repeat(np.broadcast_to(value.astype(np.float64).ravel(), (length,)), channels // length)
