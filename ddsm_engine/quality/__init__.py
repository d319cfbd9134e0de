"""How far are drawn images from real ones?

``choose_metric`` gives a ``Metric`` for what a command was asked; ``interval`` says how far chance could have moved it.
"""

from ddsm_engine.quality.choice import KINDS, add_options, choose_metric
from ddsm_engine.quality.metric import (
    Images,
    Interval,
    Metric,
    Rows,
    basic_interval,
    bootstrap,
    interval,
    paired_interval,
)

__all__ = [
    "KINDS", "Images", "Interval", "Metric", "Rows", "add_options", "basic_interval", "bootstrap", "choose_metric",
    "interval", "paired_interval",
]  # fmt: skip
