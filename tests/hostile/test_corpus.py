"""Is every hostile file refused with one line, at once, without touching anything and within a bound of memory?"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ddsm_engine import inspect, run
from ddsm_export import cli as export_cli
from ddsm_export.checkpoints import facts_from_flagfile, open_supernet
from ddsm_export.cli import known_facts, parser
from ddsm_export.training import cli as training_cli
from tests.hostile.corpus import CANARY, CASES, SOUND, Case, checkpoint, flagfile, saved, sound_weights, state

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "inspect": inspect.main,
    "run": run.main,
    "export": export_cli.main,
    "train": training_cli.main,
}
SECONDS = 20
MEMORY = 256 << 20
"""What a case that announces more may add to what the process had; some files themselves have 64 MiB."""

Tree = dict[str, tuple[int, int, int]]


def tree(folder: Path) -> Tree:
    """Everything below a folder: kind and permissions, size, time of the last change."""
    found = {}
    for item in sorted(folder.rglob("*")):
        status = item.lstat()
        found[str(item.relative_to(folder))] = status.st_mode, status.st_size, status.st_mtime_ns
    return found


@contextmanager
def time_limit(seconds: int = SECONDS) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def call(case: Case, folder: Path, bundle: Path) -> tuple[int, Tree, Tree]:
    """Exit code, and the folder before and after."""
    arguments = [str(argument) for argument in case.build(folder, bundle)]
    before = tree(folder)
    with time_limit():
        code = COMMANDS[case.command](arguments)
    return code, before, tree(folder)


def check_refusal(code: int, stderr: str, before: Tree, after: Tree, folder: Path) -> None:
    lines = stderr.splitlines()
    assert code == 1
    assert len(lines) == 1, stderr[:2000]
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 1000
    assert lines[0].isprintable(), "a terminal obeys what it cannot print"
    assert after == before
    assert not (folder / CANARY).exists()


def test_the_corpus_is_large_and_its_names_tell_cases_apart() -> None:
    assert len(CASES) >= 80
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", [case for case in CASES if not case.memory], ids=lambda case: case.name)
def test_a_hostile_file_is_refused_with_one_line(
    case: Case, bundle_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, before, after = call(case, tmp_path, bundle_path)
    check_refusal(code, capfd.readouterr().err, before, after, tmp_path)


def test_files_that_announce_more_than_they_hold_are_refused_within_a_bound_of_memory(
    bundle_path: Path, tmp_path: Path
) -> None:
    """In one process of their own, in turn; they are built here, for building them takes much."""
    greedy = []
    for case in CASES:
        if case.memory:
            folder = tmp_path / case.name
            folder.mkdir()
            arguments = [str(argument) for argument in case.build(folder, bundle_path)]
            greedy.append((case.name, case.command, arguments, str(folder)))
    (tmp_path / "cases.json").write_text(json.dumps(greedy))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.measure", str(tmp_path / "cases.json")],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(root), str(root / "export")))},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert [figure["name"] for figure in figures] == [name for name, *_ in greedy]
    assert not [figure for figure in figures if figure["failure"] or figure["added_bytes"] > MEMORY]


@pytest.mark.parametrize("case", SOUND, ids=lambda case: case.name)
def test_the_same_commands_take_the_unbroken_files(
    case: Case, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(case, tmp_path, bundle_path)[0] == 0


def test_the_unbroken_checkpoint_flagfile_and_supernet_are_read(bundle_path: Path, tmp_path: Path) -> None:
    """As the export command reads them, without the minute that exporting takes."""
    build = checkpoint(lambda path: path.write_bytes(saved(state())))
    arguments = parser().parse_args([str(argument) for argument in build(tmp_path, bundle_path)])
    assert open_supernet(arguments.sources[0], known_facts(arguments)).spec.base_channels == 32
    build = flagfile(lambda path: path.write_bytes(b"--ch=32\n--slimmable_unet\n"))
    arguments = parser().parse_args([str(argument) for argument in build(tmp_path, bundle_path)])
    assert facts_from_flagfile(arguments.flagfile).base_channels == 32
    arguments = parser().parse_args([str(argument) for argument in sound_weights(tmp_path, bundle_path)])
    assert open_supernet(arguments.sources[0], known_facts(arguments)).spec.base_channels == 32
