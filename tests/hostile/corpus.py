"""Broken and malicious files, each with the command that must refuse it with one line.

``CASES`` is the corpus. A case writes its file into an empty folder and says with which arguments the command is
called; ``memory`` marks those that announce far more than they hold.
"""

import codecs
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import save_file

from ddsm_engine.bundle import MANIFEST, TIME_TABLE, WEIGHTS
from tests.conftest import STATE

Command = Literal["inspect", "run", "export", "train"]
Put = Callable[[Path], object]
Build = Callable[[Path, Path], list[object]]
"""(empty folder, an unbroken bundle) → the command's arguments."""

CANARY = "executed"
"""A file of this name in the working folder means that code of a file was run."""


@dataclass(frozen=True, slots=True)
class Case:
    """One hostile input."""

    name: str
    command: Command
    build: Build
    memory: bool = False


CASES: list[Case] = []
SOUND: list[Case] = []
"""The same commands on unbroken files: they must succeed, or the refusals prove nothing."""


def case(name: str, command: Command, build: Build, *, memory: bool = False) -> None:
    CASES.append(Case(name, command, build, memory))


def holding(make: Callable[[], bytes] | bytes) -> Put:
    """Write a file of these bytes."""

    def put(path: Path) -> None:
        path.write_bytes(make if isinstance(make, bytes) else make())

    return put


def in_new_folder(put: Put, name: str) -> Put:
    def make(path: Path) -> None:
        path.mkdir()
        put(path / name)

    return make


# --- manifests --------------------------------------------------------------------------------------------------------

Edit = Callable[[dict[str, Any]], object]


def own_bundle(folder: Path, bundle: Path) -> Path:
    """A bundle of one variant that a case may spoil; large files are links, replaced and never written to."""
    own = folder / "own.bundle"
    shutil.copytree(bundle, own, copy_function=os.link)
    (own / MANIFEST).unlink()
    data = json.loads((bundle / MANIFEST).read_bytes())
    data["variants"] = data["variants"][:1]
    seal(own, data)
    return own


def seal(own: Path, data: dict[str, Any]) -> None:
    """Write a manifest with the checksum that it needs, as anybody can."""
    data.pop("checksum", None)
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    data["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    (own / MANIFEST).write_text(json.dumps(data), encoding="utf-8")


def resealed(edit: Edit) -> Build:
    def build(folder: Path, bundle: Path) -> list[object]:
        own = own_bundle(folder, bundle)
        data = json.loads((own / MANIFEST).read_bytes())
        edit(data)
        seal(own, data)
        return [own]

    return build


def rewritten(change: Callable[[bytes], bytes]) -> Build:
    def build(folder: Path, bundle: Path) -> list[object]:
        own = own_bundle(folder, bundle)
        (own / MANIFEST).write_bytes(change((own / MANIFEST).read_bytes()))
        return [own]

    return build


def first(data: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = data["variants"][0]
    return entry


def twice(data: dict[str, Any]) -> None:
    data["variants"].append(dict(first(data)))


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


EDITS: dict[str, Edit] = {
    "image-of-4-gigapixels": lambda d: (d["spec"].update(image_size=65536), d.update(image_shape=[3, 65536, 65536])),
    "time-table-of-16-gigabytes": lambda d: (
        d["spec"].update(time_features=65536, timesteps=65536), d["noise_schedule"].update(timesteps=65536)
    ),
    "network-of-petabytes": lambda d: d["spec"].update(base_channels=65536, channel_mults=[64, 64]),
    "blocks-without-end": lambda d: d["spec"].update(num_res_blocks=65536),
    "levels-without-end": lambda d: d["spec"].update(channel_mults=[1] * 100_000, attention_levels=[]),
    "attention-of-terabytes": lambda d: (
        d["spec"].update(image_size=2048, attention_levels=[0]), d.update(image_shape=[3, 2048, 2048])
    ),
    "image-shape-of-another-network": lambda d: d.update(image_shape=[3, 16, 16]),
    "schedule-of-other-length": lambda d: d["noise_schedule"].update(timesteps=999),
    "betas-too-small-to-divide-by": lambda d: d["noise_schedule"].update(beta_start=1e-300),
    "betas-that-leave-nothing": lambda d: d["noise_schedule"].update(beta_start=0.9, beta_end=0.99),
    "beta-of-400-digits": lambda d: d["noise_schedule"].update(beta_end=10**400),
    "beta-of-400-digits-below-zero": lambda d: d["noise_schedule"].update(beta_start=-(10**400)),
    "input-of-another-name": lambda d: first(d)["inputs"][0].update(name="../sample"),
    "input-of-another-shape": lambda d: first(d)["inputs"][0].update(shape=["batch", 3, 8, 9]),
    "input-without-batch": lambda d: first(d)["inputs"][1].update(shape=[1 << 30, 32]),
    "input-of-another-type": lambda d: first(d)["inputs"][0].update(dtype="object"),
    "input-missing": lambda d: first(d)["inputs"].pop(),
    "input-too-many": lambda d: first(d)["inputs"].append(first(d)["inputs"][0]),
    "output-of-another-shape": lambda d: first(d)["outputs"][0].update(shape=["batch", 4, 8, 8]),
    "output-missing": lambda d: first(d).update(outputs=[]),
    "id-twice": twice,
    "id-with-terminal-codes": lambda d: first(d).update(id="\x1b[2Jw008"),
    "id-that-no-terminal-can-print": lambda d: first(d).update(id="\ud800"),
    "id-of-a-megabyte": lambda d: first(d).update(id="w" * 1_000_000),
    "id-that-is-a-path": lambda d: first(d).update(id="../w008"),
    "role-unknown": lambda d: first(d).update(role="trojan"),
    "width-not-of-the-network": lambda d: first(d).update(width=9, width_mult=9 / 32),
    "width-of-10-to-the-30": lambda d: first(d).update(width=10**30),
    "width-share-of-another": lambda d: first(d).update(width_mult=1.0),
    "macs-zero": lambda d: first(d).update(macs=0),
    "macs-negative": lambda d: first(d).update(conv_linear_macs=-1),
    "macs-of-4000-digits": lambda d: first(d).update(macs=10**4000),
    "params-negative": lambda d: first(d).update(params=-5),
    "parity-negative": lambda d: first(d)["parity"].update(relative_l2=-1.0),
    "size-negative": lambda d: first(d).update(size_bytes=-1),
    "size-of-exabytes": lambda d: first(d).update(size_bytes=1 << 60),
    "hash-that-is-none": lambda d: first(d).update(sha256="../../etc/passwd"),
    "path-upwards": lambda d: first(d).update(file="variants/../../../etc/model.onnx"),
    "path-absolute": lambda d: first(d).update(file="/etc/model.onnx"),
    "path-with-backslashes": lambda d: first(d).update(file="..\\..\\model.onnx"),
    "path-with-nul": lambda d: first(d).update(file="variants/w008/model.onnx\x00.onnx"),
    "path-with-a-new-line": lambda d: first(d).update(file="variants/w008/\nerror: fine.onnx"),
    "path-of-a-megabyte": lambda d: first(d).update(file="a/" * 500_000 + "model.onnx"),
    "path-of-another-format": lambda d: first(d).update(file="variants/w008/model.ort"),
    "path-empty": lambda d: d["files"][0].update(path=""),
    "path-of-a-file-upwards": lambda d: d["files"][0].update(path="../weights.safetensors"),
    "file-twice": lambda d: d["files"].append(dict(d["files"][0])),
    "version-of-a-megabyte": lambda d: d.update(format_version="1" * 1_000_000),
    "version-that-is-true": lambda d: d.update(format_version=True),
    "family-of-a-megabyte": lambda d: d.update(family="x" * 1_000_000),
    "unknown-fields-by-thousands": lambda d: d["spec"].update({f"f{i}": i for i in range(20_000)}),
    "provenance-no-object": lambda d: d.update(provenance=[1]),
    "provenance-nested": lambda d: d.update(provenance={"a": nested(400)}),
    "variants-an-object": lambda d: d.update(variants={"a": 1}),
    "variants-by-thousands": lambda d: d.update(variants=[first(d) | {"id": f"v{i}"} for i in range(3000)]),
}  # fmt: skip
for name, edit in EDITS.items():
    case(f"manifest-{name}", "inspect", resealed(edit))


def replaced(text: str, by: str) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        assert text.encode() in data
        return data.replace(text.encode(), by.encode(), 1)

    return change


for name, change in {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "bytes": lambda data: bytes(range(256)) * 9,
    "with-a-mark": lambda data: codecs.BOM_UTF8 + data,
    "in-utf-16": lambda data: data.decode().encode("utf-16"),
    "in-utf-32": lambda data: data.decode().encode("utf-32"),
    "with-nan": replaced('"dropout": 0.0', '"dropout": NaN'),
    "with-infinity": replaced('"dropout": 0.0', '"dropout": 1e999'),
    "with-a-key-twice": replaced('"dropout": 0.0', '"dropout": 0.0, "dropout": 0.1'),
    "with-a-number-of-a-megabyte": replaced('"dropout": 0.0', '"dropout": ' + "9" * 1_000_000),
    "changed-without-a-new-checksum": replaced('"dropout": 0.0', '"dropout": 0.5'),
    "of-unclosed-lists": lambda data: b"[" * 1_000_000,
    "of-a-million-objects": lambda data: b'{"a":' * 500_000,
}.items():
    case(f"manifest-{name}", "inspect", rewritten(change))


def manifest_that_is(make: Put) -> Build:
    def build(folder: Path, bundle: Path) -> list[object]:
        own = own_bundle(folder, bundle)
        (own / MANIFEST).unlink()
        make(own / MANIFEST)
        return [own]

    return build


def sparse(path: Path, size: int, start: bytes = b"") -> Path:
    """A file that has a size and takes no space."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
    return path


case("manifest-that-is-a-folder", "inspect", manifest_that_is(Path.mkdir))
case("manifest-that-is-a-pipe", "inspect", manifest_that_is(os.mkfifo))
case("manifest-that-is-a-device", "inspect", manifest_that_is(lambda path: path.symlink_to("/dev/zero")))
case("manifest-that-is-its-own-link", "inspect", manifest_that_is(lambda path: path.symlink_to(path)))
case("manifest-of-a-terabyte", "inspect", manifest_that_is(lambda path: sparse(path, 1 << 40)), memory=True)


# --- files of a bundle ------------------------------------------------------------------------------------------------


def with_file(relative: str, put: Put) -> Callable[[Path, Path], Path]:
    """A bundle with another file in it, for which its resealed manifest vouches where it can."""

    def build(folder: Path, bundle: Path) -> Path:
        own = own_bundle(folder, bundle)
        file = own / relative
        file.unlink()
        put(file)
        data = json.loads((own / MANIFEST).read_bytes())
        for entry in (*data["variants"], *data["files"]):
            if relative == entry.get("file", entry.get("path")) and file.is_file() and file.stat().st_size < 1 << 28:
                content = file.read_bytes()
                entry.update(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        seal(own, data)
        return own

    return build


def draw(own: Path, backend: str) -> list[object]:
    return [
        "--bundle", own, "--strategy", "uniform:2/8", "--sampler", "ddim", "--steps", 2, "--num-images", 1,
        "--batch-size", 1, "--backend", backend, "--threads", 1, "-o", own.parent / "images.png",
    ]  # fmt: skip


def file_case(name: str, relative: str, put: Put, backend: str = "", **options: bool) -> None:
    own = with_file(relative, put)
    if backend:
        case(name, "run", lambda folder, bundle: draw(own(folder, bundle), backend), **options)
    else:
        case(name, "inspect", lambda folder, bundle: [own(folder, bundle)], **options)


ARTEFACT = "variants/w008/model.onnx"


def linked_folder(folder: Path, bundle: Path) -> list[object]:
    own = own_bundle(folder, bundle)
    os.replace(own / "variants", folder / "elsewhere")
    (own / "variants").symlink_to(folder / "elsewhere")
    return [own]


def strategy_of_a_strange_name(folder: Path, bundle: Path) -> list[object]:
    own = own_bundle(folder, bundle)
    (own / "strategies" / "\x1b]0;title\x07.yaml").write_text("format: ddsm-strategy\n")
    return [own]


def strategy_link(folder: Path, bundle: Path) -> list[object]:
    own = own_bundle(folder, bundle)
    (folder / "secret").write_text("password: 1234")
    (own / "strategies" / "mine.yaml").symlink_to(folder / "secret")
    arguments = draw(own, "torch")
    arguments[3] = "mine"
    return arguments


case("bundle-with-a-linked-folder", "inspect", linked_folder)
case("bundle-with-a-strategy-of-terminal-codes", "inspect", strategy_of_a_strange_name)
case("bundle-with-a-strategy-linked-outside", "run", strategy_link)
file_case("artefact-linked-outside", ARTEFACT, lambda path: path.symlink_to("/etc/hostname"))
file_case("artefact-that-is-a-pipe", ARTEFACT, os.mkfifo)
file_case("artefact-that-is-a-device", ARTEFACT, lambda path: path.symlink_to("/dev/zero"))
file_case("artefact-of-a-terabyte", ARTEFACT, lambda path: sparse(path, 1 << 40), memory=True)
file_case("artefact-damaged", ARTEFACT, lambda path: sparse(path, 1 << 29))


# --- ONNX -------------------------------------------------------------------------------------------------------------


def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def model(*, output: tuple[int | str, ...] = ("batch", 3, 8, 8), **changes: Any) -> onnx.ModelProto:
    """A denoiser that returns its input; ``changes`` are further parts of the graph."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["sample"], ["out_sample"]), *changes.pop("nodes", [])],
        "g",
        [value("sample", "batch", 3, 8, 8), value("time_features", "batch", 32)],
        [value("out_sample", *output)],
        changes.pop("initializer", []),
        sparse_initializer=changes.pop("sparse_initializer", []),
    )
    graph.value_info.extend(filter(None, [changes.pop("described", None)]))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("custom", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, **changes)


def outside(location: str) -> onnx.TensorProto:
    """A weight whose bytes lie in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def sparse_tensor() -> onnx.SparseTensorProto:
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    return helper.make_sparse_tensor(values, helper.make_tensor("i", TensorProto.INT64, [1], [0]), [1 << 40])


def body(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph([*nodes, helper.make_node("Identity", ["c"], ["d"])], "body", [], [])


def silent_external() -> onnx.TensorProto:
    """Marked as external, without saying where."""
    return TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)


def constant(**attributes: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], **attributes)


def training_model() -> onnx.ModelProto:
    """A network that brings a graph for training."""
    made = model()
    made.training_info.add(initialization=body())
    return made


HOSTILE_MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "weight-upwards": lambda: model(initializer=[outside("../../../../etc/passwd")]),
    "weight-absolute": lambda: model(initializer=[outside("/etc/passwd")]),
    "weight-beside": lambda: model(initializer=[outside("weights.bin")]),
    "weight-marked-as-outside": lambda: model(initializer=[silent_external()]),
    "weight-outside-in-a-constant": lambda: model(nodes=[constant(value=outside("../../secret"))]),
    "weights-outside-in-a-list": lambda: model(
        nodes=[helper.make_node("Identity", ["sample"], ["c"], ts=[outside("s")])]
    ),
    "weight-outside-in-a-branch": lambda: model(
        nodes=[helper.make_node("If", ["sample"], ["c"], then_branch=body(constant(value=outside("../s"))))]
    ),
    "weight-outside-in-a-function": lambda: model(
        functions=[
            helper.make_function(
                "custom", "F", [], ["c"], [constant(value=outside("../s"))], [helper.make_opsetid("", 18)]
            )
        ]
    ),
    "weight-outside-in-a-sparse-tensor": lambda: model(
        sparse_initializer=[onnx.SparseTensorProto(values=outside("../s"), dims=[4])]
    ),
    "sparse-tensor-of-terabytes": lambda: model(sparse_initializer=[sparse_tensor()]),
    "sparse-attribute-of-terabytes": lambda: model(nodes=[constant(sparse_value=sparse_tensor())]),
    "loop-without-end": lambda: model(nodes=[helper.make_node("Loop", ["", ""], ["c"], body=body())]),
    "scan": lambda: model(nodes=[helper.make_node("Scan", ["sample"], ["c"], body=body(), num_scan_inputs=1)]),
    "graphs-in-a-list": lambda: model(nodes=[helper.make_node("Identity", ["sample"], ["c"], gs=[body(), body()])]),
    "operator-of-another-domain": lambda: model(nodes=[helper.make_node("Run", ["sample"], ["c"], domain="custom")]),
    "operator-of-a-megabyte": lambda: model(nodes=[helper.make_node("A" * 1_000_000, ["sample"], ["c"])]),
    "operator-of-terminal-codes": lambda: model(nodes=[helper.make_node("\x1b[2J", ["sample"], ["c"])]),
    "training-graph": training_model,
    "name-of-a-megabyte": lambda: model(nodes=[helper.make_node("Neg", ["sample"], ["x" * 1_000_000])]),
    "name-of-terminal-codes": lambda: model(nodes=[helper.make_node("Neg", ["sample"], ["\x1b[2J"])]),
    "dimension-of-terminal-codes": lambda: model(output=("\x1b[2J", 3, 8, 8)),
    "value-that-is-a-sequence": lambda: model(described=helper.make_tensor_sequence_value_info("s", 1, ["n"])),
    "type-in-an-operator": lambda: model(
        nodes=[helper.make_node("Optional", [], ["c"], type=helper.make_tensor_type_proto(1, [1]))]
    ),
}


def serialised(make: Callable[[], onnx.ModelProto]) -> Callable[[], bytes]:
    return lambda: bytes(make().SerializeToString())


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, content: bytes) -> bytes:
    """A field of a message with a content of so many bytes."""
    return varint(number << 3 | 2) + varint(len(content)) + content


HOSTILE_BYTES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"<net name='ir' version='11'/>",
    "truncated": lambda: model().SerializeToString()[:-7],
    "without-a-graph": lambda: b"\x08\x09",
    "of-two-graphs": lambda: model().SerializeToString() * 2,
    "that-claims-exabytes": lambda: b"\x3a" + varint(1 << 62),
    "of-an-endless-number": lambda: b"\x08" + b"\xff" * 4096,
    "of-a-name-of-bytes": lambda: (
        model(nodes=[helper.make_node("Neg", ["sample"], ["@@@"])]).SerializeToString().replace(b"@@@", b"\xff\xfe@")
    ),
    "of-a-dimension-of-bytes": lambda: model(output=("@@@", 3, 8, 8)).SerializeToString().replace(b"@@@", b"\xff\xfe@"),
    "of-groups": lambda: b"\x0b" * 100_000,
    "of-a-field-beyond-32-bits": lambda: model().SerializeToString() + varint(1 << 32 | 20 << 3 | 2) + b"\0",
    "of-a-million-fields": lambda: field(7, field(1, b"") * 1_000_000),
    "of-nested-messages": lambda: field(7, field(1, field(5, field(6, field(1, field(5, field(6, b""))))))),
    "of-a-graph-that-is-a-number": lambda: model().SerializeToString() + b"\x38\x01",
}

for name, make_model in HOSTILE_MODELS.items():
    file_case(f"onnx-{name}", ARTEFACT, holding(serialised(make_model)))
for name, make_bytes in HOSTILE_BYTES.items():
    file_case(f"onnx-{name}", ARTEFACT, holding(make_bytes))


def smaller(name: str) -> onnx.ModelProto:
    """A network whose output is not the one that the manifest states."""
    made = model(output={"smaller": ("batch", 3, 4, 4), "of-fewer-axes": ("batch", 3)}[name])
    constants = {"starts": [0, 0], "ends": [4, 4], "axes": [2, 3]}
    made.graph.initializer.extend(helper.make_tensor(n, TensorProto.INT64, [2], v) for n, v in constants.items())
    del made.graph.node[:]
    if name == "smaller":
        made.graph.node.append(helper.make_node("Slice", ["sample", *constants], ["out_sample"]))
    else:
        made.graph.node.append(helper.make_node("ReduceSum", ["sample", "axes"], ["out_sample"], keepdims=0))
    return made


for backend in ("onnxruntime", "openvino"):
    for name in ("smaller", "of-fewer-axes"):
        content = smaller(name).SerializeToString()
        file_case(f"onnx-whose-output-is-{name}-{backend}", ARTEFACT, holding(content), backend)


# --- strategies -------------------------------------------------------------------------------------------------------

HEAD = "format: ddsm-strategy\nformat_version: 1\nlength: 2\n"
SEGMENTS = "segments: [{first: 0, last: 1, width_mult: 1.0}]\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)

STRATEGIES: dict[str, str | bytes] = {
    "yaml-bomb": BOMB,
    "python-object": f"!!python/object/apply:os.system ['touch {CANARY}']",
    "python-module": "a: !!python/module:os",
    "call-in-a-list": f"[__import__('os').system('touch {CANARY}')]",
    "comprehension": "[1 for _ in iter(int, 1)]",
    "power": "[9**9**9]",
    "tagged-number": HEAD + "segments: !!int '" + ":".join(["1"] * 1000) + "'",
    "sexagesimal-number": HEAD + "segments: 1" + ":59" * 80_000,
    "number-of-5000-hexadecimals": HEAD + "segments: [{first: 0x" + "f" * 5000 + ", last: 1, width_mult: 1.0}]",
    "number-of-4000-digits": HEAD + "segments: [{first: 0, last: " + "9" * 4000 + ", width_mult: 1.0}]",
    "list-with-a-number-of-4000-digits": "[" + "9" * 4000 + "]",
    "list-with-a-number-of-a-megabyte": "[" + "9" * 1_000_000 + "]",
    "list-with-infinity": "[1, 1e999]",
    "list-of-a-million": "[" + "1," * 1_000_000 + "1]",
    "list-with-a-word-of-a-megabyte": '["' + "a" * 1_000_000 + '"]',
    "lists-in-lists": "[" * 3_000_000,
    "mappings-in-mappings": "{a: " * 50_000,
    "keys-in-keys": "? " * 100_000,
    "key-twice": HEAD + "length: 2\n" + SEGMENTS,
    "key-that-is-a-list": HEAD + "? [1, 2]\n: 3\n" + SEGMENTS,
    "merge-key": HEAD + "<<: {length: 3}\n" + SEGMENTS,
    "date-that-is-none": HEAD + SEGMENTS + "provenance: !!timestamp 2026-99-99",
    "megabytes-of-yaml": HEAD + SEGMENTS + "provenance: {a: [" + "a, " * 700_000 + "]}",
    "false-for-zero": HEAD + SEGMENTS.replace("first: 0", "first: false"),
    "length-of-the-universe": HEAD.replace("length: 2", "length: 999999999999999999") + SEGMENTS,
    "segment-of-the-universe": HEAD + "segments: [{first: 0, last: 99999999999, width_mult: 1.0}]",
    "variant-of-a-megabyte": HEAD + "segments: [{first: 0, last: 1, variant: " + "w" * 200_000 + "}]",
    "variant-of-terminal-codes": HEAD + 'segments: [{first: 0, last: 1, variant: "\\e[2J"}]',
    "fields-by-thousands": HEAD + SEGMENTS + "".join(f"f{i}: 1\n" for i in range(5000)),
    "sampler-that-is-a-list": HEAD + SEGMENTS + "axis: call\nsampler: [1]\nsteps: 2\n",
    "nul": b"\0" * 4096,
    "utf-16": HEAD.encode("utf-16"),
    "binary": bytes(range(256)),
    "unclosed-quote": HEAD + "segments: '" + "x" * 100_000,
    "many-documents": "---\n" * 50_000,
}
for name, text in STRATEGIES.items():

    def written(folder: Path, bundle: Path, text: str | bytes = text) -> list[object]:
        (folder / "s.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return [folder / "s.yaml"]

    case(f"strategy-{name}", "inspect", written)


def special(name: str, make: Put) -> Build:
    def build(folder: Path, bundle: Path) -> list[object]:
        make(folder / name)
        return [folder / name]

    return build


case("strategy-that-is-a-pipe", "inspect", special("s.yaml", os.mkfifo))
case("strategy-that-is-a-device", "inspect", special("s.yaml", lambda path: path.symlink_to("/dev/zero")), memory=True)
case("strategy-of-a-terabyte", "inspect", special("s.yaml", lambda path: sparse(path, 1 << 40)), memory=True)
case("strategy-that-is-its-own-link", "inspect", special("s.yaml", lambda path: path.symlink_to(path)))


# --- checkpoints ------------------------------------------------------------------------------------------------------

FACTS: list[object] = [
    "--groups", 4, "--image-size", 8, "--beta-1", "1e-4", "--beta-T", "0.02", "--var-type", "fixedlarge",
    "--conv-multiple", 4, "--linear-multiple", 4,
]  # fmt: skip


class Calls:
    """Unpickled by an ordinary unpickler, this calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def saved(content: object, *, archive: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=archive)
    return buffer.getvalue()


def checkpoint(make: Put, *options: object) -> Build:
    def build(folder: Path, bundle: Path) -> list[object]:
        make(folder / "ckpt.pt")
        return [folder / "ckpt.pt", "-o", folder / "out.bundle", *FACTS, *options]

    return build


def state(**changes: object) -> dict[str, object]:
    return {"ema_model": OrderedDict(STATE) | changes, "step": 1}


def archive_with(pickled: bytes) -> bytes:
    """A checkpoint of torch with another pickle in it."""
    source, new = zipfile.ZipFile(io.BytesIO(saved(state()))), io.BytesIO()
    with zipfile.ZipFile(new, "w") as target:
        for item in source.infolist():
            content = pickled if item.filename.endswith("data.pkl") else source.read(item)
            target.writestr(item.filename, content)
    return new.getvalue()


def named(name: str, argument: bytes) -> bytes:
    """A pickle that calls ``name`` with one argument."""
    module, _, function = name.rpartition(".")
    return b"\x80\x02c" + f"{module}\n{function}\n".encode() + argument + b"\x85R."


def tuples_of_tuples(depth: int) -> bytes:
    """A dict whose key is a tuple of twice the same tuple of twice … : its hash takes 2^depth steps."""
    key = b")" + b"".join(b"q\x01" + b"h\x01" + b"\x86" for _ in range(depth))
    return b"\x80\x02}" + key + b"Ns."


def encoding_of_encodings(times: int) -> bytes:
    """Each encoding doubles the bytes."""
    start = b"X\x10\x00\x00\x00" + b"a" * 16
    calls = b"c_codecs\nencode\nq\x01" + start + b"X\x06\x00\x00\x00latin1\x86R"
    for _ in range(times):
        calls += b"q\x02h\x01h\x02X\x09\x00\x00\x00hex_codec\x86R"
    return b"\x80\x02" + calls + b"."


def colliding_numbers(count: int) -> bytes:
    """Keys with one hash: filling the dict takes quadratic time."""
    prime, out = (1 << 61) - 1, b""
    for i in range(count):
        number = (prime * (i + 1)).to_bytes(12, "little", signed=True)
        out += b"\x8a\x0c" + number + b"N"
    return b"\x80\x02}(" + out + b"u."


def tensor_pickle(
    numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, *, old: bool = False
) -> bytes:
    """``{"head.weight": tensor}``, with any claims about its storage."""

    def whole(n: int) -> bytes:
        data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data

    def word(text: str) -> bytes:
        return b"X" + struct.pack("<I", len(text)) + text.encode()

    storage = b"(" + word("storage") + b"ctorch\nFloatStorage\n" + word("0") + word("cpu") + whole(numel)
    storage += b"NtQ" if old else b"tQ"  # the old format names a view, too
    sizes = b"".join(b"(" + b"".join(map(whole, numbers)) + b"t" for numbers in (size, stride))
    rebuilt = b"(" + storage + whole(offset) + sizes + b"\x89" + b"ccollections\nOrderedDict\n)Rt"
    return b"\x80\x02}" + word("head.weight") + b"ctorch._utils\n_rebuild_tensor_v2\n" + rebuilt + b"Rs."


def old_with(pickled: bytes) -> bytes:
    """A checkpoint in torch's old format with this pickle as its content."""
    magic, version = pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)
    system = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
    return magic + version + system + pickled + pickle.dumps(["0"], 2) + b"\0" * 64


def rezipped(compression: int, extra: dict[str, bytes] | None = None) -> bytes:
    source, new = zipfile.ZipFile(io.BytesIO(saved(state()))), io.BytesIO()
    with zipfile.ZipFile(new, "w", compression) as target:
        for item in source.infolist():
            target.writestr(item.filename, source.read(item))
        for filename, content in (extra or {}).items():
            target.writestr(filename, content)
    return new.getvalue()


TOUCH = f"touch {CANARY}"
WRITES = f"open({CANARY!r}, 'w')"

CHECKPOINTS: dict[str, Callable[[], bytes]] = {
    "calls-os-system": lambda: saved(state() | {"step": Calls(os.system, TOUCH)}),
    "calls-os-system-old": lambda: saved(state() | {"step": Calls(os.system, TOUCH)}, archive=False),
    "calls-eval": lambda: saved({"ema_model": Calls(eval, WRITES)}),
    "calls-exec-as-a-key": lambda: saved({"ema_model": {Calls(exec, WRITES): 1}}),
    "calls-code-in-a-list": lambda: saved({"optim": [[[Calls(os.system, TOUCH)]]], **state()}),
    "calls-getattr": lambda: archive_with(named("builtins.getattr", b"N")),
    "calls-subprocess": lambda: archive_with(named("subprocess.getoutput", b"X\x02\x00\x00\x00id")),
    "names-with-a-backslash": lambda: archive_with(b"\x80\x02c\\\nx\n."),
    "pickle-of-protocol-0": lambda: pickle.dumps(Calls(os.system, TOUCH), 0),
    "pickle-of-protocol-2": lambda: pickle.dumps(Calls(os.system, TOUCH), 2),
    "pickle-of-protocol-5": lambda: pickle.dumps(Calls(os.system, TOUCH), 5),
    "module": lambda: saved(torch.nn.Linear(2, 2)),
    "truncated": lambda: saved(state())[:-5000],
    "empty": lambda: b"",
    "text": lambda: b"step,loss\n",
    "other-archive": lambda: rezipped(zipfile.ZIP_STORED)[:30] + b"\0" * 500,
    "compressed-archive": lambda: rezipped(zipfile.ZIP_DEFLATED),
    "pickle-of-a-million-instructions": lambda: archive_with(b"\x80\x02" + b"N" * 2_000_000 + b"."),
    "pickle-without-an-end": lambda: archive_with(b"\x80\x02" + b"(" * 100_000),
    "pickle-that-takes-from-nothing": lambda: archive_with(b"\x80\x02\x86\x86Rbs."),
    "pickle-that-recalls-nothing": lambda: archive_with(b"\x80\x02h\x07."),
    "numbers-for-words": lambda: saved({1: torch.zeros(1)}),
    "names-of-a-megabyte": lambda: saved({"a" * 1_000_000: torch.zeros(1)}),
    "names-of-terminal-codes": lambda: saved({"ema_model": {"\x1b[2J\n": 3}}),
    "complex-numbers": lambda: saved(state(**{"head.weight": torch.zeros(2, dtype=torch.complex64)})),
    "whole-numbers": lambda: saved(state(**{"head.bias": torch.zeros(32, dtype=torch.int8)})),
    "sparse-tensor": lambda: saved(state(**{"head.bias": torch.eye(3).to_sparse()})),
    "quantised-tensor": lambda: archive_with(named("torch._utils._rebuild_qtensor", b"N")),
    "meta-tensor": lambda: saved(state(**{"head.bias": torch.zeros(32, device="meta")})),
    "not-finite": lambda: saved(state(**{"head.bias": torch.full((32,), torch.nan)})),
    "absurd-widths": lambda: saved(state(**{"head.weight": torch.zeros(1, 3, 3, 3)})),
}  # fmt: skip
GREEDY_CHECKPOINTS: dict[str, Callable[[], bytes]] = {
    "bytearray-of-a-terabyte": lambda: archive_with(named("builtins.bytearray", b"\x8a\x06\0\0\0\0\0\x01")),
    "bytearray-of-gigabytes-old": lambda: old_with(named("builtins.bytearray", b"\x8a\x05\0\0\0\x80\0")),
    "encoding-of-encodings": lambda: archive_with(encoding_of_encodings(40)),
    "tuple-of-tuples-as-a-key": lambda: archive_with(tuples_of_tuples(60)),
    "keys-of-one-hash": lambda: archive_with(colliding_numbers(200_000)),
    "tensor-of-a-stride-of-zero": lambda: saved(state(**{"head.weight": torch.zeros(1).expand(60000, 60000, 3, 3)})),
    "tensor-beyond-its-storage": lambda: archive_with(tensor_pickle(4, (1 << 15, 1 << 15, 3, 3), (9 << 15, 27, 3, 1))),
    "tensor-beyond-its-storage-old": lambda: old_with(
        tensor_pickle(4, (1 << 14, 3 << 14, 3, 3), (27 << 14, 9, 3, 1), old=True)
    ),
    "tensor-with-an-offset": lambda: archive_with(tensor_pickle(4, (1,), (1,), 1 << 40)),
    "tensor-of-a-negative-size": lambda: archive_with(tensor_pickle(4, (-1,), (1,))),
    "tensor-of-a-negative-stride": lambda: archive_with(tensor_pickle(4, (4,), (-1,))),
    "storage-of-an-exabyte": lambda: archive_with(tensor_pickle(1 << 60, (4,), (1,))),
    "storage-of-an-exabyte-old": lambda: old_with(tensor_pickle(1 << 58, (4,), (1,), old=True)),
    "storage-of-a-negative-size": lambda: old_with(tensor_pickle(-5, (4,), (1,), old=True)),
    "zip-bomb": lambda: rezipped(zipfile.ZIP_DEFLATED, {"archive/data/999": b"\0" * (1 << 27)}),
}
for name, make_checkpoint in CHECKPOINTS.items():
    case(f"checkpoint-{name}", "export", checkpoint(holding(make_checkpoint)))
for name, make_checkpoint in GREEDY_CHECKPOINTS.items():
    case(
        f"checkpoint-{name}", "export", checkpoint(holding(make_checkpoint)),
        memory=True,
    )  # fmt: skip


def directory_of_gigabytes(path: Path) -> None:
    """A zip archive without a block on the disk, whose end says that all before it is the list of its files."""
    size = 3 << 29
    sparse(path, size, b"PK\x03\x04")
    with path.open("ab") as file:
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, size, 0, 0))


case("checkpoint-of-a-directory-of-gigabytes", "export", checkpoint(directory_of_gigabytes), memory=True)
case("checkpoint-that-is-a-folder", "export", checkpoint(Path.mkdir))
case("checkpoint-that-is-a-pipe", "export", checkpoint(os.mkfifo))
case("checkpoint-that-is-a-device", "export", checkpoint(lambda path: path.symlink_to("/dev/zero")))
case("checkpoint-of-a-terabyte", "export", checkpoint(lambda path: sparse(path, 1 << 40, b"PK\x03\x04")), memory=True)
case("checkpoint-of-zeros", "export", checkpoint(lambda path: sparse(path, 1 << 33)), memory=True)
case("checkpoint-of-zeros-old", "export", checkpoint(lambda path: sparse(path, 1 << 33, b"\x80\x02")), memory=True)


# --- flagfiles --------------------------------------------------------------------------------------------------------

FLAGFILES: dict[str, bytes] = {
    "that-includes-another": b"--flagfile=/etc/passwd\n",
    "of-no-flags": b"root:x:0:0:root:/root:/bin/bash\n",
    "with-a-call": f"--ch=__import__('os').system('touch {CANARY}')\n".encode(),
    "with-a-number-of-5000-digits": b"--ch=" + b"9" * 5000,
    "with-a-number-of-4000-digits": b"--ch=" + b"9" * 4000,
    "with-levels-by-thousands": b"--ch_mult=" + b"1," * 30_000 + b"1",
    "with-infinity": b"--beta_T=1e999\n--dropout=nan\n--ch=7",
    "with-terminal-codes": b"\x1b[2J\x1b]0;x\x07\n",
    "with-nul": b"--mean_type=\0epsilon\n",
    "of-bytes": bytes(range(256)),
    "of-one-long-word": b"--mean_type=" + b"x" * 60_000,
    "in-utf-16": "--ch=128\n".encode("utf-16"),
}


def flagfile(make: Put) -> Build:
    def build(folder: Path, bundle: Path) -> list[object]:
        torch.save(state(), folder / "ckpt.pt")
        make(folder / "flags.txt")
        return [folder / "ckpt.pt", "-o", folder / "out.bundle", *FACTS, "--flagfile", folder / "flags.txt"]

    return build


for name, content in FLAGFILES.items():
    case(f"flagfile-{name}", "export", flagfile(holding(content)))
case("flagfile-that-is-a-pipe", "export", flagfile(os.mkfifo))
case("flagfile-that-is-a-folder", "export", flagfile(Path.mkdir))
case("flagfile-that-is-a-device", "export", flagfile(lambda path: path.symlink_to("/dev/zero")), memory=True)
case("flagfile-of-a-terabyte", "export", flagfile(lambda path: sparse(path, 1 << 40)), memory=True)


# --- safetensors ------------------------------------------------------------------------------------------------------


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def weights_header(bundle: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of an unbroken supernet."""
    content = (bundle / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


Change = Callable[[dict[str, Any]], object]


def metadata(key: str, text: str) -> Change:
    return lambda header: header["__metadata__"].update({key: text})


def spec_with(**changes: object) -> Change:
    def change(header: dict[str, Any]) -> None:
        spec = json.loads(header["__metadata__"]["spec"]) | changes
        header["__metadata__"]["spec"] = json.dumps(spec)

    return change


SUPERNETS: dict[str, Change] = {
    "spec-that-is-nested": metadata("spec", "[" * 100_000),
    "spec-with-nan": spec_with(dropout=float("nan")),
    "spec-of-a-list": metadata("spec", "[1]"),
    "spec-of-petabytes": spec_with(base_channels=65536, channel_mults=[64] * 4),
    "spec-of-endless-blocks": spec_with(num_res_blocks=65535),
    "spec-of-another-network": spec_with(num_res_blocks=2),
    "schedule-of-5000-digits": metadata("noise_schedule", "9" * 5000),
    "schedule-of-a-beta-of-400-digits": metadata("noise_schedule", '{"type":"linear","beta_start":-1' + "0" * 400
        + ',"beta_end":0.1,"timesteps":1000,"variance_type":"fixed_large"}'),
    "schedule-of-another-length": metadata("noise_schedule", '{"type":"linear","beta_start":0.1,"beta_end":0.1,'
        '"timesteps":7,"variance_type":"fixed_large"}'),
    "provenance-of-a-list": metadata("provenance", "[1, 2]"),
    "provenance-that-is-nested": metadata("provenance", '{"a":' * 5000 + "1" + "}" * 5000),
    "version-of-a-megabyte": metadata("format_version", "1" * 1_000_000),
    "format-of-a-megabyte": metadata("format", "x" * 1_000_000),
    "no-metadata": lambda header: header.pop("__metadata__"),
    "no-spec": lambda header: header["__metadata__"].pop("spec"),
    "a-tensor-less": lambda header: header["__metadata__"] and header.pop("head.bias"),
    "numbers-of-another-type": lambda header: header["head.bias"].update(dtype="I32"),
    "shape-of-exabytes": lambda header: header["head.bias"].update(shape=[1 << 60]),
    "shape-that-overflows": lambda header: header["head.bias"].update(shape=[1 << 32, 1 << 32, 32]),
    "shape-that-is-negative": lambda header: header["head.bias"].update(shape=[-32]),
    "offsets-beyond": lambda header: header["head.bias"].update(data_offsets=[0, 1 << 50]),
    "offsets-backwards": lambda header: header["head.bias"].update(data_offsets=[128, 0]),
    "offsets-shared": lambda header: header["head.bias"].update(data_offsets=header["tail.norm.bias"]["data_offsets"]),
    "name-of-a-megabyte": lambda header: header.update({"x" * 1_000_000: header.pop("head.bias")}),
}  # fmt: skip


def beside(put: Put) -> Callable[[Path, Path], object]:
    """A file that is made without a look at the unbroken bundle."""
    return lambda path, bundle: put(path)


def saving(tensors: dict[str, torch.Tensor]) -> Put:
    return lambda path: save_file(tensors, path)


def supernet(make: Callable[[Path, Path], object]) -> Build:
    def build(folder: Path, bundle: Path) -> list[object]:
        make(folder / "s.safetensors", bundle)
        return [folder / "s.safetensors", "-o", folder / "out.bundle"]

    return build


def changed_supernet(change: Change) -> Callable[[Path, Path], object]:
    def make(path: Path, bundle: Path) -> None:
        header, data = weights_header(bundle)
        change(header)
        path.write_bytes(safetensors(header, data))

    return make


def giant(path: Path) -> None:
    """A valid file of 8 GiB without a block on the disk, and a tensor that fills it."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [1 << 31], "data_offsets": [0, 1 << 33]}}).encode()
    sparse(path, 8 + len(text) + (1 << 33), struct.pack("<Q", len(text)) + text)


for name, header_change in SUPERNETS.items():
    case(f"supernet-{name}", "export", supernet(changed_supernet(header_change)))
for name, raw in {
    "empty": b"",
    "header-cut": safetensors({}, length=2)[:9],
    "header-beyond-the-file": safetensors({}, length=1 << 62),
    "header-no-json": safetensors(b"{" + b"\xff" * 99),
    "header-of-unclosed-objects": safetensors(b'{"a":' * 100_000),
    "header-of-another-file": safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
}.items():
    case(f"supernet-{name}", "export", supernet(beside(holding(raw))))
case(
    "supernet-header-of-48-megabytes", "export",
    supernet(beside(holding(lambda: safetensors(b"{" + b" " * (48 << 20) + b"}")))), memory=True,
)  # fmt: skip
case("supernet-of-8-gigabytes", "export", supernet(beside(giant)), memory=True)
case("supernet-that-is-a-pipe", "export", supernet(beside(os.mkfifo)))
for name, tensors in {
    "of-another-shape": {"time_table": torch.zeros(2, 2)},
    "of-halves": {"time_table": torch.zeros(1000, 32, dtype=torch.bfloat16)},
    "not-finite": {"time_table": torch.full((1000, 32), torch.inf)},
    "of-other-names": {"a": torch.zeros(1)},
}.items():
    file_case(f"time-table-{name}", TIME_TABLE, saving(tensors), "torch")
file_case("time-table-of-bytes", TIME_TABLE, lambda path: path.write_bytes(b"\xff" * 100), "torch")
file_case("weights-of-another-network", WEIGHTS, saving({"head.bias": torch.zeros(3)}), "torch")
file_case("weights-of-bytes", WEIGHTS, lambda path: path.write_bytes(b"\x10" * 100), "torch")


# --- training data ----------------------------------------------------------------------------------------------------

NETWORK: list[object] = [
    "--image-size", 8, "--channels", 1, "--base-channels", 8, "--channel-mults", "1", "--attention-levels", "",
    "--groups", 2, "--num-res-blocks", 1, "--conv-multiple", 2, "--linear-multiple", 2, "--timesteps", 10,
    "--batch-size", 2, "--images", 2, "--precision", "fp32", "--threads", 1,
]  # fmt: skip


def training(name: str, make: Put) -> Build:
    def build(folder: Path, bundle: Path) -> list[object]:
        make(folder / name)
        return [folder / name, "-o", folder / "trained", *NETWORK]

    return build


def idx(count: int, height: int, width: int, data: bytes = b"") -> bytes:
    return b"\0\0\x08\x03" + struct.pack(">III", count, height, width) + data


def npy(shape: object, dtype: str = "|u1", data: bytes = b"", extra: str = "") -> bytes:
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, {extra}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def zipped(member: str, content: bytes, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(member, content)
    return buffer.getvalue()


def objects(writer: Callable[..., object]) -> bytes:
    array = np.empty(1, dtype=object)
    array[0] = Calls(os.system, TOUCH)
    buffer = io.BytesIO()
    writer(buffer, array)
    return buffer.getvalue()


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A picture whose header says so; rows are what its data unpack to."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def picture(kind: str, cut: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()[:cut]


def pictures(**files: bytes) -> Put:
    def make(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("_", ".", 1)).write_bytes(content)

    return make


DATA: dict[str, tuple[str, Callable[[], bytes]]] = {
    "idx-truncated": ("x-idx3-ubyte", lambda: idx(3, 8, 8, b"\0" * 100)),
    "idx-of-labels": ("x-idx3-ubyte", lambda: b"\0\0\x08\x01" + b"\0" * 50),
    "idx-of-none": ("x-idx3-ubyte", lambda: idx(0, 8, 8)),
    "gzip-truncated": ("x.gz", lambda: gzip.compress(idx(2, 8, 8, b"\0" * 128))[:-9]),
    "gzip-of-bytes": ("x.gz", lambda: b"\x1f\x8b" + b"\xff" * 99),
    "npz-of-objects": ("x.npz", lambda: objects(np.savez)),
    "npz-of-a-text": ("x.npz", lambda: zipped("images.txt", b"hello")),
    "npz-of-a-climbing-name": ("x.npz", lambda: zipped("../../images.txt", b"hello")),
    "npz-compressed-otherwise": (
        "x.npz", lambda: zipped("images.npy", npy((1, 8, 8), data=b"\0" * 64), zipfile.ZIP_LZMA)
    ),
    "npy-of-objects": ("x.npy", lambda: objects(np.save)),
    "npy-of-a-call": ("x.npy", lambda: npy(f"(__import__('os').system('touch {CANARY}'),)")),
    "npy-of-a-negative-shape": ("x.npy", lambda: npy((-1, 8, 8))),
    "npy-of-an-unknown-type": ("x.npy", lambda: npy((1, 8, 8), "weird")),
    "npy-of-another-version": ("x.npy", lambda: b"\x93NUMPY\x09\x09" + b"\0" * 90),
    "npy-of-an-old-number": ("x.npy", lambda: npy("(1L, 8L, 8L)", "|u1", b"\0" * 63)),
    "pickle": ("x.npy", lambda: pickle.dumps(Calls(os.system, TOUCH))),
}  # fmt: skip
GREEDY_DATA: dict[str, tuple[str, Callable[[], bytes]]] = {
    "idx-of-4-billion": ("x-idx3-ubyte", lambda: idx(0xFFFFFFFF, 1024, 1024)),
    "idx-that-padding-multiplies": ("x.gz", lambda: gzip.compress(idx(1 << 25, 1, 1, b"\0" * (1 << 25)))),
    "gzip-bomb": ("x.gz", lambda: gzip.compress(idx(1 << 21, 8, 8, b"\0" * (1 << 27)))),
    "gzip-that-holds-more": ("x.gz", lambda: gzip.compress(idx(1, 8, 8, b"\0" * (1 << 27)))),
    "npz-bomb": ("x.npz", lambda: zipped("images.npy", npy((1 << 21, 8, 8), data=b"\0" * (1 << 27)))),
    "npy-of-exabytes": ("x.npy", lambda: npy((1 << 50, 8, 8))),
    "npy-of-a-huge-header": ("x.npy", lambda: b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 26) + b"(" * (1 << 26)),
    "npy-of-a-nested-header": ("x.npy", lambda: npy("(" * 3000 + ")" * 3000)),
}  # fmt: skip
FOLDERS: dict[str, Put] = {
    "no-picture": pictures(notes_txt=b"nothing here"),
    "png-truncated": pictures(a_png=picture("PNG", 2000)),
    "jpeg-truncated": pictures(a_jpg=picture("JPEG", 700)),
    "png-that-is-postscript": pictures(a_png=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "png-of-bytes": pictures(a_png=bytes(range(256))),
    "pipe-for-a-picture": in_new_folder(os.mkfifo, "a.png"),
}
GREEDY_FOLDERS: dict[str, Put] = {
    "png-of-4-gigapixels": pictures(a_png=png(65000, 65000)),
    "png-bomb": pictures(a_png=png(6000, 6000, b"\0" * (6000 * 18001))),
}
for name, (file_name, make_data) in DATA.items():
    case(f"data-{name}", "train", training(file_name, holding(make_data)))
for name, (file_name, make_data) in GREEDY_DATA.items():
    case(f"data-{name}", "train", training(file_name, holding(make_data)), memory=True)
for name, make_folder in FOLDERS.items():
    case(f"data-{name}", "train", training("pictures", make_folder))
for name, make_folder in GREEDY_FOLDERS.items():
    case(f"data-{name}", "train", training("pictures", make_folder), memory=True)
case("data-of-a-directory-of-gigabytes", "train", training("x.npz", directory_of_gigabytes), memory=True)
case("data-that-is-a-pipe", "train", training("x.npz", os.mkfifo))
case("data-that-is-a-device", "train", training("x.npz", lambda path: path.symlink_to("/dev/zero")))
case("data-of-a-terabyte", "train", training("x.npz", lambda path: sparse(path, 1 << 40)), memory=True)
case(
    "data-of-a-terabyte-idx",
    "train",
    training("x", lambda path: sparse(path, 1 << 40, idx(1 << 30, 32, 32))),
    memory=True,
)


def cifar(size: int) -> Put:
    return in_new_folder(lambda path: sparse(path, size), "data_batch_1.bin")


case("data-cifar-cut", "train", training("pictures", cifar(3072)))
case("data-cifar-empty", "train", training("pictures", cifar(0)))
case("data-cifar-of-a-terabyte", "train", training("pictures", cifar(3073 << 29)), memory=True)


def training_state(content: bytes) -> Build:
    def build(folder: Path, bundle: Path) -> list[object]:
        arguments = sound_training(folder, bundle)
        (folder / "trained").mkdir()
        (folder / "trained" / "state.safetensors").write_bytes(content)
        return arguments

    return build


def sound_training(folder: Path, bundle: Path) -> list[object]:
    return training("x.npy", lambda path: path.write_bytes(npy((2, 8, 8), data=b"\x07" * 128)))(folder, bundle)


for name, words in {
    "of-another": {"identity": "{}", "step": "1", "losses": "{}"},
    "whose-identity-is-a-list": {"identity": "[]", "step": "1", "losses": "{}"},
    "whose-identity-is-nested": {"identity": "[" * 50_000, "step": "1", "losses": "{}"},
    "whose-step-is-negative": {"identity": "{}", "step": "-1", "losses": "{}"},
    "whose-step-has-5000-digits": {"identity": "{}", "step": "9" * 5000, "losses": "{}"},
    "whose-losses-are-a-list": {"identity": "{}", "step": "1", "losses": "[1]"},
    "whose-losses-are-of-words": {"identity": "{}", "step": "1", "losses": '{"w": "x"}'},
}.items():
    case(f"state-{name}", "train", training_state(safetensors({"__metadata__": words})))
case("state-of-bytes", "train", training_state(b"\xff" * 64))


# --- unbroken ---------------------------------------------------------------------------------------------------------


def sound_strategy(folder: Path, bundle: Path) -> list[object]:
    (folder / "s.yaml").write_text(HEAD + SEGMENTS)
    return [folder / "s.yaml"]


def sound_weights(folder: Path, bundle: Path) -> list[object]:
    shutil.copy(bundle / WEIGHTS, folder / "s.safetensors")
    return [folder / "s.safetensors"]


SOUND += [
    Case("bundle", "inspect", lambda folder, bundle: [own_bundle(folder, bundle)]),
    Case("resealed", "inspect", resealed(lambda data: data["provenance"].update(note="mine"))),
    Case(
        "identity", "inspect",
        lambda folder, bundle: [
            with_file(ARTEFACT, lambda path: path.write_bytes(model().SerializeToString()))(folder, bundle)
        ],
    ),
    Case("drawn-onnxruntime", "run", lambda folder, bundle: draw(own_bundle(folder, bundle), "onnxruntime")),
    Case("drawn-openvino", "run", lambda folder, bundle: draw(own_bundle(folder, bundle), "openvino")),
    Case("drawn-torch", "run", lambda folder, bundle: draw(own_bundle(folder, bundle), "torch")),
    Case("strategy", "inspect", sound_strategy),
    Case("data", "train", sound_training),
    Case("picture", "train", training("pictures", pictures(a_png=picture("PNG", 1 << 20)))),
]  # fmt: skip
