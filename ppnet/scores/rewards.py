"""Reward-weighted gate gradients: which units the rewarded completions of a prompt depend on.

For prompt q with completions i = 1..G, rewards r_i, advantages A_i = (r_i - mean) / (std + 1e-4), and the gate
gradient of the mean log-likelihood of a completion, s_{u,i} = (1 / |o_i|) sum_t d log pi(o_{i,t}) / dm_u:

    signed    sum_q v_q sum_i A_i s_{u,i}       first-order loss of reward if u is removed
    absolute  sum_q v_q |sum_i A_i s_{u,i}|

v_q = 1 for verified groups: their rewards differ, and the best reaches a threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppnet.errors import DataError
from ppnet.scores.sums import accumulator

EPSILON = 1e-4


@dataclass(frozen=True)
class Ratings:
    """What is known of the sequences of one batch. All (B,).

    Attributes:
        advantages: float64.
        groups: int64, equal for the completions of one prompt.
        sizes: int64, how many sequences of the group there are in all.
        verified: bool, whether the group counts.
    """

    advantages: Tensor
    groups: Tensor
    sizes: Tensor
    verified: Tensor

    def rows(self, part: slice) -> Ratings:
        return Ratings(self.advantages[part], self.groups[part], self.sizes[part], self.verified[part])


def ratings(rewards: Tensor, groups: Tensor, threshold: float | None) -> Ratings:
    """Advantages within groups, as GRPO takes them.

    Args:
        rewards: (N,), finite. groups: int64 (N,).
        threshold: the best reward of a verified group reaches it; None: any group whose rewards differ.

    Raises:
        DataError: rewards that are not finite numbers.
    """
    rewards = rewards.double()
    if not torch.isfinite(rewards).all():
        raise DataError("data: rewards hold NaN or infinite values; leave such completions out.")
    _, inverse, counts = groups.unique(return_inverse=True, return_counts=True)
    mean = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, inverse, rewards) / counts
    apart = rewards - mean[inverse]
    variance = torch.zeros_like(mean).index_add_(0, inverse, apart.square()) / (counts - 1).clamp(min=1)
    std = variance.sqrt()
    best = torch.full_like(mean, -torch.inf).scatter_reduce_(0, inverse, rewards, "amax")
    verified = (std > 1e-8) & (best >= (-torch.inf if threshold is None else threshold))
    return Ratings(apart / (std[inverse] + EPSILON), groups.clone(), counts[inverse], verified[inverse])


class RewardGradients:
    """Sums over verified groups of advantage-weighted gate gradients of one site. All (U,), float64.

    Attributes:
        signed, absolute: see the module.
        positive, negative: sum of |A_i| |s_{u,i}| over completions better, and worse, than their group's mean.
        groups: number of verified groups that are complete.
    """

    def __init__(self, units: int, device: torch.device) -> None:
        self.signed, self.absolute, self.positive, self.negative = (accumulator(units, device) for _ in range(4))
        self.groups = 0
        self._open: dict[int, tuple[int, Tensor]] = {}

    def forget_open(self) -> None:
        """Leaves out the groups of which only a part has come."""
        self._open.clear()

    def add(self, gradients: Tensor, rated: Ratings) -> None:
        """gradients: s_{u,i} of the batch's completions, (B, U). A group counts once all of its completions came."""
        gradients = gradients.to(self.signed)
        advantages = rated.advantages.to(gradients)[:, None]
        counted = rated.verified.to(gradients.device)[:, None]
        weighted = gradients * advantages
        magnitude = torch.where(counted, weighted.abs(), torch.zeros_like(weighted))
        self.positive += magnitude.mul(advantages > 0).sum(0)
        self.negative += magnitude.mul(advantages < 0).sum(0)
        for row, (group, size, verified) in enumerate(
            zip(rated.groups.tolist(), rated.sizes.tolist(), rated.verified.tolist(), strict=True)
        ):
            if not verified:
                continue
            seen, total = self._open.pop(group, (0, torch.zeros_like(self.signed)))
            total = total + weighted[row]
            if seen + 1 < size:
                self._open[group] = (seen + 1, total)
            else:
                self.signed += total
                self.absolute += total.abs()
                self.groups += 1
