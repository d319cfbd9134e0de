import base64
import copy
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from ddsm_engine.cli import guarded
from ddsm_engine.search.report import page, write_report

WIDTHS = (("w016", "4/8", 3.0), ("w024", "6/8", 7.0), ("w032", "8/8", 12.0))
Record = dict[str, Any]


def point(name: str, calls: list[list[Any]], cost: float, value: float) -> Record:
    return {
        "name": name,
        "calls": calls,
        "cost": cost,
        "value": value,
        "holdout": {"value": value + 0.5, "low": value + 0.25, "high": value + 0.8},
        "loss": {"value": value - 12.0, "low": value - 12.2, "high": value - 11.7},
        "predicted_ms": cost,
        "measured_ms": 1.05 * cost,
        "gflops": cost / 2,
    }


def example() -> Record:
    """A finished search over ten calls."""
    front = [
        point("A", [["w016", 6], ["w024", 2], ["w032", 2]], 120.0, 14.0),
        point("B", [["w016", 2], ["w024", 4], ["w032", 4]], 160.0, 12.5),
        point("full width", [["w032", 10]], 240.0, 12.0),
    ]
    front[2]["loss"] = {"value": 0.0, "low": 0.0, "high": 0.0}
    origins = ("uniform", "nsga2", "random")
    return {
        "format": "ddsm-search",
        "format_version": 1,
        "bundle": "my.bundle",
        "manifest": "c0ffee" * 10 + "c0ff",
        "environment": {"cpu": "Some CPU", "cores": 2, "date": "2026-11-22T01:00:00+00:00", "commit": "5951d34ab"},
        "method": "fast",
        "seed": 3,
        "sampler": "ddim",
        "steps": 10,
        "options": {"clip_sample": 1.0},
        "timesteps": [900.0 - 100 * k for k in range(10)],
        "groups": [2, 2, 2, 2, 2],
        "variants": [{"id": name, "label": label, "gflops": gflops} for name, label, gflops in WIDTHS],
        "cost": {
            "unit": "ms",
            "per_call": {"w016": 8.0, "w024": 16.0, "w032": 24.0},
            "swap": dict.fromkeys(("w016", "w024", "w032"), 0.1),
            "batch": 8,
            "target": {"backend": "openvino", "precision": "fp32", "threads": 2},
        },
        "metric": {"name": "FID", "images": 2048, "seed": 0, "holdout_images": 10000, "holdout_seed": 1},
        "error_table": [[0.01 * (group + 1), 0.001 * (group + 1), 0.0] for group in range(5)],
        "surrogate": {"r2": 0.934, "rank_correlation": 0.957, "probes": 40},
        "evaluations": [
            {
                "calls": [["w016", k], ["w032", 10 - k]],
                "origin": origins[k % 3],
                "cost": 240.0 - 16 * k,
                "value": 12.0 + k,
            }
            for k in range(1, 10)
        ],
        "front": front,
        "seeds": [{"seed": 3, "calls": front[1]["calls"]}, {"seed": 4, "calls": front[0]["calls"]}],
        "spent": {"calibration": 45_000, "probes": 2_000_000, "front": 955_000},
        "seconds": 9400.0,
    }


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 16, 3), value, dtype=np.uint8)).save(file, "png")
    return file.getvalue()


PICTURES = {"A": png(40), "full width": png(200)}


@cache
def whole_page() -> str:
    return page(example(), PICTURES)


def sparse() -> Record:
    """The same search with little to draw."""
    return example() | {"evaluations": [], "seeds": [], "error_table": None}


class Reader(HTMLParser):
    """Every element with its attributes, in order; refuses what does not nest."""

    EMPTY = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in self.EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def section(text: str, title: str) -> str:
    found = re.search(rf"<section>\n<h2>{title}</h2>(.*?)</section>", text, re.DOTALL)
    assert found
    return found[1]


def cells(text: str, row: int) -> list[str]:
    rows = re.findall(r"<tr.*?>(.*?)</tr>", text)
    return re.findall(r"<t[dh].*?>(.*?)</t[dh]>", rows[row])


def drawing(text: str) -> ElementTree.Element:
    found = re.search(r"<svg.*?</svg>", text, re.DOTALL)
    assert found
    return ElementTree.fromstring(found[0])  # noqa: S314 - our own page


def texts(text: str) -> list[str]:
    return [element.text or "" for element in drawing(text).iter("text")]


def test_the_page_needs_no_other_file_no_script_and_no_network() -> None:
    text = whole_page()
    assert "http" not in text
    assert "@import" not in text
    reader = Reader(text)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in reader.elements}
    assert all(source.startswith("data:image/png;base64,") for source in reader.attributes("src"))
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in reader.attributes("href"))
    assert not any(key.startswith("on") for _, attributes in reader.elements for key in attributes)
    assert not re.search(r"url\((?!#)", text)


def test_names_within_the_page_are_unique_and_lead_somewhere() -> None:
    text = whole_page()
    reader = Reader(text)
    names = Counter(reader.attributes("id"))
    assert max(names.values()) == 1
    targets = {target[1:] for target in reader.attributes("href") if target.startswith("#")}
    targets |= set(re.findall(r"url\(#(.*?)\)", text))
    assert targets
    assert targets <= set(names)


def test_the_same_search_gives_the_same_bytes_whatever_the_users_settings(tmp_path: Path) -> None:
    expected = whole_page()
    with mpl.rc_context({"font.size": 20, "svg.fonttype": "path", "axes.spines.top": True, "text.usetex": True}):
        write_report(json.loads(json.dumps(example())), PICTURES, tmp_path / "new" / "report.html")
    (written,) = (tmp_path / "new").iterdir()
    assert written.read_bytes() == expected.encode()


def hostile(value: Any) -> Any:
    """The same record in which every text is an attack."""
    if isinstance(value, str):
        return f"$\\frac$ \x07\n漢<script>alert(\"{value}\")</script><img src=x onerror='a'> & {'long ' * 20}"
    if isinstance(value, dict):
        return {hostile(key) if key in ("probes", "threads") else key: hostile(item) for key, item in value.items()}
    return [hostile(item) for item in value] if isinstance(value, list) else value


def test_texts_of_the_record_are_never_markup() -> None:
    record = hostile(example())
    record["surrogate"] = example()["surrogate"]
    text = page(record, {record["front"][0]["name"]: png(1), "<script>'\"": png(2)})
    reader = Reader(text)
    tame = Reader(whole_page())
    assert {tag for tag, _ in reader.elements} == {tag for tag, _ in tame.elements}
    assert {key for _, a in reader.elements for key in a} == {key for _, a in tame.elements for key in a}
    assert any('<script>alert("my.bundle")</script>' in words for words in reader.words)
    assert "&lt;script&gt;" in text
    assert "\x07" not in "".join(texts(section(text, "Strategies")))


MISSING: list[tuple[str, Callable[[Record], object], str, str]] = [
    ("front", lambda r: r.update(front=[]), "The front", "The search has chosen no strategy yet."),
    ("front", lambda r: r.update(front=[]), "Strategies", "There is none to draw yet."),
    (
        "table",
        lambda r: r.update(error_table=None),
        "Error of each variant at each call",
        "only the fast search does that",
    ),
    ("zeros", lambda r: r.update(error_table=[[0.0] * 3] * 5), "Error of each variant at each call", "No variant errs"),
    ("points", lambda r: r.update(front=[], evaluations=[]), "Cost and quality", "No strategy has been evaluated yet."),
    (
        "values",
        lambda r: [p.update(value=None, holdout=None) for p in r["front"]],
        "Cost and quality",
        "No strategy has been evaluated yet.",
    ),
    (
        "times",
        lambda r: [p.update(measured_ms=None) for p in r["front"]],
        "Predicted and measured time",
        "No strategy of",
    ),
    ("seeds", lambda r: r.update(seeds=[]), "Strategies of the seeds", "No other seeds were searched with."),
    ("spent", lambda r: r.update(spent={}), "What the search cost", "What the search cost was not recorded."),
]


@pytest.mark.parametrize(
    ("take", "title", "sentence"), [m[1:] for m in MISSING], ids=[f"{m[0]}-{m[2]}" for m in MISSING]
)
def test_a_part_without_data_says_so_and_the_others_stay(
    take: Callable[[Record], object], title: str, sentence: str
) -> None:
    record = sparse()
    take(record)
    text = page(record, PICTURES)
    Reader(text)
    part = section(text, title)
    assert sentence in part
    assert "<svg" not in part
    assert sentence not in whole_page()
    assert re.findall("<h2>(.*?)</h2>", text) == re.findall("<h2>(.*?)</h2>", whole_page())


def test_without_pictures_the_page_says_so() -> None:
    part = section(page(sparse(), {}), "Images")
    assert "No images were drawn." in part
    assert "<img" not in part


def test_an_empty_search_is_a_page() -> None:
    record = example()
    record |= {"front": [], "evaluations": [], "seeds": [], "spent": {}, "error_table": None, "surrogate": None}
    record |= {"options": {}, "environment": {}}
    record["cost"]["target"] = None
    text = page(record, {})
    Reader(text)
    assert "<svg" not in text
    assert "the cost was counted, not timed" in text
    assert "not recorded" in text
    assert "clipped" not in text


def test_the_head_says_what_was_searched_with_what() -> None:
    words = " ".join(Reader(whole_page()).words)
    for expected in (
        "Search of my.bundle",
        "(manifest c0ffeec0ffeec0ff)",
        "ddim, 10 steps, 10 calls, x_0 clipped to ±1",
        "fast search, seed 3: one of 3 variants for each of 5 groups of calls",
        "FID of 2,048 images (seed 0), for the front of 10,000 hold-out images as well (seed 1)",
        "ms per image, batch 8",
        "backend openvino, precision fp32, threads 2",
        "Some CPU, 2 cores",
    ):
        assert expected in words
    assert words.count("lower is better") == 1


def test_the_table_of_the_front_has_units_speedups_and_intervals() -> None:
    part = section(whole_page(), "The front")
    assert cells(part, 0)[2:6] == ["cost, ms", "predicted, ms", "measured, ms", "GFLOPs"]
    strategy = "4/8\u00a0×\u00a06, 6/8\u00a0×\u00a02, 8/8\u00a0×\u00a02"
    assert cells(part, 1) == [
        "A", strategy, "120", "120", "126", "60.0", "2.00x", "14.50 (14.25 to 14.80)", "+2.00 (+1.80 to +2.30)",
    ]  # fmt: skip
    assert cells(part, 3)[6:] == ["1.00x", "12.50 (12.25 to 12.80)", "–"]


@pytest.mark.parametrize(
    ("missing", "speedup"),
    [
        (("measured_ms",), "2.00x, predicted"),
        (("measured_ms", "predicted_ms"), "2.00x, GFLOPs"),
    ],
)
def test_a_speedup_that_was_not_measured_says_what_it_is(missing: tuple[str, ...], speedup: str) -> None:
    record = sparse()
    for entry in record["front"]:
        entry.update(dict.fromkeys(missing))
    row = cells(section(page(record, {}), "The front"), 1)
    assert row[6] == speedup
    assert row[4] == "–"


def test_without_the_full_width_there_is_no_speedup() -> None:
    record = sparse()
    del record["front"][2]
    assert cells(section(page(record, {}), "The front"), 1)[6] == "–"


def test_a_strategy_of_many_runs_is_summed_up_in_the_table() -> None:
    record = sparse()
    record["front"][0]["calls"] = [[("w016", "w032")[k % 2], 1] for k in range(10)]
    assert cells(section(page(record, {}), "The front"), 1)[1] == "10 runs"


def line_of_steps(text: str) -> np.ndarray[Any, Any]:
    """Corners [N, 2] of the strategy's line; y grows upwards."""
    lines = [e.get("d", "") for e in drawing(text).iter("path") if "#0072b2" in e.get("style", "")]
    assert len(lines) == 1
    numbers = np.array([float(word) for word in re.findall(r"-?[0-9.]+", lines[0])]).reshape(-1, 2)
    return numbers * (1, -1)


def test_strategies_are_step_lines_from_the_noisy_end() -> None:
    part = section(whole_page(), "Strategies")
    assert part.count("<svg") == 3
    assert [word for word in texts(part) if word.isdigit()] == ["900", "700", "500", "200", "0"], "left to right"
    corners = line_of_steps(part)
    across, up = np.diff(corners, axis=0).T
    assert np.all((np.abs(across) < 1e-6) | (np.abs(up) < 1e-6)), "nothing is smoothed"
    assert np.all(across >= 0)
    runs = across[across > 0]
    np.testing.assert_allclose(runs / runs.sum(), [0.6, 0.2, 0.2], rtol=1e-3)
    assert np.all(up >= 0), "4/8, 6/8, 8/8: the costliest is on top"


def test_a_sampler_that_calls_twice_at_a_timestep_shows_every_call() -> None:
    record = sparse()
    record["timesteps"] = [900.0, 700.0, 700.0, 500.0, 500.0, 300.0, 300.0, 100.0, 100.0, 0.0]
    runs = np.diff(line_of_steps(section(page(record, {}), "Strategies"))[:, 0])
    np.testing.assert_allclose(runs[runs > 0] / runs.sum(), [0.6, 0.2, 0.2], rtol=1e-3)


def test_the_heat_map_shows_each_group_as_often_as_it_has_calls() -> None:
    record = example() | {"front": [], "evaluations": [], "seeds": []}
    record["groups"] = [1, 5, 1, 1, 2]
    part = section(page(record, PICTURES), "Error of each variant at each call")
    images = [e for e in drawing(part).iter("image") if "pixelated" in e.get("style", "")]
    coded = images[0].get("href", "").removeprefix("data:image/png;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(coded))).convert("RGBA"))
    assert pixels.shape == (3, 10, 4)
    lengths = [1]
    for left, right in zip(pixels.transpose(1, 0, 2), pixels.transpose(1, 0, 2)[1:], strict=False):
        lengths = [*lengths[:-1], lengths[-1] + 1] if np.array_equal(left, right) else [*lengths, 1]
    assert lengths == record["groups"]
    opaque = sorted(pixels[row, :, 3].max() for row in range(3))
    assert opaque == [0, 255, 255], "the full width's zeros have no place on a logarithmic scale"
    assert "R² = 0.93, rank correlation 0.96" in part
    assert "40 probed strategies" in part


def test_the_front_shows_every_evaluation_by_origin_and_the_hold_out_values() -> None:
    part = section(whole_page(), "Cost and quality")
    words = texts(part)
    assert {"nsga2 (3)", "random (3)", "uniform (3)", "front, hold-out", "A", "B", "full width"} <= set(words)
    assert {"cost, ms per image", "FID"} <= set(words)
    # Nine evaluations and three of the legend; three of the front and its own.
    markers = Counter(use.get("style", "").partition(";")[0] for use in drawing(part).iter("use"))
    assert sum(count for style, count in markers.items() if re.search("#(0072b2|e69f00|009e73)", style)) == 12
    assert "Black: the front with 10,000 hold-out images" in part
    record = example()
    for entry in record["front"]:
        entry["holdout"] = None
    bare = section(page(record, PICTURES), "Cost and quality")
    assert "front, hold-out" not in texts(bare)
    assert "front" in texts(bare)
    assert "was not evaluated with hold-out images" in bare


def test_a_front_that_the_search_did_not_evaluate_itself_shows_its_hold_out_values() -> None:
    record = sparse()
    for entry in record["front"]:
        entry["value"] = None
    record["front"][0]["holdout"] = None
    words = texts(section(page(record, {}), "Cost and quality"))
    assert {"front, hold-out", "B", "full width"} <= set(words)
    assert "A" not in words, "neither here nor there"


@pytest.mark.parametrize(
    ("values", "logarithmic"), [((12.0, 300.0), True), ((-0.1, 9.0), False), ((10.0, 20.0), False)]
)
def test_the_metric_has_a_logarithmic_axis_where_it_spans_decades(
    values: tuple[float, float], *, logarithmic: bool
) -> None:
    record = example()
    record |= {"front": [], "seeds": [], "error_table": None}
    for entry, value in zip(record["evaluations"], values, strict=False):
        entry["value"] = value
    del record["evaluations"][2:]
    words = texts(section(page(record, {}), "Cost and quality"))
    assert ("FID, logarithmic" in words) == logarithmic
    assert not any("$" in word for word in words)


def test_predicted_times_stand_beside_measured_ones() -> None:
    record = sparse()
    record["front"][1]["measured_ms"] = 200.0
    part = section(page(record, PICTURES), "Predicted and measured time")
    assert "9.8 % off the measured ones on average, 20.0 % at most (B)" in part
    # A and the full width took 5 % longer than predicted, which speed-ups do not show; B took 25 % longer.
    assert "Speed-ups over the full width, measured in the same minutes, are 8.0 % off the measured ones" in part
    assert "16.0 % at most (B)" in part
    assert {"predicted, ms per image", "measured, ms per image", "equal"} <= set(texts(part))


def test_pictures_stand_in_the_order_of_the_front_each_whole() -> None:
    part = section(page(sparse(), {"other": png(7), **dict(reversed(PICTURES.items()))}), "Images")
    assert re.findall("<figcaption>(.*?)</figcaption>", part) == ["A", "full width", "other"]
    coded = re.findall('src="data:image/png;base64,(.*?)"', part)
    assert [base64.b64decode(data) for data in coded] == [PICTURES["A"], PICTURES["full width"], png(7)]


def test_the_seeds_are_drawn_over_each_other() -> None:
    words = texts(section(whole_page(), "Strategies of the seeds"))
    assert {"seed 3", "seed 4"} <= set(words)


def test_what_the_search_cost_stands_beside_the_published_protocol() -> None:
    part = section(whole_page(), "What the search cost")
    assert [cells(part, row) for row in range(6)] == [
        ["stage", "image evaluations"],
        ["calibration", "45,000"],
        ["probes", "2,000,000"],
        ["front", "955,000"],
        ["together", "3,000,000"],
        ["published protocol", "2,048,000,000"],
    ]
    assert "2 h 37 min in all" in part
    assert "683 times as much" in part


def test_a_search_over_a_thousand_calls_makes_a_small_page() -> None:
    record = example()
    record |= {"steps": 1000, "timesteps": [float(t) for t in range(999, -1, -1)], "groups": [1] * 1000}
    record["error_table"] = np.random.default_rng(0).random((1000, 3)).tolist()
    runs = [[WIDTHS[k % 3][0], 1] for k in range(1000)]
    for entry in (*record["front"], *record["seeds"]):
        entry["calls"] = copy.deepcopy(runs)
    record["evaluations"] = record["evaluations"] * 60
    text = page(record, {})
    Reader(text)
    assert len(text) < 2e6


def without_matplotlib(patch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        patch.delitem(sys.modules, name)
        yield name
    patch.setitem(sys.modules, "matplotlib", None)


def test_without_matplotlib_the_extra_to_install_is_named_and_an_old_page_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    old = tmp_path / "report.html"
    old.write_text("old", encoding="utf-8")
    assert list(without_matplotlib(monkeypatch))
    assert guarded(lambda: write_report(example(), {}, old)) == 1
    assert capsys.readouterr().err.startswith("error: matplotlib is not installed: pip install 'ddsm-engine[")
    assert old.read_text(encoding="utf-8") == "old"
    assert [*tmp_path.iterdir()] == [old]
