"""Kill -9 at random points of every command that writes, and look at what is left.

    python -m tests.robustness.kills --bundle tiny.bundle --kills 200

An attempt is killed right before a randomly chosen file-system event (a file opened for writing, a rename, a removal …:
the moments that matter, however short), or after a random time. Then the state is looked at, by the scenario's own
oracle, and the same command is started again, to be killed again. At the end it is left alone, and must finish with
nothing lost and nothing left over.
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from ddsm_engine.files import SUFFIX
from tests.robustness.forks import DONE, KILLED, attempt, expect, rehearse, undisturbed
from tests.robustness.scenarios import Commands, Scenario, one_file, one_folder, try_each


@dataclass(slots=True)
class Tally:
    """What kills left of one scenario."""

    kills: int = 0
    ended_before: int = 0
    states: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def torment(scenario: Scenario, folder: Path, kills: int, rng: random.Random) -> Tally:
    """Kill a scenario until it was killed often enough, look at what each kill left, then let it finish."""
    started = time.monotonic()
    tally = Tally()
    rehearsal = folder / "rehearsal"
    rehearsal.mkdir(parents=True)
    undisturbed(lambda: scenario.prepare(rehearsal))
    events, seconds = rehearse(lambda: scenario.act(rehearsal))
    place = folder / "place"

    def begin_anew() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        undisturbed(lambda: scenario.prepare(place))

    begin_anew()
    while tally.kills < kills:
        how = attempt(lambda: scenario.act(place), events, seconds, rng)
        if how == KILLED:
            tally.kills += 1
            try:
                state = scenario.state(place)
            except OSError as error:
                raise AssertionError(f"neither old nor new: {error}") from error
            tally.states[state] = tally.states.get(state, 0) + 1
            if state.endswith("new") and rng.random() < 0.5:
                begin_anew()  # from here on, there would be nothing but new states to find
        else:
            expect(how == DONE, f"the next command {how}, after {tally.kills} kills")
            tally.ended_before += 1  # it had less to do than the rehearsal
            scenario.final(place)
            begin_anew()
    undisturbed(lambda: scenario.act(place))
    scenario.final(place)
    left = list(place.rglob(f".*{SUFFIX}"))
    expect(not left, f"left over: {left}")
    tally.seconds = round(time.monotonic() - started, 1)
    return tally


def scenarios(bundle: Path, work: Path) -> Iterator[tuple[str, float, Scenario]]:
    """Name, share of the kills, scenario."""
    commands = Commands(bundle, work)
    yield "replace a file", 0.17, one_file()
    yield "replace a folder", 0.17, one_folder(two_steps=False)
    yield "replace a folder, no exchange of names", 0.17, one_folder(two_steps=True)
    yield "run -o FOLDER --resume", 0.15, commands.run_folder()
    yield "run -o FOLDER --force", 0.1, commands.run_over("images")
    yield "run -o GRID.png --force", 0.05, commands.run_over("grid.png")
    yield "run -o ARRAY.npz --force", 0.05, commands.run_over("array.npz")
    yield "export --force", 0.03, commands.export()
    yield "train", 0.03, commands.train()
    yield "build", 0.03, commands.build()
    yield "bench", 0.05, commands.bench()


def survive(bundle: Path, kills: int, seed: int) -> dict[str, Tally]:
    """Kill everything, ``kills`` times in all.

    Raises:
        AssertionError: a state that is neither the old nor the new one, or a next command that failed.
    """
    rng = random.Random(seed)

    def trials(work: Path) -> Iterator[tuple[str, Callable[[Path], Tally]]]:
        for name, share, scenario in scenarios(bundle, work):
            yield name, partial(torment, scenario, kills=max(1, round(share * kills)), rng=rng)

    return try_each(trials)


def main() -> None:
    """Print the tallies as JSON."""
    p = argparse.ArgumentParser(description="Kill -9 at random points and count what is left.")
    p.add_argument("--bundle", type=Path, required=True, help="a small bundle with a strategy named coarse")
    p.add_argument("--kills", type=int, default=200)
    p.add_argument("--seed", type=int, default=0)
    arguments = p.parse_args()
    tallies = survive(arguments.bundle.absolute(), arguments.kills, arguments.seed)
    print(json.dumps({name: asdict(tally) for name, tally in tallies.items()}, indent=1))


if __name__ == "__main__":
    main()
