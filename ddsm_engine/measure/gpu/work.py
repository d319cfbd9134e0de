"""What a part of the suite is given: bundles, a share of the time, and a file that keeps every row once measured."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ddsm_engine.backends import GPU_BACKENDS, ON_GPU, engine_target
from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import Bundle, Variant
from ddsm_engine.errors import BackendError, BundleError, DdsmError

Row = dict[str, Any]

OPTIONS = EngineOptions(device="cuda")
"""How every engine of the suite is opened: in the precision that its backend chooses itself."""

BACKENDS = tuple(dict.fromkeys((*GPU_BACKENDS, *ON_GPU)))
"""All that can run on a GPU, in the order in which they are wanted most, should the time not be enough."""

MAKE_BUNDLES = "python -m benchmarks.gpu_bundles -o FOLDER"


class Work:
    """A part in progress; what an earlier try of it measured is not measured again."""

    def __init__(self, bundles: Mapping[int, Bundle], seconds: float, file: Path) -> None:
        """Begin.

        Args:
            bundles: By image size.
            seconds: Share of the time: nothing new is begun after it.
            file: Rows as JSON lines; those it holds were measured before.
        """
        self.bundles, self._file = bundles, file
        self._end = time.monotonic() + seconds
        self.rows, self.left_out = read_rows(file)

    @property
    def left_s(self) -> float:
        """Seconds left; negative when the share is over."""
        return self._end - time.monotonic()

    def bundle(self, size: int) -> Bundle:
        """The bundle of an image size.

        Raises:
            BundleError: none was given.
        """
        if size not in self.bundles:
            raise BundleError(f"no bundle for images of {size}x{size} was given; {MAKE_BUNDLES} makes one")
        return self.bundles[size]

    def take(self, key: Row, measure: Callable[[], Row]) -> None:
        """Measure the row of a key and keep it, a refusal as its ``error``.

        What was measured before is not measured again; what the share of the time leaves no room for is noted.
        """
        if any(all(found.get(name) == value for name, value in key.items()) for found in self.rows):
            return
        if self.left_s <= 0:
            self.left_out.append(key)
            self._write({"left_out": key})
            return
        try:
            row = key | measure()
        except DdsmError as error:
            row = key | {"error": str(error)}
        self.rows.append(row)
        self._write(row)

    def backends(self) -> list[str]:
        """Those that run on the GPU here; each of the others gets a row that says why not.

        Raises:
            BackendError: none does.
        """
        found = []
        for name in BACKENDS:
            try:
                engine_target(name, OPTIONS, 1)
            except BackendError as error:
                self._write({"backend": name, "error": str(error)})
            else:
                found.append(name)
        if not found:
            raise BackendError("no backend here runs on the GPU; `ddsm doctor` says what is missing")
        return found

    def _write(self, row: Row) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_rows(file: Path) -> tuple[list[Row], list[Row]]:
    """The rows that a file of ``Work`` holds, and what was left out; a line that a kill cut short does not count."""
    rows: list[Row] = []
    left_out: list[Row] = []
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                row: Row = json.loads(line)
                if "left_out" in row:
                    left_out.append(row["left_out"])
                else:
                    rows.append(row)
    return rows, left_out


def variant_of(bundle: Bundle, eighths: int) -> Variant:
    """The variant of so many eighths of the full width.

    Raises:
        BundleError: there is none.
    """
    for variant in bundle.manifest.variants:
        if 8 * variant.width == eighths * bundle.manifest.spec.base_channels:
            return variant
    raise BundleError(f"{bundle.path} has no variant of {eighths}/8; {MAKE_BUNDLES} makes one that has")
