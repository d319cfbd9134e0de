import os
from pathlib import Path

import pytest

from ddsm_engine.errors import OutputError
from ddsm_engine.files import atomic_path, refuse_existing, set_aside, sha256_of, write_atomically


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


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_in_the_way_is_deleted_last_or_put_back(tmp_path: Path, fails: bool) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()
    try:
        with set_aside(target):
            assert not target.exists()
            target.mkdir()
            (target / "new").touch()
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert names(target) == (["old"] if fails else ["new"])
    assert names(tmp_path) == ["folder"]


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
