"""Modules run in processes of their own: what is forked must have begun no threads, and memory must be its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(*command: object) -> "subprocess.CompletedProcess[str]":
    """Run Python with one thread per library, from the checkout."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def answer(*command: object) -> Any:
    """What it prints, as JSON."""
    done = run(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
