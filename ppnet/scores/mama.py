"""Movement and magnitude analysis: weighted ranks of what the weights, supervised training and rewards say of a unit.

Inspired by MAMA pruning (Jiang et al. 2025, arXiv 2505.14052), whose published text gives no formula for the reward
term; the indicators and their combination are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppnet.checks import number
from ppnet.errors import PPNetError
from ppnet.scores.activation import activation
from ppnet.scores.bias import bias
from ppnet.scores.combine import combined
from ppnet.scores.kl import kl
from ppnet.scores.magnitude import magnitude
from ppnet.scores.obs import obs
from ppnet.scores.registry import ACTIVATIONS, CURVATURE, FISHER, GRADIENTS, GRAM, REWARDS, Needs, scorer
from ppnet.scores.reward import reward
from ppnet.scores.statistics import SiteStatistics
from ppnet.scores.taylor import taylor

# Chosen on language models of 0.26 and 5 M parameters (section "mama" of benchmarks/quality scores).
WEIGHTS = {"activation": 1.0, "obs": 1.0, "magnitude": 0.1, "bias": 0.1, "sft": 0.1, "reward": 1.0, "kl": 0.0}
_NEEDS = {
    "activation": frozenset({ACTIVATIONS}),
    "obs": frozenset({GRAM, CURVATURE}),
    "magnitude": frozenset(),
    "bias": frozenset({ACTIVATIONS}),
    "sft": frozenset({GRADIENTS}),
    "reward": frozenset({REWARDS}),
    "kl": frozenset({FISHER}),
}
_INDICATORS: dict[str, Callable[[SiteStatistics], Tensor]] = {
    "activation": activation,
    "obs": obs,
    "magnitude": lambda site: magnitude(site, form="paths"),
    "bias": bias,
    "sft": taylor,
    "reward": reward,
    "kl": kl,
}
_GIVEN = ("sft", "reward", "kl")


def _weights(options: Mapping[str, Any]) -> dict[str, float]:
    """The weights in force: rewards count only where they are given, or asked for by a weight."""
    asked = options.get("weights")
    if asked is not None and not isinstance(asked, Mapping):
        raise PPNetError(f"weights: must map indicators ({', '.join(WEIGHTS)}) to numbers, got {asked!r}.")
    strangers = sorted(map(str, set(asked or ()) - WEIGHTS.keys()))
    if strangers:
        raise PPNetError(f"weights: {strangers} are no indicators; use any of {', '.join(WEIGHTS)}.")
    weights = {**WEIGHTS, **(asked or {})}
    if options.get("reward") is None and "reward" not in (asked or {}):
        weights["reward"] = 0.0
    weights = {name: number(f"weights: {name}", weight) for name, weight in weights.items()}
    if not any(weights.values()):
        raise PPNetError(f"weights: {weights} must not all be 0; give one of them a number above 0.")
    return weights


def _needed(options: Mapping[str, Any]) -> Needs:
    weights = _weights(options)
    given = {name for name in _GIVEN if options.get(name) is not None}
    return frozenset().union(*(_NEEDS[name] for name, weight in weights.items() if weight and name not in given))


@scorer("mama", across=True, needed=_needed, scores=_GIVEN)
def mama(
    statistics: Sequence[SiteStatistics],
    *,
    weights: Mapping[str, float] | None = None,
    form: str = "ranks",
    sft: Mapping[str, Tensor] | None = None,
    reward: Mapping[str, Tensor] | None = None,
    kl: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """sum_i a_i rank(x_i) over the indicators x_i, ranks within the kind of unit over all layers.

    The indicators, each of which is a method of its own: of the weights as they are, ``activation`` (their magnitude
    times what flows through them), ``obs`` (what of that no other unit could take over), ``magnitude`` (alone,
    ``form="paths"``) and ``bias`` (effective bias); of their movement, ``sft`` (supervised, ``"taylor"``), ``reward``
    (of GRPO) and ``kl`` (a guard). A missing weight is the default; 0 leaves the indicator out, and it is then not
    collected. The reward counts only if it is given, or if the data holds rewards and `weights` names it.

    Args:
        weights: indicator -> a_i; defaults: activation, obs and reward 1, magnitude, bias and sft .1, kl 0.
        form: ``"ranks"``, or ``"product"`` of powers, prod_i (x_i / mean x_i)^a_i.
        sft, reward, kl: an indicator that was collected elsewhere, e.g. by `ppnet.train.MovementCallback` or in GRPO:
            site name -> (U,), `ppnet.Scores`, or the name of a file of these.
    """
    given = {"sft": sft, "reward": reward, "kl": kl}
    in_force = _weights({"weights": weights, "reward": reward})
    used = {name: weight for name, weight in in_force.items() if weight}
    parts = []
    for name in used:
        scores = given.get(name)
        if scores is None:
            parts.append([_INDICATORS[name](site) for site in statistics])
        else:
            parts.append([_checked(name, scores, site) for site in statistics])
    return combined(parts, list(used.values()), [site.site.kind for site in statistics], form)


def _checked(name: str, scores: Mapping[str, Tensor], site: SiteStatistics) -> Tensor:
    found = scores.get(site.site.name)
    units = None if found is None else torch.as_tensor(found).flatten()
    if units is None or len(units) != site.site.units or not torch.isfinite(units).all():
        wrong = 0 if units is None else int((~torch.isfinite(units)).sum())
        raise PPNetError(
            f"{name}: site {site.site.name!r} needs {site.site.units} finite numbers, got "
            f"{'none' if units is None else len(units)}{f', {wrong} of them NaN or infinite' if wrong else ''}; give "
            "scores of this model."
        )
    return units
