"""From a result to what people read, for every benchmark: JSON, its Markdown twin, the marked blocks of the READMEs."""

import argparse
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddsm_engine.cli import guarded
from ddsm_engine.errors import OutputError
from ddsm_engine.files import clear_leftovers, write_atomically
from ddsm_engine.measure.environment import environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "benchmarks" / "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One question, and everything that its module has to say to it.

    Attributes:
        name: The module's.
        doc: The module's docstring; its first line is the question.
        options: Adds the command's own options.
        measure: Fills the record, and calls its third argument whenever a part of it is worth keeping.
        details: The record as Markdown without a heading.
        summary: The few lines of it that the project's README shows; None where it shows none.
        draw: Draws the record on a matplotlib figure; None where a picture would say no more than the table.
        resumes: Whether ``measure`` goes on with a record that holds some parts already.
    """

    name: str
    doc: str
    options: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace, Record, Callable[[], None]], None]
    details: Callable[[Record], str]
    summary: Callable[[Record], str] | None = None
    draw: "Callable[[Record, Figure], None] | None" = None
    resumes: bool = False

    def main(self, argv: Sequence[str] | None = None) -> int:
        """The module's command; returns the exit code."""
        p = argparse.ArgumentParser(prog=f"python -m benchmarks.{self.name}", description=self.doc.partition("\n")[0])
        self.options(p)
        p.add_argument("--machine", help="a short name for the processor")
        where = p.add_mutually_exclusive_group()
        where.add_argument(
            "-o", "--output", type=Path, help="JSON to write (default: benchmarks/results/DATE-MACHINE-…)"
        )
        where.add_argument(
            "--update-readme", type=Path, metavar="FILE", help="only rewrite the tables from this result"
        )
        arguments = p.parse_args(argv)
        if arguments.update_readme is not None:
            return guarded(lambda: update_readmes(self.name, self.blocks(load(arguments.update_readme, self.name))))
        return guarded(lambda: self.run(arguments))

    def blocks(self, record: Record) -> dict[Path, str]:
        """What stands between the markers of which README."""
        shown = {README: self.details(record)}
        return shown | {ROOT / "README.md": self.summary(record)} if self.summary else shown

    def run(self, arguments: argparse.Namespace) -> None:
        """Measure and write.

        Raises:
            OutputError: the result exists already, or was begun on another machine or with other libraries.
        """
        record = new_record(self.name, arguments.machine)
        path = arguments.output or path_of(record)
        if path.exists() and not self.resumes:
            raise OutputError(f"{path} exists already; choose another --output")
        if path.exists():
            record = resumed(load(path, self.name), record)
        self.measure(arguments, record, lambda: self.save(record, path))
        self.save(record, path)
        print(f"{self.details(record)}\n\nwritten: {path} and what goes with it")

    def save(self, record: Record, path: Path) -> None:
        """Write the JSON and, beside it, its details as Markdown and its picture; each whole or not at all."""
        head, command = f"# {record['benchmark']} on {record['machine']}", record["environment"]["command"]
        picture = f"![{self.name}]({path.with_suffix('.png').name})\n\n" if self.draw else ""
        for file in (path, path.with_suffix(".md"), path.with_suffix(".png")):
            clear_leftovers(file.parent, file.name)
        write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
        markdown = f"{head}\n\n{picture}{self.details(record)}\n\nCommand: `{command}`\n"
        write_atomically(path.with_suffix(".md"), markdown.encode())
        if self.draw:
            write_atomically(path.with_suffix(".png"), png_of(record, self.draw))


def png_of(record: Record, draw: "Callable[[Record, Figure], None]") -> bytes:
    """A benchmark's picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    draw(record, figure)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()


def load(path: Path, benchmark: str) -> Record:
    """Read a result.

    Raises:
        OutputError: not a result of this benchmark.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("benchmark") != benchmark:
        raise OutputError(f"{path} is not a result of benchmarks.{benchmark}")
    return record


def resumed(record: Record, fresh: Record) -> Record:
    """A result that is gone on with, by a commit that it names beside its own.

    Raises:
        OutputError: it was begun on another machine or with other libraries: its parts could not be compared.
    """
    begun, here = record["environment"], fresh["environment"]
    differing = [key for key in ("cpu", "cpu_features", "cores", "versions") if begun[key] != here[key]]
    if differing:
        raise OutputError(f"the result was begun with another {', '.join(differing)}; start a new one")
    record.setdefault("resumed", []).append({key: here[key] for key in ("date", "commit")})
    return record


def new_record(name: str, machine: str | None) -> Record:
    """A result that holds nothing yet but where it is measured."""
    where = environment()
    return {
        "benchmark": name,
        "machine": machine or machine_name(where["cpu"], where["cores"]),
        "environment": where,
    }


def update_readmes(name: str, blocks: Mapping[Path, str]) -> None:
    """Rewrite a benchmark's marked block of each README.

    Raises:
        OutputError: the markers are missing.
    """
    for readme, block in blocks.items():
        write_atomically(readme, with_block(readme.read_text(encoding="utf-8"), name, block).encode())


def path_of(record: Record) -> Path:
    """Where a result is written: ``results/DATE-MACHINE-BENCHMARK.json``."""
    return RESULTS / f"{record['environment']['date'][:10]}-{record['machine']}-{record['benchmark']}.json"


def machine_name(cpu: str, cores: int) -> str:
    """A short name for a processor: ``AMD EPYC``, 2 cores → ``amd-epyc-2c``."""
    plain = re.sub(r"\((r|tm)\)|@.*|\b(cpu|processor|\d+-core)\b", " ", cpu.lower())
    words = re.findall(r"[a-z0-9]+", plain)
    return "-".join([*words[:4], f"{cores}c"])


def machine_line(record: Record) -> str:
    """Processor, libraries, date and commit."""
    versions = record["environment"]["versions"]
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "ddsm-engine")
    processor, made = _source(record)
    return f"{processor}; {libraries}; {made}."


def in_short(record: Record, *sentences: str) -> str:
    """Sentences as one paragraph that ends with the processor, date and commit they are from."""
    return " ".join([*sentences, f"*{'; '.join(_source(record))}.*"])


def _source(record: Record) -> tuple[str, str]:
    """The processor; the date and the commits."""
    where = record["environment"]
    commits = dict.fromkeys([where["commit"], *(later["commit"] for later in record.get("resumed", []))])
    return (
        f"{where['cpu']}, {where['cores']} cores ({', '.join(where['cpu_features']) or 'no vector features named'})",
        f"{where['date'][:10]}, commit {', then '.join(str(c) for c in commits)}",
    )


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table whose first column is text and whose others are figures."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *lines])


def times(ratio: float) -> str:
    """A speed-up."""
    return f"{ratio:.2f}x"


def percent(share: float) -> str:
    """A share."""
    return f"{100 * share:.0f} %"


def spread(timing: Mapping[str, float], per: float = 1.0) -> str:
    """A median with its 20th and 80th percentile, divided by something, such as the images of a call."""
    median, low, high = (timing[name] / per for name in ("median_ms", "p20_ms", "p80_ms"))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def has_block(text: str, name: str) -> bool:
    """Whether a README has the markers of this block."""
    return _marked(name).search(text) is not None


def with_block(text: str, name: str, block: str) -> str:
    """The README with this text between its markers.

    Raises:
        OutputError: the markers are missing.
    """
    if not has_block(text, name):
        raise OutputError(f"the markers <!-- begin {name} --> and <!-- end {name} --> are missing")
    return _marked(name).sub(lambda found: f"{found[1]}\n\n{block}\n\n{found[3]}", text)


def block_of(text: str, name: str) -> str:
    """What stands between the markers, without the blank lines around it."""
    found = _marked(name).search(text)
    return found[2].strip() if found else ""


def _marked(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- begin {re.escape(name)} -->)(.*?)(<!-- end {re.escape(name)} -->)", re.DOTALL)
