"""The Containerfile's steps, executed without a container engine: ``python -m tests.container WHEEL VENV BUNDLE``.

The image's root becomes a folder beside VENV, and its Python that of VENV, which this makes. COPY, RUN, HEALTHCHECK and
ENTRYPOINT are then executed as they stand, the last two as the image's user (where the system lets us change to it),
with a home that does not exist, a bundle that may not be written, and only /tmp and /out to write to.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
CONTAINERFILE = ROOT / "Containerfile"
DRAW = ["run", "--bundle", "/bundle", "--strategy", "uniform:2/8", "--sampler", "ddim", "--steps", "2",
        "--num-images", "4", "-o", "/out/images.png"]  # fmt: skip
MOUNTS = ("/tmp", "/out", "/bundle")  # noqa: S108 - the image's, replaced by folders of our own


class Instruction(NamedTuple):
    """One instruction: its keyword and the rest of its line, continued lines joined."""

    keyword: str
    rest: str

    @property
    def words(self) -> list[str]:
        """The exec form's words, or the words between blanks."""
        array = re.search(r'\[".*"\]$', self.rest)
        return [str(word) for word in json.loads(array[0])] if array else self.rest.split()


def instructions(text: str) -> list[Instruction]:
    """Every instruction of a Containerfile in order."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line.strip() for line in joined.splitlines()]
    found = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    return [Instruction(keyword.upper(), rest.strip()) for keyword, _, rest in found]


def environment(steps: Iterable[Instruction]) -> dict[str, str]:
    """What the ENV lines set."""
    return dict(word.split("=", 1) for step in steps if step.keyword == "ENV" for word in step.rest.split())


def execute(text: str, wheel: Path, venv: Path, bundle: Path) -> None:
    """Build the image as a folder and run it.

    Raises:
        SystemExit: a step failed, or wrote where it must not.
    """
    steps = instructions(text)
    root = venv.with_name(f"{venv.name}-root")
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    ours = {name: os.environ[name] for name in os.environ if name.startswith("PIP_")}
    theirs = {name: here(value, root) for name, value in environment(steps).items()}
    # The image has no compiler, and the folders of this machine's other programs may have one.
    found = {"PATH": f"{venv / 'bin'}:/usr/bin:/bin", "CXX": "none", "TMPDIR": str(root / "tmp")}
    values = {**ours, **theirs, **found}
    mount(root, bundle)
    build(steps, wheel, root, values)

    user = become(next(step.rest for step in steps if step.keyword == "USER"), venv)
    before = snapshot(venv, root)
    last = {step.keyword: step.words for step in steps}
    for words in (last["HEALTHCHECK"], [*last["ENTRYPOINT"], *DRAW]):
        command = [str(venv / "bin" / words[0]), *(here(word, root) for word in words[1:])]
        call(command, cwd=root / "out", env={**values, "HOME": "/nonexistent"}, **user)
    written = {path for path, _ in snapshot(venv, root) ^ before}
    if written != {root / "out/images.png"}:
        raise SystemExit(f"expected /out/images.png to be all that is written, found {sorted(map(str, written))}")
    print(f"{len(steps)} instructions of the Containerfile, run as {user or 'ourselves'}")  # noqa: T201


def mount(root: Path, bundle: Path) -> None:
    """What ``docker run`` mounts: a writable /tmp and /out, and a bundle that may only be read."""
    for folder in (root / "tmp", root / "out"):
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    shutil.copytree(bundle, root / "bundle")
    for path in (root / "bundle", *(root / "bundle").rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)


def build(steps: Sequence[Instruction], wheel: Path, root: Path, values: Mapping[str, str]) -> None:
    """Execute WORKDIR, COPY and RUN."""
    folder = root
    for step in steps:
        if step.keyword == "WORKDIR":
            folder = root / step.rest.lstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
        elif step.keyword == "COPY":
            for source in step.words[:-1]:
                given = wheel if fnmatch(wheel.name, Path(source).name) else ROOT / source
                shutil.copy(given, folder / step.words[-1])
        elif step.keyword == "RUN":
            call(["/bin/sh", "-e", "-c", step.rest], cwd=folder, env=values)


def here(value: str, root: Path) -> str:
    """A path of the image's mounts as it is named outside."""
    return str(root / value[1:]) if value.startswith(MOUNTS) else value


def become(user: str, venv: Path) -> dict[str, Any]:
    """How to run as the image's user; not at all where we are not root, or that user may not read this Python."""
    uid, gid = (int(number) for number in user.split(":"))
    changed: dict[str, Any] = {"user": uid, "group": gid, "extra_groups": []}
    if os.getuid() != 0:
        return {}
    try:
        subprocess.run([venv / "bin/python", "-c", ""], check=True, capture_output=True, cwd=venv, **changed)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"cannot become user {uid}: {error}", file=sys.stderr)  # noqa: T201
        return {}
    return changed


def call(command: Sequence[str], **options: Any) -> None:
    """Run one command and show what it said.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run(command, check=False, capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    print(done.stdout, end="")  # noqa: T201


def snapshot(*folders: Path) -> set[tuple[Path, tuple[int, int, int]]]:
    """Every file with its size, time and mode."""
    found = set()
    for folder in folders:
        for path in folder.rglob("*"):
            if not path.is_dir():
                about = path.lstat()
                found.add((path, (about.st_size, about.st_mtime_ns, about.st_mode)))
    return found


def main() -> None:
    """Entry point."""
    p = argparse.ArgumentParser(prog="python -m tests.container", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("wheel", type=Path, help="what `python -m pip wheel --no-deps -w dist .` made")
    p.add_argument("venv", type=Path, help="the environment to make; FOLDER-root beside it becomes the image's root")
    p.add_argument("bundle", type=Path, help="a bundle with the width 2/8")
    a = p.parse_args()
    execute(CONTAINERFILE.read_text(encoding="utf-8"), a.wheel.absolute(), a.venv.absolute(), a.bundle.absolute())


if __name__ == "__main__":
    main()
