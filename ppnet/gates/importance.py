"""Importance of units: what the threshold tau(lambda) is compared with. One float per unit of a site.

An importance sees the weights of one site as (U, features) views and returns a (U,) tensor. To add one, write a
function here or anywhere with `@importance("name")`; `PuppetConfig(importance="name")` selects it. The importance
``"scores"`` is none of these: its numbers are given (`ppnet.gates.given`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ppnet.errors import PPNetError
from ppnet.gates.config import SCORES
from ppnet.ops.row_norms import row_norms
from ppnet.units import Leaf, Site, leaf_weight

ImportanceFn = Callable[[nn.Module, Site, Tensor | None], Tensor]
IMPORTANCES: dict[str, ImportanceFn] = {}
DEPENDS_ON_LAMBDA: set[str] = set()


def importance(name: str, depends_on_lambda: bool = False) -> Callable[[ImportanceFn], ImportanceFn]:
    """Registers an importance: (model, site, input scale f^in (D,) or None) -> (U,) float32, differentiable.

    Args:
        depends_on_lambda: whether it uses the input scale, which is a function of lambda.
    """

    def decorate(function: ImportanceFn) -> ImportanceFn:
        IMPORTANCES[name] = function
        if depends_on_lambda:
            DEPENDS_ON_LAMBDA.add(name)
        return function

    return decorate


def get_importance(name: str) -> ImportanceFn:
    if name not in IMPORTANCES:
        known = ", ".join(sorted([*IMPORTANCES, SCORES]))
        raise PPNetError(f"importance: {name!r} is not known; use one of {known}.")
    return IMPORTANCES[name]


def unit_norms(model: nn.Module, leaf: Leaf, input_scale: Tensor | None = None, role: str | None = None) -> Tensor:
    """Frobenius norm of every unit's rows (or columns) of one leaf.

    Args:
        input_scale: ``(D,)`` factor per input dimension of a producer, applied before the norm.
        role: of a fused leaf, the part to take (``"v"``).

    Returns:
        ``(U,)`` float32.
    """
    weight = leaf_weight(model, leaf)
    if input_scale is not None:
        input_scale = input_scale.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    norms = row_norms([weight], [input_scale], [leaf.weight_dim])[0].float()
    index = leaf.index if role is None else leaf.parts[role]
    # Added inside the root: a unit of zeros has norm ~1e-19 with gradient 0, and its logarithm stays finite.
    return torch.sqrt(norms[index.to(norms.device)].square().sum(dim=1) + torch.finfo(torch.float32).tiny)


@importance("row_norm", depends_on_lambda=True)
def row_norm(model: nn.Module, site: Site, input_scale: Tensor | None) -> Tensor:
    """The paper's importance (arXiv 2606.28251): ||w^gate_i * f^in||_2 for neurons, ||W_O block of h||_F for heads."""
    if site.kind == "neuron":
        role = "gate" if site.producer("gate") else "up"
        return unit_norms(model, cast(Leaf, site.producer(role)), input_scale, role)
    return unit_norms(model, site.consumer)


def norm_product(model: nn.Module, site: Site) -> Tensor:
    """Product of a unit's input and output norms: invariant to rescaling up against down, and v against o.

    Neurons: ||gate_i|| * ||up_i|| * ||down_i|| (plain MLPs: ||up_i|| * ||down_i||). KV groups: ||V_g||_F * ||O_g||_F.
    """
    if site.kind == "neuron":
        product = unit_norms(model, site.consumer)
        for leaf in site.producers:
            for role in leaf.parts:
                product = product * unit_norms(model, leaf, role=role)
        return product
    return unit_norms(model, cast(Leaf, site.producer("v")), role="v") * unit_norms(model, site.consumer)


@importance("scale_free")
def scale_free(model: nn.Module, site: Site, input_scale: Tensor | None) -> Tensor:
    """2 * Phi(z) in (0, 2), with z the standardised log of `norm_product` within the site.

    Row norms of trained models have any scale and any spread; the site's own mean and deviation are divided out, so one
    threshold spline and one temperature fit every model. f^in is left out: it would move the ranks, not only the scale,
    of units whose weights did not change. A site whose units are all equal gets 1 everywhere.
    """
    log = torch.log(norm_product(model, site)).double()  # so that sums hardly depend on the order of the units
    if log.numel() == 1:
        return torch.ones_like(log).float()
    centred = log - log.mean()
    # Spreads below 1e-4 are rounding: equal units must not be told apart by the last bit of their logarithms.
    z = centred / centred.square().mean().clamp_min(1e-8).sqrt()
    return (1.0 + torch.erf(z / math.sqrt(2.0))).float()
