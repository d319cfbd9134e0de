"""Every refusal a user can meet.

    DdsmError
    ├── SpecError         an architecture or a width that cannot exist
    ├── CheckpointError   a supernet file that cannot be read or does not fit
    ├── BundleError       a bundle that is damaged, foreign or newer
    ├── StrategyError     a strategy that does not fit the variants or the timesteps
    ├── SamplerError      a sampler that the noise schedule or the options do not allow
    ├── BackendError      a backend or a device that is missing, or an engine that failed
    ├── DataError         images that cannot be read or do not fit
    ├── MetricError       a feature network or statistics that do not fit, or a distance that is no number
    └── OutputError       an output that exists, or cannot be written

A message says what was expected, what was found, and what to do. Commands print it as one line and exit with 1.
"""


class DdsmError(Exception):
    """A refusal with a message meant for the user."""


class SpecError(DdsmError):
    """An architecture or a width that cannot exist."""


class CheckpointError(DdsmError):
    """A supernet file that cannot be read or does not fit."""


class BundleError(DdsmError):
    """A bundle that is damaged, foreign or newer than this program."""


class StrategyError(DdsmError):
    """A strategy that does not fit the variants or the timesteps."""


class SamplerError(DdsmError):
    """A sampler that the noise schedule or the options do not allow."""


class BackendError(DdsmError):
    """A backend or device that is missing, or an engine that failed."""


class DataError(DdsmError):
    """Images that cannot be read or do not fit."""


class MetricError(DdsmError):
    """A feature network or statistics that do not fit, or a distance that is not a number."""


class OutputError(DdsmError):
    """An output that exists already or cannot be written."""
