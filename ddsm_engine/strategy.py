"""Which variant serves which timestep? A strategy answers, and remembers where it came from."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby
from numbers import Real
from operator import index
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import yaml

from ddsm_engine.bundle import Variant
from ddsm_engine.cost import PUBLISHED_CIFAR10_MMACS
from ddsm_engine.errors import StrategyError
from ddsm_engine.files import write_atomically
from ddsm_engine.samplers import SamplerLike
from ddsm_engine.untrusted import brief, one_line, parse_json, read_bytes

FORMAT = "ddsm-strategy"
FORMAT_VERSION = 1
MAX_BYTES = 4 << 20
MAX_YAML_BYTES = 1 << 18
"""Four seconds of the parser at worst; a list of numbers, which YAML does not read, may fill ``MAX_BYTES``."""
MAX_LENGTH = 1 << 16
MAX_NAME = 64

_NUMBER = re.compile(r"[0-9]{1,9}(?:/[1-9][0-9]{0,8}|\.[0-9]{0,20})?|\.[0-9]{1,20}")

Choice = Fraction | str
"""A width multiplier (of the full width), or a variant's id."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive entries that agree; both ends included."""

    first: int
    last: int
    choice: Choice

    @property
    def length(self) -> int:
        """Number of entries."""
        return self.last - self.first + 1


@dataclass(frozen=True, slots=True)
class Strategy:
    """A choice of variant for every entry of an axis.

    Attributes:
        choices: One per entry; numbers of any kind become exact. On the ``timestep`` axis index 0 is the clean end,
            which is sampled *last*; on the ``call`` axis index 0 is the first executed call.
        axis: What the entries stand for.
        sampler: The sampler a ``call`` strategy belongs to; None on the timestep axis.
        steps: That sampler's number of steps; None on the timestep axis.
        provenance: Where it came from, as JSON values.
        options: What that sampler was told beside its steps; see ``ddsm_engine.samplers.Sampler``.
    """

    choices: tuple[Choice, ...]
    axis: Literal["timestep", "call"] = "timestep"
    sampler: str | None = None
    steps: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make every number exact, and refuse what no run could follow."""
        if not 1 <= len(self.choices) <= MAX_LENGTH:
            raise StrategyError(f"a strategy needs 1 to {MAX_LENGTH} entries, found {len(self.choices)}")
        if not isinstance(self.steps, SupportsIndex | None):
            raise StrategyError(f"steps must be a whole number, found {brief(self.steps)}")
        exact = tuple(choice if isinstance(choice, str) else _fraction(choice) for choice in self.choices)
        object.__setattr__(self, "choices", exact)
        object.__setattr__(self, "steps", None if self.steps is None else index(self.steps))
        if self.axis not in ("timestep", "call"):
            raise StrategyError(f"axis must be 'timestep' or 'call', found {brief(self.axis)}")
        for choice in set(self.choices):
            if isinstance(choice, Fraction) and not 0 < choice <= 1:
                raise StrategyError(f"a width multiplier must lie in (0, 1], found {float(choice):g}")
            if isinstance(choice, str) and not (choice.isprintable() and 1 <= len(choice) <= MAX_NAME):
                raise StrategyError(f"a variant's id has 1 to {MAX_NAME} printable characters, found {brief(choice)}")
        if (self.axis == "call") != (self.sampler is not None and self.steps is not None):
            raise StrategyError("a strategy over calls names its sampler and steps; one over timesteps names neither")
        _check_options(self.options, self.axis)

    @classmethod
    def uniform(cls, choice: float | Choice, timesteps: int) -> "Strategy":
        """One variant for every timestep.

        Args:
            choice: Share of the full width, in (0, 1], as a number or as text (``4/8``), or a variant's id.
            timesteps: Length of the training schedule.

        Raises:
            StrategyError: a number that is not in (0, 1], or what can be no variant's id.
        """
        always: Choice
        if isinstance(choice, str):
            always = choice if choice[:1].isalpha() else parse_fraction(choice)  # no number begins with a letter
        else:
            always = _fraction(choice)
        return cls((always,) * timesteps, provenance={"kind": "uniform"})

    @classmethod
    def coarse(cls, runs: Iterable[tuple[int, Fraction]], timesteps: int) -> "Strategy":
        """Build from (first timestep, width multiplier) pairs in rising order, the first at 0."""
        starts = [*runs]
        ends = [*(first for first, _ in starts[1:]), timesteps]
        return cls(tuple(mult for (first, mult), end in zip(starts, ends, strict=True) for _ in range(first, end)))

    @property
    def runs(self) -> tuple[Run, ...]:
        """The entries grouped into runs, index 0 first."""
        runs, first = [], 0
        for choice, group in groupby(self.choices):
            length = len(list(group))
            runs.append(Run(first, first + length - 1, choice))
            first += length
        return tuple(runs)

    @property
    def swaps(self) -> int:
        """How often neighbouring entries differ."""
        return len(self.runs) - 1

    def resolve(self, variants: Iterable[Variant]) -> tuple[str, ...]:
        """The id of the variant that serves each entry.

        Raises:
            StrategyError: a choice that no variant offers.
        """
        known = list(variants)
        by_choice: dict[Choice, str] = {_fraction(v.width_mult): v.id for v in known if v.width_mult is not None}
        by_choice |= {v.id: v.id for v in known}
        for choice in dict.fromkeys(self.choices):
            if choice not in by_choice:
                offered = ", ".join(_offer(v) for v in known)
                raise StrategyError(f"the strategy asks for {spell(choice)}; the bundle offers {offered}")
        return tuple(by_choice[choice] for choice in self.choices)

    def sampling(
        self,
        sampler: SamplerLike | None = None,
        steps: int | None = None,
        *,
        eta: float | None = None,
        clip_sample: float | None = None,
    ) -> dict[str, Any]:
        """The arguments that make the sampler of a run, of which some were given.

        The others are the strategy's own, where it is one over calls; where another sampler was given, only the steps.
        """
        given = {"sampler": sampler, "steps": steps, "eta": eta, "clip_sample": clip_sample}
        own: dict[str, Any] = {"steps": self.steps}
        if sampler in (None, self.sampler):
            own |= {"sampler": self.options.get("config", self.sampler), **self.options}
        return {name: own.get(name) if value is None else value for name, value in given.items()}

    def published_mmacs(self) -> float | None:
        """Average 1e6 MACs per entry by the published CIFAR-10 table; None if a width is not in the table."""
        costs = [PUBLISHED_CIFAR10_MMACS.get(c) if isinstance(c, Fraction) else None for c in self.choices]
        known = [cost for cost in costs if cost is not None]
        return sum(known) / len(known) if len(known) == len(costs) else None

    def to_json(self) -> dict[str, Any]:
        """The strategy as JSON values, run-length encoded."""
        head: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION, "axis": self.axis}
        if self.axis == "call":
            head |= {"sampler": self.sampler, "steps": self.steps}
        if self.options:
            head["options"] = dict(self.options)
        segments = [{"first": run.first, "last": run.last, **_choice_to_json(run.choice)} for run in self.runs]
        return {**head, "length": len(self.choices), "segments": segments, "provenance": dict(self.provenance)}

    def save(self, path: Path | str) -> None:
        """Write YAML, whole or not at all."""
        write_atomically(
            Path(path), yaml.safe_dump(self.to_json(), sort_keys=False, width=120, allow_unicode=True).encode()
        )

    @classmethod
    def load(cls, path: Path | str) -> "Strategy":
        """Read a strategy file: ours (YAML or JSON), a JSON list, or the published search's text.

        The published text is one Python list of numbers; index = timestep. It is parsed as data, never evaluated.

        Raises:
            StrategyError: unreadable, two lists on a line, a gap or an overlap, anything that is not a number.
        """
        path = Path(path)
        try:
            text = read_bytes(path, MAX_BYTES).decode("utf-8")
        except (OSError, ValueError) as error:
            raise StrategyError(f"{path} could not be read as a strategy: {error}") from error
        try:
            return cls._from_list(text) if text.lstrip().startswith("[") else cls._from_mapping(_yaml(text))
        except StrategyError as error:
            raise StrategyError(f"{path}: {error}") from error

    @classmethod
    def _from_list(cls, text: str) -> "Strategy":
        lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
        joined = " ".join(lines)
        if joined.count("[") != 1 or not joined.endswith("]"):
            raise StrategyError(
                f"expected one list of width multipliers, found {joined.count('[')} opening brackets; a search that "
                f"ran twice appends its second list to the first: keep one"
            )
        try:
            values = parse_json(joined)
        except ValueError as error:
            raise StrategyError(f"expected plain numbers, each must be a number in (0, 1]: {error}") from error
        if len(values) > MAX_LENGTH:
            raise StrategyError(f"a strategy needs 1 to {MAX_LENGTH} entries, found {len(values)}")
        return cls(tuple(_fraction(value) for value in values), provenance={"kind": "list"})

    @classmethod
    def _from_mapping(cls, data: object) -> "Strategy":
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise StrategyError(f"expected a mapping with format: {FORMAT}, or one list of width multipliers")
        version = data.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise StrategyError(f"format_version {brief(version)} is unknown; this program reads {FORMAT_VERSION}")
        allowed = {
            "format", "format_version", "axis", "length", "segments", "provenance", "sampler", "steps", "options"
        }  # fmt: skip
        if unknown := sorted(str(key) for key in data.keys() - allowed):
            raise StrategyError(f"unknown fields {brief(unknown)}")
        length, segments, provenance = data.get("length"), data.get("segments"), data.get("provenance", {})
        if type(length) is not int or not 1 <= length <= MAX_LENGTH or not isinstance(segments, list):
            raise StrategyError(f"needs a length (1 to {MAX_LENGTH}) and a list of segments")
        if not isinstance(provenance, dict):
            raise StrategyError("provenance must be a mapping")
        sampler, steps = data.get("sampler"), data.get("steps")
        if not isinstance(sampler, str | None) or type(steps) not in (int, type(None)):
            raise StrategyError(f"sampler must be a name and steps a whole number, found {brief((sampler, steps))}")
        axis, options = data.get("axis", "timestep"), data.get("options", {})
        return cls(_choices(segments, length), axis, sampler, steps, provenance, options)


class _PlainLoader(yaml.SafeLoader):
    """YAML as far as JSON goes: no aliases (one inside another grows without bound), no tags, no key twice.

    A word is a number only where JSON has that number: YAML's own kinds include sexagesimal ones, which take time that
    grows with the square of their length, and dates.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the library's own; filled below

    def compose_node(self, parent: Any, index: Any) -> Any:  # noqa: ANN401 - the library's signature
        if self.check_event(yaml.events.AliasEvent):
            raise StrategyError("YAML aliases are not allowed in a strategy")
        if getattr(self.peek_event(), "tag", None) is not None:  # type: ignore[no-untyped-call]
            raise StrategyError("not readable as YAML: tags are not allowed in a strategy")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: ANN401, FBT001, FBT002
        found = super().construct_mapping(node, deep=deep)
        if len(found) != len(node.value):
            raise StrategyError("not readable as YAML: a key stands twice in a mapping")
        return found


for _kind, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("null", r"null|~|", ["n", "~", ""]),
    ("int", r"-?[0-9]{1,20}", "-0123456789"),
    ("float", r"-?[0-9]{1,15}\.[0-9]{0,20}(?:[eE][-+]?[0-9]{1,2})?", "-0123456789"),
):
    _PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _yaml(text: str) -> object:
    if len(text) > MAX_YAML_BYTES:
        raise StrategyError(f"expected at most {MAX_YAML_BYTES} characters of YAML, found {len(text)}")
    try:
        return yaml.load(text, Loader=_PlainLoader)  # noqa: S506 - derived from SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise StrategyError(f"not readable as YAML: {one_line(error)}") from error


def _choices(segments: Sequence[object], length: int) -> tuple[Choice, ...]:
    choices: list[Choice] = []
    for segment in segments:
        if not isinstance(segment, dict) or set(segment) not in (
            {"first", "last", "width_mult"},
            {"first", "last", "variant"},
        ):
            raise StrategyError(f"a segment is {{first, last, width_mult or variant}}, found {brief(segment)}")
        first, last = segment["first"], segment["last"]
        if type(first) is not int or type(last) is not int or first != len(choices) or not first <= last < length:
            raise StrategyError(
                f"the segment {brief(first)}…{brief(last)} must begin at {len(choices)} and end before {length}"
            )
        choice = segment["variant"] if "variant" in segment else _fraction(segment["width_mult"])
        if not isinstance(choice, str | Fraction):
            raise StrategyError(f"variant must be an id, found {brief(choice)}")
        choices += [choice] * (last - first + 1)
    if len(choices) != length:
        raise StrategyError(f"the segments cover {len(choices)} of {length} entries")
    return tuple(choices)


def _check_options(options: object, axis: str) -> None:
    """Refuse what ``make_sampler`` takes no value of; what it thinks of the value is its own matter."""
    kinds = {"config": dict, "eta": float | int, "clip_sample": float | int}
    if not isinstance(options, Mapping) or any(
        name not in kinds or isinstance(value, bool) or not isinstance(value, kinds[name])
        for name, value in options.items()
    ):
        raise StrategyError(f"options are eta and clip_sample (numbers) and config (a mapping), found {brief(options)}")
    if options and axis != "call":
        raise StrategyError("a strategy over timesteps belongs to no sampler, so it has no options for one")


def _fraction(value: object) -> Fraction:
    """A width multiplier as an exact fraction: files write 0.375, the widths are eighths (or so) of the full one."""
    if isinstance(value, Fraction):
        return value
    if isinstance(value, bool) or not isinstance(value, Real) or value <= 0 or not value <= 1:
        raise StrategyError(f"a width multiplier must be a number in (0, 1], found {brief(value)}")
    return Fraction(float(value)).limit_denominator(1 << 12)


def _choice_to_json(choice: Choice) -> dict[str, Any]:
    return {"variant": choice} if isinstance(choice, str) else {"width_mult": float(choice)}


def _offer(variant: Variant) -> str:
    """A variant as a strategy may name it: ``w048 (3/8)``, or its id alone."""
    mult = variant.width_mult
    return variant.id if mult is None else f"{variant.id} ({spell(_fraction(mult))})"


def spell(choice: Choice) -> str:
    """A choice as people write it: ``3/8``, or a variant id."""
    if isinstance(choice, str):
        return choice
    eighths = choice * 8
    return f"{eighths.numerator}/8" if eighths.denominator == 1 else f"{choice.numerator}/{choice.denominator}"


def spell_sampler(strategy: Strategy) -> str:
    """What a strategy over calls was made for: ``ddim with 50 steps, clip_sample 1.0``."""
    told = "".join(f", {option} {brief(value)}" for option, value in strategy.options.items())
    return f"{strategy.sampler} with {strategy.steps} steps{told}"


def parse_uniform(text: str, timesteps: int) -> Strategy:
    """``uniform:4/8``, ``uniform:0.5`` or ``uniform:w064`` → one variant for every timestep.

    Raises:
        StrategyError: a number that is not in (0, 1], or what can be no variant's id.
    """
    return Strategy.uniform(text.removeprefix("uniform:"), timesteps)


def parse_fraction(text: str) -> Fraction:
    """``4/8``, ``0.5`` or ``1`` as an exact number; ``Fraction`` by itself would work out 1e-999999999, too.

    Raises:
        StrategyError: anything else.
    """
    if not _NUMBER.fullmatch(text):
        raise StrategyError(f"expected a number like 4/8 or 0.5, or the id of a variant, found {brief(text)}")
    return Fraction(text)
