"""The READMEs show what the newest committed result of each benchmark says."""

import copy
import subprocess
from pathlib import Path

import pytest

from benchmarks import (
    _report,
    gpu_bundles,
    peers,
    robustness,
    samplers,
    scaling,
    search,
    strategy_latency,
    subnetwork_latency,
    swap_cost,
)
from ddsm_engine.errors import OutputError
from ddsm_engine.measure.gpu import suite

ROOT = Path(__file__).parents[2]
MODULES = (subnetwork_latency, strategy_latency, peers, swap_cost, samplers, search, scaling, robustness)
BENCHMARKS = {module.BENCHMARK.name: module.BENCHMARK for module in MODULES}


def committed_results(name: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", f"benchmarks/results/*-{name}.json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_readmes_show_the_newest_result(name: str) -> None:
    results = [_report.load(path, name) for path in committed_results(name)]
    if not results:
        pytest.skip(f"no result of {name} is committed yet (python -m benchmarks.{name})")
    newest = max(results, key=lambda result: str(result["environment"]["date"]))
    for readme, block in BENCHMARKS[name].blocks(newest).items():
        found = _report.block_of(readme.read_text(encoding="utf-8"), name)
        assert found == block, f"python -m benchmarks.{name} --update-readme FILE"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_result_is_committed_with_what_is_made_of_it(name: str) -> None:
    for path in committed_results(name):
        suffixes = [".md", *([".png"] if BENCHMARKS[name].draw else [])]
        assert all(path.with_suffix(suffix).is_file() for suffix in suffixes), path
        assert BENCHMARKS[name].details(_report.load(path, name)) in path.with_suffix(".md").read_text(encoding="utf-8")


def test_the_readmes_show_what_a_gpu_reached_or_that_nothing_was_run_on_one() -> None:
    results = [suite.load(path) for path in committed_results(gpu_bundles.NAME)]
    newest = max(results, key=lambda result: str(result["environment"]["date"]), default=None)
    blocks = gpu_bundles.blocks(newest)
    assert _report.README in blocks
    for readme, block in blocks.items():
        found = _report.block_of(readme.read_text(encoding="utf-8"), gpu_bundles.NAME)
        assert found == block, "python -m benchmarks.gpu_bundles --update-readme [FILE]"


def test_a_result_is_only_gone_on_with_where_it_was_begun() -> None:
    fresh = _report.new_record("scaling", None)
    record = copy.deepcopy(fresh) | {"part": 1}
    assert _report.resumed(record, fresh)["part"] == 1
    assert record["resumed"] == [{key: fresh["environment"][key] for key in ("date", "commit")}]
    record["environment"] |= {"cores": 999}
    with pytest.raises(OutputError, match="begun with another cores"):
        _report.resumed(record, fresh)
