from pathlib import Path

from tests.robustness.processes import answer


def test_of_two_processes_one_wins_and_none_corrupts(bundle_path: Path) -> None:
    endings = answer("-m", "tests.robustness.races", "--bundle", bundle_path, "--races", 9)
    assert endings["export"] == {"done and refused": 1}
    assert endings["train"] == {"done and refused": 1}
    assert len(endings) == 9
