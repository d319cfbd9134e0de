"""Whatever is done to a file, its reader returns or refuses: unbroken inputs, mutated by bytes and by structure."""

import io
import json
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddsm_engine.errors import DdsmError
from ddsm_engine.untrusted import MAX_DIRECTORY_BYTES, MAX_JSON_DEPTH, brief, open_archive, parse_json, words
from tests.hostile.corpus import safetensors
from tests.hostile.readers import READERS

EXAMPLES = 300

Draw = st.DrawFn
Mutation = Callable[[Draw, bytes], bytes]


def _position(draw: Draw, data: bytes) -> int:
    """Anywhere, and often near the front, where headers lie."""
    return draw(st.one_of(st.integers(0, len(data)), st.integers(0, min(len(data), 200))))


def flip(draw: Draw, data: bytes) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(draw(st.integers(1, 4))):
        changed[min(_position(draw, data), len(changed) - 1)] = draw(st.integers(0, 255))
    return bytes(changed)


def truncate(draw: Draw, data: bytes) -> bytes:
    return data[: _position(draw, data)]


def splice(draw: Draw, data: bytes) -> bytes:
    """A part of it put elsewhere."""
    first, last = sorted((_position(draw, data), _position(draw, data)))
    where = _position(draw, data)
    return data[:where] + data[first:last] + data[where + draw(st.integers(0, 20)) :]


def insert(draw: Draw, data: bytes) -> bytes:
    where = _position(draw, data)
    return data[:where] + draw(st.binary(max_size=30)) * draw(st.sampled_from([1, 1, 50])) + data[where:]


ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400, -(10**400), 65535, 65536, 65537]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["\ud800", "\x1b[2J", "\0", "../x", "/etc/passwd", "a" * 5000, "batch", "w004", "fp32"]),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.sampled_from(["first", "last", "variant", "name", "shape"]), st.integers(0, 3), max_size=3),
)


def _paths(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [below for key, child in items for below in _paths(child, (*path, key))]


def restructure(draw: Draw, value: Any) -> Any:
    """Replace, remove or repeat a few values of a JSON document."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(_paths(value)))
        if not path:
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "repeat"])):
            case "replace":
                holder[path[-1]] = draw(ODD_VALUES)
            case "remove":
                del holder[path[-1]]
            case "repeat" if isinstance(holder, list):
                holder += [holder[path[-1]]] * draw(st.integers(1, 300))
            case _:
                holder[str(path[-1]) + "2"] = holder[path[-1]]
    return value


def json_values(draw: Draw, data: bytes) -> bytes:
    try:
        value = json.loads(data)
    except ValueError:
        return flip(draw, data)
    return json.dumps(restructure(draw, value)).encode()


def header_values(draw: Draw, data: bytes) -> bytes:
    """The same in the header of a safetensors file, or in what is written in it as JSON."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    words = header["__metadata__"]
    if draw(st.booleans()):
        name = draw(st.sampled_from(["spec", "noise_schedule", "provenance"]))
        words[name] = json.dumps(restructure(draw, json.loads(words[name])))
    else:
        restructure(draw, header)
    return safetensors(header, data[8 + size :])


ANY: tuple[Mutation, ...] = (flip, truncate, splice, insert)
MUTATIONS: dict[str, tuple[Mutation, ...]] = {
    "manifest": (*ANY, json_values, json_values, json_values, json_values),
    "strategy": (*ANY, json_values, json_values),
    "flagfile": ANY,
    "checkpoint": ANY,
    "supernet": (*ANY, header_values, header_values),
    "diffusers model": (*ANY, json_values, json_values, json_values, json_values),
    "diffusers training": (*ANY, json_values, json_values, json_values, json_values),
    "scheduler": (*ANY, json_values, json_values, json_values),
    "onnx": ANY,
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bytes]]:
    return {name: reader.seeds(tmp_path_factory.mktemp(name)) for name, reader in READERS.items()}


@pytest.mark.parametrize("name", READERS)
def test_the_unbroken_inputs_are_read(name: str, seeds: dict[str, list[bytes]], tmp_path: Path) -> None:
    for seed in seeds[name]:
        READERS[name].read(tmp_path, seed)


def outcome(name: str, folder: Path, content: bytes) -> str:
    try:
        READERS[name].read(folder, content)
    except DdsmError as error:
        return "refused" if len(str(error)) < 1000 else f"refused at length: {error}"
    return "read"


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_read_or_refused_and_nothing_else(
    name: str, seeds: dict[str, list[bytes]], tmp_path: Path
) -> None:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        @st.composite
        def mutated(draw: Draw) -> bytes:
            seed = draw(st.sampled_from(seeds[name]))
            return draw(st.sampled_from(MUTATIONS[name]))(draw, seed)

        content = data.draw(mutated())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outcomes[outcome(name, tmp_path, content)] += 1

    check()
    assert outcomes.keys() <= {"read", "refused"}
    assert outcomes["refused"] > EXAMPLES / 10, "mutations that change nothing prove nothing"


# --- what the readers are made of -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "NaN", "-Infinity", "1e999", '{"a": 1, "a": 2}', "\ufeff{}", "9" * 5000,
        "[" * (MAX_JSON_DEPTH + 2) + "]" * (MAX_JSON_DEPTH + 2),
    ],
)  # fmt: skip
def test_json_that_is_not_strict_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - every reason will do
        parse_json(text)
    assert str(caught.value)


def test_json_of_the_allowed_depth_is_read() -> None:
    text = "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


def archive_of(names: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(names):
            archive.writestr(f"{number:040}", b"x")
    return buffer.getvalue()


def test_an_archive_of_many_files_is_read_and_one_of_more_is_refused_before_it_is(tmp_path: Path) -> None:
    entry = 46 + 40
    path = tmp_path / "many.zip"
    path.write_bytes(archive_of(MAX_DIRECTORY_BYTES // entry))
    with open_archive(path) as archive:
        assert archive.read(archive.namelist()[-1]) == b"x"
    path.write_bytes(archive_of(MAX_DIRECTORY_BYTES // entry + 1))
    with pytest.raises(zipfile.BadZipFile, match="Truncated"), open_archive(path):
        pass


def test_what_an_archive_holds_may_be_larger_than_its_directory_may_be(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "large.zip", "w") as archive:
        archive.writestr("large", bytes(MAX_DIRECTORY_BYTES + 1))
    with open_archive(tmp_path / "large.zip") as archive, archive.open("large") as stream:
        assert len(stream.read(MAX_DIRECTORY_BYTES + 1)) == MAX_DIRECTORY_BYTES + 1


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ([], "none"),
        (["a", "b", "c"], "a, b, c"),
        (["\x1b[2J", 7, "c", "d", "e"], r"\x1b[2J, 7, c and 2 more"),
    ],
)
def test_names_in_a_message_are_few_and_printable(names: list[object], sentence: str) -> None:
    assert words(names) == sentence


@given(ODD_VALUES)
def test_what_a_message_quotes_is_short_and_on_one_line(value: object) -> None:
    assert len(brief(value)) < 500
    assert brief(value).isprintable()
