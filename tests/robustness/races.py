"""Two processes that write the same thing at once: one wins, none corrupts.

python -m tests.robustness.races --bundle tiny.bundle --races 40
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from ddsm_engine.files import SUFFIX
from tests.robustness.forks import DONE, REFUSED, end, expect, rehearse, start, undisturbed
from tests.robustness.scenarios import Commands, Scenario, one_file, one_folder, try_each


def race(scenario: Scenario, folder: Path, times: int, rng: random.Random) -> dict[str, int]:
    """Let two attempts run at once, one a little later; counts how they ended.

    Raises:
        AssertionError: both were refused, one failed, or what they left is not what one alone would leave.
    """
    rehearsal = folder / "rehearsal"
    rehearsal.mkdir()
    undisturbed(lambda: scenario.prepare(rehearsal))
    _, seconds = rehearse(lambda: scenario.act(rehearsal))
    endings: dict[str, int] = {}
    for number in range(times):
        place = folder / str(number)
        place.mkdir()
        undisturbed(lambda place=place: scenario.prepare(place))  # type: ignore[misc]
        first = start(lambda place=place: scenario.act(place))  # type: ignore[misc]
        time.sleep(rng.uniform(0, seconds / 2))
        second = start(lambda place=place: scenario.act(place))  # type: ignore[misc]
        ended = sorted((end(first), end(second)))
        expect(ended in ([DONE, DONE], [DONE, REFUSED]), f"two at once ended as {ended}")
        scenario.final(place)
        left = list(place.rglob(f".*{SUFFIX}"))
        expect(not left, f"left over: {left}")
        name = " and ".join(ended)
        endings[name] = endings.get(name, 0) + 1
        shutil.rmtree(place)
    return endings


def scenarios(bundle: Path, work: Path) -> Iterator[tuple[str, Scenario]]:
    """Name and scenario."""
    commands = Commands(bundle, work)
    yield "replace a file", one_file()
    yield "replace a folder", one_folder(two_steps=False)
    yield "run -o FOLDER", commands.run_new()
    yield "run -o FOLDER --resume", commands.run_folder()
    yield "run -o FOLDER --force", commands.run_over("images")
    yield "export", commands.export(force=False)
    yield "export --force", commands.export()
    yield "train", commands.train()
    yield "build", commands.build()


def run_races(bundle: Path, races: int, seed: int) -> dict[str, dict[str, int]]:
    """Race everything, so often in all."""
    rng = random.Random(seed)

    def trials(work: Path) -> Iterator[tuple[str, Callable[[Path], dict[str, int]]]]:
        entries = list(scenarios(bundle, work))
        for name, scenario in entries:
            yield name, partial(race, scenario, times=max(1, races // len(entries)), rng=rng)

    return try_each(trials)


def main() -> None:
    """Print the tallies as JSON."""
    p = argparse.ArgumentParser(description="Let two processes write the same thing at once.")
    p.add_argument("--bundle", type=Path, required=True, help="a small bundle with a strategy named coarse")
    p.add_argument("--races", type=int, default=40)
    p.add_argument("--seed", type=int, default=0)
    arguments = p.parse_args()
    print(json.dumps(run_races(arguments.bundle.absolute(), arguments.races, arguments.seed), indent=1))


if __name__ == "__main__":
    main()
