"""Reward movement: which units the rewarded completions depend on (`ppnet.scores.rewards` has the formulas)."""

from __future__ import annotations

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
    choose("form", form, ("groups", "split", "signed"))
    rewards = statistics.rewards
    total = {
        "groups": rewards.absolute,
        "split": rewards.positive - kappa * rewards.negative,
        "signed": rewards.signed,
    }[form]
    return total / max(rewards.groups, 1)
