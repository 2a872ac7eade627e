"""Attaching gates to a model and taking them off again: in place, same class, one container `model.puppet`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from ppnet.attention import TRAINING, use_attention
from ppnet.binding import patch_across, patch_leaf, unpatch_across, unpatch_leaf
from ppnet.decode import fuse_mlps, unfuse_mlp
from ppnet.errors import PPNetError, UnsupportedModelError
from ppnet.families import structure_of
from ppnet.gates import Puppet, PuppetConfig
from ppnet.gates.config import SCORES
from ppnet.gates.given import importance_of
from ppnet.skip import Engine
from ppnet.units import Structure, leaf_module

Model = TypeVar("Model", bound=nn.Module)
ENGINE = "_ppnet_engine"
ACCELERATED = "_ppnet_accelerated"


class SubLayerHook:
    """Calls an engine's method for one site; a class, so that a deep copy of the model points at its own engine."""

    def __init__(self, engine: Engine, index: int) -> None:
        self.engine, self.index = engine, index


class ScaleInput(SubLayerHook):
    @property
    def scale(self) -> Tensor | None:
        """What the sub-layer's inputs are multiplied by in this pass, ``(D,)``, or None."""
        site_pass = self.engine.active[self.index]
        return None if site_pass is None else site_pass.input_scale

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.engine.scale_input(self.index, args, kwargs)


class AttachDropped(SubLayerHook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.engine.attach_dropped(self.index, args, kwargs, output)


def is_wrapped(model: nn.Module) -> bool:
    """Whether `model` carries gates."""
    return ENGINE in model.__dict__


def is_accelerated(model: nn.Module) -> bool:
    """Whether the decode operators are under `model` (`ppnet.accelerate`)."""
    return ACCELERATED in model.__dict__


def engine_of(model: nn.Module) -> Engine:
    """The engine of a wrapped model.

    Raises:
        UnsupportedModelError: the model carries no gates.
    """
    if not is_wrapped(model):
        raise UnsupportedModelError(
            f"model: this {type(model).__name__} carries no gates; call ppnet.wrap(model) first, or use ppnet.plan and "
            "ppnet.compact with scores=..., which also work on a model that was never wrapped."
        )
    engine: Engine = model.__dict__[ENGINE]
    return engine


def structure_for(model: nn.Module) -> Structure:
    """The gated sites of a wrapped model, or all sites of a model that was never wrapped."""
    return engine_of(model).puppet.structure if is_wrapped(model) else structure_of(model)


def wrap(
    model: Model,
    config: PuppetConfig | None = None,
    *,
    scores: Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> Model:
    """Attaches gates to a Hugging Face model, in place.

    The class, the weights and their names stay; all gate parameters live in ``model.puppet`` and are saved with the
    model. In training mode every forward draws lambda and masks and computes only the kept units; in evaluation mode
    the model is dense until `ppnet.resize`.

    Args:
        model: a dense model of a supported family (`ppnet.families`).
        config: options; None: `PuppetConfig()`.
        scores: the importance of the units inside the gates, instead of one that is read off the weights:
            `ppnet.Scores` of this model, the name of a file of them, or any mapping of site name -> one number per
            unit, higher stays. Only their order counts, within each site or kind (`PuppetConfig.normalise_scores`). It
            is saved with the gates, and stays as it is while weights train. Implies ``importance="scores"``.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: already gated, already compacted, quantised, with adapters, or of an unknown family. The
            model is unchanged then.
        PPNetError: `config` is not a `PuppetConfig`, or names an unknown importance; scores beside another importance,
            or none with ``importance="scores"``.
        PlanError, CheckpointError: scores that do not fit the model, or not a file of them, as in `ppnet.plan`.
    """
    if config is None:
        config = PuppetConfig()
    elif not isinstance(config, PuppetConfig):
        raise PPNetError(f"config: a {type(config).__name__}; give a ppnet.PuppetConfig(...) or None.")
    if is_wrapped(model):
        raise UnsupportedModelError(
            f"model: this {type(model).__name__} is already gated (model.puppet); use it as it is, or call "
            "ppnet.unwrap(model) first to attach new gates."
        )
    if is_accelerated(model):
        raise UnsupportedModelError(
            f"model: this {type(model).__name__} is accelerated; call ppnet.decelerate(model) first, then wrap it, and "
            "accelerate it again if you want."
        )
    structure, config, importance = fit(model, config, scores)
    attach(model, structure, config)
    if importance is not None:
        host: Any = model
        host.puppet.given_importance.copy_(importance)
    return model


def fit(model: nn.Module, config: PuppetConfig, scores: Any) -> tuple[Structure, PuppetConfig, Tensor | None]:
    """What `wrap` attaches to a dense model: the gated sites, the options, the importance that scores give (U,).

    Raises:
        as `wrap`; the model is not changed.
    """
    whole = structure_of(model)
    structure = select_kinds(whole, config.kinds)
    if scores is not None:
        config = config.with_scores()
        names = [site.name for site in whole.sites]
        return structure, config, importance_of(scores, structure, config.normalise_scores, known=names)
    if config.importance == SCORES:
        raise PPNetError(
            "scores: None, but importance='scores' takes the importance of the units from them; give "
            "ppnet.wrap(model, config, scores=ppnet.score(model, data, tokenizer=...)), or the name of a file of them."
        )
    if config.normalise_scores != PuppetConfig().normalise_scores:
        raise PPNetError(
            f"normalise_scores: {config.normalise_scores!r} says how scores are made comparable, and there are none; "
            "give ppnet.wrap(model, config, scores=...), or leave it out."
        )
    return structure, config, None


def attach(model: nn.Module, structure: Structure, config: PuppetConfig) -> None:
    """Attaches gates to some sites of a dense model: the container, the hooks and the patched forwards."""
    puppet = Puppet(model, structure, config)
    engine = Engine(model, puppet)
    model.__dict__[ENGINE] = engine
    host: Any = model
    host.puppet = puppet
    puppet.train(model.training)
    host.config.ppnet = config.to_dict()
    host.__dict__.pop("ppnet_plan", None)  # of an earlier compaction: the gates decide anew what stays
    model.register_forward_pre_hook(engine.before_forward)
    model.register_forward_hook(engine.after_forward)
    for site in structure.sites:
        for leaf in site.leaves:
            patch_leaf(leaf_module(model, leaf), by_input=leaf.role == "out")
        for norm in site.across:
            patch_across(model.get_submodule(norm.name))
    fuse_mlps(model, structure.sites)
    use_attention(model, TRAINING)
    for index, site in enumerate(structure.sites):
        block, output = model.get_submodule(site.block), model.get_submodule(site.output)
        block.register_forward_pre_hook(ScaleInput(engine, index), with_kwargs=True)
        output.register_forward_hook(AttachDropped(engine, index), with_kwargs=True)


def select_kinds(structure: Structure, kinds: tuple[str, ...]) -> Structure:
    """The structure restricted to sites of some kinds; the units of other sites are never removed."""
    return replace(structure, sites=tuple(site for site in structure.sites if site.kind in kinds))


def unwrap(model: Model) -> Model:
    """Takes the gates off, in place: the model is the plain dense model again, with its weights as they are.

    An accelerated model is decelerated first.

    Raises:
        UnsupportedModelError: the model carries no gates.
    """
    engine_of(model)
    if is_accelerated(model):
        from ppnet.accelerate import take_off

        take_off(model)
    return strip(model)


def strip(model: Model) -> Model:
    """Removes the container, the hooks and the patched forwards, and restores the dense attributes, in place."""
    engine: Engine = model.__dict__.pop(ENGINE)
    engine.release()
    for site in engine.sites:
        for leaf in site.leaves:
            unpatch_leaf(leaf_module(model, leaf))
        for norm in site.across:
            unpatch_across(model.get_submodule(norm.name))
        block = model.get_submodule(site.block)
        unfuse_mlp(block)
        for module in (block, model.get_submodule(site.output)):
            _remove_hooks(module, lambda hook: isinstance(hook, SubLayerHook))
    _remove_hooks(model, lambda hook: getattr(hook, "__self__", None) is engine)
    host: Any = model
    if getattr(host.config, "_attn_implementation", None) == TRAINING:
        host.set_attn_implementation("sdpa")
    del model.puppet
    if hasattr(model.config, "ppnet"):
        del model.config.ppnet
    return model


def _remove_hooks(module: nn.Module, ours: Any) -> None:
    for table, flags in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in table.items() if ours(hook)]:
            del table[key]
            flags.pop(key, None)
