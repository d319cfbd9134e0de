import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ddsm_engine import files
from ddsm_engine.errors import OutputError
from ddsm_engine.files import (
    SUFFIX,
    atomic_path,
    clear_leftovers,
    only_one_process,
    refuse_existing,
    sha256_of,
    write_atomically,
)
from ddsm_engine.strategy import Strategy


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_a_file_appears_whole_and_readable_by_the_umask(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    with atomic_path(tmp_path / "file") as temporary:
        temporary.write_bytes(b"half")
        temporary.chmod(0o600)  # what writers of private temporary files leave
        assert names(tmp_path)[-1] == "ordinary", "the final name is not there yet"
    assert (tmp_path / "file").read_bytes() == b"half"
    assert (tmp_path / "file").stat().st_mode == ordinary.stat().st_mode
    assert names(tmp_path) == ["file", "ordinary"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "file") as temporary:
        temporary.write_bytes(b"new, but")
        raise RuntimeError
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "folder") as temporary:
        (temporary / "deep").mkdir(parents=True)
        (temporary / "deep" / "file").write_text("x")
    assert (tmp_path / "folder/deep/file").read_text() == "x"


@pytest.fixture(params=["one step", "two steps"])
def exchanging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems that exchange two names in one step, and those that do not."""
    if request.param == "two steps":
        monkeypatch.setattr(files, "_rename_with", lambda *_: False)


def write_folder(target: Path, content: str, *, replace: bool = True) -> None:
    with atomic_path(target, replace=replace) as temporary:
        temporary.mkdir()
        (temporary / content).touch()


@pytest.mark.usefixtures("exchanging")
def test_a_folder_is_replaced_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", "old")
    with atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
        assert names(tmp_path / "folder") == ["old"]
    assert names(tmp_path / "folder") == ["new"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.usefixtures("exchanging")
def test_what_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="another process"),
        atomic_path(tmp_path / "folder", replace=False) as temporary,
    ):
        write_folder(tmp_path / "folder", "theirs")
        temporary.mkdir()
    with (
        pytest.raises(OutputError, match="another process"),
        atomic_path(tmp_path / "file", replace=False) as temporary,
    ):
        write_atomically(tmp_path / "file", b"theirs")
        temporary.write_bytes(b"ours")
    assert names(tmp_path / "folder") == ["theirs"]
    assert (tmp_path / "file").read_bytes() == b"theirs"
    assert names(tmp_path) == ["file", "folder"]


REPLACED = [("file", "file"), ("link", "file"), ("file", "folder"), ("folder", "folder"), ("link", "folder")]


@pytest.mark.usefixtures("exchanging")
@pytest.mark.parametrize(("old", "new"), REPLACED)
def test_a_file_or_a_link_gives_way_to_anything_and_a_folder_to_a_folder(tmp_path: Path, old: str, new: str) -> None:
    make: dict[str, Callable[[Path], None]] = {
        "file": Path.touch,
        "folder": Path.mkdir,
        "link": lambda path: path.symlink_to(tmp_path / "nowhere"),
    }
    target = tmp_path / "target"
    make[old](target)
    with atomic_path(target) as temporary:
        make[new](temporary)
    assert target.is_dir() == (new == "folder")
    assert not target.is_symlink()
    assert names(tmp_path) == ["target"]


@pytest.mark.usefixtures("exchanging")
def test_a_folder_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", "cat.png")
    with pytest.raises(OutputError, match="photos is a folder, which no file replaces"):
        Strategy.uniform(0.5, 10).save(tmp_path / "photos")
    assert names(tmp_path / "photos") == ["cat.png"]
    assert names(tmp_path) == ["photos"]


def test_leftovers_of_the_dead_are_cleared_and_those_of_the_living_kept(tmp_path: Path) -> None:
    for name in ("a", "b", "a.b"):
        (tmp_path / f".{name}.x1y2z3{SUFFIX}" / name).mkdir(parents=True)
    (tmp_path / ".a.notes.partial").mkdir()  # somebody's own
    clear_leftovers(tmp_path, "a")
    assert names(tmp_path) == [".a.b.x1y2z3" + SUFFIX, ".a.notes.partial", ".b.x1y2z3" + SUFFIX]
    with atomic_path(tmp_path / "c") as temporary:
        temporary.touch()
        clear_leftovers(tmp_path)
        assert temporary.exists()
    assert names(tmp_path) == [".a.notes.partial", "c"]


def test_a_folder_that_was_moved_aside_by_a_killed_process_gets_its_name_back(tmp_path: Path) -> None:
    aside = tmp_path / f".folder.x1y2z3{SUFFIX}" / "old"
    aside.mkdir(parents=True)
    (aside / "its content").touch()
    clear_leftovers(tmp_path, "folder")
    assert names(tmp_path / "folder") == ["its content"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("name", ["old", "new", "replaced", ".mode"])
def test_half_of_an_output_never_gets_its_name_whatever_that_is(tmp_path: Path, name: str) -> None:
    with atomic_path(tmp_path / "place" / name) as temporary:
        temporary.write_bytes(b"ha")
        shutil.copytree(tmp_path / "place", tmp_path / "killed")
        temporary.write_bytes(b"half and half")
    clear_leftovers(tmp_path / "killed")
    assert names(tmp_path / "killed") == []
    assert (tmp_path / "place" / name).read_bytes() == b"half and half"


STRANGE: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a file": Path.touch,
    "a link to a folder": lambda path: path.symlink_to(path.parent),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_only_has_the_name_of_a_leftover_is_left_and_stops_nothing(tmp_path: Path, kind: str) -> None:
    (tmp_path / f".name.b{SUFFIX}").mkdir()
    strange = tmp_path / f".name.a{SUFFIX}"  # comes first
    STRANGE[kind](strange)
    clear_leftovers(tmp_path, "name")
    assert names(tmp_path) == [strange.name]


def test_a_leftover_that_belongs_to_somebody_else_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = (tmp_path / f".name.{letter}{SUFFIX}" for letter in "ab")
    theirs.mkdir()
    ours.mkdir()
    opened = os.open

    def refusing(path: Path, flags: int, **options: int) -> int:
        if path == theirs:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, **options)

    monkeypatch.setattr(os, "open", refusing)  # the tests may run as a user whom permissions do not bind
    clear_leftovers(tmp_path, "name")
    assert names(tmp_path) == [theirs.name]


def test_a_pipe_in_the_place_of_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotADirectoryError), only_one_process(tmp_path / "pipe"):
        pass


def test_a_temporary_folder_taken_for_a_dead_one_s_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = files._try_lock
    stolen: list[Path] = []

    def late(descriptor: int, operation: int) -> bool:
        if not stolen:
            stolen.extend(tmp_path.glob(f".*{SUFFIX}"))
            stolen[0].rmdir()
        return lock(descriptor, operation)

    monkeypatch.setattr(files, "_try_lock", late)
    write_atomically(tmp_path / "file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"
    assert stolen


def test_a_file_system_without_locks_is_written_and_its_leftovers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "not here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / f".file.x1y2z3{SUFFIX}").mkdir()
    with only_one_process(tmp_path):
        write_atomically(tmp_path / "file", b"x")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == [f".file.x1y2z3{SUFFIX}", "file"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        only_one_process(tmp_path),
        pytest.raises(OutputError, match="in use by another process"),
        only_one_process(tmp_path),
    ):
        pass
    with only_one_process(tmp_path):
        pass


def test_a_folder_that_holds_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    refuse_existing(tmp_path / "photos", force=True, marker="manifest.json")
    with pytest.raises(OutputError, match="is a folder, which no file replaces"):
        refuse_existing(tmp_path / "photos", force=True)
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(OutputError, match="holds something else"):
        refuse_existing(tmp_path / "photos", force=True, marker="manifest.json")
    (tmp_path / "photos" / "manifest.json").touch()
    refuse_existing(tmp_path / "photos", force=True, marker="manifest.json")


@pytest.mark.parametrize("path", [".", "..", "/"])
def test_an_output_needs_a_name(path: str) -> None:
    with pytest.raises(OutputError, match="no name for an output"):
        refuse_existing(Path(path), force=True, marker="manifest.json")


def test_an_existing_output_is_refused_unless_forced(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "new", force=False)
    (tmp_path / "old").touch()
    with pytest.raises(OutputError, match="exists already"):
        refuse_existing(tmp_path / "old", force=False)
    refuse_existing(tmp_path / "old", force=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists already"):
        refuse_existing(tmp_path / "dangling", force=False)


def test_an_output_below_a_file_is_refused_even_if_forced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is not a folder"):
        refuse_existing(tmp_path / "file" / "output", force=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="may write to"):
        refuse_existing(tmp_path / "output", force=False)


def test_a_hash_is_the_standard_s(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "abc") == expected
