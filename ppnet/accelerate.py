"""Decoding at the speed of memory: the decode operators under a model, in place, and off again.

Works on a dense model, a compacted one, and a gated one at any size: the same weights then serve every size, and a
resize moves none of them. `model.generate()` and everything else that calls the model's forward use the operators;
passes of many tokens, and all training, go to the library's matrix products.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import nn

from ppnet.attention import DECODING, use_attention
from ppnet.binding import GatedLeaf, patch_leaf, unpatch_leaf
from ppnet.decode import fuse_mlps, unfuse_mlp
from ppnet.decode_blocks import fuse_blocks, unfuse
from ppnet.decode_layers import fuse_layers
from ppnet.errors import UnsupportedModelError
from ppnet.families import FAMILIES, check_decoder
from ppnet.pages import use_large_pages
from ppnet.units import Leaf, Site
from ppnet.wrap import ACCELERATED, engine_of, is_accelerated, is_wrapped

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Puts the decode operators under a model, in place: generation then reads each kept weight once per token.

    Weights whose units are inputs (down and o projections) are stored unit by unit from now on: the same parameter, of
    the same shape, with other strides, which `decelerate` leaves as they are. (What wants contiguous weights, as
    safetensors' save_file does, takes `weight.contiguous()`; save_pretrained does that itself.) Weights get large pages
    in place where the system can (Linux 6.1). Nothing is copied when the size changes.

    Args:
        model: a model of a supported family: dense, compacted, or with gates, at any size.

    Returns:
        The same model. The decode operators run steps of at most 8 tokens (sequences times new tokens) on the CPU,
        without gradients and autocast, in float32, bfloat16 or float16; longer passes and training use the library's
        products. Results differ from the model's own by rounding (sums are kept in float32 throughout).

    Raises:
        UnsupportedModelError: an unknown family, an encoder, already accelerated in whole or in part, or without its
            weights. The model is unchanged then.
    """
    sites = accelerable(model)
    state: dict[str, Any] = {"patched": [], "attention": None, "mlps": [], "blocks": [], "layers": []}
    model.__dict__[ACCELERATED] = state
    try:
        put_on(model, sites, state)
    except BaseException:
        take_off(model)
        raise
    if is_wrapped(model):
        engine = engine_of(model)
        engine.stale = True
        engine.fix(engine.fixed)
    return model


def accelerable(model: nn.Module) -> tuple[Site, ...]:
    """The sites of a model that can be accelerated. Raises UnsupportedModelError."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"model: got {type(model).__name__}; it must be a transformers model, as AutoModelForCausalLM loads one."
        )
    if is_accelerated(model):
        raise UnsupportedModelError(
            f"model: this {type(model).__name__} is already accelerated; use it as it is, or call "
            "ppnet.decelerate(model) first."
        )
    check_decoder(model, "decoding steps to accelerate")
    sites = engine_of(model).puppet.structure.sites if is_wrapped(model) else _sites(model)
    part = next((name for name, module in model.named_modules() if is_accelerated(module)), None)
    if part is not None:
        raise UnsupportedModelError(
            f"model: its part {part!r} is already accelerated; call ppnet.decelerate on that first."
        )
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if empty is not None:
        raise UnsupportedModelError(f"model: {empty} is on the meta device; load the weights first.")
    return sites


def put_on(model: nn.Module, sites: tuple[Site, ...], state: dict[str, Any]) -> None:
    """Puts the operators under a model; `state` tells at every moment what is to be taken off again."""
    wrapped = is_wrapped(model)
    if wrapped:
        engine_of(model).by_index = True
    leaves = {leaf.name: leaf for site in sites for leaf in site.leaves}
    for name, module in model.named_modules():
        if name not in leaves and type(module) is not nn.Linear:
            continue
        if name not in leaves or not wrapped:
            patch_leaf(cast(nn.Linear, module), by_input=name in leaves and leaves[name].role == "out")
            state["patched"].append(name)
        cast(GatedLeaf, module)._ppnet_binding.decode = True
    for leaf in leaves.values():
        store_by_unit(model.get_submodule(leaf.name), leaf)
    use_large_pages(model.parameters())
    state["attention"] = use_attention(model, DECODING)
    state["mlps"] = fuse_mlps(model, sites)
    state["blocks"] = fuse_blocks(model, sites)
    state["layers"] = fuse_layers(model, state["blocks"])


def decelerate(model: Model) -> Model:
    """Takes the decode operators off again, in place. Weights keep their values and their memory order.

    Raises:
        UnsupportedModelError: the model is not accelerated.
    """
    if not is_accelerated(model):
        raise UnsupportedModelError(f"model: this {type(model).__name__} is not accelerated (ppnet.accelerate).")
    take_off(model)
    if is_wrapped(model):
        engine = engine_of(model)
        engine.fix(engine.fixed)
    return model


def take_off(model: nn.Module) -> None:
    """`decelerate`, leaving a gated model's size to be bound anew by the caller."""
    state = model.__dict__.pop(ACCELERATED)
    modules = dict(model.named_modules())  # some may have been removed since
    parts = ("layers", unfuse), ("blocks", unfuse), ("mlps", unfuse_mlp), ("patched", unpatch_leaf)
    for kind, restore in parts:
        for name in state[kind]:
            if name in modules:
                restore(cast(nn.Linear, modules[name]))
    config = getattr(model, "config", None)
    if state["attention"] is not None and getattr(config, "_attn_implementation", None) == DECODING:
        cast(Any, model).set_attn_implementation(state["attention"])
    if is_wrapped(model):
        engine = engine_of(model)
        for site in engine.sites:
            for leaf in site.leaves:
                engine.binding(leaf).decode = False
        engine.by_index = False
        engine.stale = True


def _sites(model: nn.Module) -> tuple[Site, ...]:
    import ppnet.families  # noqa: F401  (registers every family of the folder)

    # A compacted model has the layout of its family, with other widths.
    model_type = str(getattr(getattr(model, "config", None), "model_type", None)).removeprefix("ppnet_")
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModelError(
            f"model: config.model_type {model_type!r} is not supported. Supported: {', '.join(sorted(FAMILIES))}."
        )
    return family.sites(model)


@torch.no_grad()
def store_by_unit(module: Any, leaf: Leaf) -> None:
    """Gives a leaf's weight the memory order in which the rows of its units are contiguous, in place."""
    if leaf.weight_dim == 1 and module.weight.stride(0) != 1:
        module.weight.data = module.weight.data.t().contiguous().t()
