"""Random choices of training (lambda, masks, token samples), all from a counter, so that a resumed run repeats them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ppnet.gates.config import PuppetConfig
from ppnet.units import Structure


@dataclass
class Draw:
    """One training pass.

    Attributes:
        u: lambda / (lambda + 1).
        number: which draw it is; seeds the token samples of its backward.
        mask: ``(U,)`` bool on the CPU, or None for a dense pass.
        gate: ``(U,)`` z = m~ * f^out with its autograd graph, or None when every gate is exactly 1.
        input_scale: ``(M, D)`` f^in with its graph, or None when it is exactly 1.
    """

    u: float
    number: int
    mask: Tensor | None
    gate: Tensor | None
    input_scale: Tensor | None


def generator(seed: int, number: int, purpose: str = "draw") -> torch.Generator:
    """A CPU generator that depends only on its arguments (the same on every rank and after every resume)."""
    digest = hashlib.blake2b(f"{seed}/{number}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Choice:
    """What a pass is to be, before its masks are drawn.

    Attributes:
        lambda_: price of computation; 0 is a dense pass.
        fraction: the fraction of the gated FLOPs that was asked for; None where lambda was drawn by itself.
        prefix: whether the mask is the first units of the gates' order, not a Bernoulli draw.
    """

    lambda_: float
    fraction: float | None = None
    prefix: bool = False


@dataclass(frozen=True)
class Stratum:
    """A gated pass whose size comes from part `number` of `count` equally likely parts, the largest sizes first."""

    number: int = 0
    count: int = 1


GATED = Stratum()


def choose(
    config: PuppetConfig,
    progress: int,
    source: torch.Generator,
    u_at: Callable[[float], float],
    stratum: Stratum | None = None,
    total_steps: int | None = None,
) -> Choice:
    """A pass: dense with probability `dense_fraction`, else lambda from `lambda_distribution`, scaled in the warm-up.

    Args:
        progress: optimizer steps made.
        u_at: fraction of the gated FLOPs -> u at which the gates keep it; not called under ``"exponential"`` and
            ``"uniform_u"``.
        stratum: where the size is drawn from; None: anywhere, and dense passes are drawn too.
        total_steps: that there will be, which a `prefix_warmup` below 1 is a share of.
    """
    dense, position = torch.rand(2, generator=source, dtype=torch.float64).tolist()
    if stratum is None and dense < config.dense_fraction:
        return Choice(0.0)
    if stratum is not None:
        position = (stratum.number + position) / stratum.count
    fraction = None
    if config.lambda_distribution == "uniform_size":
        fraction = 1.0 - position * (1.0 - config.smallest_size)
    elif config.lambda_distribution == "log_size":
        fraction = config.smallest_size**position
    if fraction is not None:
        u = u_at(fraction)
        lambda_ = u / (1.0 - u)
    elif config.lambda_distribution == "uniform_u":
        u = position * config.u_max
        lambda_ = u / (1.0 - u)
    else:
        lambda_ = -math.log1p(-position) / float(config.lambda_rate or 1.0)
    if progress + 1 < config.lambda_warmup:
        # The size is then the scaled lambda's, not the drawn one.
        lambda_, fraction = lambda_ * (progress + 1) / config.lambda_warmup, None
    warmup = float(config.prefix_warmup or 0.0)
    warmup *= 1 if warmup >= 1 else total_steps or 0
    share = float(config.prefix_fraction or 0.0) * min(1.0, (progress + 1) / max(1, warmup))
    prefix = share > 0 and float(torch.rand((), generator=source)) < share
    return Choice(lambda_, fraction, prefix)


def draw_masks(rho: Tensor, structure: Structure, source: torch.Generator) -> Tensor:
    """Bernoulli(rho) masks with at least one unit per site: ``(U,)`` bool.

    A site that draws nothing keeps its most probable unit.
    """
    mask = torch.rand(rho.shape, generator=source, dtype=torch.float64) < rho.double()
    offsets = structure.offsets()
    for start, stop in pairwise(offsets):
        if not mask[start:stop].any():
            mask[start + int(rho[start:stop].argmax())] = True
    return mask
