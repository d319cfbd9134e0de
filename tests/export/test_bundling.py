"""What is in the files that export writes, and what is left when it fails?"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from ddsm_engine import verify
from ddsm_engine.backends import open_engine
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import MANIFEST, WEIGHTS, Bundle
from ddsm_engine.errors import BackendError, OutputError, SpecError, StrategyError
from ddsm_engine.networks.slicing import subnetwork
from ddsm_engine.strategy import Strategy
from ddsm_export import cli
from ddsm_export.bundling import ExportOptions, choose_widths, export_bundle
from ddsm_export.supernet import Supernet
from tests.conftest import CONFIG, STATE, TINY
from tests.oracle.dynamic_unet import CIFAR10, dynamic_unet, weight_shapes
from tests.tolerances import FORWARD, FP16_FORWARD

VARIANTS = [f"w{width:03d}" for width in TINY.widths()]
ATTENTIONS = 4
"""Of the tiny network: one on the way down, one in the middle, two on the way up."""


@pytest.fixture(scope="module")
def half(supernet: Supernet, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("half") / "half.bundle"
    export_bundle(supernet, path, ExportOptions(widths=(8,), precision="fp16"))
    return Bundle.open(path)


def load(bundle: Bundle, variant: str) -> onnx.ModelProto:
    model = onnx.load(str(bundle.artefact(bundle.variants[variant])), load_external_data=False)
    onnx.checker.check_model(model)
    return model


def floats(model: onnx.ModelProto) -> dict[str, TensorProto]:
    kinds = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}
    return {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type in kinds}


def elements(tensor: TensorProto) -> int:
    return math.prod(tensor.dims)


def forward(bundle: Bundle, variant: str, backend: str, batch: int) -> tuple[float, np.ndarray[Any, Any]]:
    """Relative L2 to the dynamic network, and the output."""
    x = np.random.default_rng(batch).standard_normal((batch, *TINY.sample_shape), dtype=np.float32)
    t = np.linspace(0, 999, batch).astype(int).tolist()
    v = bundle.variants[variant]
    out = np.full_like(x, np.nan)
    engine = open_engine(backend, bundle, v, batch, EngineOptions(precision="fp32", threads=1))
    engine.bind({"sample": x, "time_features": bundle.time_table(v)[t]}, {"out_sample": out})
    engine.run()
    engine.close()
    expected = dynamic_unet(CONFIG, STATE, torch.from_numpy(x), torch.tensor(t), v.width / TINY.base_channels).numpy()
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected)), out


# --- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_weight_of_a_file_is_larger_than_the_subnetwork_needs(
    bundle: Bundle, supernet: Supernet, variant: str
) -> None:
    v, tensors = bundle.variants[variant], floats(load(bundle, variant))
    parameters = dict(subnetwork(TINY, supernet.weights, v.width).named_parameters())
    largest = max(parameter.numel() for parameter in parameters.values())
    projections = sum(p.numel() for name, p in parameters.items() if name.endswith(".time.weight"))
    for name, tensor in tensors.items():
        # The projections of all blocks lie in one matrix; nothing else was joined.
        assert elements(tensor) <= (projections if name == "projection.weight" else largest), name
    total = sum(elements(tensor) for tensor in tensors.values())
    assert sum(parameter.numel() for parameter in parameters.values()) == v.params
    # All of the network and beside it constants of a norm's formula only.
    assert v.params <= total <= v.params + 64


def test_a_narrow_file_is_a_fraction_of_the_full_one(bundle: Bundle) -> None:
    narrow, full = (sum(map(elements, floats(load(bundle, name)).values())) for name in ("w008", "w032"))
    assert narrow < 0.1 * full, "a file that kept the supernet's weights and sliced them would be as large"


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_time_embedding_is_at_most_three_products(bundle: Bundle, variant: str) -> None:
    nodes = Counter(node.op_type for node in load(bundle, variant).graph.node)
    assert nodes["Gemm"] <= 3
    assert nodes["MatMul"] == 2 * ATTENTIONS, "scores and mixture; everything else must be a Gemm or a Conv"
    shapes = weight_shapes(CONFIG)
    assert sum(name.endswith("attn.proj_q") for name in shapes) == ATTENTIONS
    convolutions = sum(len(shape) == 4 for shape in shapes.values())
    assert nodes["Conv"] == convolutions


def test_without_joining_there_would_be_twenty_four() -> None:
    linears = [name for name, shape in weight_shapes(CIFAR10).items() if len(shape) == 2]
    assert len(linears) == 24
    assert sum(len(shape) == 2 for shape in weight_shapes(CONFIG).values()) > 3, "the tiny network can tell, too"


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_and_outputs_are_float32_with_a_dynamic_batch(bundle: Bundle, variant: str) -> None:
    graph = load(bundle, variant).graph
    described = {
        value.name: (
            value.type.tensor_type.elem_type,
            [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim],
        )
        for value in [*graph.input, *graph.output]
    }
    assert described == {
        "sample": (TensorProto.FLOAT, ["batch", 3, 8, 8]),
        "time_features": (TensorProto.FLOAT, ["batch", 32]),
        "out_sample": (TensorProto.FLOAT, ["batch", 3, 8, 8]),
    }


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("batch", [2, 5])
def test_a_batch_that_the_export_never_saw_is_right(bundle: Bundle, backend: str, batch: int) -> None:
    assert forward(bundle, "w020", backend, batch)[0] <= FORWARD[backend]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_files_are_opset_18_of_the_standard_operators(bundle: Bundle, variant: str) -> None:
    model = load(bundle, variant)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 18}
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not model.functions
    assert [file.name for file in bundle.artefact(bundle.variants[variant]).parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("opset", [17, 21])
def test_the_first_and_the_last_opset_export_and_are_right(supernet: Supernet, tmp_path: Path, opset: int) -> None:
    export_bundle(supernet, tmp_path / "o.bundle", ExportOptions(widths=(8,), opset=opset))
    bundle = Bundle.open(tmp_path / "o.bundle")
    model = load(bundle, "w008")
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": opset}
    assert bundle.manifest.provenance["opset"] == opset
    for backend in ("onnxruntime", "openvino"):
        assert forward(bundle, "w008", backend, 2)[0] <= FORWARD[backend]


# --- half precision ---------------------------------------------------------------------------------------------------


def test_half_precision_keeps_norms_time_embedding_and_output_convolution_in_float32(half: Bundle) -> None:
    model = onnx.shape_inference.infer_shapes(load(half, "w008"), strict_mode=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in [*model.graph.value_info, *model.graph.output]}
    weights = floats(model)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    output = [node for node in convolutions if node.output[0] == "out_sample"]
    inner = [node for node in convolutions if node.output[0] != "out_sample"]
    assert len(output) == 1
    assert len(inner) > 30
    for nodes, kind in ((output, TensorProto.FLOAT), (inner, TensorProto.FLOAT16)):
        assert {weights[name].data_type for node in nodes for name in node.input[1:]} == {kind}
        assert {kinds[node.output[0]] for node in nodes} == {kind}
    gemms = [node for node in model.graph.node if node.op_type == "Gemm"]
    assert {weights[name].data_type for node in gemms for name in node.input[1:]} == {TensorProto.FLOAT}
    norms = [node for node in model.graph.node if node.op_type in ("InstanceNormalization", "GroupNormalization")]
    assert len(norms) == sum(name.endswith((".0", "group_norm")) and len(shape) == 1
                             for name, shape in weight_shapes(CONFIG).items())  # fmt: skip
    assert {kinds[node.output[0]] for node in norms} == {TensorProto.FLOAT}
    # The affine of a norm follows it as a product and a sum with [C, 1, 1].
    affines = [tensor for tensor in weights.values() if list(tensor.dims)[1:] == [1, 1] and len(tensor.dims) == 3]
    assert len(affines) == 2 * len(norms)
    assert {tensor.data_type for tensor in affines} == {TensorProto.FLOAT}
    attention = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert {kinds[node.output[0]] for node in attention} == {TensorProto.FLOAT16}


def test_half_precision_takes_and_gives_float32(half: Bundle) -> None:
    graph = load(half, "w008").graph
    assert {value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]} == {TensorProto.FLOAT}
    assert [tensor.dtype for tensor in half.variants["w008"].inputs] == ["float32", "float32"]


def test_half_precision_records_its_parity_and_is_smaller(half: Bundle, bundle: Bundle) -> None:
    v, full = half.variants["w008"], bundle.variants["w008"]
    assert v.precision == "fp16"
    # Half precision that is as exact as single was not computed in half.
    assert full.parity.relative_l2 < 1e-5 < v.parity.relative_l2 <= v.parity.tolerance <= 1e-2
    assert (v.macs, v.params) == (full.macs, full.params)
    size = {
        name: sum(len(numpy_helper.to_array(t).tobytes()) for t in floats(load(b, "w008")).values())
        for name, b in (("half", half), ("full", bundle))
    }
    assert size["half"] < 0.7 * size["full"]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_half_precision_is_right_on_every_backend(half: Bundle, backend: str) -> None:
    distance, out = forward(half, "w008", backend, 5)
    assert distance <= FP16_FORWARD
    assert np.isfinite(out).all()


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def brain(supernet: Supernet, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("brain") / "brain.bundle"
    export_bundle(supernet, path, ExportOptions(widths=(8,), precision="bf16"))
    return Bundle.open(path)


def test_bfloat16_is_valid_onnx_with_the_float32_islands_of_half_precision(brain: Bundle) -> None:
    model = load(brain, "w008")
    # Before opset 22 this fails: a convolution takes no bfloat16.
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 22}
    assert brain.manifest.provenance["opset"] == 22
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in [*inferred.value_info, *inferred.output]}
    computes: dict[str, set[int]] = {}
    for node in inferred.node:
        operator = node.op_type if node.output[0] != "out_sample" else "output"
        computes.setdefault(operator, set()).add(kinds[node.output[0]])
    assert {operator: computes[operator] for operator in ("Conv", "MatMul")} == {
        "Conv": {TensorProto.BFLOAT16},
        "MatMul": {TensorProto.BFLOAT16},
    }
    islands = ("Gemm", "GroupNormalization", "output")
    assert {operator: computes[operator] for operator in islands} == {name: {TensorProto.FLOAT} for name in islands}
    assert {value.type.tensor_type.elem_type for value in [*inferred.input, *inferred.output]} == {TensorProto.FLOAT}


def test_bfloat16_is_compared_and_run_by_openvino_and_refused_by_onnx_runtime(brain: Bundle) -> None:
    v = brain.variants["w008"]
    assert (v.precision, v.parity.backend, v.parity.tolerance) == ("bf16", "openvino", 5e-2)
    assert 1e-3 < v.parity.relative_l2 < 1e-2, "weights of 8 bits, and no other difference"
    distance, _ = forward(brain, "w008", "openvino", 5)
    assert distance < 1e-2
    with pytest.raises(BackendError, match="no bf16 on a CPU, which w008 is in; --backend openvino"):
        open_engine("onnxruntime", brain, v, 1, EngineOptions())


def test_bfloat16_passes_the_commands_that_take_every_backend(
    brain: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main([str(brain.path)]) == 0
    assert "onnxruntime" not in capsys.readouterr().out


def test_bfloat16_that_nothing_installed_can_check_is_not_written(
    supernet: Supernet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddsm_export.parity.installed_backends", lambda: ("onnxruntime", "torch"))
    monkeypatch.setattr("ddsm_export.bundling.onnx_from_subnetwork", lambda unet, path, **_: path.write_bytes(b""))
    with pytest.raises(BackendError, match=r"one in bf16 runs on openvino: pip install 'ddsm-engine\[cpu\]'"):
        export_bundle(supernet, tmp_path / "b", ExportOptions(widths=(8,), precision="bf16"))
    assert list(tmp_path.iterdir()) == []


# --- the bundle appears whole, or not at all --------------------------------------------------------------------------

Exporter = Callable[..., None]


@pytest.fixture
def exporter(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, Path], None] | None], None]:
    """Replace the slow exporter by copies of the session bundle's files, and let something happen to each."""

    def install(then: Callable[[int, Path], None] | None = None) -> None:
        def export(unet: Any, path: Path, **_: object) -> None:
            shutil.copy(bundle.path / f"variants/w{unet.width:03d}/model.onnx", path)
            if then is not None:
                then(unet.width, path)

        monkeypatch.setattr("ddsm_export.bundling.onnx_from_subnetwork", export)

    return install


def perturb(parameter: str, amount: float) -> Callable[[int, Path], None]:
    """Add to one value of a weight of the 12-channel file, as an export of other weights would have it."""

    def change(width: int, path: Path) -> None:
        if width != 12:
            return
        model = onnx.load(str(path))
        tensor = next(t for t in model.graph.initializer if t.name == parameter)
        values = numpy_helper.to_array(tensor).copy()
        values.flat[0] += amount
        tensor.CopyFrom(numpy_helper.from_array(values, parameter))
        onnx.save(model, str(path))

    return change


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


TWO = ExportOptions(widths=(8, 12))


def test_the_faithful_copy_of_these_tests_is_accepted(
    supernet: Supernet, bundle: Bundle, tmp_path: Path, exporter: Callable[..., None]
) -> None:
    exporter(perturb("unet.tail.conv.bias", 0.0))
    lines: list[str] = []
    export_bundle(supernet, tmp_path / "b", TWO, report=lines.append)
    made = Bundle.open(tmp_path / "b")
    assert list(made.variants) == ["w008", "w012"]
    assert [line.split()[0] for line in lines] == ["w008", "w012"]
    assert made.variants["w012"].parity.relative_l2 < 5e-6
    assert list(tmp_path.iterdir()) == [tmp_path / "b"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("parameter", ["unet.tail.conv.bias", "unet.middle.0.conv1.bias", "projection.bias"])
def test_a_file_that_is_not_the_network_is_refused_and_no_folder_is_left(
    supernet: Supernet, tmp_path: Path, exporter: Callable[..., None], parameter: str, *, force: bool
) -> None:
    exporter(perturb(parameter, 1e-2))
    with pytest.raises(BackendError, match=r"differs from the sliced network by .*The bundle was not written"):
        export_bundle(supernet, tmp_path / "b", TWO, force=force)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_width_is_refused(
    supernet: Supernet, bundle: Bundle, tmp_path: Path, exporter: Callable[..., None]
) -> None:
    exporter(lambda width, path: shutil.copy(bundle.path / "variants/w016/model.onnx", path) and None)
    with pytest.raises(BackendError, match="differs from the sliced network"):
        export_bundle(supernet, tmp_path / "b", TWO)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_answers_nan_is_refused(supernet: Supernet, tmp_path: Path, exporter: Callable[..., None]) -> None:
    exporter(perturb("unet.tail.conv.bias", math.nan))
    with pytest.raises(BackendError, match="not finite"):
        export_bundle(supernet, tmp_path / "b", TWO)
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_a_frozen_batch_is_refused(
    supernet: Supernet, tmp_path: Path, exporter: Callable[..., None]
) -> None:
    def freeze(_: int, path: Path) -> None:
        model = onnx.load(str(path))
        for value in [*model.graph.input, *model.graph.output]:
            value.type.tensor_type.shape.dim[0].dim_value = 1
        onnx.save(model, str(path))

    exporter(freeze)
    with pytest.raises(BackendError):
        export_bundle(supernet, tmp_path / "b", TWO)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, BackendError])
@pytest.mark.parametrize("force", [False, True])
def test_an_end_in_the_middle_leaves_things_as_they_were(
    supernet: Supernet, tmp_path: Path, exporter: Callable[..., None], error: type[BaseException], *, force: bool
) -> None:
    """With ``force`` there is an old bundle, and it must be in place again, every byte of it."""
    if force:
        (tmp_path / "b" / "variants").mkdir(parents=True)
        (tmp_path / "b" / MANIFEST).write_text("the old one")
    before = snapshot(tmp_path)
    reached = []

    def end(width: int, path: Path) -> None:
        reached.append(width)
        if width == 12:
            raise error("in the middle")

    exporter(end)
    with pytest.raises(error):
        export_bundle(supernet, tmp_path / "b", TWO, force=force)
    assert reached == [8, 12]
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["b"] if force else [])


def test_an_existing_output_is_refused_before_anything_is_computed(
    supernet: Supernet, tmp_path: Path, exporter: Callable[..., None]
) -> None:
    def fail(width: int, path: Path) -> None:
        pytest.fail("an export began")

    exporter(fail)
    (tmp_path / "b").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("b", "dangling"):
        with pytest.raises(OutputError, match=r"exists already; choose another output or add --force"):
            export_bundle(supernet, tmp_path / name, TWO)
    assert (tmp_path / "b").read_text() == "mine"


def test_force_replaces_the_old_bundle_and_leaves_nothing_of_it(
    supernet: Supernet, tmp_path: Path, exporter: Callable[..., None]
) -> None:
    exporter()
    export_bundle(supernet, tmp_path / "b", TWO)
    (tmp_path / "b" / "note.txt").write_text("of the old one")
    export_bundle(supernet, tmp_path / "b", ExportOptions(widths=(8,)), force=True)
    assert list(Bundle.open(tmp_path / "b").variants) == ["w008"]
    assert not (tmp_path / "b" / "note.txt").exists()
    assert not (tmp_path / "b" / "variants" / "w012").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_strategy_that_the_variants_cannot_run_is_refused_and_nothing_is_left(
    supernet: Supernet, tmp_path: Path, exporter: Callable[..., None]
) -> None:
    exporter()
    strategies = {"full": Strategy.uniform(1.0, TINY.timesteps)}
    with pytest.raises(StrategyError):
        export_bundle(supernet, tmp_path / "b", TWO, strategies=strategies)
    assert list(tmp_path.iterdir()) == []


# --- what to export ---------------------------------------------------------------------------------------------------


def test_widths_are_all_that_work_or_those_asked_for_in_order() -> None:
    assert choose_widths(TINY, None) == (8, 12, 16, 20, 24, 28, 32)
    assert choose_widths(TINY, (32, 8, 32)) == (8, 32)
    assert choose_widths(TINY, (4,)) == (4,), "a width outside the paper's range is exported when asked for by name"


@pytest.mark.parametrize("width", [0, -8, 33, 10])
def test_a_width_that_cannot_be_cut_is_refused_with_those_that_can(
    supernet: Supernet, tmp_path: Path, width: int
) -> None:
    with pytest.raises(SpecError, match=r"cannot be cut: .*widths that work: 8 \(2/8\), 12 \(3/8\)"):
        export_bundle(supernet, tmp_path / "b", ExportOptions(widths=(8, width)))
    assert list(tmp_path.iterdir()) == []


# --- out of the bundle again ------------------------------------------------------------------------------------------


def test_the_weights_of_a_bundle_can_be_exported_again(bundle: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "again.bundle"
    assert cli.main([str(bundle.path / WEIGHTS), "-o", str(output), "--widths", "3/8"]) == 0
    again, first = Bundle.open(output).variants["w012"], bundle.variants["w012"]
    assert (again.macs, again.conv_linear_macs, again.params) == (first.macs, first.conv_linear_macs, first.params)
    assert again.parity == first.parity
    assert Bundle.open(output).manifest.spec == bundle.manifest.spec
    assert Bundle.open(output).manifest.noise_schedule == bundle.manifest.noise_schedule
    t = [0, 1, 500, 999]
    assert np.array_equal(Bundle.open(output).time_table(again)[t], bundle.time_table(first)[t])


def test_the_card_tells_every_variant_and_where_the_weights_come_from(bundle: Bundle) -> None:
    text = (bundle.path / "README.md").read_text(encoding="utf-8")
    for v in bundle.variants.values():
        row = next(line for line in text.splitlines() if line.startswith(f"| {v.id} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1] == TINY.label(v.width)
        assert cells[2:5] == [f"{2 * v.macs / 1e9:.3f}", f"{2 * v.conv_linear_macs / 1e9:.3f}", f"{v.params:,}"]
        assert cells[6] == f"{v.parity.relative_l2:.1e}"
    assert json.dumps({"source": "random"}, indent=1) in text
    assert "--strategy uniform:8/8" in text


def test_the_folders_of_the_machine_that_exported_stay_out_of_the_files(bundle: Bundle) -> None:
    for v in bundle.variants.values():
        assert str(Path(cli.__file__).parent).encode() not in bundle.artefact(v).read_bytes()


def test_the_names_of_machines_and_folders_stay_out_of_the_manifest(bundle: Bundle) -> None:
    text = (bundle.path / MANIFEST).read_text(encoding="utf-8")
    assert str(Path.home()) not in text
    assert str(bundle.path.parent) not in text
