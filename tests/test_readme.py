"""Every command of the README is executed; the two that install are run by ``.ci/run``."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from tests.conftest import CONFIG, STATE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(console|python)\n(.*?)```", README, flags=re.DOTALL)
INSTALLS = "python -m pip install"
COMMANDS = [line for kind, block in BLOCKS if kind == "console" for line in block.strip().splitlines()]
CODE = [block for kind, block in BLOCKS if kind == "python"]

FLAGFILE = f"""--ch={CONFIG.ch}
--groups_note=unknown flags are ignored
--slimmable_unet
--noslimmable_g16
--img_size=8
--beta_1=0.0001
--beta_T=0.02
--var_type=fixedlarge
--mean_type=epsilon
"""

EXTRA = {
    # The tiny checkpoint needs rounding of its own; the published one does not. A width takes nine seconds to export.
    "ddsm-export ckpt.pt": " --groups 4 --conv-multiple 4 --linear-multiple 4 --widths 4/8,8/8",
    # Thousands of images, for a figure that nobody here reads.
    "ddsm bench": " --repeats 3",
    "ddsm search": " --images 10 --holdout 8 --probes 4 --points 3",
    "ddsm evaluate": " --images 16",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a published-style checkpoint with its flagfile, a search's output, and training images."""
    path = tmp_path_factory.mktemp("readme")
    torch.save({"net_model": STATE, "ema_model": STATE, "sched": {}, "optim": {}, "step": 7}, path / "ckpt.pt")
    (path / "flagfile.txt").write_text(FLAGFILE)
    (path / "search.txt").write_text(str([1] * 400 + [0.5] * 400 + [1] * 200))
    pixels = np.random.default_rng(0).integers(0, 255, (80, 8, 8, 3), dtype=np.uint8)
    np.savez(path / "images.npz", images=pixels)
    for name, channels in (("my-ddpm", 16), ("my-small-ddpm", 8)):
        unet = UNet2DModel(
            sample_size=8, block_out_channels=(channels, 2 * channels), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(path / name)
    return path


def own(line: str) -> list[str]:
    """The words of a line of the README, with the environment's own commands."""
    first, *rest = line.split()
    return [sys.executable if first == "python" else str(Path(sys.executable).with_name(first)), *rest]


def run(command: list[str], folder: Path) -> str:
    """Run a command where its files are."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # torch's second thread only waits where other tests run, too
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_readme_names_the_two_install_lines() -> None:
    installs = [line for line in COMMANDS if line.startswith(INSTALLS)]
    assert installs == [
        'python -m pip install -c constraints.txt -e ".[cpu,export]" && ddsm demo',
        'python -m pip install -c constraints.txt -e ".[dev]" && python -m pytest',
    ]


def test_every_other_command_works_in_order(folder: Path) -> None:
    commands = [line for line in COMMANDS if not line.startswith(INSTALLS)]
    assert len(commands) >= 7
    output = {}
    for command in commands:
        extra = next((more for start, more in EXTRA.items() if command.startswith(start)), "")
        output[command] = run(own(command + extra), folder)
    assert "2 variants" in output["ddsm-export ckpt.pt -o my.bundle"]
    assert "2 swaps" in output["ddsm inspect search.txt --bundle my.bundle"]
    assert (folder / "images.png").stat().st_size > 0
    assert len(list((folder / "images").glob("*.png"))) == 16
    assert (folder / "training" / "supernet.safetensors").exists()
    assert (folder / "my.search" / "report.html").is_file()
    assert "2 variants" in output["ddsm-export my-ddpm my-small-ddpm -o pair.bundle"]
    assert (folder / "pipelines" / "w032" / "model_index.json").is_file()


def test_the_python_examples_run_as_they_stand(folder: Path) -> None:
    assert (folder / "my.bundle").is_dir(), "made by the commands above"
    printed = []
    for code in CODE:
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert printed[0].startswith("(4, 3, 8, 8) ")
    assert (folder / "first.png").is_file(), "drawn by the example of diffusers"


def test_links_of_the_readmes_lead_somewhere() -> None:
    for readme in [ROOT / "README.md", *ROOT.glob("*/README.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", readme.read_text(encoding="utf-8")):
            assert (readme.parent / target).exists(), f"{readme.relative_to(ROOT)} → {target}"
