"""The module that speaks to CUDA: the real cuda-bindings and NVRTC over an invented driver, and a stand-in for pycuda.

What it shows is that every call exists, takes what it is given, and draws the graphs that it should; what a real driver
makes of them only a GPU can say.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cuda.bindings.driver")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def library_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("libcuda")
    target = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", target, HERE / "fake_libcuda.c", "-ldl"], check=True)
    return folder


def session(library_folder: Path, **environment: str) -> dict[str, Any]:
    """What the session prints; it must not end otherwise than by itself."""
    roots = [str(HERE / "stand_in"), *(path for path in sys.path if path)]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.gpu.cuda_session"],
        env={**os.environ, "LD_LIBRARY_PATH": str(library_folder), "PYTHONPATH": os.pathsep.join(roots), **environment},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode in (0, 1), ended.stderr
    lines = ended.stdout.splitlines()
    assert lines, ended.stderr
    said: dict[str, Any] = json.loads(lines[-1])
    return said


def test_memory_kernels_and_graphs(library_folder: Path) -> None:
    said = session(library_folder)
    assert said["properties"] == ["Invented GPU", "9.0", [13, 2], 1 << 20]
    assert said["copied"]
    assert said["shared"]
    assert said["nodes"] == [1, 2, 0]
    assert said["chain"] == "(first)>(second>first)>(first)"
    assert said["loop"] == "while{(first)>switch{(second>first);(first);(second>first)}}"
    assert said["handles"][0] != said["handles"][1]
    assert said["launched"] == "first[(first)>(second>first)>(first)]"
    assert said["after an error"] == 1
    assert (
        'NVRTC cannot compile for compute capability 9.0: kernel.cu(1): error: identifier "nothing"' in said["mistake"]
    )
    assert said["space"] == 32, "what NVRTC writes to is nobody else's"
    assert said["alive"] == [0, 0]
    assert said["blocks left"] == 0
    assert said["contexts beside one in use"] == [0, 1]
    assert said["contexts left"] == [0, 0], "a context that was released would stay current"


@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        ("init", "CUDA refused to start: cuInit failed: no CUDA-capable device"),
        ("cuStreamBeginCapture", "CUDA refused to capture: CUDA_ERROR_INVALID_VALUE"),
        ("cuStreamEndCapture", "CUDA refused to end a capture"),
        ("cuGraphAddChildGraphNode", "a graph within a graph: CUDA_ERROR_NOT_SUPPORTED"),
        ("cuGraphAddNode", "CUDA refused a conditional node: CUDA_ERROR_NOT_SUPPORTED"),
        ("cuGraphInstantiate", "CUDA refused to make a graph launchable"),
        ("cuGraphLaunch", "CUDA refused to launch a graph"),
    ],
)
def test_what_the_driver_refuses_is_a_refusal(library_folder: Path, refuses: str, message: str) -> None:
    assert message in session(library_folder, FAKE_CUDA_REFUSES=refuses)["refused"]


def test_no_gpu_and_no_memory_are_refusals(library_folder: Path) -> None:
    assert "expected GPU 0, found 0 GPUs" in session(library_folder, FAKE_CUDA_GPUS="0")["refused"]
    assert "out of GPU memory" in session(library_folder, FAKE_CUDA_ROOM="32")["refused"]


def test_only_this_module_reaches_for_the_driver() -> None:
    root = HERE.parents[1]
    found = {
        str(file.relative_to(root))
        for folder in ("ddsm_engine", "export", "kernels")
        for file in (root / folder).rglob("*.py")
        if re.search(r"^\s*(from|import) (pycuda|cuda)\b", file.read_text(), re.M)
    }
    assert found <= {"ddsm_engine/backends/cuda.py", "ddsm_engine/doctor/probe.py", "ddsm_engine/doctor/cuda.py"}
    assert "ddsm_engine/backends/cuda.py" in found
