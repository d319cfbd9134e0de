"""``python -m tests.hostile.fuzz READER --seconds N``: coverage-guided fuzzing of one reader of foreign files.

Needs ``pip install -e ".[fuzz]"``; no part of the tests, whose mutations know no coverage. It ends with 1, and with the
input in ``--output``, when a reader raises anything but a refusal, takes more than 5 s, or the process passes 2 GiB.
"""

import argparse
import os
import sys
import tempfile
import traceback
from pathlib import Path

import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

with atheris.instrument_imports(include=["ddsm_engine", "ddsm_export"], enable_loader_override=False):
    from ddsm_engine.errors import DdsmError
    from tests.hostile.readers import READERS

TIMEOUT_S = 5
MEMORY_MB = 2048


def main() -> None:
    """Fuzz until the time is up; libFuzzer ends the process and prints the number of executions."""
    p = argparse.ArgumentParser(prog="python -m tests.hostile.fuzz")
    p.add_argument("reader", choices=READERS)
    p.add_argument("--seconds", type=int, default=60)
    p.add_argument("--output", type=Path, default=Path("fuzzed"), help="folder for the inputs that were found")
    arguments = p.parse_args()
    reader, folder = READERS[arguments.reader], Path(tempfile.mkdtemp(prefix="ddsm-fuzz-"))
    for part in ("seeds", "work"):
        (folder / part).mkdir()
    for number, seed in enumerate(reader.seeds(folder)):
        (folder / "seeds" / str(number)).write_bytes(seed)
    arguments.output.mkdir(parents=True, exist_ok=True)

    def once(data: bytes) -> None:
        try:
            reader.read(folder / "work", data)
        except DdsmError as error:
            if len(str(error)) < 1000:
                return
            traceback.print_exc()
        except Exception:
            traceback.print_exc()
        else:
            return
        found = arguments.output / f"{arguments.reader}-{abs(hash(data)):x}"
        found.write_bytes(data)
        sys.stderr.write(f"{found} was not refused in one line\n")
        sys.stderr.flush()
        os._exit(1)

    options = (
        f"-max_total_time={arguments.seconds}", f"-timeout={TIMEOUT_S}", f"-rss_limit_mb={MEMORY_MB}",
        f"-artifact_prefix={arguments.output}/{arguments.reader}-", "-timeout_exitcode=1", "-error_exitcode=1",
        "-print_final_stats=1", "-verbosity=1", "-max_len=65536",
    )  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(folder / "seeds")], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
