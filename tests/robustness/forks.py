"""Attempts in forks of this process, which end by themselves, by a refusal, or by a kill at a chosen moment.

Libraries are imported once, so that an attempt costs what it does. The forks begin with one thread: nothing may have
started a thread pool before.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

EVENTS = frozenset(
    {
        "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link", "ctypes.dlsym",
        "tempfile.mkdtemp", "shutil.rmtree",
    }
)  # fmt: skip
"""Audit events of Python that come right before a change on disk; ``renameat2`` shows as the look-up of its symbol."""

RENAMES = frozenset({"os.rename", "ctypes.dlsym"})


KILLED, DONE, REFUSED, FAILED = "killed", "done", "refused", "failed"


class RefusedError(Exception):
    """A command ended with exit code 1 and its one line."""


def succeed(code: int) -> None:
    """Take a command's exit code.

    Raises:
        RefusedError: it was not 0.
    """
    if code != 0:
        raise RefusedError


def expect(condition: object, what: object) -> None:
    """An assertion that survives ``python -O``."""
    if not condition:
        raise AssertionError(what)


@dataclass(frozen=True, slots=True)
class Moment:
    """When to die.

    Attributes:
        after_s: Seconds after the start, by the clock; or None:
        event: Right before this file-system event, counted from 1.
        renames: Count only renames, which is where states change.
        later: Not before it, but before the event that follows.
    """

    after_s: float | None = None
    event: int = 0
    renames: bool = False
    later: bool = False


def start(act: Callable[[], None], moment: Moment | None = None) -> int:
    """Begin an attempt in a fork; returns its process number."""
    sys.stdout.flush()
    child = os.fork()
    if child != 0:
        return child
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    if moment is not None and moment.after_s is None:
        _die_at(moment)
    code = 2
    try:
        act()
        code = 0
    except RefusedError:
        code = 1
    finally:
        os._exit(code)


def end(child: int) -> str:
    """Wait for a fork; says how it ended."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return KILLED if os.WTERMSIG(status) == signal.SIGKILL else FAILED
    return {0: DONE, 1: REFUSED}.get(os.waitstatus_to_exitcode(status), FAILED)


def undisturbed(act: Callable[[], None]) -> None:
    """Let an attempt run in a fork.

    Raises:
        AssertionError: it did not end well.
    """
    how = end(start(act))
    expect(how == DONE, f"the undisturbed attempt {how}")


def _changes_the_disk(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        return isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in EVENTS


def _die_at(moment: Moment) -> None:
    seen, due = 0, False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen, due
        if not _changes_the_disk(event, arguments):
            return
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += event in RENAMES or not moment.renames
        if seen == moment.event:
            due = True
            if not moment.later:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def rehearse(act: Callable[[], None]) -> tuple[list[str], float]:
    """File-system events and seconds of an undisturbed attempt."""
    reader, writer = os.pipe()
    started = time.monotonic()

    def recorded() -> None:
        events: list[str] = []

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if _changes_the_disk(event, arguments):
                events.append(event)

        sys.addaudithook(hook)
        act()
        with os.fdopen(writer, "w") as pipe:
            json.dump(events, pipe)

    child = start(recorded)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    how = end(child)
    expect(how == DONE, f"the undisturbed attempt {how}")
    events: list[str] = json.loads(text)
    return events, time.monotonic() - started


def attempt(act: Callable[[], None], events: list[str], seconds: float, rng: random.Random) -> str:
    """An attempt that is killed at a random moment, if it is still there then; says how it ended."""
    moment = choose_moment(events, seconds, rng)
    child = start(act, moment)
    if moment.after_s is not None:
        time.sleep(moment.after_s)
        os.kill(child, signal.SIGKILL)
    return end(child)


def choose_moment(events: list[str], seconds: float, rng: random.Random) -> Moment:
    """By the clock, before any event, or right before or after a rename."""
    kind, renames = rng.random(), sum(event in RENAMES for event in events)
    if kind < 0.3:
        return Moment(after_s=rng.uniform(0, seconds))
    if kind < 0.65 or renames == 0:
        return Moment(event=rng.randint(1, len(events)))
    return Moment(event=rng.randint(1, renames), renames=True, later=rng.random() < 0.5)
