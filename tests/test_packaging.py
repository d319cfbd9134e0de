import re
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import ddsm_engine
from ddsm_engine import cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = [*ROOT.glob("ddsm_engine/**/*.py"), *ROOT.glob("export/**/*.py"), *ROOT.glob("kernels/**/*.py")]


def test_all_equals_the_public_names() -> None:
    public = {n for n in vars(ddsm_engine) if not n.startswith("_")} - {
        p.stem for p in (ROOT / "ddsm_engine").iterdir()
    }
    assert public | {"__version__"} == set(ddsm_engine.__all__)


def test_no_package_claims_the_names_export_and_kernels() -> None:
    for root in ("export", "kernels", "benchmarks", "tests"):
        assert not (ROOT / root / "__init__.py").exists()


def test_every_listed_verb_loads_and_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = entry_points(group=cli.GROUP)
    engine = {"run", "inspect", "verify", "doctor", "build", "bench", "evaluate", "search"}
    assert {verb.name for verb in verbs} == engine | {"export", "train", "demo"}
    for verb in verbs:
        with pytest.raises(SystemExit) as stop:
            verb.load()(["--help"])
        assert stop.value.code == 0
        assert "usage:" in capsys.readouterr().out


def test_a_library_that_is_not_installed_is_answered_with_its_extra(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise ModuleNotFoundError("No module named 'openvino'", name="openvino")

    assert cli.guarded(command) == 1
    assert capsys.readouterr().err == "error: openvino is not installed: pip install 'ddsm-engine[cpu]'\n"


def test_extras_for_missing_libraries_exist() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for library, extra in cli.EXTRAS.items():
        assert any(requirement.startswith(library) for requirement in extras[extra]), library


def test_onnx_runtime_on_a_gpu_brings_the_libraries_that_it_loads() -> None:
    (wanted,) = (r for r in PROJECT["project"]["optional-dependencies"]["gpu"] if r.startswith("onnxruntime-gpu"))
    assert re.fullmatch(r"onnxruntime-gpu\[cuda,cudnn\]>=[\d.]+", wanted), "without cuDNN and cuBLAS no session opens"


def test_torch_never_pulls_a_build_that_was_not_tested() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    found = {r for requirements in extras.values() for r in requirements if r.startswith("torch")}
    assert found == {"torch>=2.11,<2.14"}


def test_constraints_are_plain_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9.]*", pin) for pin in pins), pins


def test_no_pickle_no_eval_and_one_torch_load() -> None:
    forbidden = re.compile(
        r"\bimport (pickle|marshal|shelve|dill|joblib)\b|from pickle import (?!UnpicklingError\b)|\b(eval|exec)\("
        r"|yaml\.(unsafe|full)_load|os\.system|shell=True"
    )
    loads = []
    for source in SOURCES:
        text = source.read_text(encoding="utf-8")
        # Methods named eval (of torch modules) are no evaluation of text.
        found = [m.group(0) for m in forbidden.finditer(text.replace(".eval(", ""))]
        assert not found, (source, found)
        loads += [(source.name, line) for line in text.splitlines() if "torch.load(" in line]
    assert len(loads) == 1
    assert loads[0][0] == "ddsm.py"
    assert "weights_only=True" in loads[0][1]


def test_the_shipped_supernet_stays_small() -> None:
    shipped = ROOT / "export/ddsm_export/data/fashion_mnist.safetensors"
    assert shipped.stat().st_size <= 12_000_000
