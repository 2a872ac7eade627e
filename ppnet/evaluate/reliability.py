"""Are predictions as often right as they are sure? Expected calibration error (ECE), and what else one pass tells."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppnet.errors import PPNetError
from ppnet.evaluate.perplexity import perplexity_of

BINS = 15


class Reliability:
    """Confidence against accuracy in bins of equal width, summed up as predictions come.

    ECE = sum over bins of |B| / n * |accuracy(B) - confidence(B)|, bin m of M holding confidences in
    ((m - 1) / M, m / M] (Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599, equations 1 to
    3; they use 15 bins, too).

    Args:
        bins: M.

    Raises:
        PPNetError: `bins` below 1.
    """

    def __init__(self, bins: int = BINS) -> None:
        if bins < 1:
            raise PPNetError(f"bins: must be at least 1, got {bins}.")
        self.bins = bins
        self.inner = torch.arange(1, bins, dtype=torch.float64) / bins  # edges between bins
        self.sums = torch.zeros(3, bins, dtype=torch.float64)  # predictions, confidence, right ones

    def add(self, confidence: Tensor, right: Tensor) -> None:
        """Counts predictions: probability of the most likely class ``(n,)``, and whether it was the true one."""
        sure = confidence.detach().double().cpu().clamp(0.0, 1.0)
        bin_of = torch.bucketize(sure, self.inner)
        self.sums.index_add_(1, bin_of, torch.stack([torch.ones_like(sure), sure, right.detach().cpu().to(sure)]))

    @property
    def count(self) -> float:
        return float(self.sums[0].sum())

    @property
    def confidence(self) -> float:
        """Mean confidence."""
        return float(self.sums[1].sum()) / self.count

    @property
    def accuracy(self) -> float:
        """Share of predictions that are right."""
        return float(self.sums[2].sum()) / self.count

    @property
    def ece(self) -> float:
        """Expected calibration error, in [0, 1]."""
        return float((self.sums[2] - self.sums[1]).abs().sum()) / self.count


@dataclass(frozen=True)
class Prediction:
    """How good one predictive distribution is, per scored token.

    Attributes:
        nll: mean negative log-likelihood, in nats.
        perplexity: exp(nll).
        accuracy: share of tokens that are the most likely one.
        confidence: mean probability of the most likely token.
        ece: expected calibration error of that probability (`Reliability`).
        entropy: mean entropy of the distribution, in nats.
    """

    nll: float
    perplexity: float
    accuracy: float
    confidence: float
    ece: float
    entropy: float


class Tally:
    """Sums over tokens that make a `Prediction`; float64."""

    def __init__(self, bins: int) -> None:
        self.reliability = Reliability(bins)
        self.nll = self.entropy = 0.0

    def add(self, log_likelihood: Tensor, probabilities: Tensor, targets: Tensor) -> None:
        """Counts tokens.

        Args:
            log_likelihood: of the targets, ``(n,)``.
            probabilities: ``(n, V)``.
            targets: int64 ``(n,)``.
        """
        self.nll -= float(log_likelihood.sum(dtype=torch.float64))
        self.entropy += float(torch.special.entr(probabilities).sum(-1).sum(dtype=torch.float64))
        confidence, likeliest = probabilities.max(-1)
        self.reliability.add(confidence, likeliest == targets)

    def result(self) -> Prediction:
        found, count = self.reliability, self.reliability.count
        nll = self.nll / count
        return Prediction(nll, perplexity_of(nll), found.accuracy, found.confidence, found.ece, self.entropy / count)
