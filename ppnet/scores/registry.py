"""The registry of scorers: from the statistics of sites to one float per unit, higher stays."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ppnet.errors import PPNetError

if TYPE_CHECKING:
    from ppnet.scores.statistics import SiteStatistics

# What a scorer can ask for, beside the weights, which are always there. Only what is asked for is collected.
ACTIVATIONS, GRADIENTS, FISHER, REWARDS = "activations", "gradients", "fisher", "rewards"
GRAM, CURVATURE = "gram", "curvature"
COLLECTED = (ACTIVATIONS, GRAM, GRADIENTS, FISHER, CURVATURE, REWARDS)

Needs = frozenset[str]


@dataclass(frozen=True)
class Scorer:
    """One way to score units.

    Attributes:
        name: what `ppnet.score(method=...)` calls it.
        function: ``(statistics of a site, **options) -> (U,)``; with `across`, ``(statistics of every site, **options)
            -> one (U,) per site``.
        needs: options -> what must be collected from data (`COLLECTED`).
        across: whether the scores of a unit depend on other sites.
        scores: the options that hold scores.
    """

    name: str
    function: Callable[..., Any]
    needs: Callable[[Mapping[str, Any]], Needs]
    across: bool
    scores: tuple[str, ...] = ()

    def __call__(self, statistics: Sequence[SiteStatistics], options: Mapping[str, Any]) -> list[Tensor]:
        if self.across:
            return self.function(statistics, **options)
        return [self.function(site, **options) for site in statistics]

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuses options that the scorer does not have.

        Raises:
            PPNetError: an unknown option.
        """
        known = [p.name for p in inspect.signature(self.function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        for name in options:
            if name not in known:
                takes = f"it takes {', '.join(known)}" if known else "it takes none"
                raise PPNetError(f"{name}: is no option of method {self.name!r}; {takes}.")


SCORERS: dict[str, Scorer] = {}


def scorer(
    name: str,
    *needs: str,
    across: bool = False,
    needed: Callable[[Mapping[str, Any]], Needs] | None = None,
    scores: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a scorer under `name`; its keyword-only arguments are its options.

    Args:
        needs: what must be collected from data, of `COLLECTED`.
        across: the function sees all sites at once.
        needed: options -> needs, where these depend on the options.
        scores: the options that hold scores; a file's name is then read.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        fixed = frozenset(needs)
        SCORERS[name] = Scorer(name, function, needed or (lambda options: fixed), across, scores)
        return function

    return decorate


def get_scorer(name: str) -> Scorer:
    """The scorer of a name.

    Raises:
        PPNetError: there is none of that name.
    """
    if not isinstance(name, str) or name not in SCORERS:
        raise PPNetError(f"method: {name!r} is not known; use one of {', '.join(sorted(SCORERS))}.")
    return SCORERS[name]


def choose(name: str, value: str, allowed: Sequence[str]) -> str:
    """`value`, if it is one of the allowed words.

    Raises:
        PPNetError: it is not.
    """
    if value not in allowed:
        raise PPNetError(f"{name}: {value!r} is not known; use one of {', '.join(map(repr, allowed))}.")
    return value
