"""Engines that are built once and loaded after: equal, sealed, and never anybody else's."""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ddsm_engine import build, engine_cache, verify
from ddsm_engine.backends.openvino import OpenVINOEngine
from ddsm_engine.bundle import Bundle
from ddsm_engine.engine_cache import ENGINE, SEAL, engines_of, read_sealed, user_cache_folder
from ddsm_engine.errors import BackendError, OutputError
from ddsm_engine.pipeline import Pipeline
from tests.conftest import Refusal

BATCH = 2


@pytest.fixture(scope="module")
def built_once(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "built.bundle"
    shutil.copytree(bundle_path, path)
    assert build.main([str(path), "--batch-size", str(BATCH)]) == 0
    return path


@pytest.fixture
def built(built_once: Path, tmp_path: Path) -> Path:
    """A bundle with engines for batch 2."""
    return Path(shutil.copytree(built_once, tmp_path / "built.bundle"))


def draw(bundle: Path) -> bytes:
    with Pipeline.from_bundle(bundle, backend="openvino") as pipe:
        return pipe("coarse", "ddim", 3, num_images=BATCH, batch_size=BATCH).x_final.tobytes()


def how_engines_were_opened(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """True for every engine that was loaded, False for every one that was compiled."""
    opened, original = [], OpenVINOEngine.__init__

    def spy(self: OpenVINOEngine, model: Path, shapes: object, options: object, built: bytes | None = None) -> None:
        opened.append(built is not None)
        original(self, model, shapes, options, built)  # type: ignore[arg-type]

    monkeypatch.setattr(OpenVINOEngine, "__init__", spy)
    return opened


def test_a_run_loads_what_was_built_and_draws_the_same(
    built: Path, bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = how_engines_were_opened(monkeypatch)
    compiled = draw(bundle_path)
    assert opened == [False] * 3
    assert draw(built) == compiled
    assert opened == [False] * 3 + [True] * 3
    with Pipeline.from_bundle(built, backend="openvino") as pipe:
        pipe("coarse", "ddim", 3, num_images=1, batch_size=1)  # another target
    assert opened[6:] == [False] * 3


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 0x40
    file.write_bytes(data)


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def reseal_as_another_user(folder: Path) -> None:
    """What an author who means harm would do: the content and its SHA-256 agree, the seal is of another key."""
    (folder / ENGINE).write_bytes(b"code" + (folder / ENGINE).read_bytes())
    data = (folder / ENGINE).read_bytes()
    seal = json.loads((folder / SEAL).read_text())
    del seal["seal"]
    seal |= {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    (folder / SEAL).write_text(json.dumps(seal | {"seal": engine_cache._seal(seal, b"k" * 32)}))


def rewrite_seal(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        seal = json.loads((folder / SEAL).read_text())
        (folder / SEAL).write_text(json.dumps(seal | changes))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "one flipped byte": (lambda f: flip(f / ENGINE, 70_000), "content is not what its seal vouches for"),
    "cut short": (lambda f: os.truncate(f / ENGINE, 1000), "content is not what its seal vouches for"),
    "empty": (lambda f: os.truncate(f / ENGINE, 0), "content is not what its seal vouches for"),
    "too long": (lambda f: (f / ENGINE).write_bytes((f / ENGINE).read_bytes() + b"x"), "not what its seal vouches for"),
    "no engine": (lambda f: (f / ENGINE).unlink(), "not what its seal vouches for"),
    "an engine that is a pipe": (lambda f: make_pipe(f / ENGINE), "not what its seal vouches for"),
    "a seal that is a pipe": (lambda f: make_pipe(f / SEAL), "seal cannot be read"),
    "no seal": (lambda f: (f / SEAL).unlink(), "seal cannot be read"),
    "a flipped seal": (lambda f: flip(f / SEAL, 0), "seal cannot be read"),
    "a seal that is a list": (lambda f: (f / SEAL).write_text("[]"), "seal cannot be read"),
    "a seal without end": (lambda f: (f / SEAL).write_text("[" * 60_000), "seal cannot be read"),
    "a huge seal": (lambda f: (f / SEAL).write_bytes(b" " * (1 << 17)), "seal cannot be read"),
    "another's seal": (reseal_as_another_user, "was not built by this user on this machine"),
    "another target": (rewrite_seal(target={"backend": "openvino"}), "was not built by this user"),
    "another bundle": (rewrite_seal(manifest="0" * 64), "was not built by this user"),
    "no text in the seal": (rewrite_seal(seal=None), "was not built by this user"),
    "no Unicode in the seal": (rewrite_seal(seal="\ud800"), "was not built by this user"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_an_engine_that_is_not_ours_is_refused(built: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    (folder,) = built.glob("engines/*/w016")
    assert read_sealed(folder)
    damage(folder)
    with pytest.raises(BackendError, match=message):
        read_sealed(folder)


def test_a_damaged_engine_is_named_in_one_line_and_compiled_anew(
    built: Path, bundle_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder,) = built.glob("engines/*/w016")
    flip(folder / ENGINE, 70_000)
    opened = how_engines_were_opened(monkeypatch)
    assert draw(built) == draw(bundle_path)
    assert opened[:3].count(False) == 1, "only the damaged one was compiled"
    (line,) = caplog.messages
    assert "content is not what its seal vouches for; remove that folder; compiling anew" in line
    assert "w016" in line


def test_verify_counts_engines_and_refuses_damaged_ones(
    built: Path, refusal: Refusal, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow, damaged = (next(built.glob(f"engines/*/{name}")) for name in ("w008", "w016"))
    reseal_as_another_user(narrow)
    assert verify.main([str(built), "--backend", "onnxruntime", "--threads", "1"]) == 0
    assert "engines: 6 whole, 1 sealed by another user or machine and never loaded" in capsys.readouterr().out
    flip(damaged / ENGINE, 70_000)
    line = refusal(verify.main, built)
    assert "w016 is damaged" in line
    assert "remove that folder" in line


def test_a_valid_engine_of_another_variant_is_not_taken(built: Path, caplog: pytest.LogCaptureFixture) -> None:
    (narrow,), (wide,) = built.glob("engines/*/w016"), built.glob("engines/*/w024")
    shutil.rmtree(wide)
    shutil.copytree(narrow, wide)
    draw(built)
    assert "built from another bundle or for another target" in caplog.text


def test_several_batch_sizes_are_built_at_once(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle.open(built)
    monkeypatch.setattr(type(bundle), "variants", {bundle.full.id: bundle.full})
    assert build.main([str(built), "--batch-size", "1,3,1"]) == 0
    assert [line.split(";")[0].split(": ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "1 engines for batch 1",
        "1 engines for batch 3",
    ]
    assert len(list(engines_of(bundle))) == 7 + 2


def test_without_the_user_s_key_nothing_is_loaded(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    opened = how_engines_were_opened(monkeypatch)
    draw(built)
    assert opened == [False] * 3
    assert len(caplog.messages) == 3
    assert not (tmp_path / "another").exists(), "reading makes no key"


def test_the_key_is_private_and_stays(built: Path) -> None:
    key = user_cache_folder() / "engine.key"
    assert key.stat().st_mode & 0o777 == 0o600
    before = key.read_bytes()
    bundle = Bundle.open(built)
    engine_cache.EngineCache(bundle, {"backend": "another"}).store(bundle.full, b"engine")
    assert key.read_bytes() == before
    assert len(list(engines_of(bundle))) == 8


def test_a_damaged_key_is_made_anew(bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    user_cache_folder().mkdir()
    (user_cache_folder() / "engine.key").write_bytes(b"short")
    bundle = Bundle.open(shutil.copytree(bundle_path, tmp_path / "x.bundle"))
    cache = engine_cache.EngineCache(bundle, {"backend": "openvino"})
    cache.store(bundle.full, b"engine")
    assert cache.load(bundle.full) == b"engine"


def test_engines_of_a_read_only_bundle_lie_in_the_user_s_cache_folder(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bundle = Bundle.open(shutil.copytree(bundle_path, tmp_path / "x.bundle"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    cache = engine_cache.EngineCache(bundle, {"backend": "openvino"})
    cache.store(bundle.full, b"engine")
    assert not (bundle.path / "engines").exists()
    assert cache.load(bundle.full) == b"engine"
    (kept,) = engines_of(bundle)
    assert kept.is_relative_to(user_cache_folder())


@pytest.mark.parametrize("linked", ["engines", "engines/{target}"])
def test_engines_are_neither_kept_nor_looked_for_behind_a_link_out_of_the_bundle(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = Bundle.open(shutil.copytree(bundle_path, tmp_path / "x.bundle"))
    cache = engine_cache.EngineCache(bundle, {"backend": "openvino"})
    target = cache.folders[0].name
    own = tmp_path / "home" / Path("engines", target, bundle.full.id).relative_to(linked.format(target=target))
    own.mkdir(parents=True)
    (own / "thesis.txt").write_text("years of work")
    link = bundle.path / linked.format(target=target)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "home")
    assert list(engines_of(bundle)) == []
    cache.store(bundle.full, b"engine")
    assert [path.name for path in own.iterdir()] == ["thesis.txt"]
    assert cache.load(bundle.full) == b"engine"
    (kept,) = engines_of(bundle)
    assert kept.is_relative_to(user_cache_folder())


def test_a_folder_whose_name_cannot_be_printed_is_no_engine(built: Path) -> None:
    (built / "engines/openvino-\x1b[2J/w008").mkdir(parents=True)
    assert len(list(engines_of(Bundle.open(built)))) == 7


def no_cache_folder(path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("XDG_CACHE_HOME", "/dev/null")


def a_key_that_cannot_be_read(path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("XDG_CACHE_HOME", str(path))
    (user_cache_folder() / "engine.key").mkdir(parents=True)


def another_user_s_folder(path: Path, patch: pytest.MonkeyPatch) -> None:
    def is_dir(self: Path) -> bool:
        if self.is_relative_to(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return os.path.isdir(self)  # noqa: PTH112 - the method is this one

    patch.setenv("XDG_CACHE_HOME", str(path))
    patch.setattr(Path, "is_dir", is_dir)  # the tests may run as a user whom permissions do not bind


def a_user_without_a_home(path: Path, patch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    patch.delenv("XDG_CACHE_HOME")
    patch.setattr(Path, "home", home)


@pytest.mark.parametrize(
    "cache", [no_cache_folder, a_key_that_cannot_be_read, another_user_s_folder, a_user_without_a_home]
)
def test_a_cache_folder_that_cannot_be_used_stops_no_run(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    cache: Callable[[Path, pytest.MonkeyPatch], None],
) -> None:  # fmt: skip
    bundle = Bundle.open(built)
    (folder,) = built.glob("engines/*/w016")
    target = json.loads((folder / SEAL).read_text())["target"]
    cache(tmp_path / "cache", monkeypatch)
    assert engine_cache.EngineCache(bundle, target).load(bundle.variants["w016"]) is None
    (line,) = caplog.messages
    assert line.endswith("; compiling anew")


def test_an_engine_that_cannot_be_kept_is_one_line_that_names_the_remedy(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_user_without_a_home(tmp_path, monkeypatch)
    (tmp_path / "file").touch()
    monkeypatch.setattr(engine_cache, "NO_HOME", tmp_path / "file")
    bundle = Bundle.open(shutil.copytree(bundle_path, tmp_path / "x.bundle"))
    with pytest.raises(OutputError, match=r"w032 cannot be kept in .*; XDG_CACHE_HOME chooses another cache folder"):
        engine_cache.EngineCache(bundle, {"backend": "openvino"}).store(bundle.full, b"engine")


def test_an_engine_that_changed_on_its_way_is_not_kept(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    path = Path(shutil.copytree(bundle_path, tmp_path / "x.bundle"))
    answers = iter([np.zeros(1, np.float32), np.ones(1, np.float32)])
    monkeypatch.setattr(build, "_answer", lambda *_: next(answers))
    assert "w008 answers otherwise once it is loaded again" in refusal(build.main, path, "--batch-size", "1")
    assert not (path / "engines").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "whole numbers of at least 1, separated by commas, found --batch-size 0"),
        (["--batch-size", "2,x"], "found --batch-size 2,x"),
        (["--precision", "bf16"], "has no bf16 arithmetic"),
        (["--precision", "fp16"], "OpenVINO computes in fp32 or bf16"),
        (["--backend", "tensorrt"], "the backend tensorrt is not installed"),
    ],
)
def test_what_cannot_be_built_is_refused(
    bundle_path: Path, refusal: Refusal, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    if "bf16" in arguments:
        from ddsm_engine.backends import openvino

        class Core:
            def get_property(self, *_: str) -> list[str]:
                return ["FP32"]

        monkeypatch.setattr(openvino, "core", Core)
    assert message in refusal(build.main, bundle_path, *arguments)
