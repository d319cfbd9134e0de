"""The READMEs show what the newest committed result of each benchmark says."""

import subprocess
from pathlib import Path

import pytest

from benchmarks import _report, robustness, swap_cost

ROOT = Path(__file__).parents[2]
BENCHMARKS = {benchmark.name: benchmark for benchmark in (robustness.BENCHMARK, swap_cost.BENCHMARK)}


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
