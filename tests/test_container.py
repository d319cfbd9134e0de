"""What the Containerfile promises; ``.ci/run`` executes its steps (``tests/container.py``), for they install."""

import os
import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from ddsm_engine import doctor
from ddsm_engine.run import parser
from tests import container
from tests.container import CONTAINERFILE, DRAW, ROOT, Instruction, environment, instructions

TEXT = CONTAINERFILE.read_text(encoding="utf-8")
STEPS = instructions(TEXT)
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
WHEEL = f"ddsm_engine-{VERSION}-py3-none-any.whl"


def only(keyword: str) -> Instruction:
    (step,) = (step for step in STEPS if step.keyword == keyword)
    return step


def test_the_image_runs_as_a_user_with_a_number_and_not_as_root() -> None:
    """A cluster that demands a user other than root can only judge numbers."""
    uid, gid = only("USER").rest.split(":")
    assert uid.isdecimal()
    assert gid.isdecimal()
    assert 0 not in (int(uid), int(gid))
    last = [step.keyword for step in STEPS].index("USER")
    assert not any(step.keyword in ("RUN", "COPY", "ADD") for step in STEPS[last:]), "nothing is built as that user"


def test_the_base_is_named_with_a_version_and_can_be_pinned() -> None:
    name, _, base = only("ARG").rest.partition("=")
    assert only("FROM").rest == f"${{{name}}}"
    assert re.fullmatch(r"python:3\.1\d-slim", base)
    assert "latest" not in TEXT
    assert f"--build-arg {name}={base}@sha256:" in TEXT


def test_every_source_is_in_the_repository_or_made_by_the_stated_command() -> None:
    assert "#   python -m pip wheel --no-deps -w dist .\n" in TEXT
    *sources, _ = only("COPY").words
    made = [source for source in sources if not (ROOT / source).exists() or source.startswith("dist/")]
    assert [fnmatch(f"dist/{WHEEL}", source) for source in made] == [True]
    assert not any(step.keyword == "ADD" for step in STEPS)


def test_the_build_context_holds_the_sources_and_nothing_else() -> None:
    ignored, *kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ignored == "*"
    assert [line.removeprefix("!") for line in kept] == only("COPY").words[:-1]


def test_the_cpu_backends_are_installed_at_the_tested_versions_and_torch_is_refused() -> None:
    install, check = (step.rest for step in STEPS if step.keyword == "RUN")
    assert "-c constraints.txt" in install
    assert '"$(echo ddsm_engine-*.whl)[cpu]"' in install
    assert "torch" not in install
    assert "find_spec('torch') is not None" in check


def test_the_health_check_is_the_doctor_and_the_entry_point_the_command() -> None:
    assert only("HEALTHCHECK").words == ["ddsm", "doctor"]
    assert doctor.main.__module__ == "ddsm_engine.doctor"
    assert only("ENTRYPOINT").words == ["ddsm"]


def test_what_is_written_at_run_time_goes_to_tmp() -> None:
    values = environment(STEPS)
    assert values["XDG_CACHE_HOME"] == "/tmp"  # noqa: S108 - the image's
    assert values["PYTHONDONTWRITEBYTECODE"] == values["ORT_DISABLE_TELEMETRY"] == "1"
    assert "HOME" not in values


def test_the_stated_command_is_closed_and_is_that_of_the_readme() -> None:
    stated = re.search(r"docker run (?:.*\\\n)*.*", TEXT.replace("#   ", ""))
    assert stated is not None
    command = " ".join(stated[0].replace("\\", "").split())
    for option in (
        "--read-only",
        "--tmpfs /tmp",
        "--network none",
        "--cap-drop ALL",
        "my.bundle:/bundle:ro",
        "out:/out",
    ):
        assert option in command
    page = " ".join((ROOT / "README.md").read_text(encoding="utf-8").replace("\\", "").split())
    assert command in page
    arguments = command.partition("ddsm-engine run ")[2].split()
    assert parser().parse_args(arguments).output == Path("/out/images.png")
    assert parser().parse_args(DRAW[1:]).bundle == "/bundle"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# note\nfrom a\n", [("FROM", "a")]),
        ("RUN a \\\n    && b\n\nUSER 1:1", [("RUN", "a  && b"), ("USER", "1:1")]),
    ],
)
def test_instructions_are_read_as_an_engine_reads_them(text: str, expected: list[tuple[str, str]]) -> None:
    assert instructions(text) == expected


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of one file, and an image of a shell script in the place of ``ddsm``, so that nothing is installed."""
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/manifest.json").write_text("{}")
    (tmp_path / WHEEL).write_text("")

    def make(command: list[object], **_: object) -> subprocess.CompletedProcess[str]:
        (Path(str(command[-1])) / "bin").mkdir(parents=True)
        return subprocess.CompletedProcess([], 0)

    original = subprocess.run
    monkeypatch.setattr(container, "become", lambda user, venv: {})
    monkeypatch.setattr(subprocess, "run", lambda command, **o: (make if "venv" in command else original)(command, **o))
    return tmp_path


def steps_with(body: str) -> str:
    """A Containerfile whose RUN line writes the ``ddsm`` that its last lines call."""
    script = f"#!/bin/sh\\n{body}\\n"
    return f"""ENV XDG_CACHE_HOME=/tmp
WORKDIR /opt
COPY dist/ddsm_engine-*.whl ./
RUN test -e {WHEEL} && rm {WHEEL} && bin="${{PATH%%:*}}" && printf '{script}' > "$bin/ddsm" && chmod +x "$bin/ddsm"
USER 10001:10001
HEALTHCHECK CMD ["ddsm", "doctor"]
ENTRYPOINT ["ddsm"]
"""


DRAWS = '[ "$1" = run ] || exit 0; for last; do :; done; echo drawn > "$last"'


def test_steps_are_executed_in_order(image: Path) -> None:
    container.execute(steps_with(DRAWS), image / WHEEL, image / "venv", image / "bundle")
    assert (image / "venv-root/out/images.png").read_text() == "drawn\n"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("exit 3", id="a command that fails"),
        pytest.param(DRAWS + '; echo x > "$XDG_CACHE_HOME/trace"', id="a file in the cache"),
        pytest.param(DRAWS + '; echo x > "$(dirname "$0")/trace"', id="a file in the installation"),
        pytest.param('[ "$HOME" = /nonexistent ] || ' + DRAWS, id="no image"),
    ],
)
def test_an_image_that_fails_or_writes_elsewhere_is_refused(image: Path, body: str) -> None:
    with pytest.raises(SystemExit) as stop:
        container.execute(steps_with(body), image / WHEEL, image / "venv", image / "bundle")
    assert stop.value.code not in (None, 0)


def test_the_bundle_is_mounted_for_reading_only(tmp_path: Path, image: Path) -> None:
    container.mount(tmp_path / "root", image / "bundle")
    mounted = tmp_path / "root/bundle/manifest.json"
    assert mounted.stat().st_mode & 0o222 == mounted.parent.stat().st_mode & 0o222 == 0
    assert os.access(tmp_path / "root/out", os.W_OK)
