import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ddsm_engine import run
from ddsm_engine.backends.onnxruntime import OnnxRuntimeEngine
from ddsm_engine.cli import main as umbrella
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_engine.pipeline import Pipeline
from ddsm_engine.samplers.config import NAMES, named_config
from ddsm_engine.strategy import Strategy
from ddsm_export.bundling import ExportOptions, export_bundle
from ddsm_export.supernet import Supernet
from tests.conftest import CONFIG, TINY, Refusal
from tests.oracle.dynamic_unet import published_state_dict
from tests.oracle.names import product_spec, product_weights

FAST = ["--strategy", "coarse", "--sampler", "ddim", "--steps", "3", "--backend", "onnxruntime", "--threads", "1"]


def pixels(file: Path) -> NDArray[np.uint8]:
    with Image.open(file) as picture:
        return np.asarray(picture)


def array(file: Path) -> NDArray[np.float32]:
    with np.load(file) as arrays:
        images: NDArray[np.float32] = arrays["images"]
        return images


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle_path: Path) -> Path:
    """A working directory that holds one bundle."""
    shutil.copytree(bundle_path, tmp_path / "tiny.bundle")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_grid_is_drawn_with_the_only_bundle_here(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([*FAST, "--num-images", "4", "-o", "grid.png", "--trace", "trace.json", "-v"]) == 0
    assert pixels(here / "grid.png").shape == (2 * 8 + 2, 2 * 8 + 2, 3)
    out = capsys.readouterr().out
    assert "plan: w016×1, w024×1, w032×1; 3 calls, 2 swaps" in out
    assert "grid.png: 4 images in" in out
    trace = json.loads((here / "trace.json").read_text())
    assert [segment["variant"] for segment in trace["segments"]] == ["w016", "w024", "w032"]
    assert trace["backend"] == "onnxruntime"


def test_the_array_holds_what_the_pipeline_draws(here: Path, bundle_path: Path) -> None:
    assert run.main([*FAST, "--num-images", "5", "--batch-size", "2", "--seed", "3", "-o", "x.npz"]) == 0
    images = array(here / "x.npz")
    assert images.dtype == np.float32
    with Pipeline.from_bundle(bundle_path, backend="onnxruntime", threads=1) as pipe:
        expected = pipe("coarse", "ddim", 3, num_images=5, batch_size=2, seed=3)
    assert np.array_equal(images, expected.images)


def test_a_folder_holds_one_png_an_image_and_what_they_are(here: Path) -> None:
    assert run.main([*FAST, "--num-images", "3", "-o", "images"]) == 0
    names = sorted(file.name for file in (here / "images").iterdir())
    assert names == ["000000.png", "000001.png", "000002.png", "run.json"]
    assert pixels(here / "images/000001.png").shape == (8, 8, 3)
    assert json.loads((here / "images/run.json").read_text())["seed"] == 0


def test_a_resumed_folder_ends_with_the_same_files(here: Path) -> None:
    arguments = [*FAST, "--num-images", "6", "--batch-size", "2"]
    assert run.main([*arguments, "-o", "whole"]) == 0
    assert run.main([*arguments, "-o", "part"]) == 0
    for number in (2, 3, 5):
        (here / f"part/{number:06d}.png").unlink()
    assert run.main([*arguments, "-o", "part", "--resume"]) == 0
    for file in (here / "whole").iterdir():
        assert (here / "part" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(("option", "value", "named"), [("--seed", "1", "seed"), ("--steps", "4", "steps")])
def test_another_run_cannot_be_resumed(here: Path, refusal: Refusal, option: str, value: str, named: str) -> None:
    assert run.main([*FAST, "--num-images", "1", "-o", "images"]) == 0
    line = refusal(run.main, *FAST, "--num-images", "1", "-o", "images", "--resume", option, value)
    assert f"records another {named}" in line


def test_a_run_that_is_spelled_otherwise_is_the_same_run(here: Path) -> None:
    Strategy((Fraction(1, 2), Fraction(1), Fraction(1)), axis="call", sampler="ddim", steps=3).save(here / "call.yaml")
    few = ["--strategy", "call.yaml", "--backend", "onnxruntime", "--threads", "1", "--num-images", "2", "-o", "images"]
    assert run.main(few) == 0
    (here / "images/000001.png").unlink()
    assert run.main([*few, "--resume", "--sampler", "ddim", "--steps", "3", "--eta", "0"]) == 0
    assert (here / "images/000001.png").is_file()


def test_a_run_of_before_devices_were_recorded_was_on_the_cpu(
    here: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.main([*FAST, "--num-images", "1", "-o", "images"]) == 0
    file = here / "images/run.json"
    recorded = json.loads(file.read_text())
    assert recorded.pop("device") == "cpu"
    file.write_text(json.dumps(recorded))
    assert run.main([*FAST, "--num-images", "2", "--batch-size", "1", "-o", "images", "--resume"]) == 0
    file.write_text(json.dumps(recorded | {"device": "cuda"}))
    assert "records another device;" in refusal(run.main, *FAST, "--num-images", "1", "-o", "images", "--resume")


@pytest.mark.parametrize(
    ("output", "trace"),
    [("t.npz", "t.npz"), ("t.png", "./t.png"), ("out", "out/000000.png"), ("out", "out/run.json"), ("out", "out"),
     ("t.png", "t.png/trace.json")],
)  # fmt: skip
def test_a_trace_that_would_replace_images_is_refused(here: Path, refusal: Refusal, output: str, trace: str) -> None:
    assert "would lie over the images" in refusal(run.main, *FAST, "-o", output, "--trace", trace)
    assert [file.name for file in here.iterdir()] == ["tiny.bundle"]


def test_a_trace_may_lie_beside_the_images_of_a_folder(here: Path) -> None:
    assert run.main([*FAST, "--num-images", "1", "-o", "out", "--trace", "out/trace.json"]) == 0
    assert sorted(file.name for file in (here / "out").iterdir()) == ["000000.png", "run.json", "trace.json"]


def test_images_that_no_png_shows_are_written_as_an_array_only(
    here: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = replace(CONFIG, ch=16, ch_mult=(1,), attn=(), T=60, in_channels=4)
    weights = product_weights(published_state_dict(four, seed=3))
    supernet = Supernet(product_spec(four, image_size=8), NoiseSchedule(1e-3, 0.02, 60), weights)
    export_bundle(supernet, here / "four.bundle", ExportOptions(widths=[4]))
    few = ["--bundle", "four.bundle", "--strategy", "uniform:2/8", "--steps", "2", "--backend", "onnxruntime"]
    for output in ("x.png", "x"):
        line = refusal(run.main, *few, "-o", output)
        assert "a PNG shows one channel or three, found images of 4" in line
    assert sorted(file.name for file in here.iterdir()) == ["four.bundle", "tiny.bundle"]
    assert run.main([*few, "--num-images", "2", "-o", "x.npz"]) == 0
    assert array(here / "x.npz").shape == (2, 4, 8, 8)


RUN = OnnxRuntimeEngine.run


def interrupt_after(calls: int) -> Callable[[Any], None]:
    count = 0

    def counted(self: OnnxRuntimeEngine) -> None:
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        RUN(self)

    return counted


def test_ctrl_c_keeps_finished_images(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(OnnxRuntimeEngine, "run", interrupt_after(7))  # two batches of three calls, and a bit
    assert run.main([*FAST, "--num-images", "6", "--batch-size", "2", "-o", "images"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted; what was finished is kept"
    assert len(list((here / "images").glob("*.png"))) == 4
    monkeypatch.setattr(OnnxRuntimeEngine, "run", interrupt_after(7))
    assert run.main([*FAST, "--num-images", "6", "--batch-size", "2", "-o", "x.npz"]) == 1
    assert len(array(here / "x.npz")) == 4
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert run.main([*FAST, "--num-images", "6", "--batch-size", "2", "-o", "images", "--resume"]) == 0
    assert len(list((here / "images").glob("*.png"))) == 6


@pytest.mark.parametrize("output", ["old.png", "old.npz", "old"])
def test_an_interrupted_replacement_leaves_the_old_output(
    here: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    old = here / output
    if output == "old":
        old.mkdir()
        (old / "run.json").touch()
        (old / "keep.txt").write_text("old")
    else:
        old.write_text("old")
    monkeypatch.setattr(OnnxRuntimeEngine, "run", interrupt_after(1))
    assert run.main([*FAST, "-o", output, "--force"]) == 1
    assert (old / "keep.txt" if output == "old" else old).read_text() == "old"
    assert sorted(file.name for file in here.iterdir()) == sorted([output, "tiny.bundle"])


def test_a_folder_is_replaced_whole(here: Path) -> None:
    assert run.main([*FAST, "--num-images", "3", "-o", "images"]) == 0
    assert run.main([*FAST, "--num-images", "1", "-o", "images", "--seed", "1", "--force"]) == 0
    assert sorted(file.name for file in (here / "images").iterdir()) == ["000000.png", "run.json"]
    assert sorted(file.name for file in here.iterdir()) == ["images", "tiny.bundle"]


def test_resuming_what_was_never_begun_begins_it(here: Path) -> None:
    for output, option in (("whole", []), ("resumed", ["--resume"])):
        assert run.main([*FAST, "--num-images", "3", "-o", output, *option]) == 0
    files = sorted(file.name for file in (here / "whole").iterdir())
    assert files == sorted(file.name for file in (here / "resumed").iterdir())
    assert all((here / "whole" / name).read_bytes() == (here / "resumed" / name).read_bytes() for name in files)


def test_pictures_of_somebody_s_own_are_no_images_of_the_run(here: Path) -> None:
    assert run.main([*FAST, "--num-images", "2", "-o", "images"]) == 0
    first = (here / "images/000001.png").read_bytes()
    (here / "images/000001.png").unlink()
    for name in ("2026-note.png", "1.png", "²³.png"):
        (here / "images" / name).touch()
    assert run.main([*FAST, "--num-images", "2", "-o", "images", "--resume"]) == 0
    assert (here / "images/000001.png").read_bytes() == first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is no record of a run, so its folder cannot be resumed: it holds []"),
        ('"\\u001b[2J"', "is no record of a run"),
        ("[" * 100_000, "cannot be read, so its folder cannot be resumed"),
    ],
)
def test_a_folder_without_a_record_of_its_run_cannot_be_resumed(
    here: Path, refusal: Refusal, content: str, message: str
) -> None:
    (here / "images").mkdir()
    (here / "images/run.json").write_text(content)
    line = refusal(run.main, *FAST, "--num-images", "1", "-o", "images", "--resume")
    assert message in line
    assert line.isprintable()


@pytest.mark.parametrize("output", ["images.png", "images.npz"])
def test_a_file_replaces_no_folder_even_one_of_ours(here: Path, refusal: Refusal, output: str) -> None:
    (here / output).mkdir()
    (here / output / "run.json").write_text("{}")
    assert "is a folder, which no file replaces" in refusal(run.main, *FAST, "-o", output, "--force")
    assert (here / output / "run.json").read_text() == "{}"


def test_a_folder_that_appeared_meanwhile_is_kept(
    here: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    def meanwhile(self: OnnxRuntimeEngine) -> None:
        (here / "images").mkdir(exist_ok=True)
        RUN(self)

    monkeypatch.setattr(OnnxRuntimeEngine, "run", meanwhile)
    assert "made by another process" in refusal(run.main, *FAST, "--num-images", "1", "-o", "images")
    assert list((here / "images").iterdir()) == []


def test_force_replaces_and_only_force(here: Path, refusal: Refusal) -> None:
    (here / "images.png").write_text("old")
    assert "exists already" in refusal(run.main, *FAST)
    assert (here / "images.png").read_text() == "old"
    assert run.main([*FAST, "--num-images", "1", "--force"]) == 0
    assert pixels(here / "images.png").shape == (8, 8, 3)


def test_a_strategy_file_finds_the_bundle_that_holds_it(bundle_path: Path, tmp_path: Path) -> None:
    file = bundle_path / "strategies/coarse.yaml"
    arguments = ["--strategy", str(file), *FAST[2:], "--num-images", "1", "-o", str(tmp_path / "x.png")]
    assert run.main(arguments) == 0


def test_the_umbrella_command_runs_the_same(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert umbrella(["run", *FAST, "--num-images", "1", "-o", "u.png"]) == 0
    assert umbrella(["paint"]) == 2
    assert "unknown verb 'paint'" in capsys.readouterr().err
    assert umbrella(["--help"]) == 0
    assert "inspect" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "nothing"], "has no strategy 'nothing'; it has: coarse"),
        (["--strategy", "uniform:1/3"], "the bundle offers w008"),
        (["--strategy", "uniform:9/8"], "must lie in (0, 1]"),
        (
            ["--strategy", "uniform:1e-999999999"],
            "expected a number like 4/8 or 0.5, or the id of a variant, found '1e-",
        ),
        (["--bundle", "elsewhere"], "elsewhere is not a bundle"),
        (["--steps", "0"], "1 to 1000 steps"),
        (["--sampler", "nope"], "unknown sampler 'nope'; expected one of ddpm, ddim, euler, heun, dpm++2m"),
        (["--sampler", "heun:logsnr"], "heun has no grid 'logsnr'"),
        (["--sampler", "heun", "--eta", "1"], "heun takes no eta"),
        (["--sampler", "nope.json"], "nope.json could not be read"),
        (["--sampler", "tiny.bundle/manifest.json"], "the scheduler class None is not supported"),
        (["--num-images", "0"], "at least one image"),
        (["--batch-size", "0"], "at least one image"),
        (["--seed", "-1"], "a seed is"),
        (["--device", "cuda"], "needs an NVIDIA GPU"),
        (["--backend", "torch-compile"], "needs an NVIDIA GPU"),
        (["--backend", "tensorrt-rtx", "--device", "cpu"], "runs on a GPU, found --device cpu"),
        (["--threads", "-1"], "expected 0 to 1024 threads"),
        (["--threads", str(1 << 40)], "expected 0 to 1024 threads"),
        (["--precision", "bf16"], "no bf16 arithmetic"),
        (["--precision", "bf16", "-o", "folder"], "no bf16 arithmetic"),
        (["--backend", "openvino", "--device", "cuda"], "runs on the CPU"),
        (["-o", "x.jpg"], "must end in .png"),
        (["-o", "x.png", "--resume"], "finishes a folder"),
        (["-o", "tiny.bundle/variants", "--resume"], "cannot be resumed"),
        (["-o", "tiny.bundle/variants", "--force"], "holds something else"),
        (["-o", "."], "no name for an output"),
        (["-o", "tiny.bundle/manifest.json/x.png"], "is not a folder"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_nothing_is_written(
    here: Path, refusal: Refusal, arguments: list[str], message: str
) -> None:
    assert message in refusal(run.main, *FAST, *arguments)
    assert [file.name for file in here.iterdir()] == ["tiny.bundle"]


def test_a_strategy_of_the_wrong_length_is_refused(here: Path, refusal: Refusal) -> None:
    Strategy.uniform(0.5, 999).save(here / "short.yaml")
    assert "has 999 entries" in refusal(run.main, *FAST, "--strategy", "short.yaml")


def test_several_bundles_must_be_told_apart(here: Path, refusal: Refusal) -> None:
    shutil.copytree(here / "tiny.bundle", here / "other.bundle")
    assert "found 2; name one with --bundle" in refusal(run.main, *FAST)


@pytest.mark.parametrize("name", [*NAMES, "heun:karras", "dpm++2m:logsnr"])
def test_every_sampler_draws_by_name_and_by_diffusers_config(here: Path, name: str) -> None:
    config = {**named_config(name, NoiseSchedule(1e-4, 0.02, 1000)), "num_train_timesteps": 1000}
    (here / "scheduler_config.json").write_text(json.dumps(config))
    few = ["--num-images", "2", "--clip-sample"]
    assert run.main([*FAST, *few, "--sampler", name, "-o", "name.npz"]) == 0
    assert run.main([*FAST, *few, "--sampler", "scheduler_config.json", "-o", "config.npz"]) == 0
    assert np.array_equal(array(here / "name.npz"), array(here / "config.npz"))


def test_a_sampler_that_makes_two_calls_a_step_swaps_at_each(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choices = tuple(Fraction(k, 8) for k in (4, 8, 4, 6, 8))
    Strategy(choices, axis="call", sampler="heun", steps=3).save(here / "heun.yaml")
    assert run.main([*FAST, "--strategy", "heun.yaml", "--sampler", "heun", "--num-images", "1", "-v"]) == 0
    assert "plan: w016×1, w032×1, w016×1, w024×1, w032×1; 5 calls, 4 swaps" in capsys.readouterr().out


def test_a_strategy_over_calls_of_another_grid_is_refused(here: Path, refusal: Refusal) -> None:
    Strategy((Fraction(1),) * 5, axis="call", sampler="heun", steps=3).save(here / "heun.yaml")
    line = refusal(run.main, *FAST, "--strategy", "heun.yaml", "--sampler", "heun:karras")
    assert "belongs to heun with 3 steps (5 entries); this run is heun:karras with 3 (5 calls)" in line


def test_the_shape_of_images_follows_the_bundle(here: Path) -> None:
    assert run.main([*FAST, "--num-images", "2", "-o", "x.npz"]) == 0
    assert array(here / "x.npz").shape == (2, *TINY.sample_shape)
