"""What a scorer sees of one site: weights by unit, activations by feature, gradients by gate.

The gate m_u = 1 of a unit multiplies the unit's features where they enter the consumer (the output projection). With x
(B, T, F) entering it and dx the gradient of the loss with respect to x, the gate's gradient for sequence b is

    s_{u,b} = sum_t sum_{f in u} x_{b,t,f} dx_{b,t,f}                                                       (B, U)

and its sum over b is <W_out[:, u], dL/dW_out[:, u]>, and the same of the rows (and bias entries) that make x linearly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ppnet.errors import PPNetError
from ppnet.scores.rewards import RewardGradients
from ppnet.scores.sums import accumulator, wide
from ppnet.units import Leaf, Site, leaf_tensor, leaf_weight

T = TypeVar("T")


@dataclass(frozen=True)
class Affine:
    """What a norm does after normalising: x * gain + shift, each (D,)."""

    gain: Tensor
    shift: Tensor


class SiteWeights:
    """The weights of a site by unit, detached, in float32 or float64."""

    def __init__(self, model: nn.Module, site: Site, norm: Callable[[Site], Affine | None]) -> None:
        self._model, self._site, self._norm = model, site, norm

    def output(self) -> Tensor:
        """Columns of the output projection: (U, r, D)."""
        leaf = self._site.consumer
        features = self._features(leaf)
        return features[leaf.index.to(features.device)]

    def output_has_bias(self) -> bool:
        return leaf_tensor(self._model, self._site.consumer, "bias") is not None

    def roles(self) -> tuple[str, ...]:
        """What the producers are: of ``gate``, ``up``, or ``q``, ``k``, ``v``; a fused one counts as several."""
        return tuple(role for leaf in self._site.producers for role in leaf.parts)

    def rows(self, role: str, folded: bool = False) -> Tensor:
        """Rows of one producer with their bias as one more column: (U, r, D + 1); (U, r, D) without a bias.

        Args:
            role: one of `roles`.
            folded: multiply the gain of the norm before the sub-layer into the columns, and add what its shift gives to
                the bias: the rows as they act on the normalised input.
        """
        leaf = next(leaf for leaf in self._site.producers if role in leaf.parts)
        features, bias = self._features(leaf), leaf_tensor(self._model, leaf, "bias")
        index = leaf.parts[role].to(features.device)
        weight = features[index]
        bias = None if bias is None else bias.detach().to(weight.dtype)[index]
        affine = self._norm(self._site) if folded else None
        if affine is not None:
            shifted = weight @ affine.shift.to(weight)
            bias = shifted if bias is None else bias + shifted
            weight = weight * affine.gain.to(weight)
        return weight if bias is None else torch.cat([weight, bias[..., None]], dim=-1)

    def _features(self, leaf: Leaf) -> Tensor:
        """The weight with the indexed features first."""
        weight = leaf_weight(self._model, leaf).detach()
        return (weight if leaf.weight_dim == 0 else weight.t()).to(wide(weight.dtype))


class Activations:
    """First and second moments of the features that enter the consumer, over tokens that are not padding."""

    def __init__(self, site: Site, device: torch.device) -> None:
        self._index = site.consumer.index
        features = self._index.numel()
        self.tokens = 0
        self._sum, self._squares = accumulator(features, device), accumulator(features, device)

    def add(self, rows: Tensor) -> None:
        """rows: (N, F), the features of N tokens."""
        self.tokens += len(rows)
        for part in rows.split(4096):
            part = part.to(wide(part.dtype))
            self._sum += part.sum(0).to(self._sum)
            self._squares += part.square().sum(0).to(self._squares)

    @property
    def mean(self) -> Tensor:
        """E[a] of every feature of every unit: (U, r)."""
        return self._by_unit(self._sum)

    @property
    def second(self) -> Tensor:
        """E[a^2]: (U, r)."""
        return self._by_unit(self._squares)

    @property
    def variance(self) -> Tensor:
        """E[a^2] - E[a]^2: (U, r)."""
        return (self.second - self.mean.square()).clamp_min(0)

    def _by_unit(self, total: Tensor) -> Tensor:
        return (total / max(self.tokens, 1))[self._index.to(total.device)]


class Gram:
    """Products of the features that enter the consumer with each other, over tokens that are not padding.

    They are summed around the mean of the first batch, so that features of a mean far above their spread do not cancel
    when moments around the mean are asked for. Held: (F, F) numbers of the model's precision, at least float32, on the
    consumer's device.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._origin: Any = None
        self._sum: Any = 0.0
        self._products: Any = 0.0

    def add(self, rows: Tensor) -> None:
        """rows: (N, F), the features of N tokens."""
        if self._origin is None and len(rows):
            self._origin = rows.to(wide(rows.dtype)).mean(0)
        self.tokens += len(rows)
        for part in rows.split(4096):
            part = part.to(wide(part.dtype)) - self._origin
            self._sum = self._sum + part.sum(0)
            with torch.autocast(part.device.type, enabled=False):  # the caller's would round the products
                self._products = self._products + part.T @ part

    def mean(self, centred: bool = False) -> Tensor:
        """E[a a^T], or around the mean: a new (F, F) in float64 (float32 where the device has nothing wider)."""
        dtype = torch.float32 if self._products.device.type == "mps" else torch.float64
        moment, apart = self._products.to(dtype) / self.tokens, self._sum.to(dtype) / self.tokens
        moment.addr_(apart, apart, alpha=-1)
        if not centred:
            mean = self._origin.to(dtype) + apart
            moment.addr_(mean, mean)
        return moment


class GateGradients:
    """Sums over sequences of the gate gradients s_{u,b} of a loss that is itself a sum over tokens. All (U,), float64.

    Attributes:
        signed: sum_b s_{u,b}: the gradient of the whole loss.
        absolute: sum_b |s_{u,b}|.
        squared: sum_b s_{u,b}^2.
        by_token: sum_b sum_t |s_{u,b,t}|, of the terms of one position each.
        sequences: number of sequences added.
    """

    def __init__(self, site: Site, device: torch.device) -> None:
        self.signed, self.absolute, self.squared, self.by_token = (accumulator(site.units, device) for _ in range(4))
        self.sequences = 0

    def add(self, gradients: Tensor, by_token: Tensor | None = None) -> None:
        """gradients: (B, U); by_token: (B, U), absolute values summed over tokens."""
        gradients = gradients.to(self.signed)
        self.signed += gradients.sum(0)
        self.absolute += gradients.abs().sum(0)
        self.squared += gradients.square().sum(0)
        if by_token is not None:
            self.by_token += by_token.to(self.signed).sum(0)
        self.sequences += len(gradients)


class Curvature:
    """Products of the gradients at the features of one unit with each other, summed over positions."""

    def __init__(self, site: Site, device: torch.device) -> None:
        units, width = site.consumer.index.shape
        self.sum = accumulator(units * width * width, device).view(units, width, width)

    def add(self, index: Tensor, dx: Tensor) -> None:
        """index: (U, r); dx: (B, T, F)."""
        for part in dx.reshape(-1, dx.shape[-1]).split(4096):
            units = part.to(wide(part.dtype))[:, index]
            with torch.autocast(dx.device.type, enabled=False):
                self.sum += torch.einsum("nur,nus->urs", units, units).to(self.sum)


def gate_gradients(index: Tensor, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """s_{u,b} and sum_t |s_{u,b,t}|: both (B, U), in at least float32.

    Args:
        index: the consumer's ``(U, r)`` feature table, on the device of x.
        x, dx: (B, T, F), what enters the consumer and its gradient; (T, F) counts as one sequence.
    """
    if x.dim() == 2:
        x, dx = x[None], dx[None]
    x, dx = x.flatten(1, -2), dx.flatten(1, -2)
    dtype = wide(x.dtype)
    sums, absolute = [], []
    # One sequence after the other: the products need a buffer in float32.
    for x_b, dx_b in zip(x, dx, strict=True):
        product = x_b.to(dtype) * dx_b.to(dtype)
        product = product[:, index[:, 0]] if index.shape[1] == 1 else product[:, index].sum(-1)
        sums.append(product.sum(0))
        absolute.append(product.abs_().sum(0))
    return torch.stack(sums), torch.stack(absolute)


@dataclass
class SiteStatistics:
    """What was collected for one site; what no scorer asked for is absent.

    Attributes:
        site: where and how many units U.
        weights: by unit.
        tokens: predicted tokens that the loss was summed over.
        seed: for scorers that draw.
    """

    site: Site
    weights: SiteWeights
    tokens: int = 0
    seed: int = 0
    collected: dict[str, Any] = field(default_factory=dict)

    @property
    def activations(self) -> Activations:
        return self._of("activations", Activations)

    @property
    def gradients(self) -> GateGradients:
        """Of the loss on the data (NLL summed over tokens)."""
        return self._of("gradients", GateGradients)

    @property
    def fisher(self) -> GateGradients:
        """Of the NLL of tokens drawn from the model's own predictions."""
        return self._of("fisher", GateGradients)

    @property
    def gram(self) -> Gram:
        return self._of("gram", Gram)

    @property
    def curvature(self) -> Tensor:
        """sum over tokens of dx_u dx_u^T, the gradients at a unit's features, by unit: (U, r, r). The loss is that of
        `fisher`, or the one that was given."""
        return self._of("curvature", Curvature).sum

    @property
    def rewards(self) -> RewardGradients:
        """Of the likelihood of completions, weighted by their advantages."""
        return self._of("rewards", RewardGradients)

    def _of(self, name: str, kind: type[T]) -> T:
        found = self.collected.get(name)
        if not isinstance(found, kind):
            raise PPNetError(
                f"statistics: {name} of {self.site.name} were not collected; the scorer must declare them."
            )
        return found
