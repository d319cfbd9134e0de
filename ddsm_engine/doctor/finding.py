"""What the doctor says of one fact."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["problem", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        severity: ``problem``: something does not work. ``note``: everything works, but not as well as it could.
        expected: What a healthy machine has.
        found: What this one has.
        repair: The exact command; empty where there is nothing to repair.
    """

    severity: Severity
    expected: str
    found: str
    repair: str = ""
