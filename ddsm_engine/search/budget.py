"""``budget:200ms``: of the strategies that were searched for a bundle, the best that this machine runs in that time."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import StrategyError
from ddsm_engine.search.cost import measured_cost
from ddsm_engine.strategy import Strategy
from ddsm_engine.untrusted import brief

PREFIX = "budget:"


class Affordable(NamedTuple):
    """A strategy that meets a budget.

    Attributes:
        name: In the bundle.
        strategy: It.
        predicted_ms: Of a run, per image, by this machine's latency table.
    """

    name: str
    strategy: Strategy
    predicted_ms: float


def strategy_within(
    bundle: Bundle,
    text: str,
    *,
    backend: str,
    options: EngineOptions,
    batch: int,
    sampler: str | None = None,
    steps: int | None = None,
) -> Affordable:
    """Choose the strategy of the best metric among those that take no longer.

    Args:
        bundle: With searched strategies and a latency table of this machine.
        text: ``budget:200ms`` or ``budget:0.2s``, per image.
        backend: A backend, or ``auto``.
        options: Device, precision and threads.
        batch: Images at a time.
        sampler: Only strategies for this one.
        steps: Only strategies for so many.

    Raises:
        StrategyError: no budget, nothing searched, several searches that cannot be compared, or nothing that meets it.
        BundleError: no latency table of this machine.
    """
    budget = parse_budget(text)
    known = {
        name: strategy for name, strategy in searched_strategies(bundle).items()
        if sampler in (None, strategy.sampler) and steps in (None, strategy.steps)
    }  # fmt: skip
    if not known:
        wanted = "" if sampler is None and steps is None else f" for {sampler or 'any sampler'}, {steps or 'any'} steps"
        raise StrategyError(
            f"{bundle.path} holds no searched strategy{wanted} to choose from; make some: ddsm search {bundle.path}"
        )
    kinds = {(s.sampler, s.steps, _metric(name, s)[0]) for name, s in known.items()}
    if len(kinds) > 1:
        found = "; ".join(f"{name}, {count} steps, by {metric}" for name, count, metric in sorted(kinds, key=str))
        raise StrategyError(f"{bundle.path} holds strategies of several searches ({found}); say --sampler and --steps")
    took = {}
    for name, strategy in known.items():
        calls = strategy.resolve(bundle.manifest.variants)
        took[name] = measured_cost(bundle, backend, options, batch, calls).of(calls)
    fitting = [name for name in known if took[name] <= budget]
    if not fitting:
        fastest = min(took, key=lambda name: took[name])
        raise StrategyError(
            f"no strategy of {bundle.path} can meet {text}: the fastest, {fastest}, takes {took[fastest]:.1f} ms an "
            f"image (batch {batch}); allow more, or search one of fewer steps"
        )
    best = min(fitting, key=lambda name: (_metric(name, known[name])[1], took[name]))
    return Affordable(best, known[best], took[best])


def parse_budget(text: str) -> float:
    """Milliseconds.

    Raises:
        StrategyError: anything but a number with its unit.
    """
    found = re.fullmatch(r"budget:([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s)", text)
    if found is None or float(found[1]) == 0:
        raise StrategyError(f"expected budget:200ms or budget:0.2s (of a run, per image), found {brief(text)}")
    return float(found[1]) * (1 if found[2] == "ms" else 1000)


def searched_strategies(bundle: Bundle) -> dict[str, Strategy]:
    """Those that ``ddsm search`` left in a bundle, by name."""
    loaded = {name: Strategy.load(bundle.strategy_file(name)) for name in bundle.strategies()}
    return {name: s for name, s in loaded.items() if s.axis == "call" and s.provenance.get("kind") == "search"}


def _metric(name: str, strategy: Strategy) -> tuple[str, float]:
    """The metric's name and its value on images that the search had not seen."""
    metric = strategy.provenance.get("metric")
    kind, value = (metric.get("name"), metric.get("value")) if isinstance(metric, Mapping) else (None, None)
    if not isinstance(kind, str) or not isinstance(value, (int, float)) or isinstance(value, bool):
        raise StrategyError(f"the strategy {name} does not say what it scored; search again, or remove it")
    return kind, float(value)
