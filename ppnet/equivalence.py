"""The run-time check of compaction: the small model's logits against those of the masked dense model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ppnet.errors import EquivalenceError
from ppnet.modes import evaluating
from ppnet.plan import Plan
from ppnet.units import Leaf, Site, Structure, leaf_module
from ppnet.wrap import engine_of, is_wrapped

# Largest difference of logits as a fraction of the largest logit. In float32 both models add the same non-zero products
# in another order. Half precision rounds every activation: eight units in the last place stand for a deep model's.
FLOAT32_TOLERANCE = 1e-5
HALF_ROUNDINGS = 8
# What rounding alone may come to in float32 after a norm of nearly nothing.
ROUNDING = 1e-2


def tolerance(dtype: torch.dtype) -> float:
    """The relative difference of logits that rounding alone explains."""
    if dtype in (torch.float32, torch.float64):
        return FLOAT32_TOLERANCE
    return HALF_ROUNDINGS * torch.finfo(dtype).eps


@contextmanager
def masked(
    model: nn.Module,
    structure: Structure,
    plan: Plan,
    scales: Sequence[tuple[Tensor | None, Tensor | None]] | None = None,
    refitted: nn.Module | None = None,
) -> Iterator[None]:
    """Forwards inside multiply dropped units by zero, at dense cost: the definition that compaction must reproduce.

    It shares no code with the slicing: hooks multiply what enters each consumer (and, with `scales`, what enters each
    producer), and what enters norms over all units, for which dropped units are zeros. Gates that the model has of its
    own must be bypassed.

    Args:
        scales: per site (unit scale ``(U,)`` or None, input scale ``(D,)`` or None).
        refitted: a compacted model whose output projections take the place of the model's, which then have zeros for
            the features of dropped units; they hold the unit scales already.
    """
    handles: list[Any] = []

    def multiply(name: str, factor: Tensor) -> None:
        module: Any = model.get_submodule(name)
        factor = factor.to(module.weight)
        handles.append(module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * factor, *inputs[1:])))

    try:
        for site, (unit_scale, input_scale) in zip(
            structure.sites, scales or [(None, None)] * len(structure.sites), strict=True
        ):
            keep = torch.zeros(site.units)
            keep[plan.kept[site.name]] = 1.0
            if refitted is not None:
                handles.append(_use_projection(model, refitted, site, torch.tensor(plan.kept[site.name])))
                unit_scale = None
            per_unit = keep if unit_scale is None else keep * unit_scale.detach().float().cpu()
            multiply(site.consumer.name, _by_feature(site.consumer, per_unit))
            for norm in site.across:
                multiply(norm.name, _by_feature(norm, keep))
            if input_scale is not None:
                for leaf in site.producers:
                    multiply(leaf.name, input_scale.detach())
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_feature(leaf: Leaf, per_unit: Tensor) -> Tensor:
    """One factor per unit ``(U,)`` as one per feature, in the leaf's order: ``(F,)``."""
    factor = torch.zeros(leaf.index.numel())
    factor[leaf.index] = per_unit[:, None].expand(leaf.index.shape)
    return factor


def _use_projection(model: nn.Module, refitted: nn.Module, site: Site, kept: Tensor) -> Any:
    """A hook that makes a consumer compute with the small model's weight and bias, at dense width."""
    leaf = site.consumer
    dense, small = leaf_module(model, leaf), leaf_module(refitted, leaf)
    weight = torch.zeros_like(dense.weight)
    weight.index_copy_(leaf.weight_dim, leaf.features(kept).to(weight.device), small.weight.detach())
    matrix = weight if leaf.weight_dim == 1 else weight.T
    return dense.register_forward_hook(
        lambda module, inputs, output: nn.functional.linear(inputs[0], matrix, small.bias)
    )


@contextmanager
def _reference(model: nn.Module, structure: Structure, plan: Plan, refitted: nn.Module | None = None) -> Iterator[None]:
    """The model as the plan masks it, by hooks alone: no code is shared with the slicing that is checked."""
    scales = None
    engine = None
    if is_wrapped(model):
        engine = engine_of(model)
        scales = engine.puppet.scales(plan.u)
        engine.bypass = True
    try:
        with masked(model, structure, plan, scales, refitted):
            yield
    finally:
        if engine is not None:
            engine.bypass = False


@contextmanager
def as_dense(model: nn.Module, structure: Structure, plan: Plan) -> Iterator[None]:
    """The model with all its units, whatever its size and mode: of gated models the pass at lambda = 0."""
    everything = {site.name: list(range(site.units)) for site in structure.sites}
    with _reference(model, structure, replace(plan, kept=everything, u=0.0)):
        yield


@contextmanager
def plain_evaluation(*models: nn.Module) -> Iterator[None]:
    """No dropout, no autocast, no reduced-precision matrix products; every flag is restored."""
    precision = torch.get_float32_matmul_precision()
    device = next(models[0].parameters()).device.type
    try:
        torch.set_float32_matmul_precision("highest")
        with evaluating(*models), torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _batches(model: Any, structure: Structure) -> list[dict[str, Tensor]]:
    """Random token ids: three full sequences, and three of different lengths padded on the left."""
    length = min(24, int(getattr(model.config, "max_position_embeddings", None) or 24))
    source = torch.Generator().manual_seed(0)
    device = model.get_input_embeddings().weight.device
    ids = torch.randint(structure.vocabulary, (3, length), generator=source)
    mask = torch.ones_like(ids)
    for row in range(1, 3):
        mask[row, : row * length // 3] = 0
    full = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {"input_ids": ids.flip(0), "attention_mask": mask}
    return [{name: value.to(device) for name, value in batch.items()} for batch in (full, padded)]


def _run(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    return model(**batch, use_cache=False, return_dict=True, **options)


def _answer(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits (of a model without, what it returns first) of the tokens that are not padding, in float32."""
    values = output.logits if "logits" in output else output[0]
    if values.shape[:2] == batch["attention_mask"].shape:
        values = values[batch["attention_mask"].bool().to(values.device)]
    return values.detach().float()


def _distance(expected: Tensor, found: Tensor) -> float:
    """Largest difference over the largest magnitude; nan when either holds a nan or infinity."""
    return float((expected - found.to(expected.device)).abs().max() / expected.abs().max().clamp_min(1e-30))


def check_equivalent(model: Any, small: Any, structure: Structure, plan: Plan, refitted: bool = False) -> float:
    """Compares a compacted model with the masked dense one on random tokens, padded and not, in evaluation mode.

    float32 and float64 models must agree to 1e-5 of the largest logit. Where norms follow sub-layers, what few units
    give is made large again, with its rounding: float32 models that agree to `ROUNDING` only are compared once more in
    float64, as copies. Half-precision models are compared in their own dtype, to 8 of its rounding units: float32
    copies of a large model would not fit where the model does. To check one to 1e-5, compact ``model.float()``.

    Args:
        refitted: the small model's output projections are not the model's own; the masked model then uses them.

    Returns:
        The largest difference relative to the largest logit.

    Raises:
        EquivalenceError: they differ by more; names the layer where hidden states first diverge.
    """
    try:
        return _compared(model, small, structure, plan, refitted)
    except EquivalenceError as error:
        if small.dtype != torch.float32 or not error.distance <= ROUNDING:
            raise
        wide = copy.deepcopy(model).double()
        return _compared(wide, copy.deepcopy(small).double(), structure, plan, refitted)


def _compared(model: Any, small: Any, structure: Structure, plan: Plan, refitted: bool) -> float:
    """The comparison in the models' own dtype."""
    allowed = tolerance(small.dtype)
    worst = 0.0
    projections = small if refitted else None
    with plain_evaluation(model, small):
        for batch in _batches(model, structure):
            with _reference(model, structure, plan, projections):
                expected = _answer(_run(model, batch), batch)
            distance = _distance(expected, _answer(_run(small, batch), batch))
            if not distance <= allowed:
                place = _divergence(model, small, structure, plan, batch, allowed, projections)
                error = EquivalenceError(
                    f"compact: logits differ from the masked model's by {distance:.3g} of the largest logit (allowed "
                    f"{allowed:.3g} in {str(small.dtype).removeprefix('torch.')}); "
                    f"{place}. The given model is unchanged. "
                    "If its logits are finite, the family's site table is at fault: please report it with the config."
                )
                error.distance = distance
                raise error
            worst = max(worst, distance)
    return worst


def _divergence(
    model: Any,
    small: Any,
    structure: Structure,
    plan: Plan,
    batch: dict[str, Tensor],
    allowed: float,
    projections: nn.Module | None,
) -> str:
    """Where two models part, in words."""
    with _reference(model, structure, plan, projections):
        expected = _run(model, batch, output_hidden_states=True).hidden_states
    found = _run(small, batch, output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()
    for layer, (left, right) in enumerate(zip(expected, found, strict=True)):
        distance = _distance(left[real].float(), right[real].float())
        if not distance <= allowed:
            place = "the embeddings" if layer == 0 else f"layer {layer - 1}"
            return f"hidden states first differ after {place}, by {distance:.3g} of their largest value"
    return "hidden states agree in every layer, so the output head differs"
