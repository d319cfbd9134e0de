"""Compiled engines kept for the next start, sealed so that nobody else's are ever loaded.

An engine file is native code to its runtime, and OpenVINO takes one with a flipped byte without complaint. Each is
therefore kept beside a seal: what it was made from and for, its SHA-256, and an HMAC over these with a key that exists
only in this user's cache folder. An engine that came with a bundle from elsewhere has no valid seal and is not read.
"""

import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddsm_engine.bundle import Bundle, Variant, checksum_of
from ddsm_engine.errors import BackendError, OutputError
from ddsm_engine.files import SUFFIX, atomic_path, clear_leftovers, write_atomically
from ddsm_engine.untrusted import parse_json, read_bytes, word

ENGINES = "engines"
ENGINE, SEAL = "engine.bin", "seal.json"
TIMINGS = "timing.cache"
KEY_BYTES = 32
SEAL_LENGTH = 64
"""Hexadecimal digits."""
MAX_SEAL_BYTES = 1 << 16
MAX_TIMINGS_BYTES = 1 << 30
MAX_OTHERS = 64
"""Engines for other targets that are looked at for a message."""
NO_HOME = Path("/nonexistent")
"""By Debian's policy, section 9.2.3."""
ELSEWHERE = "XDG_CACHE_HOME chooses another cache folder"

log = logging.getLogger(__name__)


class ForeignEngineError(BackendError):
    """An engine that this user did not build on this machine, or not for this purpose: native code of somebody else."""


Target = Mapping[str, str | int]
"""What an engine depends on beside the variant: backend and its version, device, precision, batch, threads."""


def user_cache_folder() -> Path:
    """``$XDG_CACHE_HOME/ddsm-engine``, or ``~/.cache/ddsm-engine``; it need not exist.

    A user whom the system does not know, as in many containers, has the home of those that have none: it never exists,
    so nothing is found there, and what must be kept is refused.
    """
    try:
        home = Path.home()
    except RuntimeError:
        home = NO_HOME
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "ddsm-engine"


@dataclass(frozen=True, slots=True)
class EngineCache:
    """The engines of one bundle for one target: ``engines/<target>/<variant>/{engine.bin, seal.json}``.

    What their builder measured lies beside them in ``timing.cache``, a seal and then the content.

    They lie in the bundle, or in the user's cache folder where the bundle is read-only or leads elsewhere.
    """

    bundle: Bundle
    target: Target

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where the engines may lie: in the bundle, unless a link there leaves it, then in the user's cache folder."""
        name = f"{self.target['backend']}-{checksum_of(self.target)[:12]}"
        inside = self.bundle.path / ENGINES / name
        outside = user_cache_folder() / ENGINES / self.bundle.manifest.checksum[:32] / name
        return (inside, outside) if self.bundle.is_inside(inside) else (outside,)

    def load(self, variant: Variant) -> bytes | None:
        """The engine of a variant, or None where none was built; one that is damaged is named in a warning and left.

        A cache must never stop a run where what it holds can be made again in a moment.
        """
        try:
            return self.find(variant)
        except BackendError as error:
            log.warning("%s; compiling anew", error)
        return None

    def find(self, variant: Variant) -> bytes | None:
        """The engine of a variant, or None where none was built.

        Raises:
            ForeignEngineError: there is only one that somebody else built, or for something else.
            BackendError: there is only a damaged one.
        """
        refusal: BackendError | None = None
        for folder in self.folders:
            try:
                if (folder / variant.id).is_dir():
                    return read_sealed(folder / variant.id, self._subject(variant))
            except BackendError as error:
                refusal = refusal or error
            except OSError as error:  # another user's cache folder
                refusal = refusal or BackendError(f"engines in {folder} cannot be looked for: {error.strerror}")
        if refusal is not None:
            raise refusal
        return None

    def other_targets(self, variant: Variant) -> Iterator[Mapping[str, str]]:
        """What the engines that this backend has of a variant say that they are for.

        Nobody vouches for these words: they are cut short, and good for a message alone.
        """
        for folder in self.folders:
            for seal in sorted(folder.parent.glob(f"{self.target['backend']}-*/{variant.id}/{SEAL}"))[:MAX_OTHERS]:
                with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                    found = parse_json(read_bytes(seal, MAX_SEAL_BYTES))["target"]
                    if found["backend"] == self.target["backend"]:
                        yield {word(name): word(value) for name, value in found.items()}

    @property
    def kept_in(self) -> Path:
        """The folder that ``store`` writes to."""
        return self.folders[0 if os.access(self.bundle.path, os.W_OK) else -1]

    def store(self, variant: Variant, engine: bytes) -> None:
        """Keep an engine; one that is there is replaced whole.

        Raises:
            OutputError: neither the bundle nor the user's cache folder can be written.
        """
        folder = self.kept_in / variant.id
        subject = self._subject(variant) | {"sha256": hashlib.sha256(engine).hexdigest(), "size_bytes": len(engine)}
        try:
            clear_leftovers(user_cache_folder())
            seal = subject | {"seal": _seal(subject, _own_key(make=True))}
            folder.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(folder.parent, folder.name)
            with atomic_path(folder) as temporary:
                temporary.mkdir()
                (temporary / ENGINE).write_bytes(engine)
                (temporary / SEAL).write_text(json.dumps(seal, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"the engine of {variant.id} cannot be kept in {folder}: {error}; {ELSEWHERE}") from error

    def store_timings(self, timings: bytes) -> None:
        """Keep what a builder measured, for its next time; sealed, as compiled kernels are part of it.

        Raises:
            OutputError: neither the bundle nor the user's cache folder can be written.
        """
        file = self.kept_in / TIMINGS
        try:
            write_atomically(file, _seal(self._timings_subject(timings), _own_key(make=True)).encode() + timings)
        except OSError as error:
            raise OutputError(f"the builder's timings cannot be kept in {file}: {error}; {ELSEWHERE}") from error

    def load_timings(self) -> bytes:
        """What ``store_timings`` kept; empty where there is nothing, or nothing that this user made for this target."""
        try:
            found = read_bytes(self.kept_in / TIMINGS, MAX_TIMINGS_BYTES)
        except (OSError, ValueError):
            return b""
        seal, timings = found[:SEAL_LENGTH], found[SEAL_LENGTH:]
        is_ours = hmac.compare_digest(_seal(self._timings_subject(timings), _own_key(make=False)).encode(), seal)
        return timings if is_ours else b""

    def _timings_subject(self, timings: bytes) -> dict[str, object]:
        return {
            "format": "ddsm-engine-timings",
            "target": dict(self.target),
            "sha256": hashlib.sha256(timings).hexdigest(),
        }

    def _subject(self, variant: Variant) -> dict[str, object]:
        """What an engine is made from and for."""
        return {
            "format": "ddsm-engine-seal",
            "manifest": self.bundle.manifest.checksum,
            "variant": variant.id,
            "artefact_sha256": variant.sha256,
            "target": dict(self.target),
        }


def read_sealed(folder: Path, subject: Mapping[str, object] | None = None) -> bytes:
    """An engine whose seal holds.

    Args:
        folder: The engine's folder.
        subject: What it must be made from and for; None takes any.

    Raises:
        ForeignEngineError: sealed elsewhere, or made from or for something else.
        BackendError: damaged.
    """
    return _read_vouched(folder, subject)[1]


def sealed_target(folder: Path) -> Target:
    """What an engine is for, once it was read as ``read_sealed`` reads it.

    Raises:
        ForeignEngineError, BackendError: as ``read_sealed``.
    """
    target: Target = _read_vouched(folder, None)[0]["target"]
    return target


def _read_vouched(folder: Path, subject: Mapping[str, object] | None) -> tuple[dict[str, Any], bytes]:
    """What a seal vouches for, and the engine."""
    try:
        sealed = parse_json(read_bytes(folder / SEAL, MAX_SEAL_BYTES))
        claimed, sha256, size_bytes = sealed.pop("seal"), sealed["sha256"], sealed["size_bytes"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackendError(f"the engine in {folder} is damaged: its seal cannot be read; remove that folder") from error
    # Nothing of an engine is read before its seal is known to be ours.
    if not hmac.compare_digest(_seal(sealed, _own_key(make=False)).encode(), str(claimed).encode(errors="replace")):
        raise ForeignEngineError(
            f"the engine in {folder} was not built by this user on this machine, and is not loaded"
        )
    if subject is not None and any(sealed.get(name) != value for name, value in subject.items()):
        raise ForeignEngineError(f"the engine in {folder} was built from another bundle or for another target")
    try:
        engine = read_bytes(folder / ENGINE, size_bytes)
    except (OSError, ValueError):
        engine = b""
    if hashlib.sha256(engine).hexdigest() != sha256:
        raise BackendError(
            f"the engine in {folder} is damaged: its content is not what its seal vouches for; remove that folder"
        )
    return sealed, engine


def engines_of(bundle: Bundle) -> Iterator[Path]:
    """The folders of every engine that was kept for a bundle, whatever the target.

    What leaves the bundle by a link, or has a name that cannot be printed, is no engine that was kept.
    """
    inside = [path for path in sorted((bundle.path / ENGINES).glob("*/*")) if bundle.is_inside(path)]
    outside = sorted((user_cache_folder() / ENGINES / bundle.manifest.checksum[:32]).glob("*/*"))
    for path in (*inside, *outside):
        target, variant = path.parts[-2:]
        if path.is_dir() and (target + variant).isprintable() and not variant.endswith(SUFFIX):
            yield path


def _seal(subject: Mapping[str, object], key: bytes) -> str:
    return hmac.new(key, checksum_of(subject).encode(), hashlib.sha256).hexdigest()


def _own_key(*, make: bool) -> bytes:
    """This user's key on this machine; where there is none, an unguessable one that no seal fits."""
    file = user_cache_folder() / "engine.key"
    key = _read_key(file)
    if make and key is None:
        with suppress(OutputError), atomic_path(file, replace=file.exists(), private=True) as temporary:
            temporary.write_bytes(secrets.token_bytes(KEY_BYTES))
        key = _read_key(file)  # another process may have made it first
    return key or secrets.token_bytes(KEY_BYTES)


def _read_key(file: Path) -> bytes | None:
    try:
        key = file.read_bytes()
    except OSError:  # absent, or not this user's: no seal fits
        return None
    return key if len(key) == KEY_BYTES else None
