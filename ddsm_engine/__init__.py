"""Run step-aware diffusion models: one static engine per variant, swapped between timesteps without a gap."""

from importlib.metadata import version as _version

from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import DdsmError
from ddsm_engine.pipeline import Pipeline, Result
from ddsm_engine.strategy import Strategy

__version__ = _version("ddsm-engine")

__all__ = ["Bundle", "DdsmError", "Pipeline", "Result", "Strategy", "__version__"]
