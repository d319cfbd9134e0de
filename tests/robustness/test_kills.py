"""Two hundred kills; ``python -m benchmarks.robustness`` runs a thousand."""

from pathlib import Path

from tests.robustness.processes import answer, run


def test_two_hundred_kills_leave_the_old_state_or_the_new_one(bundle_path: Path) -> None:
    tallies = answer("-m", "tests.robustness.kills", "--bundle", bundle_path, "--kills", 200)
    assert sum(tally["kills"] for tally in tallies.values()) >= 200
    assert len(tallies) == 11
    for name in ("replace a file", "replace a folder"):
        assert {"old", "new"} <= tallies[name]["states"].keys(), "kills came before and after the change"
    assert any(state.startswith("put back") for state in tallies["replace a folder, no exchange of names"]["states"])


NOT_ATOMIC = """
import sys
from contextlib import contextmanager
from ddsm_engine import files
from tests.robustness import kills

@contextmanager
def in_two_steps(target, **_):
    if target.exists():
        target.unlink()
    yield target

files.atomic_path = in_two_steps
sys.argv = ["kills", "--bundle", sys.argv[1], "--kills", "200"]
kills.main()
"""


def test_the_kills_would_notice_a_write_that_is_not_atomic(bundle_path: Path) -> None:
    done = run("-c", NOT_ATOMIC, bundle_path)
    assert done.returncode == 1
    assert "AssertionError: replace a file: neither old nor new" in done.stderr
