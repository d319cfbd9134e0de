"""What is said about dependencies and trust is what is true of them."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from ddsm_engine import bundle, onnx_file, untrusted
from ddsm_engine.doctor.libraries import fits, normalised, read_libraries

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
PINS = {
    normalised(name): version
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
    for name, version in [line.split("==")]
}
SBOM = json.loads((ROOT / "sbom.cdx.json").read_text(encoding="utf-8"))
COMPONENTS = {normalised(component["name"]): component["version"] for component in SBOM["components"]}
TABLE = {
    normalised(name): (version, minimum)
    for name, version, minimum in re.findall(
        r"^\| ([\w-]+) \| (\d[\w.]*) \| [^|]+ \| *([\d.]*) *\|", CHANGELOG, flags=re.MULTILINE
    )
}

LAST_VULNERABLE = {
    "torch": ["2.5.1", "2.9.1", "2.10.0"],  # CVE-2025-32434, CVE-2026-24747, CVE-2026-4538
    "onnx": ["1.20.1"],  # CVE-2026-27489, CVE-2026-34446, CVE-2026-49114
    "Pillow": ["11.2.1", "12.3.0"],  # CVE-2025-48379, CVE-2026-112403
    "tqdm": ["4.66.2"],  # CVE-2024-34062
    "PyYAML": ["5.3.1"],  # CVE-2020-14343
}


def requirements(*extras: str) -> dict[str, str]:
    """Library → the versions that the project accepts."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return {library.name: library.required for library in read_libraries(lines, {})}


@pytest.mark.parametrize(
    ("library", "version"),
    [(library, version) for library, versions in LAST_VULNERABLE.items() for version in versions],
)
def test_no_version_with_a_known_hole_is_accepted(library: str, version: str) -> None:
    assert not fits(version, requirements(*EXTRAS)[library])


def test_the_pinned_versions_are_accepted() -> None:
    for library, required in requirements("cpu", "export", "train").items():
        assert fits(PINS[normalised(library)], required), library


def test_the_sbom_lists_the_pinned_versions() -> None:
    assert SBOM["bomFormat"] == "CycloneDX"
    assert {name: PINS.get(name) for name in COMPONENTS} == COMPONENTS, "run .ci/sbom"
    root = SBOM["metadata"]["component"]
    assert (root["name"], root["version"]) == (PROJECT["name"], PROJECT["version"]), "run .ci/sbom"


def test_the_sbom_holds_every_requirement_and_no_torch() -> None:
    graph = {entry["ref"]: entry.get("dependsOn", []) for entry in SBOM["dependencies"]}
    direct = {normalised(reference.partition("==")[0]) for reference in graph["root-component"]}
    assert direct == {normalised(name) for name in requirements("cpu")}, "run .ci/sbom"
    assert not {"torch", "onnx", "pip"} & set(COMPONENTS)


def test_the_sbom_names_no_path_of_the_machine_that_made_it() -> None:
    assert "file:" not in json.dumps(SBOM)


def test_the_release_notes_list_what_the_sbom_lists() -> None:
    assert {name: version for name, (version, _) in TABLE.items()} == COMPONENTS
    minima = {name: f">={minimum}" for name, (_, minimum) in TABLE.items() if minimum}
    assert minima == {normalised(name): required for name, required in requirements("cpu").items()}


def test_the_security_page_states_the_bounds_of_the_code() -> None:
    stated = " ".join(SECURITY.split())
    for words in (
        f"headers {untrusted.MAX_HEADER_BYTES >> 20} MiB",
        f"directories {untrusted.MAX_DIRECTORY_BYTES >> 20} MiB",
        f"JSON {untrusted.MAX_JSON_DEPTH} levels deep",
        f"at most {bundle.MAX_VARIANTS} variants",
        f"{bundle.MAX_FILE_BYTES >> 30} GiB a file",
        f"{onnx_file.MAX_FIELDS:,} fields",
    ):
        assert words in stated


def test_links_of_the_security_page_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", SECURITY)
    assert targets
    assert all((ROOT / target).exists() for target in targets)
