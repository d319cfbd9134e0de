"""What does a bundle say, and what is refused of one that was damaged, tampered with, or made by another program?"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddsm_engine import inspect, run
from ddsm_engine.bundle import MANIFEST, MAX_MANIFEST_BYTES, TIME_TABLE, WEIGHTS, Bundle, Manifest
from ddsm_engine.errors import BundleError
from ddsm_engine.files import SUFFIX, sha256_of
from tests.conftest import TINY, Refusal

FIELDS = {
    "format", "format_version", "family", "spec", "noise_schedule", "prediction_type", "image_shape", "variants",
    "files", "provenance", "checksum",
}  # fmt: skip
VARIANT_FIELDS = {
    "id", "role", "precision", "inputs", "outputs", "file", "sha256", "size_bytes", "macs", "params", "width",
    "width_mult", "parity",
}  # fmt: skip
"""Of DESIGN's contract; a variant may say more."""

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def copy(bundle_path: Path, tmp_path: Path) -> Path:
    """A bundle that a test may spoil."""
    return Path(shutil.copytree(bundle_path, tmp_path / "copy.bundle"))


def reseal(bundle: Path, edit: Edit) -> None:
    """Change the manifest as somebody would who knows how its checksum is made."""
    data = json.loads((bundle / MANIFEST).read_bytes())
    edit(data)
    data.pop("checksum", None)
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    data["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(data), encoding="utf-8")


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 0x10
    file.write_bytes(data)


def draw(bundle: Path, *options: object) -> tuple[object, ...]:
    """Options of ``run`` that read every kind of file and compute little."""
    return (
        "--bundle", bundle, "--sampler", "ddim", "--steps", 2, "--num-images", 1, "--threads", 1,
        "-o", bundle.parent / "images.png", *options,
    )  # fmt: skip


def listing(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_manifest_has_the_fields_of_the_contract(bundle_path: Path) -> None:
    data = json.loads((bundle_path / MANIFEST).read_bytes())
    assert data.keys() == FIELDS
    assert (data["format"], data["format_version"], data["prediction_type"]) == ("ddsm-bundle", 1, "epsilon")
    assert data["image_shape"] == [3, 8, 8]
    assert data["spec"]["groups"] == TINY.groups
    assert data["noise_schedule"]["timesteps"] == 1000
    assert data["provenance"]["supernet"] == {"source": "random"}
    assert [entry["id"] for entry in data["variants"]] == ["w008", "w012", "w016", "w020", "w024", "w028", "w032"]
    for entry in data["variants"]:
        assert entry.keys() >= VARIANT_FIELDS
        assert (entry["role"], entry["precision"]) == ("denoiser", "fp32")
        assert entry["file"] == f"variants/{entry['id']}/model.onnx"
        assert entry["width_mult"] == entry["width"] / 32
        assert entry["inputs"] == [
            {"name": "sample", "dtype": "float32", "shape": ["batch", 3, 8, 8]},
            {"name": "time_features", "dtype": "float32", "shape": ["batch", 32]},
        ]
        assert [tensor["name"] for tensor in entry["outputs"]] == ["out_sample"]


def test_the_manifest_vouches_for_every_file(bundle_path: Path) -> None:
    data = json.loads((bundle_path / MANIFEST).read_bytes())
    vouched = {e["file"]: e for e in data["variants"]} | {e["path"]: e for e in data["files"]}
    present = {str(f.relative_to(bundle_path)) for f in bundle_path.rglob("*") if f.is_file()} - {MANIFEST}
    assert vouched.keys() == present
    assert {WEIGHTS, TIME_TABLE, "README.md", "strategies/coarse.yaml"} <= present
    for relative, entry in vouched.items():
        assert entry["size_bytes"] == (bundle_path / relative).stat().st_size
        assert entry["sha256"] == hashlib.sha256((bundle_path / relative).read_bytes()).hexdigest()


def test_every_parity_figure_was_measured_and_lies_within_its_tolerance(bundle: Bundle) -> None:
    figures = [variant.parity for variant in bundle.variants.values()]
    assert all(0 < parity.relative_l2 <= parity.tolerance <= 1e-5 for parity in figures)
    assert all(parity.max_abs > 0 for parity in figures)
    assert len({parity.relative_l2 for parity in figures}) > 1, "one figure for all was not measured on each"


def test_costs_rise_with_the_width_and_attention_is_what_tells_them_apart(bundle: Bundle) -> None:
    variants = list(bundle.variants.values())
    assert variants[-1] is bundle.full
    assert bundle.full.width == TINY.base_channels
    for narrow, wide in itertools.pairwise(variants):
        assert narrow.macs < wide.macs
        assert narrow.params < wide.params
        assert narrow.size_bytes < wide.size_bytes
    for v in variants:
        # Four attentions at 4 x 4 pixels, two products each, over the 2 x width channels of the second level.
        assert v.macs - v.conv_linear_macs == 4 * 2 * 16 * 16 * 2 * v.width


def test_a_manifest_survives_json(bundle: Bundle) -> None:
    data = bundle.manifest.to_json()
    again = Manifest.from_json(json.loads(json.dumps(data)), Path("manifest.json"))
    assert again == bundle.manifest
    assert again.to_json() == data
    assert data == json.loads((bundle.path / MANIFEST).read_bytes())


def test_inspect_prints_the_variants_with_named_conventions(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(bundle.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "8x8x3, 1000 timesteps" in lines[0]
    assert "4 groups" in lines[0]
    assert "true | conv+linear" in lines[1]
    assert "published" not in "".join(lines), "the published table is of another network"
    rows = {line.split()[0]: line for line in lines if line.startswith("w0")}
    assert rows.keys() == bundle.variants.keys()
    for identifier, row in rows.items():
        v = bundle.variants[identifier]
        words = row.split()
        assert words[1:3] == [str(v.width), f"({v.width // 4}/8)"]
        assert words[3:5] == [f"{2 * v.macs / 1e9:.3f}", f"{2 * v.conv_linear_macs / 1e9:.3f}"]
        assert words[5:7] == [f"{v.params:,}", f"{v.size_bytes:,}"]
        assert words[7:] == ["fp32", f"{v.parity.relative_l2:.1e}"]
    assert lines[-1] == "strategies: coarse"


def test_inspect_costs_a_strategy_with_the_variants_of_a_bundle(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect.main([str(bundle.path / "strategies/coarse.yaml"), "--bundle", str(bundle.path)]) == 0
    text = capsys.readouterr().out
    assert "average GFLOPs (true)" in text
    assert "average GFLOPs (conv+linear)" in text
    assert f"full width's {2 * bundle.full.macs / 1e9:.3f}" in text


# --- refusals ---------------------------------------------------------------------------------------------------------

USES = {
    "variants/w008/model.onnx": ("--strategy", "uniform:2/8", "--backend", "onnxruntime"),
    WEIGHTS: ("--strategy", "uniform:2/8", "--backend", "torch"),
    TIME_TABLE: ("--strategy", "uniform:2/8", "--backend", "torch"),
    "strategies/coarse.yaml": ("--strategy", "coarse", "--backend", "torch"),
}
"""A file of the bundle and a run that reads it."""


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("relative", USES)
def test_a_flipped_byte_is_refused_when_the_file_is_used(
    copy: Path, refusal: Refusal, relative: str, where: float
) -> None:
    file = copy / relative
    flip(file, int(where * (file.stat().st_size - 1)))
    before = listing(copy.parent)
    message = refusal(run.main, *draw(copy, *USES[relative]))
    assert f"{file} is damaged" in message
    assert "export it again" in message
    assert listing(copy.parent) == before


@pytest.mark.parametrize("relative", USES)
def test_the_undamaged_bundle_of_these_refusals_draws(copy: Path, relative: str) -> None:
    arguments = draw(copy, *USES[relative])
    assert run.main([str(argument) for argument in arguments]) == 0
    assert (copy.parent / "images.png").is_file()


@pytest.mark.parametrize("relative", USES)
def test_a_truncated_and_a_missing_file_are_refused(copy: Path, refusal: Refusal, relative: str) -> None:
    file = copy / relative
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} is damaged" in refusal(run.main, *draw(copy, *USES[relative]))
    file.unlink()
    message = refusal(run.main, *draw(copy, *USES[relative]))
    assert "is missing" in message or "has no strategy 'coarse'" in message
    assert not (copy.parent / "images.png").exists()


def test_inspect_verifies_the_artefacts_it_describes(copy: Path, refusal: Refusal) -> None:
    flip(copy / "variants/w032/model.onnx", 1000)
    assert "w032/model.onnx is damaged" in refusal(inspect.main, copy)
    (copy / "variants/w032/model.onnx").unlink()
    assert "w032/model.onnx is missing" in refusal(inspect.main, copy)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_of_the_manifest_is_refused_or_changes_nothing(
    data: st.DataObject, bundle: Bundle, tmp_path: Path
) -> None:
    content = bytearray((bundle.path / MANIFEST).read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[position]))
    (tmp_path / MANIFEST).write_bytes(content)
    try:
        opened = Bundle.open(tmp_path)
    except BundleError:
        return
    assert opened.manifest == bundle.manifest
    original = (bundle.path / MANIFEST).read_bytes()[position]
    assert chr(original).isspace() or original in b"eE", "only spelling may change without being noticed"


def test_a_changed_figure_of_the_manifest_is_refused(copy: Path, refusal: Refusal) -> None:
    text = (copy / MANIFEST).read_text(encoding="utf-8")
    changed = text.replace('"groups": 4', '"groups": 2')
    assert changed != text
    (copy / MANIFEST).write_text(changed, encoding="utf-8")
    assert "was changed after it was written" in refusal(inspect.main, copy)


@pytest.mark.parametrize("cut", [0, 1, 100, -3])
def test_a_truncated_manifest_is_refused(copy: Path, refusal: Refusal, cut: int) -> None:
    (copy / MANIFEST).write_bytes((copy / MANIFEST).read_bytes()[:cut])
    assert "is not JSON" in refusal(inspect.main, copy)


@pytest.mark.parametrize("command", ["inspect", "run"])
@pytest.mark.parametrize("name", ["../outside.onnx", "variants/../../outside.onnx", "/ABSOLUTE", "..\\outside.onnx"])
def test_a_path_that_leaves_the_bundle_is_refused_although_file_and_checksums_are_right(
    copy: Path, refusal: Refusal, name: str, command: str
) -> None:
    outside = copy.parent / "outside.onnx"
    shutil.copy(copy / "variants/w008/model.onnx", outside)
    name = name.replace("/ABSOLUTE", str(outside))
    reseal(copy, lambda data: data["variants"][0].update(file=name))
    arguments = (inspect.main, copy) if command == "inspect" else (run.main, *draw(copy, *USES[WEIGHTS][:2]))
    assert "leaves the bundle" in refusal(*arguments)


@pytest.mark.parametrize("linked", ["variants/w008/model.onnx", "variants/w008", "variants", TIME_TABLE])
def test_a_link_out_of_the_bundle_is_refused(copy: Path, refusal: Refusal, linked: str) -> None:
    outside = copy.parent / "outside"
    os.replace(copy / linked, outside)
    (copy / linked).symlink_to(outside)
    message = refusal(run.main, *draw(copy, "--strategy", "uniform:2/8", "--backend", "onnxruntime"))
    assert "is a link that leaves the bundle" in message


def test_a_bundle_reached_through_a_link_is_still_itself(bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "link.bundle").symlink_to(bundle_path)
    assert inspect.main([str(tmp_path / "link.bundle")]) == 0


def test_resealing_alone_is_no_reason_to_refuse(copy: Path) -> None:
    reseal(copy, lambda data: data["provenance"].update(note="mine"))
    assert Bundle.open(copy).manifest.provenance["note"] == "mine"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        pytest.param(
            lambda data: data.update(format_version=2),
            "has format_version 2; this program reads 1: update ddsm-engine",
            id="newer",
        ),
        pytest.param(lambda data: data.update(format_version="1"), "has format_version '1'", id="version-word"),
        pytest.param(lambda data: data.pop("format_version"), "has format_version None", id="no-version"),
        pytest.param(lambda data: data.update(format="other"), "is not the manifest of a bundle", id="format-other"),
        pytest.param(lambda data: data.pop("format"), "is not the manifest of a bundle", id="no-format"),
        pytest.param(
            lambda data: data.update(family="dit"),
            "predicting epsilon, sample, v_prediction, found ('dit', 'epsilon')",
            id="family",
        ),
        pytest.param(lambda data: data.update(prediction_type="v"), "found ('ddsm-unet', 'v')", id="prediction"),
        pytest.param(lambda data: data.update(variants=[]), "lists no variants", id="no-variants"),
        pytest.param(lambda data: data["spec"].update(groups=0), "groups must be a whole number", id="spec"),
        pytest.param(lambda data: data["spec"].update(extra=1), "unknown ['extra']", id="spec-extra"),
        pytest.param(lambda data: data["spec"].pop("groups"), "lacks ['groups']", id="spec-lacks"),
        pytest.param(lambda data: data["noise_schedule"].update(beta_start=2.0), "betas must satisfy", id="betas"),
        pytest.param(lambda data: data["variants"].append(7), "lacks a field or has one of the wrong kind", id="int"),
        pytest.param(lambda data: data["files"][0].update(x=1), "lacks a field or has one of the wrong", id="file-x"),
        *(
            pytest.param(lambda data, name=name: data.pop(name), f"lacks a field .*{name}", id=f"no-{name}")
            for name in ("spec", "noise_schedule", "variants", "files", "provenance")
        ),
        *(
            pytest.param(
                lambda data, name=name: data["variants"][3].pop(name),
                f"lacks a field .*{name}",
                id=f"variant-no-{name}",
            )
            for name in sorted(VARIANT_FIELDS)
        ),
        pytest.param(
            lambda data: data["variants"][0]["parity"].pop("tolerance"), "lacks a field .*tolerance", id="parity-lacks"
        ),
    ],
)
def test_a_manifest_that_cannot_be_is_refused_whatever_its_checksum_says(
    copy: Path, refusal: Refusal, edit: Edit, words: str
) -> None:
    reseal(copy, edit)
    message = refusal(inspect.main, copy)
    assert all(part in message for part in words.split(" .*")), message
    assert str(copy / MANIFEST) in message


@pytest.mark.parametrize("name", ["family", "prediction_type"])
def test_a_manifest_without_its_family_is_refused(copy: Path, refusal: Refusal, name: str) -> None:
    reseal(copy, lambda data: data.pop(name))
    assert "expected family 'ddsm-unet' predicting epsilon, sample, v_prediction, found" in refusal(inspect.main, copy)


def _nested(depth: int) -> bytes:
    return b'{"format": "ddsm-bundle", "format_version": 1, "provenance": ' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON"),
        (b"\x00\xff\xfe", "is not JSON"),
        (b"PK\x03\x04", "is not JSON"),
        (b"[]", "is not the manifest of a bundle"),
        (b'"ddsm-bundle"', "is not the manifest of a bundle"),
        (b"1" * 5000, "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (_nested(100_000), "is not JSON"),
        (b"{" + b" " * MAX_MANIFEST_BYTES + b"}", f"expected at most {MAX_MANIFEST_BYTES} bytes"),
    ],
    ids=["empty", "binary", "zip", "list", "string", "number", "unclosed", "deep", "huge"],
)
def test_a_manifest_of_something_else_is_refused(tmp_path: Path, refusal: Refusal, content: bytes, words: str) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    assert words in refusal(inspect.main, tmp_path)
    assert listing(tmp_path) == [MANIFEST]


def test_no_depth_of_nesting_gives_a_traceback(tmp_path: Path) -> None:
    """Reading, and writing again for the checksum, give up at different depths."""
    refused = 0
    for depth in range(20, 1100, 3):
        (tmp_path / MANIFEST).write_bytes(_nested(depth))
        with pytest.raises(BundleError):
            Bundle.open(tmp_path)
        refused += 1
    assert refused == 360


def test_a_folder_without_a_manifest_says_how_to_make_a_bundle(tmp_path: Path, refusal: Refusal) -> None:
    assert "manifest.json is missing; make one with ddsm-export" in refusal(inspect.main, tmp_path)


def test_a_value_of_another_kind_is_never_a_traceback(copy: Path) -> None:
    """Every value of the manifest in turn becomes something else, resealed; describing it is refused or works."""
    original = json.loads((copy / MANIFEST).read_bytes())
    original |= {"variants": original["variants"][:1], "files": original["files"][:1]}
    paths = list(_leaves(original))
    assert len(paths) > 60
    failures, refused = [], 0
    for path in paths:
        for value in OTHER_KINDS:
            data = json.loads(json.dumps(original))
            _set(data, path, value)
            (copy / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
            reseal(copy, lambda data: None)
            try:
                inspect.describe_bundle(Bundle.open(copy))
            except BundleError:
                refused += 1
            except Exception as error:
                failures.append(f"{'.'.join(map(str, path))} = {value!r}: {error!r}")
    assert refused > 100
    assert not failures, "\n".join(failures)


Key = str | int
OTHER_KINDS: tuple[object, ...] = (None, "text", -1, 1.5, [], {})


def _leaves(value: object, path: tuple[Key, ...] = ()) -> list[tuple[Key, ...]]:
    items: list[tuple[Key, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    below = [leaf for key, child in items for leaf in _leaves(child, (*path, key))]
    return ([path] if path else []) + below


def _set(data: Any, path: tuple[Key, ...], value: object) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


def test_a_refused_command_writes_nothing(copy: Path, refusal: Refusal) -> None:
    reseal(copy, lambda data: data.update(format_version=9))
    before = {name: (copy.parent / name).stat().st_mtime_ns for name in listing(copy.parent)}
    refusal(inspect.main, copy)
    refusal(run.main, *draw(copy, "--strategy", "uniform:2/8", "--trace", copy.parent / "trace.json"))
    assert {name: (copy.parent / name).stat().st_mtime_ns for name in listing(copy.parent)} == before


def test_a_file_is_hashed_when_it_is_asked_for_and_not_before(copy: Path) -> None:
    flip(copy / WEIGHTS, 100)
    opened = Bundle.open(copy)
    assert sha256_of(opened.artefact(opened.variants["w008"])) == opened.variants["w008"].sha256
    with pytest.raises(BundleError, match="is damaged"):
        opened.weights(opened.full)


def test_a_bundle_that_a_kill_left_aside_is_put_back_when_it_is_opened(bundle_path: Path, tmp_path: Path) -> None:
    """Where a file system cannot exchange two names: between the two renames, the kill found neither."""
    shutil.copytree(bundle_path, tmp_path / f".x.bundle.a1b2c3{SUFFIX}" / "old")
    assert Bundle.open(tmp_path / "x.bundle").full.id == "w032"
    assert [path.name for path in tmp_path.iterdir()] == ["x.bundle"]


def test_a_strategy_that_is_a_link_to_itself_is_one_line(bundle_path: Path, tmp_path: Path, refusal: Refusal) -> None:
    bundle = Path(shutil.copytree(bundle_path, tmp_path / "x.bundle"))
    (bundle / "strategies/loop.yaml").symlink_to("loop.yaml")
    assert "loop.yaml" in refusal(run.main, "--bundle", bundle, "--strategy", "loop", "-o", tmp_path / "x.png")
