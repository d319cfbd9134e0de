"""Is an ONNX file refused that is more than a flat graph with its weights, wherever in it the excess lies?"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from ddsm_engine import onnx_file
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import BundleError
from ddsm_engine.onnx_file import MAX_FIELDS, check_onnx
from tests.hostile.corpus import HOSTILE_BYTES, HOSTILE_MODELS, field, model, outside, varint

MESSAGES = {
    "model": onnx.ModelProto, "graph": onnx.GraphProto, "node": onnx.NodeProto, "attribute": onnx.AttributeProto,
    "tensor": onnx.TensorProto, "value": onnx.ValueInfoProto, "type": onnx.TypeProto,
    "tensor type": onnx.TypeProto.Tensor, "shape": onnx.TensorShapeProto, "dimension": onnx.TensorShapeProto.Dimension,
}  # fmt: skip
HARMFUL = {"TensorProto", "SparseTensorProto", "GraphProto", "FunctionProto", "TrainingInfoProto", "NodeProto"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def holds(descriptor: Any, seen: frozenset[str] = frozenset()) -> bool:
    """Whether a message is, or can hold, one of the harmful ones."""
    if descriptor.name in seen:
        return False
    below = (f.message_type for f in descriptor.fields if f.message_type)
    return descriptor.name in HARMFUL or any(holds(m, seen | {descriptor.name}) for m in below)


@pytest.mark.parametrize("name", MESSAGES)
def test_every_field_that_can_hold_a_weight_or_an_operator_is_looked_into_or_refused(name: str) -> None:
    """By the descriptors of the installed onnx: a field that a later version adds is missed here first."""
    descriptor = MESSAGES[name].DESCRIPTOR
    known = {number for message, number in (*onnx_file._NESTED, *onnx_file._REFUSED) if message == name}
    can_hold = {f.number for f in descriptor.fields if f.message_type and holds(f.message_type)}
    assert can_hold <= known
    # Beyond these: the entries that name a file, and the descriptions of values, for the words in them.
    described = {
        "tensor": {13}, "graph": {11, 12, 13}, "attribute": {14, 15}, "value": {2}, "type": {1, 4, 5, 7, 8, 9},
        "tensor type": {2}, "shape": {1},
    }  # fmt: skip
    assert known - can_hold == described.get(name, set())


def test_every_kind_of_type_but_a_tensor_is_refused() -> None:
    kinds = {f.number for f in onnx.TypeProto.DESCRIPTOR.oneofs_by_name["value"].fields}
    assert {number for message, number in onnx_file._REFUSED if message == "type"} == kinds - {1}


@pytest.mark.parametrize("name", MESSAGES)
def test_every_name_and_word_is_checked(name: str) -> None:
    """Descriptions are read by nobody; bytes of weights are no words."""
    fields = MESSAGES[name].DESCRIPTOR.fields
    checked = {number for message, number in (*onnx_file._TEXTS, *onnx_file._WIRE_TYPES) if message == name}
    texts = {f.number for f in fields if f.cpp_type == f.CPPTYPE_STRING and not f.name.startswith("doc_")}
    unread = {
        "model": {"producer_name", "producer_version", "domain"}, "node": {"overload"},
        "attribute": {"ref_attr_name"}, "tensor": {"raw_data", "string_data"},
    }.get(name, set())  # fmt: skip
    assert texts - checked == {f.number for f in fields if f.name in unread}


def test_the_field_numbers_are_those_of_onnx() -> None:
    def number(message: str, field_name: str) -> tuple[str, int]:
        return message, MESSAGES[message].DESCRIPTOR.fields_by_name[field_name].number

    assert number("node", "op_type") == onnx_file._OP_TYPE
    assert number("node", "domain") == onnx_file._DOMAIN
    assert number("tensor", "data_location") == onnx_file._DATA_LOCATION
    assert number("tensor", "external_data") in onnx_file._REFUSED
    nested = {
        "graph": "GraphProto", "node": "NodeProto", "attribute": "AttributeProto", "tensor": "TensorProto",
        "value": "ValueInfoProto", "type": "TypeProto", "tensor type": "Tensor", "shape": "TensorShapeProto",
        "dimension": "Dimension",
    }  # fmt: skip
    for (message, field_number), inner in onnx_file._NESTED.items():
        assert MESSAGES[message].DESCRIPTOR.fields_by_number[field_number].message_type.name == nested[inner]


def test_exported_variants_pass(bundle: Bundle) -> None:
    for variant in bundle.variants.values():
        check_onnx(bundle.artefact(variant))


def test_a_small_model_of_another_maker_passes(file: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    file.write_bytes(model(initializer=[weight]).SerializeToString())
    check_onnx(file)


@pytest.mark.parametrize("name", HOSTILE_MODELS)
def test_a_model_with_more_than_a_flat_graph_is_refused(file: Path, name: str) -> None:
    file.write_bytes(HOSTILE_MODELS[name]().SerializeToString())
    with pytest.raises(BundleError, match="expected one flat graph of standard operators") as caught:
        check_onnx(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", HOSTILE_BYTES)
def test_bytes_that_are_no_model_are_refused(file: Path, name: str) -> None:
    file.write_bytes(HOSTILE_BYTES[name]())
    with pytest.raises(BundleError):
        check_onnx(file)


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_a_weight_behind_a_link_is_refused_like_any_outside_the_file(
    file: Path, link: Callable[[Path, Path], None]
) -> None:
    (file.parent / "secret").write_bytes(b"\0" * 16)
    link(file.parent / "secret", file.parent / "weights.bin")
    file.write_bytes(model(initializer=[outside("weights.bin")]).SerializeToString())
    with pytest.raises(BundleError, match="a weight outside the file"):
        check_onnx(file)


@pytest.mark.parametrize("cut", [1, 10, 100])
def test_a_truncated_model_is_refused(file: Path, cut: int) -> None:
    file.write_bytes(model().SerializeToString()[:-cut])
    with pytest.raises(BundleError, match="is not a readable ONNX file"):
        check_onnx(file)


def test_a_large_file_costs_no_more_than_a_small_one(file: Path) -> None:
    """The weights are stepped over: 1 GiB of them takes no measurable time."""
    size = 1 << 30
    tensor_head = b"\x08\x01\x10\x01" + b"\x4a" + varint(size)
    graph_head = b"\x2a" + varint(len(tensor_head) + size) + tensor_head
    with file.open("wb") as stream:
        stream.write(b"\x3a" + varint(len(graph_head) + size) + graph_head)
        stream.truncate(stream.tell() + size)
    started = time.perf_counter()
    check_onnx(file)
    assert time.perf_counter() - started < 1


def test_as_many_fields_as_are_looked_at_take_a_bounded_time(file: Path) -> None:
    file.write_bytes(field(7, field(1, b"") * (MAX_FIELDS - 2)))
    check_onnx(file)
    file.write_bytes(field(7, field(1, b"") * MAX_FIELDS))
    with pytest.raises(BundleError, match="more than"):
        check_onnx(file)
