"""Reward movement: which units the rewarded completions depend on (`ppnet.scores.rewards` has the formulas)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ppnet.scores.registry import REWARDS, choose, scorer
from ppnet.scores.statistics import SiteStatistics


@scorer("reward", REWARDS)
def reward(statistics: SiteStatistics, *, form: str = "groups", kappa: float = 0.5) -> Tensor:
    """Per verified group of completions.

    Args:
        form: ``"groups"``: sum_q |sum_i A_i s_{u,i}|. ``"split"``: what better completions depend on, less `kappa`
            times what worse ones do. ``"signed"``: sum_q sum_i A_i s_{u,i}, the first-order loss of reward; pruning by
            it raises the reward and destroys the language model, so it is there for comparison only.
        kappa: of ``"split"``, in [0, 1].
    """
    rewards = statistics.rewards
    sums = {name: getattr(rewards, name) for name in ("signed", "absolute", "positive", "negative")}
    return from_sums(sums, rewards.groups, form, kappa)


def from_sums(sums: Mapping[str, Tensor], groups: float, form: str, kappa: float) -> Tensor:
    """The score from the sums of `RewardGradients` over so many groups."""
    choose("form", form, ("groups", "split", "signed"))
    total = {
        "groups": sums["absolute"],
        "split": sums["positive"] - kappa * sums["negative"],
        "signed": sums["signed"],
    }[form]
    return total / max(groups, 1)
