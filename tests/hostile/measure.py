"""``python -m tests.hostile.measure CASES.json``: what refusing files that announce much adds to a process's peak."""

import io
import json
import os
import resource
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from tests.hostile.test_corpus import COMMANDS, check_refusal, time_limit, tree

ADDRESS_SPACE = 6 << 30
"""On top of what the process has: nothing that a file announces may take the machine down if the code is wrong."""


def status(name: str) -> int:
    """Bytes of a line of Linux's process status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def measure(name: str, command: str, arguments: list[str], folder: Path) -> dict[str, object]:
    """Call one command; says what went wrong, and what it added to the memory that was in use before it."""
    os.chdir(folder)
    stderr, failure, before = io.StringIO(), "", tree(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    used, started = status("VmRSS"), time.perf_counter()
    try:
        with redirect_stderr(stderr), redirect_stdout(io.StringIO()), time_limit():
            code = COMMANDS[command](arguments)
        added = status("VmHWM") - used
        check_refusal(code, stderr.getvalue(), before, tree(folder), folder)
    except (Exception, SystemExit) as error:
        added, failure = status("VmHWM") - used, f"{type(error).__name__}: {error}"[:500]
    seconds = round(time.perf_counter() - started, 2)
    words = stderr.getvalue().strip()[:300]
    return {"name": name, "failure": failure, "added_bytes": added, "seconds": seconds, "words": words}


def main(cases: str) -> None:
    torch.set_num_threads(1)
    limit = status("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name, command, arguments, folder in json.loads(Path(cases).read_bytes()):
        print(json.dumps(measure(name, command, arguments, Path(folder))), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
