"""Unstructured masks, the baselines of the pruning papers: Wanda (Sun et al. 2023, arXiv 2306.11695) and SparseGPT
(Frantar & Alistarh 2023, arXiv 2301.00774). Weights become zero; nothing gets smaller or faster.

Both go through the decoder layers in order, and a layer's inputs are those that the layers before it give once they are
masked, as in the papers. Masked are the matrices of units: what ppnet could remove, every one to the same share.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppnet.families import structure_of
from ppnet.layerwise import capture, decoder_layer


def wanda(weight: Tensor, gram: Tensor, tokens: int, removed: float) -> Tensor:
    """Zeroes, in every row, the `removed` share with the smallest |w| ||x||.

    Args:
        weight: (out, in). gram: sum x x^T over tokens, (in, in). tokens: unused; the norm needs no mean.
    """
    metric = weight.abs() * gram.diagonal().sqrt().to(weight)
    smallest = metric.argsort(dim=1, stable=True)[:, : round(removed * weight.shape[1])]
    return weight.scatter(1, smallest, 0.0)


def sparsegpt(
    weight: Tensor, gram: Tensor, tokens: int, removed: float, block: int = 128, damp: float = 0.01
) -> Tensor:
    """Zeroes the weights of the smallest error w^2 / [H^-1]_jj, block of columns by block, and moves what each gave to
    the columns that are still to come: w_k -= w_j [U]_jk / [U]_jj, with U the upper Cholesky factor of H^-1.

    Args:
        weight: (out, in). gram: sum x x^T over tokens, (in, in); H = 2 gram / tokens + damp * mean diagonal.
    """
    weight = weight.double().clone()
    hessian = 2 * gram.double() / tokens
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1.0
    weight[:, dead] = 0.0
    hessian += damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    columns = weight.shape[1]
    for first in range(0, columns, block):
        last = min(first + block, columns)
        metric = (weight[:, first:last] / upper.diagonal()[first:last]).square()
        count = round(removed * metric.numel())
        zeroed = torch.zeros(metric.numel(), dtype=torch.bool)
        zeroed[metric.flatten().argsort(stable=True)[:count]] = True
        zeroed = zeroed.view_as(metric)
        errors = torch.zeros_like(metric)
        for column in range(first, last):
            gone = torch.where(zeroed[:, column - first], weight[:, column], 0.0)
            errors[:, column - first] = gone / upper[column, column]
            weight[:, column] -= gone
            rest = slice(column + 1, last)
            weight[:, rest] -= torch.outer(errors[:, column - first], upper[column, rest])
        weight[:, last:] -= errors @ upper[first:last, last:]
    return weight


MASKS: dict[str, Callable[[Tensor, Tensor, int, float], Tensor]] = {"wanda": wanda, "sparsegpt": sparsegpt}


@torch.no_grad()
def masked(model: nn.Module, batches: Sequence[dict[str, Tensor]], method: str, removed: float) -> nn.Module:
    """A copy of the model with `removed` of the weights of every matrix of units at zero; for `nn.Linear` matrices."""
    model = copy.deepcopy(model)
    layers: dict[int, list[Any]] = {}
    for site in structure_of(model).sites:
        layers.setdefault(site.layer, []).append(site)
    traces = capture(model, [decoder_layer(model, sites[0]) for sites in layers.values()], batches)
    tokens = sum(int(trace.real.sum()) for trace in traces)
    for index, sites in enumerate(layers.values()):
        layer = decoder_layer(model, sites[0])
        names = [leaf.name for site in sites for leaf in (*site.producers, site.consumer)]
        matrices = {name: model.get_submodule(name) for name in names}
        grams = dict.fromkeys(matrices, torch.zeros(()))
        for trace in traces:
            handles = [
                module.register_forward_pre_hook(_adding(grams, name, trace.real)) for name, module in matrices.items()
            ]
            trace.calls[index].run(layer, trace.dense)
            for handle in handles:
                handle.remove()
        for name, module in matrices.items():
            module.weight.copy_(MASKS[method](module.weight, grams[name], tokens, removed))
        for trace in traces:
            trace.dense = trace.calls[index].run(layer, trace.dense)
    return model


def _adding(grams: dict[str, Tensor], name: str, real: Tensor) -> Callable[..., None]:
    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0][real].float()
        grams[name] = grams[name] + (x.T @ x).double()

    return add
