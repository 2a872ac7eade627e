"""Compaction: a new, smaller, ordinary Hugging Face model that keeps only the units of a plan.

Removing whole units changes the sizes of linear modules and a few integer attributes; forwards stay upstream's. Where
all layers keep equally many units and the stock class can say so, the result has the stock class. Otherwise it has the
class of a shipped modelling file (`ppnet.shipped`) and a config with `per_layer_config`, so that plain
`save_pretrained` is right.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ppnet.accelerate import take_off
from ppnet.checks import renamed
from ppnet.equivalence import as_dense, check_equivalent, plain_evaluation
from ppnet.errors import DataError, EquivalenceError, PlanError, PPNetError
from ppnet.families import FAMILIES
from ppnet.kept import Kept, Scales, kept_parts, multiplied
from ppnet.modes import mixed_precision_off
from ppnet.plan import Plan
from ppnet.redistribute import RIDGE, check_options
from ppnet.redistribute import redistribute as refit
from ppnet.scores.probe import remove_probes
from ppnet.scores.score import score
from ppnet.shipped import shipped
from ppnet.size import plan as plan_for_size
from ppnet.size import refuse_options, unranked
from ppnet.units import Structure
from ppnet.wrap import is_accelerated, is_wrapped, strip, structure_for


def compact(
    model: nn.Module,
    size_or_plan: Any,
    *,
    check: bool = True,
    metric: str = "params",
    redistribute: Any = None,
    tokenizer: Any = None,
    column: str = "text",
    redistribution: str | None = None,
    ridge: float = RIDGE,
    sequential: bool = True,
    **plan_kwargs: Any,
) -> Any:
    """A new, smaller model holding the units that a plan keeps. The given model is not changed.

    Works on models with gates (`ppnet.wrap`), whose amplitudes at the plan's u are folded into the weights in float32,
    and on models that never had any: these need a plan, ``scores=...``, or data to be scored on. Weights keep their
    dtype, device and `requires_grad`; tied embeddings stay tied. Peak memory is the dense plus the small model. The
    plan is attached as ``result.ppnet_plan``.

    With `redistribute`, the output projections are refitted so that the units that stay take over what removed ones
    gave (`ppnet.redistribute`); what was done is in ``result.ppnet_plan.extra["redistribution"]``. A size of a model
    with neither gates nor ``scores=`` is then filled by ``ppnet.score``'s default method on the same data (a forward
    and a backward pass more), which ``source`` and ``extra["scores"]`` of the plan say.

    Args:
        model: a `PreTrainedModel` of a supported family.
        size_or_plan: a `Plan`, or a size that ``ppnet.plan(model, size, metric=metric, **plan_kwargs)`` accepts.
        check: compare the logits of the result with those of the masked dense model on random tokens
            (`ppnet.equivalence`): at most 1e-5 of the largest logit apart in float32. After redistribution the masked
            dense model computes with the refitted projections: what is checked is that nothing else has changed.
        metric: what a size means: ``params``, ``flops``, ``bytes`` or ``latency``.
        redistribute: calibration data: text, files, token ids, a dataset or batches (`ppnet.calibration_batches`, whose
            result may be given, too); None: nothing is redistributed.
        tokenizer: the model's tokenizer, where `redistribute` is text.
        column: key of the text in the rows of `redistribute`, where that is a dataset.
        redistribution: ``least_squares`` (the default), ``nearest``, ``mean`` or ``none``.
        ridge: of the least squares, as a share of the mean squared feature.
        sequential: refit layer after layer on what the small model itself computes; False: all on the dense model's
            activations.
        **plan_kwargs: further arguments of `ppnet.plan`.

    Raises:
        UnsupportedModelError: unknown family, adapters, quantised modules, already compacted, or a head that the
            shipped classes do not have.
        PlanError: the plan is of another model; nothing ranks the units (neither gates, scores nor data), or
            `ppnet.score` cannot score this model without a loss (encoders); options that `ppnet.plan` refuses.
        SizeError: the size cannot be met.
        EquivalenceError: the result does not reproduce the masked model.
        DataError: the data cannot be read, or the model gives NaN on it.
        PPNetError: `redistribution` is unknown or without data, or `ridge` is negative.
    """
    method = _method(redistribute, redistribution, ridge)
    # The copy has the stock forward, too: a Trainer with bf16 leaves one on the model that autocasts.
    with mixed_precision_off(model):
        batches: Any = None
        if isinstance(size_or_plan, Plan) or is_wrapped(model) or plan_kwargs.get("scores") is not None:
            plan = plan_of(model, size_or_plan, metric, plan_kwargs)
        else:
            _check_size(model, size_or_plan, metric, plan_kwargs, redistribute)
            batches = _batches(model, redistribute, tokenizer, column)
            plan = _plan_on(batches, model, size_or_plan, metric, plan_kwargs)
        structure = planned_structure(model, plan)
        scales = amplitudes(model, structure, plan)
        refitted = method != "none"
        if refitted and batches is None:
            batches = _batches(model, redistribute, tokenizer, column)
        small = shrunk(model, structure, plan, kept_parts(model, structure, plan, scales))
        if refitted:
            with as_dense(model, structure, plan), plain_evaluation(model, small):
                done = refit(
                    model, small, structure, plan, scales, batches, method=method, ridge=ridge, sequential=sequential
                )
            plan = replace(plan, extra={**plan.extra, "redistribution": done})
            small.ppnet_plan = plan
        if check:
            check_equivalent(model, small, structure, plan, refitted=refitted)
    return small


def _batches(model: nn.Module, data: Any, tokenizer: Any, column: str) -> Any:
    # Imported here: it brings transformers' trainer along.
    from ppnet.calibration import calibration_batches

    try:
        return calibration_batches(model, data, tokenizer, column=column)
    except DataError as error:
        raise renamed(error, "redistribute", "data") from error


def _method(redistribute: Any, redistribution: str | None, ridge: float) -> str:
    if redistribute is None and redistribution not in (None, "none"):
        raise PPNetError(
            f"redistribution: {redistribution!r} needs calibration data; give text or token ids as redistribute=..."
        )
    method = "none" if redistribute is None else "least_squares" if redistribution is None else redistribution
    check_options(method, ridge)
    return method


def planned_structure(model: nn.Module, plan: Plan) -> Structure:
    """The sites of a model that a plan speaks of: a model may have been gated in one kind of unit only.

    Raises:
        PlanError: the plan does not fit the model.
    """
    structure = structure_for(model)
    kinds = {name.rpartition(".")[2] for name in plan.dense_units}
    structure = replace(structure, sites=tuple(site for site in structure.sites if site.kind in kinds))
    plan.check(structure)
    return structure


def plan_of(model: nn.Module, size_or_plan: Any, metric: str, plan_kwargs: dict[str, Any]) -> Plan:
    if not isinstance(size_or_plan, Plan):
        return plan_for_size(model, size_or_plan, metric=metric, **plan_kwargs)
    refuse_options("size_or_plan is already a Plan", metric=metric, **plan_kwargs)
    return size_or_plan


def _check_size(model: nn.Module, size: Any, metric: str, plan_kwargs: dict[str, Any], data: Any) -> None:
    """Refuses what no scores can help, before a pass over the data is spent on them.

    Raises:
        PlanError: there is no data. All that `ppnet.plan` raises.
    """
    structure_for(model)
    if data is None:
        raise unranked(model, "give redistribute=data, which then ranks them, too, or ")
    plan_of(model, size, metric, {**plan_kwargs, "scores": "random"})


def _plan_on(batches: Any, model: nn.Module, size: Any, metric: str, plan_kwargs: dict[str, Any]) -> Plan:
    """The plan by scores of the default method, from the data of the redistribution."""
    try:
        scores = score(model, batches, max_tokens=None)
    except DataError as error:
        raise renamed(error, "redistribute", "data") from error
    except PPNetError as error:
        raise PlanError(
            f"scores: None, so that the units were to be scored on the data of redistribute, but {error} compact "
            "takes no loss: give scores=ppnet.score(model, data, loss=...), or of a method without gradients, "
            'scores=ppnet.score(model, data, method="activation").'
        ) from error
    plan = plan_of(model, size, metric, {**plan_kwargs, "scores": scores})
    about = {"method": scores.method, "data": "redistribute", "tokens": scores.tokens}
    return replace(plan, extra={**plan.extra, "scores": about})


def amplitudes(model: nn.Module, structure: Structure, plan: Plan) -> Scales:
    """Per site the amplitudes at the plan's u: (per unit ``(U,)`` or None, per input dimension ``(D,)`` or None)."""
    if is_wrapped(model):
        puppet: Any = model.puppet
        if len(puppet.structure.sites) != len(structure.sites):
            raise PlanError(
                f"plan: speaks of {len(structure.sites)} sites, the model's gates of {len(puppet.structure.sites)}; "
                "make the plan from the gated model with ppnet.plan(model, size)."
            )
        return puppet.scales(plan.u)
    if plan.u > 0.0:
        warnings.warn(
            f"The plan was made from gates at u = {plan.u:.4g}, but the model has none: amplitudes that were trained "
            "with the gates cannot be folded in. Load the gated model with ppnet.load(folder) to keep them.",
            stacklevel=3,
        )
    return [(None, None)] * len(structure.sites)


# ---- weights ---------------------------------------------------------------------------------------------------------


def _kept_parameter(parameter: nn.Parameter, part: Kept) -> nn.Parameter:
    kept = parameter.detach().index_select(part.dim, part.features.to(parameter.device))
    return nn.Parameter(multiplied(kept, part.factors), requires_grad=parameter.requires_grad)


def _state_feature_count(module: Any) -> None:
    """Lets a linear module's own record of its size follow its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    else:
        module.nx, module.nf = module.weight.shape


def shrunk(model: nn.Module, structure: Structure, plan: Plan, parts: Mapping[str, Kept]) -> Any:
    """A deep copy without the units that go, with the class and config that say so; `plan` is attached to it.

    Dense leaves are never copied. Of a model without weights (on the meta device) it is one without weights.
    """
    small = cut_copy(model, structure, plan, parts)
    _fit_config(small, structure, plan)
    small.ppnet_plan = plan
    return small


@torch.no_grad()
def cut_copy(model: nn.Module, structure: Structure, plan: Plan, parts: Mapping[str, Kept]) -> Any:
    """`shrunk`, but of a class and config that may not say its widths: it runs, and cannot be saved."""
    # deepcopy takes what the memo already holds, so a dense parameter is replaced by its small version on the way. It
    # also keeps the memo's values alive and every tie between modules (embeddings, the shared config).
    memo: dict[int, Any] = {}
    for name, part in parts.items():
        parameter = model.get_parameter(name)
        memo[id(parameter)] = _kept_parameter(parameter, part)
    small: Any = copy.deepcopy(model, memo)
    remove_probes(small)
    if is_accelerated(small):
        take_off(small)
    if is_wrapped(small):
        strip(small)
    for site in structure.sites:
        for leaf in site.leaves:
            _state_feature_count(small.get_submodule(leaf.name))
        site.set_attributes(small, len(plan.kept[site.name]))
    return small


# ---- class and config ------------------------------------------------------------------------------------------------


def _fit_config(small: Any, structure: Structure, plan: Plan) -> None:
    """Gives the small model a class and config that say its widths: stock where possible, else shipped."""
    config = small.config
    if hasattr(config, "ppnet"):  # a folder with gates that AutoModel loaded without them
        del config.ppnet
    family = FAMILIES[structure.model_type]
    removed = [site for site in structure.sites if len(plan.kept[site.name]) < site.units]
    if not removed:
        return
    layers: dict[int, dict[str, int]] = {}
    for site in structure.sites:
        layers.setdefault(site.layer, {}).update(family.per_layer_keys(site, len(plan.kept[site.name]), config))
    # Once heads go, the head width no longer follows from the model's width and its number of heads.
    stated: dict[str, Any] = {}
    for site in removed:
        if site.kind == "kv_group" and hasattr(small.get_submodule(site.block), "head_dim"):
            stated["head_dim"] = int(small.get_submodule(site.block).head_dim)
    uniform = all(entries == layers[0] for entries in layers.values())
    if uniform and all(family.stock_expressible(site, config) for site in removed):
        numbers = {**stated, **layers[0]}
        if _stock_reproduces(small, numbers):
            for name, value in numbers.items():
                setattr(config, name, value)
            return
    stated.update(family.parts(small))
    classes = shipped(structure.model_type)
    target = classes.for_stock(type(small))
    for name, value in stated.items():
        setattr(config, name, value)
    # The class is swapped on the one config object that every module points at; a copy would go stale in attention.
    config.__class__ = classes.config
    config.auto_map = classes.auto_map
    config.per_layer_config = layers
    small.__class__ = target
    if not _same_shapes(small, target, copy.deepcopy(config)):
        raise EquivalenceError(
            f"model: {target.__name__} built from the new config has other shapes than the compacted weights; the "
            f"family {family.name!r} and ppnet/shipped/modeling_ppnet_{family.stem}.py disagree on per_layer_config."
        )


def _stock_reproduces(small: Any, numbers: dict[str, int]) -> bool:
    """Whether the stock class, built from a config with the new numbers, has exactly the small model's shapes."""
    dense = small.config.to_dict()
    try:
        return _same_shapes(small, type(small), type(small.config).from_dict({**dense, **numbers}))
    except Exception:  # config validators and stock constructors refuse widths with several exception types
        return False


def _same_shapes(small: Any, target: type, config: Any) -> bool:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        built = target(config)
    # Buffers, too: rotary tables have the width of a head, which a class may take from elsewhere than its projections.
    shapes = [
        {name: tensor.shape for each in (model.named_parameters(), model.named_buffers()) for name, tensor in each}
        for model in (built, small)
    ]
    return shapes[0] == shapes[1]
