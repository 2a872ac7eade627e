"""Decoder layers of accelerated models: a decoding step is two operators, around the update of the cache.

In a step of few tokens the layer's own Python costs as much as the products of a small layer: the weights have just
gone through the caches, so all of it is cold. A layer as Llama's (RMSNorm before each sub-layer, residuals around them)
therefore calls `qkv_decode` and `attend_mlp_decode`; any call that is not a plain step goes to the class's own forward,
whose attention block, norms and MLP are fused each by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ppnet import ops
from ppnet.attention import DECODING, SPECIAL
from ppnet.binding import Binding
from ppnet.decode import MlpParts, suits
from ppnet.decode_blocks import LEAVES, attention_block_forward, cached_steps, kept_if_same
from ppnet.modes import evaluating, transformed
from ppnet.ops.gated_attention_decode import GPU_WIDTH
from ppnet.wrap import ScaleInput, SubLayerHook

ATTENTION, MLP, NORMS = "self_attn", "mlp", ("input_layernorm", "post_attention_layernorm")
# What the forward of a supported layer takes, by name; the rest are keywords of the attention.
ARGUMENTS = {
    "hidden_states",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "position_embeddings",
    "kwargs",
}


@dataclass(frozen=True, eq=False)
class Leaf:
    """A linear module of a layer: what holds its tensors, its binding, and whether its units are its inputs."""

    parameters: dict[str, Tensor | None]
    binding: Binding
    by_input: bool

    def weight(self, dtype: torch.dtype) -> Tensor | None:
        """The weight where it is as the operators read it, else None."""
        weight, binding = self.parameters.get("weight"), self.binding
        # A parametrized bias is no parameter; one that is absent is the parameter None.
        if weight is None or "bias" not in self.parameters or binding.overrides:
            return None
        return weight if weight.dtype == dtype and weight.stride(0 if self.by_input else 1) == 1 else None


@dataclass(frozen=True, eq=False)
class LayerParts:
    """What a fused layer reads in every step, looked up once.

    Attributes:
        attention: the attention block.
        leaves: q, k, v, o, up, down and, if there is one, gate.
        norms: parameters of the norms: before the attention, before the MLP, of queries, of keys; None for no norm.
        eps: of all of them. act: of the MLP.
        children: ``(parent's children, name, child)`` of all modules below the layer.
        forwards: of the blocks and norms, which a layer would call.
        hooks: ``(hooks, how many of them are the gates')`` of all of these modules; not calling these goes unnoticed
            without others, once the inputs are scaled.
        scales: what may scale the inputs of the attention and of the MLP, if there are gates.
    """

    attention: Any
    leaves: tuple[Leaf, ...]
    norms: tuple[dict[str, Tensor | None] | None, ...]
    eps: float
    act: str
    children: tuple[tuple[dict[str, nn.Module | None], str, nn.Module | None], ...]
    forwards: tuple[tuple[nn.Module, Any], ...]
    hooks: tuple[tuple[dict[int, Any], int], ...]
    scales: tuple[ScaleInput | None, ScaleInput | None]

    def unchanged(self) -> bool:
        """Whether every module is there and computes what it did, and none of them minds not being called."""
        if not all(len(hooks) == own for hooks, own in self.hooks):
            return False
        if not all(children.get(name) is child for children, name, child in self.children):
            return False
        return all(forward_of(module) is forward for module, forward in self.forwards)

    def weights(self, x: Tensor) -> tuple[list[Tensor], list[Any]] | None:
        """The weights of leaves and of norms (times scales) if the decode operators take them for x, else None."""
        weights: list[Tensor] = []
        norms: list[Any] = []
        for leaf in self.leaves:
            weight = leaf.weight(x.dtype)
            if weight is None:
                return None
            weights.append(weight)
        for norm in self.norms:
            weight = None if norm is None else norm.get("weight")
            if norm is not None and (weight is None or weight.dtype != x.dtype):
                return None
            norms.append(weight)
        for i, gate in enumerate(self.scales):
            if gate is not None and gate.scale is not None:
                norms[i] = norms[i] * gate.scale.to(x.dtype)
        return weights, norms


def forward_of(module: nn.Module) -> Any:
    """What took the place of the forward of a module's class: our function, or whatever a user gave it."""
    forward = module.__dict__.get("forward")
    return getattr(forward, "func", forward)


def scale_of(block: nn.Module) -> ScaleInput | None:
    return next((hook for hook in block._forward_pre_hooks.values() if isinstance(hook, ScaleInput)), None)


def is_step(parts: LayerParts, x: Tensor, mask: Tensor | None, position_embeddings: Any, kwargs: dict) -> bool:
    """Whether a call is a plain decoding step of few tokens, but for the state of the layer's tensors."""
    if torch.is_grad_enabled() or transformed() or not suits(x):
        return False
    if position_embeddings is None or position_embeddings[0].dtype != x.dtype or (mask is None and x.shape[1] != 1):
        return False
    if kwargs and any(kwargs.get(name) is not None for name in SPECIAL):
        return False
    if not x.is_cpu and parts.attention.head_dim > GPU_WIDTH:
        return False
    return not _has_any_global_hook() and parts.attention.config._attn_implementation == DECODING


def layer_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """Forward of a fused decoder layer."""
    x, parts = hidden_states, self._ppnet_layer
    evaluates = not self.training and not parts.attention.training
    plain = evaluates and is_step(parts, x, attention_mask, position_embeddings, kwargs) and parts.unchanged()
    found = parts.weights(x) if plain else None
    if found is None or position_embeddings is None:
        return type(self).forward(
            self,
            x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
    weights, (before_attention, before_mlp, of_query, of_key) = found
    bias: list[Any] = [leaf.parameters.get("bias") for leaf in parts.leaves]
    kept = [leaf.binding.kept for leaf in parts.leaves]
    query, key, value = ops.qkv_decode(
        x,
        before_attention,
        parts.eps,
        weights[:3],
        bias[:3],
        *position_embeddings,
        idx=[None if k is None else k.features for k in kept[:3]],
        q_norm=of_query,
        k_norm=of_key,
    )
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, parts.attention.layer_idx)
    gated = len(weights) == 7
    return ops.attend_mlp_decode(
        x,
        query,
        key,
        value,
        weights[3],
        before_mlp,
        parts.eps,
        weights[4],
        weights[5],
        weights[6] if gated else None,
        mask=attention_mask,
        scale=parts.attention.scaling,
        out_bias=bias[3],
        out_idx=None if kept[3] is None else kept[3].features,
        out_z=None if kept[3] is None else kept[3].gate,
        up_bias=bias[4],
        gate_bias=bias[6] if gated else None,
        down_bias=bias[5],
        idx=None if kept[5] is None else kept[5].features,
        z=None if kept[5] is None else kept[5].gate,
        act=parts.act,
    )


def parts_of(layer: Any) -> LayerParts | None:
    """The parts of a layer whose sub-layers are fused and whose modules are those of Llama's; else None."""
    taken = inspect.signature(type(layer).forward).parameters.keys() - {"self"}
    if set(layer._modules) != {ATTENTION, MLP, *NORMS} or not {"hidden_states"} < taken <= ARGUMENTS:
        return None
    attention, mlp = layer._modules[ATTENTION], layer._modules[MLP]
    mlp_parts: MlpParts | None = mlp.__dict__.get("_ppnet_mlp")
    if mlp_parts is None or forward_of(attention) is not attention_block_forward:
        return None
    norms = [layer._modules[name] for name in NORMS]
    norms += [attention._modules.get(name) for name in ("q_norm", "k_norm")]
    every_eps = {norm.__dict__.get("_ppnet_eps") for norm in norms if norm is not None}
    if len(every_eps) != 1 or None in every_eps:
        return None
    named = [(attention, name, name == LEAVES[-1]) for name in LEAVES]
    named += [(mlp, mlp_parts.up, False), (mlp, mlp_parts.down, True)]
    named += [] if mlp_parts.gate is None else [(mlp, mlp_parts.gate, False)]
    modules = [(parent._modules[name], by_input) for parent, name, by_input in named]
    below = [module for module in layer.modules() if module is not layer]
    hooks = [
        t for m in below for t in (m._forward_pre_hooks, m._forward_hooks, m._backward_pre_hooks, m._backward_hooks)
    ]
    return LayerParts(
        attention=attention,
        leaves=tuple(Leaf(m._parameters, m._ppnet_binding, by_input) for m, by_input in modules),
        norms=tuple(None if norm is None else norm._parameters for norm in norms),
        eps=norms[0]._ppnet_eps,
        act=mlp_parts.act,
        children=tuple((m._modules, *child) for m in (layer, *below) for child in m._modules.items()),
        forwards=tuple((m, forward_of(m)) for m in (attention, mlp, *norms) if m is not None),
        hooks=tuple((table, sum(isinstance(hook, SubLayerHook) for hook in table.values())) for table in hooks),
        scales=(scale_of(attention), scale_of(mlp)),
    )


def fuse_layer(layer: Any) -> bool:
    """Gives a layer the fused forward, if it then computes the same, with a cache; returns whether it does."""
    parts = parts_of(layer)
    if parts is None:
        return False
    layer.__dict__["_ppnet_layer"] = parts
    layer.__dict__["forward"] = partial(layer_forward, layer)
    return kept_if_same(layer, partial(cached_steps, layer, parts.attention, parts.leaves[0].parameters["weight"]))


@torch.no_grad()
def fuse_layers(model: nn.Module, blocks: Iterable[str]) -> list[str]:
    """Fuses every layer that is known among the parents of the fused `blocks`; returns their names."""
    parents = {name.rpartition(".")[0] for name in blocks if name.rpartition(".")[2] == ATTENTION}
    with evaluating(model):
        return [name for name, module in model.named_modules() if name in parents and fuse_layer(module)]
