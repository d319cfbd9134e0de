"""Does ``ddsm verify`` accept what is sound, and find what hashes cannot: an artefact that is not its network?"""

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from ddsm_engine import parity, verify
from ddsm_engine.backends import open_engine
from ddsm_engine.backends.engine import Engine, EngineOptions, artefact_precision
from ddsm_engine.bundle import MANIFEST, WEIGHTS, Bundle, Variant
from ddsm_engine.parity import TOLERANCES, compare, distance, effective_precision, psnr_db
from ddsm_engine.pipeline import Pipeline
from ddsm_export.bundling import ExportOptions, export_bundle
from ddsm_export.supernet import Supernet
from tests.conftest import TINY, Refusal
from tests.tolerances import FORWARD, FP16_FORWARD

NARROW, WIDE = "variants/w008/model.onnx", "variants/w012/model.onnx"

Edit = Callable[[dict[str, Any]], object]
Capture = pytest.CaptureFixture[str]


def reseal(bundle: Path, edit: Edit = lambda data: None) -> None:
    """Let the manifest vouch for the files as they are now, as somebody would who knows how it is made."""
    data = json.loads((bundle / MANIFEST).read_bytes())
    edit(data)
    for entry in [*data["variants"], *data["files"]]:
        content = (bundle / entry.get("file", entry.get("path"))).read_bytes()
        entry |= {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    data.pop("checksum")
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    data["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(data), encoding="utf-8")


@pytest.fixture
def pair(bundle_path: Path, tmp_path: Path) -> Path:
    """A bundle of the two narrowest variants that a test may spoil."""
    path = Path(shutil.copytree(bundle_path, tmp_path / "pair.bundle"))
    (path / "strategies/coarse.yaml").unlink()

    def keep_two(data: dict[str, Any]) -> None:
        data["variants"] = [entry for entry in data["variants"] if entry["id"] in ("w008", "w012")]
        data["files"] = [entry for entry in data["files"] if entry["path"] != "strategies/coarse.yaml"]

    for folder in path.glob("variants/*"):
        if folder.name not in ("w008", "w012"):
            shutil.rmtree(folder)
    reseal(path, keep_two)
    return path


@pytest.fixture(scope="module")
def half(supernet: Supernet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("half") / "half.bundle"
    export_bundle(supernet, path, ExportOptions(widths=(8,), precision="fp16"))
    return path


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on torch cannot be imported, and what has imported it cannot be reached."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "ddsm_engine.backends.torch", None)


def verified(capsys: Capture, *arguments: object, code: int = 0) -> dict[str, Any]:
    """The JSON object of a verification."""
    capsys.readouterr()
    assert verify.main([*map(str, arguments), "--threads", "1", "--json"]) == code
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def table(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.startswith("w0")]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def add_to_bias(file: Path, amount: float) -> None:
    """Spoil an artefact by one value of one weight."""
    model = onnx.load(str(file))
    tensor = next(t for t in model.graph.initializer if t.name == "unet.tail.conv.bias")
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] += amount
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, str(file))


# --- what is sound ----------------------------------------------------------------------------------------------------


def test_every_variant_of_a_sound_bundle_passes(bundle_path: Path, capsys: Capture) -> None:
    report = verified(capsys, bundle_path, "--backend", "onnxruntime")
    assert [row["variant"] for row in report["variants"]] == [f"w{width:03d}" for width in TINY.widths()]
    assert report["not_vouched_for"] == []


def test_every_backend_passes_and_every_tolerance_is_explained(pair: Path, capsys: Capture) -> None:
    assert verify.main([str(pair), "--threads", "1", "--precision", "fp32"]) == 0
    text = capsys.readouterr().out
    rows = table(text)
    backends = ("openvino", "onnxruntime", "native")
    assert [(row[0], row[1]) for row in rows] == [(v, backend) for v in ("w008", "w012") for backend in backends]
    for _, backend, precision, relative_l2, max_abs, tolerance, verdict in rows:
        assert (precision, tolerance, verdict) == ("fp32", "5e-06", "ok")
        assert 0 < float(relative_l2) <= FORWARD[backend]
        assert 0 < float(max_abs) < 1e-4
    assert "not vouched for" not in text
    for precision, allowed in TOLERANCES.items():
        line = next(line for line in text.splitlines() if line.startswith(f"  {precision} "))
        assert allowed.reason in line
        assert line.endswith("no such row here") == (precision != "fp32")


def test_half_precision_passes_its_own_tolerance_and_not_that_of_fp32(
    half: Path, tmp_path: Path, capsys: Capture, refusal: Refusal
) -> None:
    rows = verified(capsys, half, "--precision", "fp32")["variants"]
    assert {row["parity"]["backend"] for row in rows} == {"openvino", "onnxruntime", "native"}
    for row in rows:
        if row["parity"]["backend"] == "native":  # reads the weights
            assert (row["precision"], row["parity"]["tolerance"]) == ("fp32", TOLERANCES["fp32"].relative_l2)
            continue
        assert (row["precision"], row["parity"]["tolerance"]) == ("fp16", 1e-2)
        assert TOLERANCES["fp32"].relative_l2 < row["parity"]["relative_l2"] <= FP16_FORWARD
    claims_fp32 = Path(shutil.copytree(half, tmp_path / "claims.bundle"))
    reseal(claims_fp32, lambda data: data["variants"][0].update(precision="fp32"))
    assert "fp32 must stay within 5e-06" in refusal(verify.main, claims_fp32, "--threads", 1)


def test_export_and_verify_measure_the_same(half: Path, capsys: Capture) -> None:
    recorded = Bundle.open(half).variants["w008"].parity
    (again,) = verified(capsys, half, "--backend", recorded.backend)["variants"]
    assert again["parity"]["relative_l2"] == pytest.approx(recorded.relative_l2, rel=1e-2)
    assert again["parity"]["max_abs"] == pytest.approx(recorded.max_abs, rel=1e-2)
    assert again["parity"]["tolerance"] == recorded.tolerance


def test_one_engine_is_open_at_a_time(pair: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    still_open: list[Engine] = []
    opened: list[str] = []

    def spy(name: str, bundle: Bundle, variant: Variant, batch: int, options: EngineOptions) -> Engine:
        assert not still_open
        engine = open_engine(name, bundle, variant, batch, options)
        close = engine.close

        def closing() -> None:
            still_open.remove(engine)
            close()

        monkeypatch.setattr(engine, "close", closing)
        still_open.append(engine)
        opened.append(f"{name} {batch}")
        return engine

    monkeypatch.setattr(parity, "open_engine", spy)
    verified(capsys, pair, "--backend", "onnxruntime")
    assert not still_open
    assert sorted(opened) == sorted(2 * [f"{name} {batch}" for name in ("torch", "onnxruntime") for batch in (1, 3)])


def test_every_batch_size_that_is_asked_for_is_tried_and_the_run_takes_the_one_that_fits(
    pair: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: set[tuple[str, int]] = set()
    drawn: list[tuple[str, int]] = []
    batches = Pipeline.batches

    def spy(name: str, bundle: Bundle, variant: Variant, batch: int, options: EngineOptions) -> Engine:
        tried.add((name, batch))
        return open_engine(name, bundle, variant, batch, options)

    def watched(self: Pipeline, *arguments: Any, **options: Any) -> Any:
        drawn.append((self.backend, options["batch_size"]))
        return batches(self, *arguments, **options)

    monkeypatch.setattr(parity, "open_engine", spy)
    monkeypatch.setattr(Pipeline, "batches", watched)
    run = ("--trajectory", "--num-images", 3, "--steps", 2, "--backend", "onnxruntime")
    for sizes, fits in (("7,2,5", 5), ("2,1", 2)):
        drawn.clear()
        tried.clear()
        (row,) = verified(capsys, pair, *run, "--batch-size", sizes)["trajectories"]
        assert tried == {(name, int(size)) for name in ("torch", "onnxruntime") for size in sizes.split(",")}
        assert drawn == [("torch", 3), ("onnxruntime", fits)]
        assert row["psnr_worst_db"] is None or row["psnr_worst_db"] > 80


@pytest.mark.parametrize("sizes", ["0", "1,-3", "two"])
def test_batch_sizes_that_cannot_be_are_refused(pair: Path, refusal: Refusal, sizes: str) -> None:
    assert f"found --batch-size {sizes}" in refusal(verify.main, pair, "--batch-size", sizes)


# --- what is not ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [NARROW, WEIGHTS, "README.md", MANIFEST])
def test_a_flipped_byte_of_any_file_is_refused(pair: Path, refusal: Refusal, relative: str) -> None:
    flip(pair / relative)
    message = refusal(verify.main, pair)
    assert str(pair / relative) in message
    assert "export" in message


def test_a_missing_file_is_refused(pair: Path, refusal: Refusal) -> None:
    (pair / "README.md").unlink()
    assert "README.md is missing" in refusal(verify.main, pair)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_an_artefact_of_another_variant_is_named_after_the_whole_table(
    pair: Path, capsys: Capture, backend: str
) -> None:
    shutil.copy(pair / WIDE, pair / NARROW)
    reseal(pair)
    assert verify.main([str(pair), "--backend", backend, "--precision", "fp32", "--threads", "1"]) == 1
    out, error = capsys.readouterr()
    assert [(row[0], row[-1]) for row in table(out)] == [("w008", "BEYOND"), ("w012", "ok")]
    assert all(tolerance.reason in out for tolerance in TOLERANCES.values())
    (line,) = error.splitlines()
    assert line.startswith(f"error: w008 on {backend} differs from torch fp32 from {WEIGHTS} by ")
    assert "the worst of 1 beyond tolerance among 2 rows" in line
    assert "Export the bundle again" in line


def test_our_kernels_are_left_out_where_the_compiler_does_not_work(
    pair: Path, capsys: Capture, refusal: Refusal, broken_compiler: None
) -> None:
    assert verify.main([str(pair), "--threads", "1", "--precision", "fp32"]) == 0
    out, error = capsys.readouterr()
    assert {row[1] for row in table(out)} == {"openvino", "onnxruntime"}
    assert error.startswith("leaving out native: the native backend has no kernels: false cannot compile")
    assert "has no kernels" in refusal(verify.main, pair, "--backend", "native", "--threads", 1)


def test_the_worst_offender_is_named(pair: Path, refusal: Refusal) -> None:
    add_to_bias(pair / NARROW, 1e-3)
    add_to_bias(pair / WIDE, 1e-1)
    reseal(pair)
    message = refusal(verify.main, pair, "--backend", "onnxruntime", "--threads", 1)
    assert message.startswith("error: w012 on onnxruntime")
    assert "the worst of 2 beyond" in message


def test_other_weights_are_found_in_every_variant(pair: Path, capsys: Capture) -> None:
    tensors = load_file(pair / WEIGHTS)
    tensors["tail.conv.bias"] += np.float32(1e-3)
    save_file(tensors, pair / WEIGHTS)
    reseal(pair)
    rows = verified(capsys, pair, "--precision", "fp32", code=1)["variants"]
    assert len(rows) >= 6
    for row in rows:
        is_beyond = row["parity"]["relative_l2"] > row["parity"]["tolerance"]
        assert is_beyond == (row["parity"]["backend"] != "native"), "native reads the weights, as the reference does"


def test_an_artefact_that_answers_nan_is_beyond_every_tolerance(pair: Path, capsys: Capture) -> None:
    add_to_bias(pair / NARROW, math.nan)
    reseal(pair)
    rows = verified(capsys, pair, "--backend", "onnxruntime", code=1)["variants"]
    assert [row["parity"]["relative_l2"] is None for row in rows] == [True, False], "null stands for infinite"


def test_weights_that_answer_nan_are_refused_as_a_reference(pair: Path, refusal: Refusal) -> None:
    tensors = load_file(pair / WEIGHTS)
    tensors["tail.conv.bias"][0] = np.nan
    save_file(tensors, pair / WEIGHTS)
    reseal(pair)
    assert "w008 on torch answers with values that are not finite" in refusal(verify.main, pair, "--threads", 1)


# --- files of the folder that the manifest does not list --------------------------------------------------------------


def test_what_nothing_vouches_for_is_named(pair: Path, capsys: Capture) -> None:
    (pair / "strategies/mine.yaml").write_text(str([0.25] * 500 + [0.375] * 500))
    for relative in ("engines/notes.txt", "latency/here.json", "notes.txt", "variants/w008/model.data"):
        (pair / relative).parent.mkdir(parents=True, exist_ok=True)
        (pair / relative).write_text("something")
    (pair / "strategies/old.txt").symlink_to("gone.txt")
    found = verify.check_files(Bundle.open(pair))
    assert found == ["notes.txt", "strategies/old.txt", "variants/w008/model.data"]
    assert verify.main([str(pair), "--backend", "onnxruntime", "--threads", "1"]) == 0
    assert f"not vouched for: {', '.join(found)}" in capsys.readouterr().out.splitlines()


def test_what_nothing_vouches_for_is_printed_whatever_it_is_called(pair: Path, capsys: Capture) -> None:
    (pair / "\udcff.txt").touch()  # a byte that is no UTF-8, as Python has it
    (pair / "\x1b]0;title\x07").touch()
    assert verify.main([str(pair), "--backend", "onnxruntime", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("not vouched for: "))
    assert line == r"not vouched for: \x1b]0;title\x07, \udcff.txt"
    for number in range(verify.MOST_NAMES):
        (pair / f"a{number}").touch()
    assert verify.main([str(pair), "--backend", "onnxruntime", "--threads", "1"]) == 0
    assert "a8 and 2 more\n" in capsys.readouterr().out


def test_a_strategy_that_is_a_link_out_of_the_bundle_is_refused(pair: Path, refusal: Refusal) -> None:
    (pair.parent / "mine.yaml").write_text(str([0.25] * 1000))
    (pair / "strategies/mine.yaml").symlink_to(pair.parent / "mine.yaml")
    assert "mine.yaml is a link that leaves the bundle" in refusal(verify.main, pair)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(str([1.0] * 1000), "asks for 8/8; the bundle offers w008", id="a-width-that-is-not-there"),
        pytest.param(str([0.25] * 100), "has 100 entries; this supernet has 1000 timesteps", id="a-wrong-length"),
        pytest.param("import os", "expected a mapping", id="no-strategy"),
        pytest.param(
            "{format: ddsm-strategy, format_version: 1, axis: call, sampler: rk4, steps: 2, length: 2, "
            "segments: [{first: 0, last: 1, variant: w008}]}",
            "unknown sampler 'rk4'",
            id="a-sampler-that-is-not-there",
        ),
    ],
)
def test_a_strategy_that_the_bundle_cannot_run_is_refused(
    pair: Path, refusal: Refusal, text: str, message: str
) -> None:
    file = pair / "strategies/mine.yaml"
    file.write_text(text)
    line = refusal(verify.main, pair)
    assert str(file) in line
    assert message in line


def test_a_strategy_over_calls_of_its_own_sampler_is_accepted(pair: Path) -> None:
    (pair / "strategies/mine.yaml").write_text(
        "{format: ddsm-strategy, format_version: 1, axis: call, sampler: ddim, steps: 2, length: 2, "
        "segments: [{first: 0, last: 1, variant: w008}]}"
    )
    assert verify.check_files(Bundle.open(pair)) == []


# --- backends and precisions ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_torch")
def test_without_torch_the_backends_are_compared_with_each_other(pair: Path, capsys: Capture) -> None:
    assert verify.main([str(pair), "--precision", "fp32", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert [row[:2] for row in table(text)] == [[v, b] for v in ("w008", "w012") for b in ("onnxruntime", "native")]
    assert "relative L2 is that to openvino fp32;" in text
    assert text.splitlines()[-1] == (
        "not compared with weights.safetensors, which needs torch: pip install 'ddsm-engine[export]'"
    )


@pytest.mark.usefixtures("no_torch")
def test_without_torch_a_lone_backend_runs_every_variant(pair: Path, capsys: Capture, refusal: Refusal) -> None:
    options = ("--backend", "onnxruntime", "--threads", 1)
    assert verify.main([str(pair), *map(str, options)]) == 0
    assert "every variant runs on onnxruntime fp32; there is nothing else here" in capsys.readouterr().out
    add_to_bias(pair / WIDE, math.nan)
    reseal(pair)
    assert "w012 on onnxruntime answers with values that are not finite" in refusal(verify.main, pair, *options)


@pytest.mark.usefixtures("no_torch")
def test_without_torch_damage_is_found_and_a_whole_run_is_refused(pair: Path, refusal: Refusal) -> None:
    assert "pip install 'ddsm-engine[export]'" in refusal(verify.main, pair, "--trajectory")
    flip(pair / WEIGHTS)
    assert f"{WEIGHTS} is damaged" in refusal(verify.main, pair)


def test_torch_alone_is_refused_as_nothing_reads_the_artefacts(
    pair: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "installed_backends", lambda: ("torch",))
    assert "pip install 'ddsm-engine[cpu]'" in refusal(verify.main, pair)


def test_a_precision_that_is_not_here_is_refused(pair: Path, refusal: Refusal) -> None:
    message = refusal(verify.main, pair, "--backend", "onnxruntime", "--precision", "bf16")
    assert "onnxruntime cannot compute in bf16 here" in message


def test_bf16_is_a_row_of_its_own_where_it_is_offered(
    pair: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU with bf16 is played: its engine's answers are cut to 8 bits."""
    asked: list[str] = []

    def play(name: str, bundle: Bundle, variant: Variant, batch: int, options: EngineOptions) -> Engine:
        engine = open_engine(name, bundle, variant, batch, EngineOptions(precision="fp32", threads=1))
        if options.precision == "bf16":
            asked.append(name)
            bound: list[np.ndarray[Any, Any]] = []
            bind, run = engine.bind, engine.run

            def keep(inputs: Any, outputs: Any) -> None:
                bound.append(outputs["out_sample"])
                bind(inputs, outputs)

            def cut() -> None:
                run()
                bound[-1].view(np.uint32)[...] &= 0xFFFF0000

            monkeypatch.setattr(engine, "bind", keep)
            monkeypatch.setattr(engine, "run", cut)
        return engine

    monkeypatch.setattr(verify, "offered_precisions", lambda name: ("fp32", "bf16"))
    monkeypatch.setattr(parity, "open_engine", play)
    rows = verified(capsys, pair, "--backend", "onnxruntime")["variants"]
    assert [(row["variant"], row["precision"]) for row in rows] == [
        (variant, precision) for variant in ("w008", "w012") for precision in ("fp32", "bf16")
    ]
    assert set(asked) == {"onnxruntime"}
    for row in rows:
        assert row["parity"]["tolerance"] == TOLERANCES[row["precision"]].relative_l2
        assert (row["parity"]["relative_l2"] > 1e-4) == (row["precision"] == "bf16")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx", "onnxruntime", "torch", "torch-compile"])
def test_on_a_gpu_what_reads_artefacts_is_asked_for_nothing_else_than_they_hold(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, backend: str, precision: Any
) -> None:
    monkeypatch.setattr(verify, "choose_backend", lambda name, device: name)
    arguments = verify.parser().parse_args([str(bundle.path), "--backend", backend, "--device", "cuda"])
    _, ((_, options),) = verify.choose_engines(arguments)
    if backend in ("torch", "torch-compile"):
        assert options.precision == "fp32", "as the reference"
    else:
        assert artefact_precision(options, replace(bundle.full, precision=precision)) == precision


@pytest.mark.parametrize(
    ("artefact", "computed", "effective"),
    [("fp32", "fp32", "fp32"), ("fp16", "fp32", "fp16"), ("fp32", "bf16", "bf16"), ("fp16", "bf16", "bf16")],
)
def test_the_coarser_precision_chooses_the_tolerance(artefact: str, computed: str, effective: str) -> None:
    assert effective_precision(artefact, computed) == effective


def test_coarser_precisions_have_wider_tolerances() -> None:
    assert [*TOLERANCES] == ["fp32", "fp16", "bf16"]
    assert 0 < TOLERANCES["fp32"].relative_l2 < TOLERANCES["fp16"].relative_l2 < TOLERANCES["bf16"].relative_l2 < 0.1


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_a_whole_run_is_compared_as_the_pipeline_draws_it(bundle_path: Path, pair: Path, capsys: Capture) -> None:
    """Every option differs from its default; the figures are recomputed from two runs of the pipeline."""
    strategy = pair / "strategies/mine.yaml"
    strategy.write_text(str([0.25] * 300 + [0.375] * 700))
    (row,) = verified(
        capsys, pair, "--trajectory", "--strategy", "mine", "--sampler", "ddim", "--steps", 7, "--num-images", 3,
        "--seed", 11, "--clip-sample", 1.5, "--backend", "onnxruntime", "--precision", "fp32",
    )["trajectories"]  # fmt: skip
    states = []
    for backend in ("torch", "onnxruntime"):
        with Pipeline.from_bundle(bundle_path, backend=backend, precision="fp32", threads=1) as pipe:
            run = pipe(strategy, "ddim", 7, num_images=3, seed=11, clip_sample=1.5)
        states.append(run.x_final.astype(np.float64))
    expected, found = states
    difference = np.clip(found, -1, 1) - np.clip(expected, -1, 1)
    psnr = [20 * math.log10(2 / np.sqrt(np.mean(image**2))) for image in difference]
    assert (row["backend"], row["precision"]) == ("onnxruntime", "fp32")
    assert row["max_abs"] == np.abs(found - expected).max()
    assert row["relative_l2"] == pytest.approx(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    assert row["psnr_worst_db"] == pytest.approx(min(psnr))
    assert row["psnr_mean_db"] == pytest.approx(np.mean(psnr))
    assert row["psnr_worst_db"] > 80
    assert row["seconds"] > 0
    assert row["reference_seconds"] > 0


def test_a_whole_run_in_half_precision_is_reported_and_further_away(half: Path, pair: Path, capsys: Capture) -> None:
    options = ("--trajectory", "--strategy", "uniform:2/8", "--steps", 5, "--num-images", 2, "--clip-sample",
               "--backend", "onnxruntime", "--precision", "fp32")  # fmt: skip
    (exact,) = verified(capsys, pair, *options)["trajectories"]
    (coarse,) = verified(capsys, half, *options)["trajectories"]
    assert (exact["precision"], coarse["precision"]) == ("fp32", "fp16")
    assert coarse["psnr_worst_db"] < exact["psnr_worst_db"] - 20
    assert coarse["relative_l2"] > 10 * exact["relative_l2"]


def test_by_default_the_full_width_runs_fifty_steps_on_every_backend(pair: Path, capsys: Capture) -> None:
    arguments = ["--trajectory", "--num-images", "1", "--clip-sample", "--precision", "fp32", "--threads", "1"]
    assert verify.main([str(pair), *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("whole run: w012×50; 50 calls, 0 swaps; 1 images, seed 0")
    assert [line.split()[:2] for line in lines[first + 2 : first + 5]] == [
        ["openvino", "fp32"],
        ["onnxruntime", "fp32"],
        ["native", "fp32"],
    ]
    assert lines[-1].startswith("not judged")


def test_ddpm_runs_every_timestep(pair: Path) -> None:
    arguments = verify.parser().parse_args([str(pair), "--trajectory", "--sampler", "ddpm"])
    assert len(verify.plan_trajectory(Bundle.open(pair), arguments).plan.variants) == 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 0), "ddim takes 1 to 1000 steps"),
        (("--num-images", 0), "at least one image"),
        (("--strategy", "uniform:8/8"), "asks for 8/8"),
        (("--sampler", "heun"), "heun needs a number of steps"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_before_any_work(
    pair: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], message: str
) -> None:
    monkeypatch.setattr(verify, "compare_variants", lambda *_: pytest.fail("worked before it refused"))
    assert message in refusal(verify.main, pair, "--trajectory", *options)


def test_a_run_of_artefacts_beyond_tolerance_is_not_drawn(pair: Path, capsys: Capture) -> None:
    add_to_bias(pair / NARROW, 1e-2)
    reseal(pair)
    report = verified(capsys, pair, "--trajectory", "--steps", 1, "--backend", "onnxruntime", code=1)
    assert report["trajectories"] == []


# --- the measures -----------------------------------------------------------------------------------------------------


def test_psnr_is_that_of_images_two_wide() -> None:
    expected = np.zeros((3, 3, 4, 4), np.float32)
    found = expected + np.array([0.02, 0.0, 2.0], np.float32).reshape(3, 1, 1, 1)
    assert psnr_db(found, expected) == [pytest.approx(40), math.inf, pytest.approx(0)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_infinitely_far(value: float) -> None:
    sound, spoilt = np.ones((1, 2), np.float32), np.array([[1, value]], np.float32)
    assert distance(spoilt, sound) == distance(sound, spoilt) == (math.inf, math.inf)


def test_distance_is_relative_to_the_reference() -> None:
    expected = np.array([[3, 4]], np.float32)
    relative_l2, max_abs = distance(expected + np.float32(0.5), expected)
    assert relative_l2 == pytest.approx(math.sqrt(0.5) / 5)
    assert max_abs == 0.5
    nothing = np.zeros((1, 2), np.float32)
    assert distance(nothing, nothing) == (0, 0)
    assert distance(expected, nothing) == (math.inf, 4)


@pytest.mark.parametrize("order", [1, -1])
def test_the_worst_probe_counts(order: int) -> None:
    large, small = np.full((1, 2), 100, np.float32), np.ones((3, 2), np.float32)
    expected = [large, small][::order]
    found = [large + 2, small + 1][::order]
    parity = compare(found, expected, precision="fp16", backend="any")
    assert (parity.max_abs, parity.tolerance, parity.backend) == (2, 1e-2, "any")
    assert parity.relative_l2 == pytest.approx(1)
