"""``budget:200ms``: of the strategies that were searched for a bundle, the best that this machine runs in that time."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ddsm_engine.backends.engine import EngineOptions
from ddsm_engine.bundle import Bundle
from ddsm_engine.errors import StrategyError
from ddsm_engine.search.cost import measured_cost
from ddsm_engine.strategy import Strategy, spell_sampler
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
    given: Mapping[str, Any],
) -> Affordable:
    """Choose the strategy of the best metric among those that take no longer.

    Where a search was made for the bundle, what it came with is left out: it was judged elsewhere, by other images.

    Args:
        bundle: With searched strategies and a latency table of this machine.
        text: ``budget:200ms`` or ``budget:0.2s``, per image.
        backend: A backend, or ``auto``.
        options: Device, precision and threads.
        batch: Images at a time.
        given: ``sampler``, ``steps``, ``eta`` and ``clip_sample``; only strategies for those that are not None.

    Raises:
        StrategyError: no budget, nothing searched, several searches that cannot be compared, or nothing that meets it.
        BundleError: no latency table of this machine.
    """
    budget = parse_budget(text)
    asked = {option: value for option, value in given.items() if value is not None}
    known = {
        name: strategy for name, strategy in searched_strategies(bundle).items()
        if {**strategy.sampling(), "sampler": strategy.sampler}.items() >= asked.items()
    }  # fmt: skip
    brought = bundle.exported_strategies
    known = {name: strategy for name, strategy in known.items() if name not in brought} or known
    if not known:
        wanted = " for " + ", ".join(f"{option} {value}" for option, value in asked.items()) if asked else ""
        raise StrategyError(
            f"{bundle.path} holds no searched strategy{wanted} to choose from; make some: ddsm search {bundle.path}"
        )
    kinds = {_spell_kind(name, strategy) for name, strategy in known.items()}
    if len(kinds) > 1:
        raise StrategyError(
            f"{bundle.path} holds strategies of several searches, which cannot be compared "
            f"({'; '.join(sorted(kinds))}); say which: --sampler, --steps, --eta, --clip-sample; or name the strategy"
        )
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
    best = min(fitting, key=lambda name: (_score(name, known[name]), took[name]))
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


def _spell_kind(name: str, strategy: Strategy) -> str:
    """What must be the same for two scores to be comparable: a Fréchet distance falls with the number of images."""
    metric = _metric(name, strategy)
    return f"{spell_sampler(strategy)}, by {metric['name']} of {metric['images']} images, seed {metric['seed']}"


def _score(name: str, strategy: Strategy) -> float:
    return float(_metric(name, strategy)["value"])


def _metric(name: str, strategy: Strategy) -> Mapping[str, Any]:
    """What a strategy scored on images that the search had not seen, and on which."""
    metric = strategy.provenance.get("metric")
    kinds = {"name": str, "value": int | float, "images": int, "seed": int}
    if not isinstance(metric, Mapping) or any(
        isinstance(metric.get(key), bool) or not isinstance(metric.get(key), kind) for key, kind in kinds.items()
    ):
        raise StrategyError(f"the strategy {name} does not say what it scored; search again, or remove it")
    return metric
