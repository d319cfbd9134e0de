import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddsm_engine.bundle import Bundle
from ddsm_engine.cost import gflops
from ddsm_engine.errors import StrategyError
from ddsm_engine.inspect import describe_strategy
from ddsm_engine.inspect import main as inspect_main
from ddsm_engine.strategy import Strategy, parse_uniform
from tests.conftest import Refusal

PUBLISHED = Path(__file__).parents[1] / "data" / "ddsm_cifar10_strategy.yaml"


def test_the_published_strategy_has_its_published_figures() -> None:
    strategy = Strategy.load(PUBLISHED)
    assert Counter(strategy.choices) == {
        Fraction(1): 274, Fraction(3, 4): 181, Fraction(1, 2): 534, Fraction(1, 4): 11
    }  # fmt: skip
    assert strategy.swaps == 28
    assert strategy.published_mmacs() == 3098.0875
    assert round(gflops(3098.0875e6), 3) == 6.196
    lengths = [run.length for run in strategy.runs]
    assert (lengths[0], lengths[1], lengths[-1]) == (266, 163, 530)
    assert strategy.choices[0] == 1, "index 0 is the clean end"
    assert strategy.choices[999] == Fraction(1, 2)


def test_inspect_prints_runs_swaps_and_gflops(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_main([str(PUBLISHED)]) == 0
    text = capsys.readouterr().out
    assert "29 runs, 28 swaps" in text
    assert "published CIFAR-10 table: 6.196 GFLOPs" in text


def test_a_strategy_is_costed_with_a_bundle_s_own_counts(bundle: Bundle) -> None:
    text = describe_strategy(Strategy.coarse([(0, Fraction(1)), (500, Fraction(1, 2))], 1000), bundle)
    full, half = bundle.variants["w032"].macs, bundle.variants["w016"].macs
    assert f"average GFLOPs (true): {gflops((full + half) / 2):.3f}" in text
    assert f"{2 * full / (full + half):.2f}x expected" in text


@given(st.lists(st.sampled_from(range(2, 9)), min_size=1, max_size=60))
def test_load_after_save_is_the_identity(tmp_path_factory: pytest.TempPathFactory, eighths: list[int]) -> None:
    path = tmp_path_factory.mktemp("strategy") / "s.yaml"
    strategy = Strategy(tuple(Fraction(k, 8) for k in eighths), provenance={"kind": "test"})
    strategy.save(path)
    assert Strategy.load(path) == strategy
    assert sum(run.length for run in strategy.runs) == len(eighths)
    assert all(a.choice != b.choice for a, b in zip(strategy.runs, strategy.runs[1:], strict=False))


def test_every_format_reads_the_same(tmp_path: Path) -> None:
    values = [1, 1, 0.75, 0.5, 0.5]
    expected = tuple(Fraction(v) for v in (1, 1, Fraction(3, 4), Fraction(1, 2), Fraction(1, 2)))
    files = {
        "published.txt": str(values),
        "list.json": json.dumps(values, indent=1),
        "ours.json": json.dumps(Strategy(expected).to_json()),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert Strategy.load(tmp_path / name).choices == expected, name


def test_a_call_strategy_remembers_its_sampler(tmp_path: Path) -> None:
    strategy = Strategy((Fraction(1, 2), "w032"), axis="call", sampler="ddim", steps=2)
    strategy.save(tmp_path / "s.yaml")
    assert Strategy.load(tmp_path / "s.yaml") == strategy


SEGMENT = "{first: 0, last: 1, width_mult: 1.0}"
HEAD = "format: ddsm-strategy\nformat_version: 1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 0.5][1, 0.5]", "found 2 opening brackets"),
        ("[1, 0.5]\n[1, 0.5]", "found 2 opening brackets"),
        ("[__import__('os').system('touch pwned')]", "plain numbers"),
        ("[1, (2).bit_length()]", "plain numbers"),
        ("[1, 0]", "must be a number in"),
        ("[1, 1.5]", "must be a number in"),
        ("[1, NaN]", "must be a number in"),
        ("[1, true]", "must be a number in"),
        ("[1, '0.5']", "plain numbers"),
        ("[]", "needs 1 to"),
        ("", "expected a mapping"),
        ("hello", "expected a mapping"),
        ("a: [", "not readable as YAML"),
        ("!!python/object/apply:os.system ['touch pwned']", "not readable as YAML"),
        ("a: &a [1]\nb: *a", "aliases are not allowed"),
        (HEAD.replace("1", "2") + f"length: 2\nsegments: [{SEGMENT}]", "format_version 2 is unknown"),
        (HEAD + f"length: 3\nsegments: [{SEGMENT}]", "cover 2 of 3"),
        (HEAD + f"length: 1\nsegments: [{SEGMENT}]", "must begin at 0 and end before 1"),
        (HEAD + f"length: 4\nsegments: [{SEGMENT}, {SEGMENT}]", "must begin at 2"),
        (HEAD + "length: 2\nsegments: [{first: 0, last: 1}]", "a segment is"),
        (HEAD + "length: 2\nsegments: [{first: 0, last: 1, width_mult: 2.0}]", "must be a number in"),
        (HEAD + f"length: 2\nsegments: [{SEGMENT}]\naxis: step", "axis must be"),
        (HEAD + f"length: 2\nsegments: [{SEGMENT}]\naxis: call", "names its sampler"),
        (HEAD + f"length: 2\nsegments: [{SEGMENT}]\nwidth: 3", "unknown fields"),
        (HEAD + f"length: 99999999\nsegments: [{SEGMENT}]", "needs a length"),
    ],
)
def test_a_broken_strategy_is_refused(
    text: str, message: str, tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "strategy.yaml"
    file.write_text(text)
    with pytest.raises(StrategyError, match=message):
        Strategy.load(file)
    assert str(file) in refusal(inspect_main, file)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000, b"[1," + b" " * (5 << 20) + b"1]"])
def test_bytes_that_are_no_strategy_are_refused(content: bytes, tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "s.txt").write_bytes(content)
    refusal(inspect_main, tmp_path / "s.txt")


def test_an_unknown_width_names_what_the_bundle_offers(bundle: Bundle) -> None:
    with pytest.raises(StrategyError, match=r"asks for 1/3; the bundle offers w008 \(2/8\), w012 \(3/8\)"):
        Strategy.uniform(Fraction(1, 3), 1000).resolve(bundle.manifest.variants)
    with pytest.raises(StrategyError, match="asks for w999"):
        Strategy(("w999",)).resolve(bundle.manifest.variants)


@pytest.mark.parametrize("text", ["uniform:4/8", "uniform:0.5", "uniform:1/2"])
def test_uniform_spells_one_width(text: str) -> None:
    assert parse_uniform(text, 10) == Strategy.uniform(0.5, 10)


def test_uniform_spells_one_variant_by_its_id(bundle: Bundle) -> None:
    strategy = parse_uniform("uniform:w016", 10)
    assert strategy == Strategy.uniform("w016", 10)
    assert strategy.resolve(bundle.manifest.variants) == ("w016",) * 10


def test_a_multiplier_finds_no_variant_that_is_no_part_of_a_supernet(bundle: Bundle) -> None:
    known = bundle.manifest.variants
    experts = [replace(v, width_mult=None) if v.id == "w032" else v for v in known]
    assert Strategy.uniform("w032", 2).resolve(experts) == ("w032", "w032")
    with pytest.raises(StrategyError, match=r"asks for 8/8; the bundle offers w008 \(2/8\), .*w028 \(7/8\), w032$"):
        Strategy.uniform(1.0, 2).resolve(experts)


@pytest.mark.parametrize("given", [0.375, np.float32(0.375), np.float64(0.375), Fraction(3, 8), "3/8", "0.375", ".375"])
def test_a_width_is_exact_however_it_is_given(given: Any) -> None:
    assert Strategy.uniform(given, 10).choices == (Fraction(3, 8),) * 10


@pytest.mark.parametrize("given", [0.6, np.float32(0.6), Fraction(3, 5)])
def test_entries_may_be_numbers_of_any_kind(given: Any, bundle: Bundle, tmp_path: Path) -> None:
    strategy = Strategy([given, 1, "w016"])  # type: ignore[arg-type]
    assert strategy == Strategy((Fraction(3, 5), Fraction(1), "w016"))
    strategy.save(tmp_path / "s.yaml")
    assert Strategy.load(tmp_path / "s.yaml") == strategy
    with pytest.raises(StrategyError, match="asks for 3/5; the bundle offers"):
        strategy.resolve(bundle.manifest.variants)


@pytest.mark.parametrize("entry", [None, True, 0, 1.5, float("nan"), 10**400, "", "x" * 65])
def test_an_entry_that_is_neither_a_width_nor_an_id_is_refused(entry: Any) -> None:
    with pytest.raises(StrategyError, match="found"):
        Strategy((entry,) * 3)


def test_numpy_s_number_of_steps_is_saved_as_a_number(tmp_path: Path) -> None:
    strategy = Strategy((Fraction(1, 2),) * 4, "call", "ddim", np.int64(4))  # type: ignore[arg-type]
    strategy.save(tmp_path / "s.yaml")
    assert Strategy.load(tmp_path / "s.yaml") == strategy
    with pytest.raises(StrategyError, match=r"steps must be a whole number, found 4\.0"):
        Strategy((Fraction(1, 2),) * 4, "call", "ddim", 4.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["uniform:", "uniform:0", "uniform:9/8", "uniform:1/0", "uniform:2x", "uniform:-w", "uniform:1e-999999999",
     "uniform:0." + "0" * 100 + "1", "uniform:1/" + "9" * 5000, "uniform:٤/٨"],
)  # fmt: skip
def test_a_uniform_width_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(StrategyError):
        parse_uniform(text, 10)
