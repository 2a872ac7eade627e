"""A second model object on the weights of the first, at a smaller size: what drafts tokens for it.

One engine has one size at a time, and setting another binds every leaf anew. A draft alternates with its target after
every token, so it is a model object of its own: modules, bindings and gates' hooks are copied, parameters and buffers
are the target's. To go from one to the other costs nothing. On a sorted or accelerated model the draft reads its kept
units where they are; elsewhere they are gathered once.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from ppnet.accelerate import accelerate, take_off
from ppnet.families import check_decoder
from ppnet.gates import PuppetConfig
from ppnet.plan import Plan
from ppnet.size import Size, plan, refuse_options, resize
from ppnet.units import ORDER
from ppnet.wrap import engine_of, is_accelerated, is_wrapped, structure_for, wrap

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Memory:
    """Bytes that speculative decoding takes.

    Attributes:
        weights: of the target's parameters and buffers, tied ones once.
        draft_weights: what of them the draft reads per token, as a compacted model of its size would hold it.
        draft_own: of tensors that only the draft has: indices, gates, gathered weights.
        cache, draft_cache: of the keys and values of target and draft at the end.
    """

    weights: int
    draft_weights: int
    draft_own: int
    cache: int = 0
    draft_cache: int = 0


def draft(
    model: Model,
    size: Size | Plan,
    *,
    metric: str = "params",
    of: str = "model",
    scores: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    **options: Any,
) -> Model:
    """A model of a smaller size that shares its weights with `model`, as a draft for speculative decoding.

    It is an ordinary model object of the same class, gated, at that size and in evaluation mode: for `ppnet.speculate`
    and for ``model.generate(ids, assistant_model=draft)``. Parameters and buffers are the same tensors: to train one or
    to convert its dtype, does so to both, and after `ppnet.sort_` a new draft is due. It is accelerated if `model` is;
    accelerate first, so that a model that is not sorted is read through indices instead of gathered.

    Args:
        model: with gates, at any size, or dense. It is not changed.
        size: as in `ppnet.plan`, or a plan for `model`.
        metric, of, options: as in `ppnet.plan`.
        scores: what ranks the units, as in `ppnet.plan`. None: the gates; of a dense model that `ppnet.sort_` has
            sorted, the order.

    Returns:
        The draft. Nothing of the weights is copied if `model` is sorted or accelerated, else the kept units' rows are.

    Raises:
        UnsupportedModelError: an encoder, an unknown family, adapters, quantised, or already compacted.
        SizeError, PlanError, CheckpointError, PPNetError: as `ppnet.plan`.
    """
    check_decoder(model, "tokens to draft")
    structure = structure_for(model)
    if isinstance(size, Plan):
        refuse_options(
            "size is already a Plan", metric=metric, of=of, **options, **({} if scores is None else {"scores": scores})
        )
        chosen = size
    else:
        if scores is None and not is_wrapped(model) and getattr(model.config, ORDER, None):
            scores = "position"
        chosen = plan(model, size, metric=metric, of=of, scores=scores, **options)
    chosen.check(structure)
    clone = shared_copy(model).eval()
    if not is_wrapped(clone):
        accelerated = is_accelerated(clone)
        if accelerated:
            take_off(clone)
        wrap(clone, PuppetConfig(amplitudes=False))
        if accelerated:
            accelerate(clone)
    resize(clone, chosen)
    return clone


def shared_copy(model: Model) -> Model:
    """A copy of a model whose parameters and buffers are those of the original."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    if is_wrapped(model):
        # Index tables of all units, which nothing writes to.
        memo[id(engine_of(model).puppet.structure)] = engine_of(model).puppet.structure
    return copy.deepcopy(model, memo)


def memory(model: nn.Module, drafted: nn.Module) -> Memory:
    """Bytes of a target and a draft, without caches."""
    shared = storages((*model.parameters(), *model.buffers()))
    own = storages(tensors_of(drafted))
    if is_wrapped(drafted):
        fixed, engine = engine_of(drafted).fixed, engine_of(drafted)
        read = (engine.puppet.costs.dense if fixed is None else fixed.cost).bytes
    else:
        read = sum(storages(drafted.parameters()).values())
    return Memory(
        weights=sum(shared.values()),
        draft_weights=read,
        draft_own=sum(size for address, size in own.items() if address not in shared),
    )


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and what is bound to the leaves of a gated model."""
    yield from model.parameters()
    yield from model.buffers()
    if not is_wrapped(model):
        return
    engine = engine_of(model)
    for leaf in (leaf for site in engine.sites for leaf in site.leaves):
        binding = engine.binding(leaf)
        kept = () if binding.kept is None else (binding.kept.features, binding.kept.gate)
        yield from (t for t in (binding.weight, binding.bias, binding.scale, *kept) if t is not None)


def storages(tensors: Any) -> dict[int, int]:
    """Address -> bytes of the memory below some tensors."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found}
