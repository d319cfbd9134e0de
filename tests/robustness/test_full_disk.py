"""A disk that is full, and folders that may not be written: one line, and nothing that existed is lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddsm_engine.files import SUFFIX
from tests.robustness.scenarios import content

DRAW = [
    "run", "--bundle", "tiny.bundle", "--strategy", "coarse", "--sampler", "ddim", "--steps", "2",
    "--backend", "onnxruntime", "--threads", "1",
]  # fmt: skip
TRAIN = [
    "train", "data.npz", "--image-size", "8", "--channels", "1", "--base-channels", "16", "--channel-mults", "1",
    "--attention-levels", "", "--groups", "2", "--num-res-blocks", "1", "--conv-multiple", "4", "--linear-multiple",
    "4", "--timesteps", "50", "--batch-size", "4", "--precision", "fp32", "--images", "8", "--samples-every", "1000000",
]  # fmt: skip

COMMANDS = {
    "a grid": [*DRAW, "--num-images", "64", "-o", "grid.png", "--force"],
    "an array": [*DRAW, "--num-images", "16", "-o", "array.npz", "--force"],
    "a folder": [*DRAW, "--num-images", "2", "-o", "images", "--force"],
    "a trace": [*DRAW, "--num-images", "1", "-o", "new.png", "--trace", "trace.json", "--force"],
    "a bundle": ["export", "supernet.safetensors", "-o", "old.bundle", "--widths", "2/8", "--force"],
    "engines": ["build", "tiny.bundle", "--batch-size", "1", "--threads", "1"],
    "a training": [*TRAIN, "-o", "training"],
}
"""Each replaces something that exists, or adds to it."""

LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
os.execv(sys.argv[1], sys.argv[1:])
"""
FULL = [sys.executable, "-c", LIMITED]
"""No file may grow beyond 200 bytes: what a full disk says, in the middle of a file. (Python ignores the signal.)"""


@pytest.fixture(scope="module")
def here(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with an older output of everything."""
    folder = tmp_path_factory.mktemp("full")
    shutil.copytree(bundle_path, folder / "tiny.bundle")
    (folder / "supernet.safetensors").write_bytes((bundle_path / "weights.safetensors").read_bytes())
    (folder / "old.bundle").mkdir()
    (folder / "old.bundle/manifest.json").write_text("old")
    np.savez(folder / "data.npz", images=np.zeros((8, 8, 8), np.uint8))
    for name in ("grid.png", "array.npz", "trace.json"):
        (folder / name).write_text("old")
    for name, file in (("images", "run.json"), ("training", "notes.txt")):
        (folder / name).mkdir()
        (folder / name / file).write_text("old")
    return folder


@pytest.mark.parametrize("what", COMMANDS)
def test_a_full_disk_is_one_line_and_loses_nothing(here: Path, what: str) -> None:
    before = content(here)
    line = one_line([*FULL, sys.executable, "-m", "ddsm_engine.cli", *COMMANDS[what]], here)
    assert "File too large" in line
    unchanged(here, before)


def one_line(command: list[str], folder: Path, **options: Any) -> str:
    """The refusal of a command that must be refused."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def unchanged(here: Path, before: dict[str, bytes]) -> None:
    after = content(here)
    assert {name: after.get(name) for name in before} == before
    assert list(here.rglob(f".*{SUFFIX}")) == []


READ_ONLY = [
    "unshare",
    "--mount",
    "sh",
    "-c",
    'mount --bind . . && mount -o remount,ro,bind . && cd "$PWD" && "$@"',
    "-",
]


@pytest.mark.parametrize("what", COMMANDS)
def test_a_read_only_disk_is_one_line_and_loses_nothing(here: Path, what: str) -> None:
    if subprocess.run([*READ_ONLY, "true"], cwd=here, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs root")
    before = content(here)
    environment = os.environ | {"XDG_CACHE_HOME": str(here / "cache")}
    line = one_line([*READ_ONLY, sys.executable, "-m", "ddsm_engine.cli", *COMMANDS[what]], here, env=environment)
    assert "not a folder that you may write to" in line or "Read-only file system" in line
    unchanged(here, before)
