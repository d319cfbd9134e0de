"""Is an ONNX file one flat graph of standard operators with every weight inside it?

That is what our exporter writes, and all that is handed to a backend. The other things that the format can say are
ways to harm: a weight outside the file names a path that may lead anywhere, a loop need not end, a function or a sparse
tensor expands to any size, an operator of another domain is somebody's code.

The file is walked as protobuf's wire format (https://protobuf.dev/programming-guides/encoding); weights are stepped
over, not read. Field numbers are those of onnx.proto.
"""

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

from ddsm_engine.errors import BundleError

MAX_FIELDS = 1 << 18
"""Fields looked at. The widest CIFAR-10 network has 25,000; this many take half a second."""

STANDARD_DOMAINS = (b"", b"ai.onnx")
MAX_NAME = 64
MAX_TEXT = 1024

_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5

_NESTED: Mapping[tuple[str, int], str] = {
    ("model", 7): "graph",
    ("graph", 1): "node",
    ("graph", 5): "tensor",  # initializer
    ("graph", 11): "value",  # input
    ("graph", 12): "value",  # output
    ("graph", 13): "value",  # value_info
    ("value", 2): "type",
    ("type", 1): "tensor type",
    ("tensor type", 2): "shape",
    ("shape", 1): "dimension",
    ("node", 5): "attribute",
    ("attribute", 5): "tensor",  # t
    ("attribute", 10): "tensor",  # tensors
}
"""A message and a field of it → the message that is looked into there."""

_REFUSED: Mapping[tuple[str, int], str] = {
    ("model", 20): "a training graph",
    ("model", 25): "a function",
    ("graph", 15): "a sparse tensor",  # sparse_initializer
    ("attribute", 6): "a graph inside an operator (a loop or a branch)",  # g
    ("attribute", 11): "a graph inside an operator (a loop or a branch)",  # graphs
    ("attribute", 14): "a type inside an operator",  # tp
    ("attribute", 15): "a type inside an operator",  # type_protos
    ("type", 4): "a value that is no tensor",  # sequence_type
    ("type", 5): "a value that is no tensor",  # map_type
    ("type", 7): "a value that is no tensor",  # opaque_type
    ("type", 8): "a value that is no tensor",  # sparse_tensor_type
    ("type", 9): "a value that is no tensor",  # optional_type
    ("attribute", 22): "a sparse tensor",  # sparse_tensor
    ("attribute", 23): "a sparse tensor",  # sparse_tensors
    ("tensor", 13): "a weight outside the file",  # external_data
}
"""A message and a field of it → what that field would bring."""

_OP_TYPE, _DOMAIN, _DATA_LOCATION = ("node", 4), ("node", 7), ("tensor", 14)
_TEXTS = frozenset(
    {
        ("graph", 2), ("node", 1), ("node", 2), ("node", 3), ("value", 1), ("tensor", 8),  # names
        ("attribute", 1), ("attribute", 4), ("attribute", 9),  # name, s, strings
        ("type", 6), ("dimension", 2), ("dimension", 3),  # denotation, dim_param, denotation
    }
)  # fmt: skip
"""What backends quote in their messages; they fail on bytes that are no UTF-8."""
_WIRE_TYPES = {_OP_TYPE: _LEN, _DOMAIN: _LEN, _DATA_LOCATION: _VARINT}


class _NotOnnxError(Exception):
    """Bytes that are no such message."""


def check_onnx(path: Path) -> None:
    """Refuse an ONNX file that is more than one flat graph of standard operators with its weights.

    The file is only mapped. Time and memory are at most those of ``MAX_FIELDS`` fields: half a second, 50 MB.

    Raises:
        BundleError: not an ONNX file, or one that holds any of these other things.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check(data, path)
    except (_NotOnnxError, ValueError) as error:  # an empty file cannot be mapped
        raise BundleError(f"{path} is not a readable ONNX file ({error}); export the bundle again") from error


def _check(data: mmap.mmap, path: Path) -> None:
    graphs, left = 0, MAX_FIELDS
    waiting = [("model", 0, len(data))]
    while waiting:
        message, start, end = waiting.pop()
        graphs += message == "graph"
        for number, wire_type, first, last in _fields(data, start, end):
            left -= 1
            if not left:
                raise _NotOnnxError(f"it has more than {MAX_FIELDS} fields")
            field = (message, number)
            nested = _NESTED.get(field)
            if wire_type != _WIRE_TYPES.get(field, _LEN if nested else wire_type):
                raise _NotOnnxError(f"field {number} of a {message} has wire type {wire_type}")
            if nested:
                waiting.append((nested, first, last))
            elif found := _REFUSED.get(field) or _suspicious(field, data, first, last):
                raise BundleError(f"{path} holds {found}; expected one flat graph of standard operators: do not use it")
    if graphs != 1:
        raise _NotOnnxError(f"it holds {graphs} graphs")


def _suspicious(field: tuple[str, int], data: mmap.mmap, first: int, last: int) -> str | None:
    """What the value of a field brings that a plain network has not, or None."""
    value = data[first : min(last, first + MAX_NAME)]
    if field == _DATA_LOCATION and _varint(data, first, last)[0]:
        return "a weight outside the file"
    if field == _DOMAIN and value not in STANDARD_DOMAINS:
        return f"an operator of the domain {value!r}"
    if field == _OP_TYPE and (last - first >= MAX_NAME or not value.isalnum()):
        return f"an operator of the name {value!r}"
    if field in _TEXTS and (last - first > MAX_TEXT or not _is_text(data[first:last])):
        return f"a name or word that is none ({value!r})"
    return None


def _is_text(value: bytes) -> bool:
    try:
        return value.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _fields(data: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, and where the value begins and ends, of every field of a message."""
    while position < end:
        tag, position = _varint(data, position, end)
        number, wire_type = tag >> 3, tag & 7
        # Readers in C++ keep 32 bits of a tag, so a larger one would be one field to us and another to them.
        if not 0 < number < 1 << 29:
            raise _NotOnnxError(f"it has a field {number}")
        first = position
        if wire_type == _VARINT:
            _, position = _varint(data, position, end)
        elif wire_type == _LEN:
            length, first = _varint(data, position, end)
            position = first + length
        elif wire_type in (_I64, _I32):
            position += 8 if wire_type == _I64 else 4
        else:
            raise _NotOnnxError(f"it has a field of wire type {wire_type}")
        if position > end:
            raise _NotOnnxError("it is truncated")
        yield number, wire_type, first, position


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise _NotOnnxError("it is truncated")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _NotOnnxError("it has a number of more than 10 bytes")
