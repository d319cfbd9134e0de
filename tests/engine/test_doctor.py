"""The doctor sees only what it is given: fake trees of the kernel's files, lists of distributions, broken libraries."""

import fcntl
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

import ddsm_engine
from ddsm_engine import doctor
from ddsm_engine.backends import is_installed
from ddsm_engine.doctor import Examination, backends, describe, libraries, machine
from ddsm_engine.doctor import cuda as doctor_cuda
from ddsm_engine.doctor.backends import Backend, ask, probe
from ddsm_engine.doctor.cuda import Cuda, check_cuda, check_driver, read_cuda
from ddsm_engine.doctor.finding import Finding
from ddsm_engine.doctor.libraries import fits, read_libraries
from ddsm_engine.doctor.machine import Cache, Gpu, Limits, Processor, read_cache, read_gpu, read_limits
from ddsm_engine.doctor.probe import MODEL
from ddsm_engine.files import SUFFIX
from ddsm_engine.measure import environment

METADATA = [
    "numpy>=1.26",
    "pyyaml>=6.0.1",
    "openvino>=2025.0; extra == 'cpu'",
    "onnxruntime>=1.20; extra == 'cpu'",
    "onnxruntime-gpu>=1.27; extra == 'gpu'",
    "torch<2.14,>=2.11; extra == 'export'",
    "onnx>=1.21; extra == 'export'",
    "torch<2.14,>=2.11; extra == 'train'",
    "ddsm-engine[cpu,export]; extra == 'dev'",
    "pytest>=8.3; extra == 'dev'",
    "types-tqdm; extra == 'dev'",
]
INSTALLED = {
    "ddsm-engine": "0.1.0",
    "numpy": "2.4.6",
    "pyyaml": "6.0.3",
    "openvino": "2026.4.1",
    "onnxruntime": "1.31.1",
}
H100 = "NVIDIA H100, 580.65.06, 81559 MiB\n"


def healthy(installed: dict[str, str] | None = None, **changes: object) -> Examination:
    """A machine with nothing wrong: 8 cores, both CPU backends, no torch, no GPU, no limits."""
    installed = INSTALLED if installed is None else installed
    works = {"works": True, "auto_precision": "fp32", "threads": 8}
    facts = {
        "installed": installed,
        "libraries": read_libraries(METADATA, installed),
        "backends": (Backend(name="openvino", **works), Backend(name="onnxruntime", **works)),  # type: ignore[arg-type]
        "processor": Processor(model="Some CPU", features=("avx2",), cores=8),
        "limits": Limits(cgroup=2, memory_room_mb=16_000),
        "gpu": Gpu(),
        "cache": Cache(path="/home/a/.cache/ddsm-engine", writable=True),
    }
    return Examination(**{**facts, **changes})  # type: ignore[arg-type]


def only(examination: Examination) -> Finding:
    (finding,) = examination.findings
    return finding


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_healthy_machine_has_no_finding() -> None:
    assert healthy().findings == ()
    assert describe(healthy()).endswith("findings: none")


def test_the_exit_code_says_whether_there_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", healthy)
    assert doctor.main([]) == 0
    assert capsys.readouterr().err == ""
    note = healthy(cache=Cache(path="/c", writable=True, leftovers=("/c/.a.x.ddsm-partial",)))
    monkeypatch.setattr(doctor, "examine", lambda: note)
    assert doctor.main([]) == 0
    assert capsys.readouterr().err == ""
    sick = healthy(cache=Cache(path="/c", writable=False), backends=())
    monkeypatch.setattr(doctor, "examine", lambda: sick)
    assert doctor.main(["--json"]) == 1
    out, err = capsys.readouterr()
    assert err == "error: 2 problems found; each is named above with its repair\n"
    assert [finding["severity"] for finding in json.loads(out)["findings"]] == ["problem", "problem"]


def test_the_json_has_the_fields_that_the_documentation_lists() -> None:
    printed = json.loads(json.dumps(healthy(gpu=Gpu(driver="580.65.06")).to_json()))
    documented = re.findall(r"^- ``(\w+)``", doctor.__doc__ or "", flags=re.MULTILINE)
    assert set(printed) == {*documented, "format_version"}
    paragraphs = dict(
        re.findall(r"^- ``(\w+)``: (.*?)(?=\n- |\n\n)", doctor.__doc__ or "", flags=re.MULTILINE | re.DOTALL)
    )
    for section in set(documented) - {"format"}:
        rows = printed[section] if isinstance(printed[section], list) else [printed[section]]
        assert rows, section
        for row in rows:
            assert set(row) <= set(re.findall(r"``(\w+)``", paragraphs[section])), section


def test_the_report_says_what_the_json_says() -> None:
    sick = healthy(
        gpu=Gpu(driver="580.65.06"),
        limits=Limits(cgroup=1, cpu_quota=1.5, cpuset="0-3", memory_limit_mb=512, memory_room_mb=100),
        backends=(Backend(name="openvino", error="ImportError: libopenvino.so"),),
    )
    text = describe(sick)
    for fact in (
        "0.1.0",
        "1.31.1",
        "Some CPU",
        "8 cores",
        "avx2",
        "1.5 CPUs",
        "0-3",
        "512 MB",
        "580.65.06",
        "libopenvino",
    ):
        assert fact in text, fact
    for finding in sick.findings:
        assert f"{finding.severity}: expected {finding.expected}; found {finding.found}" in text
        assert finding.repair in text
    assert text.index("findings") > text.index("cache")


def test_a_library_below_its_minimum_is_named_with_the_line_that_lifts_it() -> None:
    finding = only(healthy(INSTALLED | {"onnxruntime": "1.19.2"}))
    assert (finding.severity, finding.found) == ("problem", "onnxruntime 1.19.2")
    assert finding.repair == "pip install --upgrade 'onnxruntime>=1.20'"


def test_a_library_above_its_maximum_is_named_too() -> None:
    found = healthy(INSTALLED | {"torch": "2.14.0", "onnx": "1.23.2"}).findings
    assert [finding.repair for finding in found] == ["pip install --upgrade 'torch>=2.11,<2.14'"]


def test_a_library_that_every_command_needs_is_a_problem_and_one_of_an_extra_is_not() -> None:
    finding = only(healthy({name: version for name, version in INSTALLED.items() if name != "pyyaml"}))
    assert finding.repair == "pip install --upgrade 'pyyaml>=6.0.1'"
    assert finding.severity == "problem"


def test_an_old_tool_of_a_contributor_is_no_problem() -> None:
    assert only(healthy(INSTALLED | {"pytest": "7.0"})).severity == "note"


def test_a_folder_that_is_not_installed_is_a_problem() -> None:
    assert "pip install" in only(healthy(libraries=())).repair


@pytest.mark.parametrize(
    ("version", "required", "expected"),
    [
        ("1.26.0", ">=1.26", True),
        ("1.26", ">=1.26.0", True),
        ("1.9.9", ">=1.26", False),
        ("2.13.0+cpu", ">=2.11,<2.14", True),
        ("2.14", ">=2.11,<2.14.0", False),
        ("10.0", ">=9.9", True),
        ("20261106", "", True),
        ("1.2.post1", "!=1.2", False),
    ],
)
def test_versions_are_compared_as_numbers(version: str, required: str, *, expected: bool) -> None:
    assert fits(version, required) is expected


def test_requirements_of_several_extras_are_one_row() -> None:
    (torch,) = (library for library in read_libraries(METADATA, {"torch": "2.13.0"}) if library.name == "torch")
    assert (torch.required, torch.extras, torch.installed) == (">=2.11,<2.14", ("export", "train"), "2.13.0")


def test_every_requirement_of_the_package_is_understood() -> None:
    requirements = libraries.own_requirements()
    names = {re.match(r"[\w.-]+", line)[0] for line in requirements} - {"ddsm-engine"}  # type: ignore[index]
    read = read_libraries(requirements, {})
    assert {library.name for library in read} == names
    for library in read:
        clauses = filter(None, library.required.split(","))
        assert all(re.fullmatch(r"(>=|<=|==|!=|>|<)[\d.]+", clause) for clause in clauses), library


def test_distributions_are_found_by_their_normalised_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, name in (("PyYAML-6.0.3.dist-info", "Name: PyYAML\n"), ("half.dist-info", "")):
        tree(tmp_path, {f"{folder}/METADATA": f"Metadata-Version: 2.1\n{name}Version: 6.0.3\n"})
    monkeypatch.setattr(libraries, "distributions", lambda: importlib.metadata.distributions(path=[str(tmp_path)]))
    assert libraries.installed_versions() == {"pyyaml": "6.0.3"}


@pytest.mark.parametrize(("gpu", "extra"), [(Gpu(), "cpu"), (Gpu(driver="580", devices=("H100",)), "gpu")])
def test_both_builds_of_onnx_runtime_overwrite_each_other(gpu: Gpu, extra: str) -> None:
    found = healthy(INSTALLED | {"onnxruntime-gpu": "1.31.0"}, gpu=gpu).findings
    (clash,) = (finding for finding in found if finding.severity == "problem")
    assert "onnxruntime 1.31.1 and onnxruntime-gpu 1.31.0" in clash.found
    assert clash.repair == f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'ddsm-engine[{extra}]'"


def test_without_any_backend_the_extra_is_named() -> None:
    finding = only(healthy(backends=()))
    assert (finding.severity, finding.repair) == ("problem", "pip install 'ddsm-engine[cpu]'")


@pytest.mark.parametrize(
    ("installed", "name", "repair"),
    [
        (INSTALLED, "openvino", "pip install --force-reinstall 'openvino>=2025.0'"),
        (INSTALLED, "onnxruntime", "pip install --force-reinstall 'onnxruntime>=1.20'"),
        ({"onnxruntime-gpu": "1.31.1"}, "onnxruntime", "pip install --force-reinstall 'onnxruntime-gpu>=1.27'"),
    ],
)
def test_a_broken_backend_is_shown_with_its_error(installed: dict[str, str], name: str, repair: str) -> None:
    broken = Backend(name=name, error="ImportError: no such library")
    found = list(backends.check_backends([broken], read_libraries(METADATA, installed), Gpu()))
    assert [(finding.severity, finding.found, finding.repair) for finding in found] == [
        ("problem", "ImportError: no such library", repair)
    ]


FAKE_LIBRARIES = {
    "is not importable": ("raise ImportError('libonnxruntime.so: cannot open')", "cannot open"),
    "raises nonsense": ("raise ZeroDivisionError", "ZeroDivisionError"),
    "kills its process": ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL"),
    "leaves without a word": ("import os; os._exit(0)", "exit code 0"),
    "is an empty folder": ("", "AttributeError"),
    "never returns": ("import time; time.sleep(60)", "no answer within 1.5 s"),
}


@pytest.mark.parametrize(("code", "expected"), FAKE_LIBRARIES.values(), ids=FAKE_LIBRARIES)
def test_a_library_that_is_broken_cannot_stop_the_doctor(tmp_path: Path, code: str, expected: str) -> None:
    tree(tmp_path, {"torch.py": code})
    found = probe("torch", search_path=[tmp_path, *sys.path], timeout_s=1.5 if "sleep" in code else 60)
    assert not found.works
    assert expected in found.error


@pytest.mark.parametrize("name", ["openvino", "onnxruntime", "native", "torch"])
def test_a_backend_that_works_says_what_it_can_do(name: str) -> None:
    found = probe(name)
    assert found.works, found.error
    assert found.auto_precision in ("fp32", "bf16")
    assert found.threads is not None
    assert found.threads >= 1


def test_wrong_numbers_are_a_broken_backend(tmp_path: Path) -> None:
    fake = """
        class Tensor:
            def __init__(self, array): self.array = array
            def to(self, device): return self
            def cpu(self): return self
            def numpy(self): return self.array
        from_numpy = Tensor
        def relu(tensor): return tensor
    """
    tree(tmp_path, {"torch.py": "\n".join(line[8:] for line in fake.splitlines())})
    assert "came out as" in probe("torch", search_path=[tmp_path, *sys.path]).error


FAKE_TORCH = """
import numpy
class Tensor:
    def __init__(self, array): self.array = array
    def to(self, device): return self
    cpu = reshape = lambda self, *shape: self
    def numpy(self): return self.array
from_numpy = Tensor
ones = lambda size: None
def relu(tensor): return Tensor(numpy.maximum(tensor.array, 0))
def get_num_threads(): return 1
class cuda:
    @staticmethod
    def is_available(): return True
class version:
    cuda = "13.0"
"""


@pytest.mark.parametrize(
    ("error", "repair"),
    [
        ("__import__('subprocess').CalledProcessError(1, ['gcc', 'cuda_utils.c'])", "apt-get install -y gcc python3-"),
        ("AssertionError('libcuda.so cannot found!')", "sudo /sbin/ldconfig"),
        ("RuntimeError('Failed to find C compiler. Please specify via CC')", "apt-get install -y gcc python3-dev"),
        ("OSError('libtriton.so')", "pip install triton"),
    ],
    ids=["no Python.h", "no libcuda", "no compiler", "a broken Triton"],
)
def test_a_triton_that_launches_nothing_is_named_with_its_repair(tmp_path: Path, error: str, repair: str) -> None:
    tree(tmp_path, {"torch.py": FAKE_TORCH, "triton/__init__.py": f"raise {error}", "triton/language.py": ""})
    found = probe("torch", search_path=[tmp_path, *sys.path])
    assert (found.works, found.cuda) == (True, True)
    assert found.cuda_error.split(":")[0] in error
    finding = only(on_gpu(backends=(found,)))
    assert (finding.severity, finding.found) == ("problem", found.cuda_error)
    assert repair in finding.repair


def test_the_probe_of_our_kernel_knows_its_numbers() -> None:
    """In Triton's interpreter, which is chosen when Triton is imported."""
    pytest.importorskip("triton")
    wrong = "kernel.group_norm_silu = lambda x, *_: x"
    for change, says in (("", "right"), (wrong, "BackendError: the fused norm of [[-1.0, 0.0, 0.5, 2.0]] came out as")):
        code = f"from ddsm_engine.doctor import probe\nimport ddsm_kernels.group_norm_silu as kernel\n{change}\n"
        code += "probe.fused_norm('cpu')\nprint('right')"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False,
            env={**os.environ, "TRITON_INTERPRET": "1"},
        )  # fmt: skip
        assert says in (done.stdout + done.stderr).splitlines()[-1]


def test_the_model_of_the_probe_is_one_operator() -> None:
    model = onnx.load(MODEL)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Relu"]


def test_torch_that_nothing_needs_is_noted() -> None:
    finding = only(healthy(INSTALLED | {"torch": "2.13.0"}))
    assert (finding.severity, finding.repair) == ("note", "pip uninstall -y torch")
    assert healthy(INSTALLED | {"torch": "2.13.0", "onnx": "1.23.2"}).findings == ()


CUDA_TORCH = INSTALLED | {"torch": "2.13.0", "onnx": "1.23.2", "nvidia-cublas": "13.0", "triton": "3.7"}


def test_cuda_in_torch_without_a_gpu_is_noted_with_the_line_for_the_small_build() -> None:
    torch = Backend(name="torch", works=True, offers=("CUDA 13.0",))
    assert only(healthy(CUDA_TORCH, backends=(torch,))).repair == (
        "pip uninstall -y torch nvidia-cublas triton && "
        "pip install --index-url https://download.pytorch.org/whl/cpu 'torch>=2.11,<2.14'"
    )
    with_gpu = healthy(CUDA_TORCH, backends=(torch,), gpu=Gpu(driver="580", devices=("H100",)))
    assert not any("CPU build" in finding.expected for finding in with_gpu.findings)


@pytest.mark.parametrize("flags", ["fpu sse2", "fpu avx2 amx_bf16 amx_int8 avx512f"])
def test_the_processor_is_read_from_the_kernels_file(tmp_path: Path, flags: str) -> None:
    tree(tmp_path, {"proc/cpuinfo": f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n"})
    found = machine.read_processor(tmp_path)
    assert found.model == "Some CPU"
    assert set(found.features) == set(flags.split()) & set(environment.FEATURES)
    assert found.cores >= 1


V2 = {"proc/self/cgroup": "0::/user/job\n", "proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4194304 kB\n"}
V1 = {
    "proc/self/cgroup": "9:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n2:cpuset:/docker/a\n0::/\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
}
GB = 1 << 30


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, Limits(), id="no cgroup"),
        pytest.param(
            V2 | {"sys/fs/cgroup/cpu.max": "max 100000", "sys/fs/cgroup/memory.max": "max"},
            Limits(cgroup=2, memory_room_mb=4096),
            id="v2 without limits",
        ),
        pytest.param(
            V2 | {"sys/fs/cgroup/user/job/cpu.max": "150000 100000", "sys/fs/cgroup/cpu.max": "400000 100000",
                  "sys/fs/cgroup/user/job/cpuset.cpus.effective": "0-3\n"},
            Limits(cgroup=2, cpu_quota=1.5, cpuset="0-3", memory_room_mb=4096),
            id="v2 with a quota",
        ),
        pytest.param(
            V2 | {"sys/fs/cgroup/user/job/cpu.max": "max 100000", "sys/fs/cgroup/user/cpu.max": "50000 100000"},
            Limits(cgroup=2, cpu_quota=0.5, memory_room_mb=4096),
            id="v2 with a tighter quota above",
        ),
        pytest.param(
            V2 | {"sys/fs/cgroup/memory.max": str(2 * GB), "sys/fs/cgroup/memory.current": str(GB),
                  "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {GB // 2}\n"},
            Limits(cgroup=2, memory_limit_mb=2048, memory_room_mb=1536),
            id="v2 with a memory limit",
        ),
        pytest.param(
            V2 | {"sys/fs/cgroup/memory.max": str(64 * GB), "sys/fs/cgroup/memory.current": "0"},
            Limits(cgroup=2, memory_limit_mb=65536, memory_room_mb=4096),
            id="v2 with a limit above what the machine has",
        ),
        pytest.param(V1, Limits(cgroup=1), id="v1 without limits"),
        pytest.param(
            V1 | {"sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_quota_us": "200000",
                  "sys/fs/cgroup/cpu,cpuacct/docker/a/cpu.cfs_period_us": "100000",
                  "sys/fs/cgroup/cpuset/cpuset.effective_cpus": "0,2\n",
                  "sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes": str(GB),
                  "sys/fs/cgroup/memory/docker/a/memory.usage_in_bytes": str(GB // 2)},
            Limits(cgroup=1, cpu_quota=2.0, cpuset="0,2", memory_limit_mb=1024, memory_room_mb=512),
            id="v1 with limits",
        ),
        pytest.param(
            {"proc/self/cgroup": "4:cpu,cpuacct:/../../host/path\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000",
             "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            Limits(cgroup=1, cpu_quota=1.0),
            id="v1 in a container that sees the host's path",
        ),
        pytest.param(
            V2 | {"sys/fs/cgroup/cpu.max": "", "sys/fs/cgroup/memory.max": "nonsense"},
            Limits(cgroup=2, memory_room_mb=4096),
            id="files that say nothing",
        ),
    ],
)  # fmt: skip
def test_limits_are_read_from_the_control_group(tmp_path: Path, files: dict[str, str], expected: Limits) -> None:
    assert read_limits(tree(tmp_path, files)) == expected


@pytest.mark.parametrize(("quota", "threads"), [(2.0, 2), (1.5, 1), (0.25, 1), (7.9, 7)])
def test_more_threads_than_the_quota_are_named_with_the_number_to_use(quota: float, threads: int) -> None:
    finding = only(healthy(limits=Limits(cgroup=2, cpu_quota=quota)))
    assert (finding.severity, finding.repair) == ("note", f"ddsm run --threads {threads}")
    assert "openvino starts 8, onnxruntime starts 8" in finding.found


@pytest.mark.parametrize("quota", [None, 8.0, 32.0])
def test_a_quota_that_is_wide_enough_is_no_finding(quota: float | None) -> None:
    assert healthy(limits=Limits(cgroup=2, cpu_quota=quota)).findings == ()


def test_little_memory_is_noted() -> None:
    finding = only(healthy(limits=Limits(cgroup=2, memory_limit_mb=1024, memory_room_mb=900)))
    assert finding.severity == "note"
    assert "900 MB are free under the limit of 1024 MB" in finding.found


PROPRIETARY = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12.3.0\n"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (a@b)\n"


@pytest.mark.parametrize(("text", "version"), [(PROPRIETARY, "535.104.05"), (OPEN, "580.65.06"), ("nonsense", "")])
def test_the_driver_is_read_from_the_kernels_file(tmp_path: Path, text: str, version: str) -> None:
    tree(tmp_path, {"proc/driver/nvidia/version": text, "dev/nvidia0": "", "dev/nvidiactl": "", "dev/nvidia1": ""})
    assert read_gpu(tmp_path, lambda: "") == Gpu(driver=version, devices=("nvidia0", "nvidia1"))


def test_nvidia_smi_names_the_gpu_and_nonsense_of_its_is_ignored(tmp_path: Path) -> None:
    assert read_gpu(tmp_path, lambda: H100) == Gpu(driver="580.65.06", devices=("NVIDIA H100 (81559 MiB)",))
    assert read_gpu(tmp_path, lambda: "NVIDIA-SMI has failed\n") == Gpu()


def test_nvidia_smi_is_asked_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.query_nvidia_smi() == ""
    program = tmp_path / "nvidia-smi"
    for text, expected in ((f"echo '{H100.strip()}'", H100), ("exit 9", "")):
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        assert machine.query_nvidia_smi() == expected


@pytest.mark.parametrize(
    ("gpu", "package", "repair"),
    [
        (Gpu(driver="580", devices=("H100",)), "onnxruntime",
         "pip uninstall -y onnxruntime && pip install 'ddsm-engine[gpu]'"),
        (Gpu(), "onnxruntime-gpu", "pip uninstall -y onnxruntime-gpu && pip install 'ddsm-engine[cpu]'"),
        (Gpu(driver="580"), "onnxruntime", ""),
    ],
    ids=["a GPU that nothing uses", "a GPU build without a GPU", "a driver without a GPU"],
)  # fmt: skip
def test_a_gpu_and_a_build_that_do_not_fit_are_noted(gpu: Gpu, package: str, repair: str) -> None:
    installed = {name: version for name, version in INSTALLED.items() if name != "onnxruntime"} | {package: "1.31.1"}
    finding = only(healthy(installed, gpu=gpu))
    assert (finding.severity, finding.repair) == ("note", repair)


def test_cuda_that_fails_is_a_problem_only_where_there_is_a_gpu() -> None:
    installed = {name: version for name, version in INSTALLED.items() if name != "onnxruntime"}
    installed |= {"onnxruntime-gpu": "1.31.1", "pycuda": "2026.1", "cuda-bindings": "13.5.0"}
    broken = Backend(name="onnxruntime", works=True, cuda_error="libcudnn.so.9: cannot open")
    found = healthy(installed, backends=(broken,), gpu=Gpu(driver="580", devices=("H100",))).findings
    assert [(finding.severity, finding.found) for finding in found] == [("problem", "libcudnn.so.9: cannot open")]
    assert all(finding.severity == "note" for finding in healthy(installed, backends=(broken,)).findings)


# --- the way to a GPU -------------------------------------------------------------------------------------------------

A100 = Gpu(driver="580.65.06", devices=("NVIDIA A100",))
ON_GPU = {name: version for name, version in INSTALLED.items() if name != "onnxruntime"} | {
    "onnxruntime-gpu": "1.31.1", "tensorrt": "11.4.0.106", "pycuda": "2026.1", "cuda-bindings": "13.5.0",
}  # fmt: skip
RUNS = Cuda(works=True, gpu="NVIDIA A100", compute_capability="8.0", version="13.0")


def on_gpu(installed: dict[str, str] | None = None, **changes: object) -> Examination:
    """A machine with an A100 and nothing wrong."""
    return healthy(ON_GPU if installed is None else installed, **{"gpu": A100, "cuda": RUNS, **changes})


def without(*names: str) -> dict[str, str]:
    return {name: version for name, version in ON_GPU.items() if name not in names}


def test_a_machine_whose_gpu_works_has_no_finding() -> None:
    assert on_gpu().findings == ()
    assert "CUDA 13.0, compute capability 8.0, runs a kernel" in describe(on_gpu())


NO_LIBCUDA = "ImportError: libcuda.so.1: cannot open shared object file: No such file or directory"
UNDEFINED = "ImportError: _driver.cpython-311.so: undefined symbol: cuArrayCreate_v2"
BUILD = "PATH=/usr/local/cuda/bin:$PATH pip install --no-cache-dir --no-binary pycuda"
GAPS = {
    "a GPU without a driver": (
        {"gpu": Gpu(slots=("0000:3b:00.0",)), "cuda": Cuda(), "installed": INSTALLED},
        ("problem", "0000:3b:00.0", "ubuntu-drivers install --gpgpu nvidia:580-server"),
    ),
    "libraries without a GPU": (
        {"gpu": Gpu(), "cuda": Cuda(), "installed": INSTALLED | {"tensorrt": "11.4.0", "pycuda": "2026.1"}},
        ("note", "of no use", "pip uninstall -y tensorrt pycuda"),
    ),
    "a driver before CUDA 13": (
        {"gpu": replace(A100, driver="570.195.03")},
        ("problem", "580 or newer: onnxruntime-gpu 1.31.1, cuda-bindings 13.5.0, tensorrt 11.4.0.106", "nvidia:580"),
    ),
    "pycuda is missing": ({"installed": without("pycuda")}, ("note", "memory and streams", f"{BUILD} 'pycuda>=")),
    "cuda-bindings are missing": (
        {"installed": without("cuda-bindings")}, ("note", "graphs", "pip install 'cuda-bindings>=13'"),
    ),
    "pycuda is linked without libcuda": (
        {"cuda": Cuda(errors={"pycuda": UNDEFINED})},
        ("problem", "cuArrayCreate_v2", f"LDFLAGS=-Wl,--no-as-needed {BUILD} --force-reinstall --no-deps"),
    ),
    "a container without the driver's libraries": (
        {"cuda": Cuda(errors={"pycuda": NO_LIBCUDA})},
        ("problem", "libcuda.so.1", "docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility"),
    ),
    "another library that pycuda was built for": (
        {"cuda": Cuda(errors={"pycuda": "ImportError: libcurand.so.10: cannot open"})},
        ("problem", "libcurand.so.10", f"{BUILD} --force-reinstall"),
    ),
    "broken cuda-bindings": (
        {"cuda": Cuda(errors={"cuda-bindings": "ImportError: nonsense"})},
        ("problem", "nonsense", "pip install --force-reinstall 'cuda-bindings>=13'"),
    ),
    "NVRTC is missing": (
        {"cuda": Cuda(errors={"nvrtc": "DynamicLibNotFoundError: libnvrtc.so"})},
        ("problem", "libnvrtc", "pip install --upgrade nvidia-cuda-nvrtc"),
    ),
    "a kernel that does not run": (
        {"cuda": Cuda(errors={"kernel": "BackendError: CUDA refused to start"})},
        ("problem", "refused to start", "nvidia-smi"),
    ),
    "TensorRT's bindings without its libraries": (
        {"backends": (Backend(name="tensorrt", error="ImportError: libnvinfer.so.11: cannot open"),)},
        ("problem", "libnvinfer.so.11",
         "pip install --force-reinstall --extra-index-url https://pypi.nvidia.com 'tensorrt'"),
    ),
    "TensorRT-RTX is broken": (
        {"backends": (Backend(name="tensorrt-rtx", error="ImportError: no"),)},
        ("problem", "no", "pip install --force-reinstall 'tensorrt-rtx-cu13'"),
    ),
    "triton is missing": (
        {"backends": (Backend(name="torch-compile", error="TritonMissing: Cannot find a working triton"),)},
        ("problem", "TritonMissing", "pip install triton"),
    ),
    "torch for the CPU": (
        {"installed": ON_GPU | {"torch": "2.13.0+cpu", "onnx": "1.23"},
         "backends": (Backend(name="torch", works=True),)},
        ("note", "2.13.0+cpu", "--index-url https://download.pytorch.org/whl/cu130 'torch>=2.11,<2.14'"),
    ),
    "Triton without Python.h": (
        {"backends": (Backend(name="torch-compile", error="CalledProcessError: '/usr/bin/gcc', '-I…/triton/…'"),)},
        ("problem", "CalledProcessError", "sudo apt-get install -y gcc python3-dev"),
    ),
    "TensorRT-RTX that builds and does not load": (
        {"backends": (Backend(name="tensorrt-rtx", works=True, cuda_error="TensorRT could not load it"),)},
        ("problem", "could not load it", "pip install --force-reinstall 'tensorrt-rtx-cu13'"),
    ),
    "a GPU that TensorRT-RTX does not list": (
        {"cuda": replace(RUNS, gpu="NVIDIA H100", compute_capability="9.0"),
         "backends": (Backend(name="tensorrt-rtx", works=True, offers=("SM75", "SM80")),)},
        ("note", "NVIDIA H100 (SM90)", "ddsm build --backend tensorrt BUNDLE"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), GAPS.values(), ids=GAPS)
def test_each_gap_on_the_way_to_a_gpu_is_one_finding_with_its_repair(
    changes: dict[str, object], expected: tuple[str, str, str]
) -> None:
    severity, words, repair = expected
    finding = only(on_gpu(**changes))  # type: ignore[arg-type]
    assert finding.severity == severity
    assert words in finding.expected + finding.found
    assert repair in finding.repair
    assert "\n" not in finding.expected + finding.found + finding.repair


@pytest.mark.parametrize(
    ("driver", "installed", "expected"),
    [
        ("550.90.07", {"tensorrt": "10.13.2.6"}, ["note"]),
        ("550.90.07", {"tensorrt": "11.4.0.106"}, ["problem"]),
        ("570.195.03", {"tensorrt": "10.13.2.6"}, []),
        ("570.195.03", {"nvidia-cublas": "13.0.2"}, ["problem"]),
        ("580.65.06", {"tensorrt": "11.4.0.106"}, []),
    ],
)
def test_a_driver_is_old_for_what_is_installed(driver: str, installed: dict[str, str], expected: list[str]) -> None:
    found = list(check_driver(replace(A100, driver=driver), installed))
    assert [finding.severity for finding in found] == expected
    assert all(f"NVIDIA driver {driver}" in finding.found for finding in found)


def test_a_gpu_that_tensorrt_rtx_lists_is_no_finding() -> None:
    assert on_gpu(backends=(Backend(name="tensorrt-rtx", works=True, offers=("SM75", "SM80")),)).findings == ()


def test_where_no_nvcc_is_found_a_broken_pycuda_says_so() -> None:
    broken = Cuda(errors={"pycuda": "ImportError: no"})
    found = {path: next(check_cuda(broken, A100, ON_GPU, path)).found for path in ("/usr/local/cuda/bin/nvcc", None)}
    assert list(found.values()) == ["ImportError: no", "ImportError: no; no nvcc is on the PATH"]


def test_what_nothing_asks_for_on_a_gpu_is_not_missing() -> None:
    """Who installed nothing for the GPU is told of that by one note alone."""
    assert [finding.repair for finding in healthy(gpu=A100).findings] == [
        "pip uninstall -y onnxruntime && pip install 'ddsm-engine[gpu]'"
    ]


def test_cuda_is_tried_only_where_a_gpu_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [{"works": True, "gpu": "A100", "errors": {}}, {"error": "its process ended with SIGSEGV"}]
    monkeypatch.setattr(doctor_cuda, "ask", lambda name, timeout_s: answers.pop(0))
    assert read_cuda(Gpu(driver="580")) == Cuda()
    assert read_cuda(A100) == Cuda(works=True, gpu="A100")
    assert read_cuda(A100) == Cuda(errors={"kernel": "its process ended with SIGSEGV"})


@pytest.mark.parametrize(
    ("gpu", "torch_on_cuda", "probed"),
    [
        (Gpu(), False, ["torch", "tensorrt-rtx"]),
        (A100, False, ["torch", "tensorrt", "tensorrt-rtx"]),
        (A100, True, ["torch", "tensorrt", "tensorrt-rtx", "torch-compile"]),
    ],
)
def test_backends_for_a_gpu_are_probed_where_they_can_do_something(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu, torch_on_cuda: bool, probed: list[str]
) -> None:
    monkeypatch.setattr(backends, "installed_backends", lambda: ("torch",))
    monkeypatch.setattr(backends, "is_installed", lambda _: True)
    monkeypatch.setattr(backends, "probe", lambda name: Backend(name=name, works=True, cuda=torch_on_cuda))
    assert [backend.name for backend in backends.read_backends(gpu)] == probed


FAKE_CUDA = {
    "nothing is installed": ({}, {"pycuda": "ModuleNotFoundError", "cuda-bindings": "ModuleNotFoundError"}),
    "pycuda is badly linked": (
        {"pycuda/driver.py": f"raise ImportError({UNDEFINED!r})", "cuda/bindings/driver.py": "",
         "cuda/bindings/nvrtc.py": "nvrtcVersion = tuple"},
        {"pycuda": "cuArrayCreate_v2"},
    ),
    "NVRTC is missing": (
        {"pycuda/driver.py": "", "cuda/bindings/driver.py": "",
         "cuda/bindings/nvrtc.py": "def nvrtcVersion(): raise RuntimeError('libnvrtc.so')"},
        {"nvrtc": "RuntimeError: libnvrtc.so"},
    ),
    "the driver refuses": (
        {"pycuda/driver.py": "class Error(Exception): pass\nclass MemoryError(Error): pass\n"
                             "def init(): raise Error('cuInit failed: no CUDA-capable device is detected')",
         "cuda/bindings/driver.py": "", "cuda/bindings/nvrtc.py": "nvrtcVersion = tuple"},
        {"kernel": "no CUDA-capable device"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("files", "expected"), FAKE_CUDA.values(), ids=FAKE_CUDA)
def test_the_probe_of_cuda_names_the_library_that_fails(
    tmp_path: Path, files: dict[str, str], expected: dict[str, str]
) -> None:
    tree(tmp_path, {"pycuda/__init__.py": "", "cuda/__init__.py": "", "cuda/bindings/__init__.py": ""} | files)
    found = ask("cuda", search_path=[tmp_path, *sys.path])
    assert not found["works"]
    assert found["errors"].keys() == expected.keys()
    for name, words in expected.items():
        assert words in found["errors"][name]


@pytest.mark.skipif(not is_installed("tensorrt-rtx"), reason="tensorrt-rtx is not installed")
def test_tensorrt_rtx_builds_without_a_gpu_and_says_for_which_gpus() -> None:
    found = probe("tensorrt-rtx")
    assert found.works, found.error
    assert "SM80" in found.offers
    assert found.cuda or found.cuda_error


@pytest.mark.parametrize(
    ("vendor", "kind", "expected"),
    [
        ("0x10de", "0x030200", ("0000:3b:00.0",)),
        ("0x10de", "0x030000", ("0000:3b:00.0",)),
        ("0x10de", "0x040300", ()),
        ("0x8086", "0x030000", ()),
    ],
    ids=["a data-centre GPU", "a display", "its sound chip", "another maker's"],
)
def test_a_gpu_on_the_bus_is_seen_without_a_driver(
    tmp_path: Path, vendor: str, kind: str, expected: tuple[str, ...]
) -> None:
    slot = "sys/bus/pci/devices/0000:3b:00.0"
    tree(tmp_path, {f"{slot}/vendor": f"{vendor}\n", f"{slot}/class": f"{kind}\n"})
    assert read_gpu(tmp_path, str) == Gpu(slots=expected)


def test_the_cache_is_measured_and_only_the_dead_leave_leftovers(tmp_path: Path) -> None:
    folder = tmp_path / "ddsm-engine"
    assert read_cache(folder) == Cache(path=str(folder), writable=True)
    tree(folder, {"engines/a/model.blob": "x" * 1500, f"engines/.a.dead{SUFFIX}/b": "", f".c.living{SUFFIX}/d": ""})
    descriptor = os.open(folder / f".c.living{SUFFIX}", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        found = read_cache(folder)
    finally:
        os.close(descriptor)
    assert (found.files, found.size_mb) == (3, 0.002)
    assert found.leftovers == (str(folder / f"engines/.a.dead{SUFFIX}"),)
    assert only(healthy(cache=found)).repair == f"rm -rf -- {folder}/engines/.a.dead{SUFFIX}"


def test_a_cache_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = read_cache(tmp_path / "file" / "ddsm-engine")
    assert not found.writable
    finding = only(healthy(cache=found))
    assert finding.severity == "problem"
    assert finding.repair.startswith("export XDG_CACHE_HOME=")


def test_problems_come_before_notes() -> None:
    sick = healthy(limits=Limits(cpu_quota=1.0), cache=replace(healthy().cache, writable=False))
    assert [finding.severity for finding in sick.findings] == ["problem", "note"]


def test_the_doctor_itself_needs_no_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "installed_backends", tuple)
    monkeypatch.setattr(backends, "is_installed", lambda _: False)
    monkeypatch.setattr(libraries, "installed_versions", lambda: {"ddsm-engine": ddsm_engine.__version__})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "query_nvidia_smi", str)
    found = doctor.examine(tmp_path)
    assert found.backends == ()
    assert found.cache.path == str(tmp_path / "ddsm-engine")
    assert "pip install 'ddsm-engine[cpu]'" in [finding.repair for finding in found.findings]
