"""``ddsm-export`` as people type it: a published checkpoint becomes a bundle, or one line says why not."""

import contextlib
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from ddsm_engine import inspect
from ddsm_engine.bundle import Bundle, Parity
from ddsm_engine.files import sha256_of
from ddsm_export.cli import main
from tests.conftest import Refusal
from tests.oracle.dynamic_unet import TABLE, Config, published_state_dict

SMALL = Config(ch=16, ch_mult=(1,), attn=(), num_res_blocks=1, groups=4, conv_multiple=4, linear_multiple=4, T=20)
WIDE = Config(ch=32, ch_mult=(1,), attn=(), num_res_blocks=1, groups=8, T=20)
"""Three of its eighths are no multiple of the published 8, and a linear's 16 leaves out two more."""

FLAGFILE = """\
--T=20
--ch={ch}
--ch_mult=1
--num_res_blocks=1
--beta_1=0.0001
--beta_T=0.02
--img_size=8
--mean_type=epsilon
--var_type=fixedlarge
--slimmable_unet
"""
FACTS = ["--groups", "4", "--image-size", "8", "--beta-1", "1e-4", "--beta-T", "0.02", "--var-type", "fixedlarge"]
SMALL_ROUNDING = ["--groups", "4", "--conv-multiple", "4", "--linear-multiple", "4"]


def checkpoint(config: Config) -> dict[str, Any]:
    return {
        "net_model": published_state_dict(config, seed=1),
        "ema_model": published_state_dict(config, seed=2),
        "step": 7,
    }


def save(content: object, folder: Path, flagfile: str | None = FLAGFILE.format(ch=16)) -> Path:
    torch.save(content, folder / "ckpt.pt")
    if flagfile is not None:
        (folder / "flagfile.txt").write_text(flagfile, encoding="utf-8")
    return folder / "ckpt.pt"


def listing(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace the slow exporter and the comparison by nothing; the widths that were asked for are recorded."""
    widths: list[int] = []

    def export(unet: Any, path: Path, **_: object) -> None:
        widths.append(unet.width)
        path.write_bytes(b"no network")

    parity = Parity(relative_l2=1e-7, max_abs=1e-6, tolerance=5e-6, backend="none")
    monkeypatch.setattr("ddsm_export.bundling.onnx_from_subnetwork", export)
    monkeypatch.setattr("ddsm_export.bundling.measure_parity", lambda *_: parity)
    return widths


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a checkpoint was exported under the default name."""
    folder = tmp_path_factory.mktemp("cli")
    source = save(checkpoint(SMALL), folder)
    assert main([str(source), *SMALL_ROUNDING, "--widths", "2/8,8/8"]) == 0
    return folder


def test_a_published_checkpoint_becomes_a_bundle_beside_it(exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == {"ckpt.pt", "flagfile.txt", "ckpt.bundle"}
    bundle = Bundle.open(exported / "ckpt.bundle")
    assert list(bundle.variants) == ["w004", "w016"]
    for v in bundle.variants.values():
        onnx.checker.check_model(onnx.load(str(bundle.artefact(v))))
        assert 0 < v.parity.relative_l2 <= v.parity.tolerance == 5e-6
    assert bundle.manifest.provenance["supernet"] == {
        "format": "ddsm-checkpoint",
        "source": "ckpt.pt",
        "weights": "ema",
        "step": 7,
        "sha256": sha256_of(exported / "ckpt.pt"),
    }


def test_options_and_flagfile_together_make_the_spec(exported: Path) -> None:
    manifest = Bundle.open(exported / "ckpt.bundle").manifest
    spec, schedule = manifest.spec, manifest.noise_schedule
    assert (spec.groups, spec.conv_multiple, spec.linear_multiple, spec.image_size) == (4, 4, 4, 8)
    assert (spec.base_channels, spec.channel_mults, spec.attention_levels, spec.timesteps) == (16, (1,), (), 20)
    assert (schedule.beta_start, schedule.beta_end, schedule.variance_type) == (1e-4, 0.02, "fixed_large")


def test_the_bundle_keeps_the_time_table_of_the_checkpoint(exported: Path) -> None:
    table = published_state_dict(SMALL, seed=2)[TABLE].numpy()
    bundle = Bundle.open(exported / "ckpt.bundle")
    assert (bundle.time_table(bundle.full)[range(20)] == table).all()


def test_inspect_reads_what_export_wrote(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(exported / "ckpt.bundle")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("w0")]
    assert [row[:3] for row in rows] == [["w004", "4", "(2/8)"], ["w016", "16", "(8/8)"]]


def test_a_second_export_is_refused_and_changes_nothing(exported: Path, refusal: Refusal, no_export: list[int]) -> None:
    before = listing(exported)
    message = refusal(main, exported / "ckpt.pt", *SMALL_ROUNDING)
    assert "ckpt.bundle exists already; choose another output or add --force" in message
    assert listing(exported) == before
    assert no_export == []


# --- widths -----------------------------------------------------------------------------------------------------------


def test_every_width_that_works_is_exported_and_the_others_are_named_with_the_reason(
    tmp_path: Path, no_export: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(checkpoint(WIDE), tmp_path, FLAGFILE.format(ch=32))
    assert main([str(source), "--groups", "8", "-o", str(tmp_path / "b")]) == 0
    captured = capsys.readouterr()
    left_out = [line for line in captured.err.splitlines() if line.startswith("leaving out")]
    assert left_out == [
        "leaving out 8 (2/8): 8 channels of a convolution meet 16 of a linear (multiple 16)",
        "leaving out 12 (3/8): 12 channels are not a multiple of 8 (convolutions)",
        "leaving out 20 (5/8): 20 channels are not a multiple of 8 (convolutions)",
        "leaving out 24 (6/8): 24 channels of a convolution meet 32 of a linear (multiple 16)",
        "leaving out 28 (7/8): 28 channels are not a multiple of 8 (convolutions)",
    ]
    assert no_export == [16, 32]
    assert list(Bundle.open(tmp_path / "b").variants) == ["w016", "w032"]
    assert "2 variants; look inside with: ddsm inspect" in captured.out


def test_thirty_two_groups_leave_out_what_they_do_not_divide(
    tmp_path: Path, no_export: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(checkpoint(WIDE), tmp_path, FLAGFILE.format(ch=32))
    assert main([str(source), "--groups", "32", "-o", str(tmp_path / "b")]) == 0
    assert "leaving out 16 (4/8): 16 channels cannot be normalised in 32 groups" in capsys.readouterr().err
    assert no_export == [32]


@pytest.mark.parametrize(
    ("text", "widths"), [("4,16", [4, 16]), ("8/8, 2/8", [4, 16]), ("0.5", [8]), ("12,6/8,12", [12])]
)
def test_widths_are_channels_or_eighths(tmp_path: Path, no_export: list[int], text: str, widths: list[int]) -> None:
    source = save(checkpoint(SMALL), tmp_path)
    assert main([str(source), *SMALL_ROUNDING, "--widths", text]) == 0
    assert no_export == widths


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("48", "width 48 (24/8) cannot be cut: width 48 is not within 1…16; widths that work: 4 (2/8), 8 (4/8)"),
        ("6", "6 (3/8) cannot be cut: 6 channels are not a multiple of 4"),
        ("2/8,3/8", "6 (3/8) cannot be cut"),
        ("0", "cannot be cut"),
        ("-4", "found '-4'"),
        ("1e-999999999", "found '1e-999999999'"),
        ("1/5", "1/5 of 16 channels is not a whole number"),
        ("wide", "--widths takes channels (32,64) or eighths (2/8,4/8), found 'wide'"),
        ("", "--widths takes channels (32,64) or eighths (2/8,4/8), found ''"),
        ("4,,8", "found ''"),
        ("1/0", "found '1/0'"),
    ],
)
def test_a_width_that_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, refusal: Refusal, no_export: list[int], text: str, words: str
) -> None:
    source = save(checkpoint(SMALL), tmp_path)
    before = listing(tmp_path)
    assert words in refusal(main, source, *SMALL_ROUNDING, f"--widths={text}")
    assert listing(tmp_path) == before
    assert no_export == []


# --- facts ------------------------------------------------------------------------------------------------------------


def test_facts_that_nobody_gave_are_asked_for_in_one_line(
    tmp_path: Path, refusal: Refusal, no_export: list[int]
) -> None:
    source = save(checkpoint(SMALL), tmp_path, flagfile=None)
    message = refusal(main, source)
    for option in ("--groups N", "--image-size PIXELS", "--beta-1 BETA", "--beta-T BETA", "--var-type", "--flagfile"):
        assert option in message
    assert listing(tmp_path) == ["ckpt.pt"]
    assert main([str(source), *FACTS, *SMALL_ROUNDING]) == 0, "and with them it works"


def test_a_flagfile_elsewhere_is_named_and_an_absent_one_is_refused(
    tmp_path: Path, refusal: Refusal, no_export: list[int]
) -> None:
    source = save(checkpoint(SMALL), tmp_path)
    elsewhere = tmp_path / "flags"
    os.replace(tmp_path / "flagfile.txt", elsewhere)
    assert "a checkpoint does not record" in refusal(main, source, *SMALL_ROUNDING)
    assert "absent.txt, which cannot be read" in refusal(main, source, "--flagfile", tmp_path / "absent.txt")
    assert no_export == []
    assert main([str(source), *SMALL_ROUNDING, "--flagfile", str(elsewhere)]) == 0


def test_an_option_wins_over_the_flagfile(tmp_path: Path, no_export: list[int]) -> None:
    source = save(checkpoint(SMALL), tmp_path)
    assert main([str(source), *SMALL_ROUNDING, "--beta-T", "0.03", "--var-type", "fixedsmall"]) == 0
    schedule = Bundle.open(tmp_path / "ckpt.bundle").manifest.noise_schedule
    assert (schedule.beta_start, schedule.beta_end, schedule.variance_type) == (1e-4, 0.03, "fixed_small")


def test_the_raw_weights_are_a_choice(tmp_path: Path, no_export: list[int]) -> None:
    source = save(checkpoint(SMALL), tmp_path)
    assert main([str(source), *SMALL_ROUNDING, "--weights", "net"]) == 0
    assert Bundle.open(tmp_path / "ckpt.bundle").manifest.provenance["supernet"]["weights"] == "net"


# --- refusals ---------------------------------------------------------------------------------------------------------


class _Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def _state(**changes: Tensor) -> dict[str, Tensor]:
    return published_state_dict(SMALL, seed=0) | changes


def _without(key: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in _state().items() if name != key}


def _truncated(path: Path) -> None:
    torch.save(checkpoint(SMALL), path)
    os.truncate(path, path.stat().st_size // 2)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncated, "is truncated, damaged or no checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "has 0 bytes"),
    "text": (lambda path: path.write_text("step,loss\n"), "is not a training checkpoint"),
    "code": (
        lambda path: torch.save({"ema_model": _state(), "step": _Attack(path.with_name("ran"))}, path),
        "holds code or objects other than tensors",
    ),
    "pickle": (
        lambda path: path.write_bytes(pickle.dumps(_Attack(path.with_name("ran")), 4)),
        "can hold code and was refused",
    ),
    "other-architecture": (lambda path: torch.save({"conv_in.weight": torch.zeros(8, 3, 3, 3)}, path), "another archi"),
    "missing-key": (lambda path: torch.save(_without("tail.2.bias"), path), "missing tail.2.bias"),
    "extra-key": (lambda path: torch.save(_state(cond=torch.zeros(1)), path), "unexpected cond"),
    "nan": (lambda path: torch.save(_state(**{"tail.2.bias": torch.full((3,), torch.nan)}), path), "is not finite"),
    "wrong-shape": (lambda path: torch.save(_state(**{"tail.2.bias": torch.zeros(4)}), path), "tail.2.bias"),
    "absent": (lambda path: path.unlink(), "found no such file"),
    "folder": (lambda path: os.replace(path.with_name("empty"), path), "expected a folder that diffusers saved"),
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", SPOILT)
def test_a_file_that_cannot_be_a_supernet_is_one_line_and_no_folder(
    tmp_path: Path, refusal: Refusal, no_export: list[int], kind: str, *, force: bool
) -> None:
    spoil, words = SPOILT[kind]
    source = save(_state(), tmp_path)
    if kind == "folder":
        source.unlink()
        source.with_name("empty").mkdir()
    spoil(source)
    if force:  # what is there must stay there until its successor is whole
        (tmp_path / "ckpt.bundle").mkdir()
        (tmp_path / "ckpt.bundle" / "manifest.json").write_text("old")
    before = listing(tmp_path)
    assert words in refusal(main, source, *SMALL_ROUNDING, *(["--force"] if force else []))
    assert listing(tmp_path) == before, "nothing written, and no code of the file was run"
    assert no_export == []


def test_the_unspoilt_checkpoint_of_these_refusals_is_exported(tmp_path: Path, no_export: list[int]) -> None:
    assert main([str(save(_state(), tmp_path)), *SMALL_ROUNDING]) == 0
    assert no_export == [4, 8, 12, 16]


def test_the_attack_of_these_refusals_is_real(tmp_path: Path) -> None:
    SPOILT["pickle"][0](tmp_path / "ckpt.pt")
    pickle.loads((tmp_path / "ckpt.pt").read_bytes())
    assert (tmp_path / "ran").is_dir()


def test_an_option_that_does_not_exist_is_a_matter_of_usage(tmp_path: Path) -> None:
    source = save(_state(), tmp_path)
    for wrong in (["--opset", "16"], ["--precision", "int8"], ["--groups", "many"]):
        with pytest.raises(SystemExit) as caught:
            main([str(source), *wrong])
        assert caught.value.code == 2
    assert not list(tmp_path.glob("*.bundle"))


def test_a_disk_that_refuses_is_one_line(
    tmp_path: Path, refusal: Refusal, no_export: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ddsm_export.bundling.save_supernet", full)
    source = save(_state(), tmp_path)
    before = listing(tmp_path)
    assert "No space left on device" in refusal_with_progress(main, source, *SMALL_ROUNDING)
    assert listing(tmp_path) == before


def refusal_with_progress(command: Callable[[list[str]], int], *arguments: object) -> str:
    """As ``refusal``, where lines of progress may precede the refusal."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        assert command([str(argument) for argument in arguments]) == 1
    lines = stderr.getvalue().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


def test_a_bundle_that_was_moved_is_whole(exported: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(exported / "ckpt.bundle", tmp_path / "elsewhere"))
    bundle = Bundle.open(moved)
    assert all(bundle.artefact(v).is_file() for v in bundle.variants.values())
    assert bundle.weights(bundle.full).is_file()


# --- precision and opset ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "options", "opset"),
    [
        ("fp32", [], 18),
        ("fp16", [], 18),
        ("fp32", ["--opset", "21"], 21),
        ("bf16", [], 22),
        ("bf16", ["--opset", "22"], 22),
    ],
)
def test_the_opset_follows_the_precision(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_export: list[int],
    precision: str,
    options: list[str],
    opset: int,
) -> None:
    asked: list[tuple[object, object]] = []

    def export(unet: Any, path: Path, *, precision: str, opset: int) -> None:
        asked.append((precision, opset))
        path.write_bytes(b"no network")

    monkeypatch.setattr("ddsm_export.bundling.onnx_from_subnetwork", export)
    source = save(checkpoint(SMALL), tmp_path)
    arguments = [str(source), *SMALL_ROUNDING, "--widths", "2/8", "--precision", precision, *options]
    assert main(arguments) == 0
    assert asked == [(precision, opset)]
    manifest = Bundle.open(tmp_path / "ckpt.bundle").manifest
    assert (manifest.variants[0].precision, manifest.provenance["opset"]) == (precision, opset)


@pytest.mark.parametrize(("precision", "opset", "allowed"), [("bf16", "18", "22"), ("fp16", "22", "17 to 21")])
def test_an_opset_without_the_precision_is_refused(
    tmp_path: Path, refusal: Refusal, no_export: list[int], precision: str, opset: str, allowed: str
) -> None:
    source = save(checkpoint(SMALL), tmp_path)
    message = refusal(main, source, *SMALL_ROUNDING, "--precision", precision, "--opset", opset)
    assert f"files in {precision} are written in opset {allowed}, found {opset}: leave --opset out" in message
    assert no_export == []
    assert not (tmp_path / "ckpt.bundle").exists()
