"""Decoding at the speed of memory: the decode operators under a model, in place, and off again.

Works on a dense model, a compacted one, and a gated one at any size: the same weights then serve every size, and a
resize moves none of them. `model.generate()` and everything else that calls the model's forward use the operators;
passes of many tokens, and all training, run as before.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ppnet.binding import GatedLeaf, patch_leaf, unpatch_leaf
from ppnet.decode import MlpParts, computes_the_same, fuse_mlp, recognise, unfuse_mlp
from ppnet.errors import UnsupportedModelError
from ppnet.families import FAMILIES
from ppnet.ops import gated_attention_decode
from ppnet.ops.linear_decode import MOST_TOKENS
from ppnet.units import Leaf, Site
from ppnet.wrap import ACCELERATED, engine_of, is_accelerated, is_wrapped

Model = TypeVar("Model", bound=nn.Module)
ATTENTION = "ppnet"


def accelerate(model: Model) -> Model:
    """Puts the decode operators under a model, in place: generation then reads each kept weight once per token.

    Weights whose units are inputs (down and o projections) are stored unit by unit from now on: the same parameter, of
    the same shape, with other strides. No weight is copied, also not when the size changes.

    Args:
        model: a model of a supported family: dense, compacted, or with gates, at any size.

    Returns:
        The same model. Only steps of at most 8 tokens (sequences times new tokens) on the CPU, without gradients and
        autocast, in float32, bfloat16 or float16, take another way than before; their results differ from the model's
        own by rounding (sums are kept in float32 throughout).

    Raises:
        UnsupportedModelError: an unknown family, or already accelerated. The model is unchanged then.
    """
    if is_accelerated(model):
        raise UnsupportedModelError(
            f"model: this {type(model).__name__} is already accelerated; use it as it is, or call "
            "ppnet.decelerate(model) first."
        )
    sites = engine_of(model).puppet.structure.sites if is_wrapped(model) else _sites(model)
    if is_wrapped(model):
        engine = engine_of(model)
        engine.by_index = True
    leaves = {leaf.name: leaf for site in sites for leaf in site.leaves}
    patched: list[str] = []
    for name, module in model.named_modules():
        if name not in leaves and type(module) is not nn.Linear:
            continue
        if name not in leaves or not is_wrapped(model):
            patch_leaf(cast(nn.Linear, module), by_input=name in leaves and leaves[name].role == "out")
            patched.append(name)
        cast(GatedLeaf, module)._ppnet_binding.decode = True
    for leaf in leaves.values():
        store_by_unit(model.get_submodule(leaf.name), leaf)
    model.__dict__[ACCELERATED] = {
        "patched": patched,
        "attention": _use_attention(model),
        "blocks": _fuse(model, sites),
    }
    if is_wrapped(model):
        engine.stale = True
        engine.fix(engine.fixed)
    return model


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
    for name in state["blocks"]:
        unfuse_mlp(model.get_submodule(name))
    for name in state["patched"]:
        unpatch_leaf(cast(nn.Linear, model.get_submodule(name)))
    if state["attention"] is not None:
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


# ---- MLPs ------------------------------------------------------------------------------------------------------------


def _fuse(model: nn.Module, sites: tuple[Site, ...]) -> list[str]:
    """Fuses every MLP whose parts are understood and whose fused result is the same; returns their names."""
    fused = []
    training = model.training
    model.eval()
    try:
        for site in sites:
            parts = _mlp_parts(model, site) if site.kind == "neuron" else None
            if parts is None:
                continue
            block = model.get_submodule(site.block)
            weight = cast(Tensor, block.get_submodule(parts.up).weight)
            fuse_mlp(block, parts)
            width = weight.shape[1] if isinstance(block.get_submodule(parts.up), nn.Linear) else weight.shape[0]
            if computes_the_same(block, width, weight):
                fused.append(site.block)
            else:
                unfuse_mlp(block)
    finally:
        model.train(training)
    return fused


def _mlp_parts(model: nn.Module, site: Site) -> MlpParts | None:
    """The parts of an MLP in which feature u of every leaf is unit u, and whose activation is known; else None."""
    plain = torch.arange(site.units)
    if any(leaf.index.shape[1] != 1 or not torch.equal(leaf.index[:, 0], plain) for leaf in site.leaves):
        return None
    prefix = f"{site.block}."
    roles = {leaf.role: leaf.name for leaf in site.leaves}
    if not {"up", "out"} <= roles.keys() <= {"gate", "up", "out"} or any(
        not name.startswith(prefix) for name in roles.values()
    ):
        return None
    names = {role: name.removeprefix(prefix) for role, name in roles.items()}
    block = model.get_submodule(site.block)
    others = [m for name, m in block.named_children() if name not in names.values() and not isinstance(m, nn.Dropout)]
    acts = {recognise(other) for other in others}
    act = next(iter(acts)) if len(acts) == 1 else None
    return None if act is None else MlpParts(names["up"], names["out"], names.get("gate"), act)


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: few tokens over the cache by ours, everything else by SDPA."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    tokens, context = query.shape[2], key.shape[2]
    causal = tokens > 1 and attention_mask is None
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    special = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache", "s_aux"))
    wanted = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if (
        query.device.type != "cpu"
        or tokens > MOST_TOKENS
        or learns
        or dropout
        or special
        or (causal and not (wanted and context == tokens))
        or query.dtype != key.dtype
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    out = gated_attention_decode(query, key, value, mask=attention_mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _use_attention(model: Any) -> str | None:
    """Switches a model from SDPA to our attention; returns what it had, or None where another one was asked for."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    before = model.config._attn_implementation
    if before != "sdpa":
        return None
    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    return before
