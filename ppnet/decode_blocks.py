"""Attention blocks and norms of accelerated models: fewer, larger operators per decoding step.

Between two products a step of a transformers model runs some dozen small kernels, each with its dispatch and, since the
weights just went through the caches, with cold code. Where a module's arithmetic is known its forward is replaced by
one that calls an operator for all of them; any call that is not a plain decoding step goes to the class's own forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ppnet import ops
from ppnet.attention import DECODING, attention_forward
from ppnet.decode import DTYPES, Kept, computes_the_same, decodes, is_plain, linear
from ppnet.modes import evaluating, transformed
from ppnet.ops.linear_decode import has_kernels
from ppnet.units import Site

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj")
# What the forward of a supported attention block takes first, by name.
ARGUMENTS = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values")


# ---- norms -----------------------------------------------------------------------------------------------------------


def norm_forward(self: Any, hidden_states: Tensor) -> Any:
    """Forward of a fused RMSNorm."""
    x, weight = hidden_states, self.weight
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    plain = has_kernels(x) and x.dtype == weight.dtype and x.dtype in DTYPES
    if learns or not plain or transformed():
        return type(self).forward(self, x)
    return ops.rms_norm(x, weight, self._ppnet_eps)


def norm_eps(module: nn.Module) -> float | None:
    """The eps of a module that is named an RMSNorm and has the weight and eps of one; None for any other."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    named = type(module).__name__.endswith("RMSNorm")
    return eps if named and isinstance(eps, float) and isinstance(weight, nn.Parameter) and weight.dim() == 1 else None


def fuse_norm(module: nn.Module) -> bool:
    """Gives an RMSNorm the fused forward, if it then computes the same on random tokens; returns whether it does."""
    eps = norm_eps(module)
    if eps is None or "_ppnet_across" in module.__dict__:  # that norm is not always given all features
        return False
    module.__dict__["_ppnet_eps"] = eps
    module.__dict__["forward"] = partial(norm_forward, module)
    weight: Any = module.weight
    x = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    return kept_if_same(module, partial(module, x))


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_block_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    """Forward of a fused attention block: q, k and v as one operator, then both embeddings as one."""
    x = hidden_states
    known = position_embeddings is not None and position_embeddings[0].dtype == x.dtype and is_plain(self, LEAVES)
    # What is in the place of a leaf need not have a weight.
    leaves = (self.q_proj, self.k_proj, self.v_proj) if known else ()
    weights, biases = [leaf.weight for leaf in leaves], [leaf.bias for leaf in leaves]
    if not known or not decodes(x, weights, biases) or self.config._attn_implementation != DECODING:
        return type(self).forward(self, x, position_embeddings, attention_mask, past_key_values, **kwargs)
    kept: list[Kept | None] = [leaf._ppnet_binding.kept for leaf in leaves]
    outputs = ops.linears_decode(
        x.reshape(-1, x.shape[-1]),
        weights,
        biases,
        idx=[None if k is None else k.features for k in kept],
    )
    heads = (*x.shape[:-1], -1, self.head_dim)
    query, key, value = (y.view(heads) for y in outputs)
    if "q_norm" in self._modules:
        query, key = self.q_norm(query), self.k_norm(key)
    cos, sin = cast(tuple[Tensor, Tensor], position_embeddings)
    query, key = ops.rotary(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    value = value.transpose(1, 2)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    dropout = self.attention_dropout if self.training else 0.0
    out, _ = attention_forward(self, query, key, value, attention_mask, dropout, self.scaling, decode=True, **kwargs)
    last = self.o_proj
    return linear(out.flatten(2), last.weight, last.bias, True, last._ppnet_binding.kept), None


def is_known(block: nn.Module) -> bool:
    """Whether an attention block has the parts and the signature that `attention_block_forward` is written for."""
    parts = all("_ppnet_binding" in getattr(block, name, nn.Identity()).__dict__ for name in LEAVES)
    norm = getattr(getattr(block, "q_norm", None), "weight", None)
    parts = parts and (norm is None or len(norm) == block.head_dim)
    attributes = all(
        hasattr(block, name) for name in ("config", "head_dim", "layer_idx", "scaling", "attention_dropout")
    )
    taken = tuple(inspect.signature(type(block).forward).parameters)[1 : len(ARGUMENTS) + 1]
    return parts and attributes and taken == ARGUMENTS


def fuse_attention_block(block: Any) -> bool:
    """Gives an attention block the fused forward, if it then computes the same, with a cache; returns whether."""
    if not is_known(block):
        return False
    block.__dict__["forward"] = partial(attention_block_forward, block)
    return kept_if_same(block, partial(cached_steps, block, block, block.q_proj.weight))


def cached_steps(module: Any, block: Any, weight: Any) -> Tensor:
    """What an attention block, or the layer around it, gives for two sequences' first tokens and then the next ones.

    Args:
        weight: of the queries: width, dtype and device.
    """
    from transformers import DynamicCache

    generator, cache, outputs = torch.Generator().manual_seed(0), DynamicCache(), []
    for _ in range(2):
        x = torch.randn(2, 2, weight.shape[1], generator=generator).to(weight)
        angle = torch.rand(2, 2, block.head_dim // 2, generator=generator)
        embedding = tuple(torch.cat([f(angle)] * 2, -1).to(weight) for f in (torch.cos, torch.sin))
        past = cache.get_seq_length(block.layer_idx)
        mask = torch.ones(2, 1, 2, past + 2, dtype=torch.bool).tril(past)
        out = module(hidden_states=x, position_embeddings=embedding, attention_mask=mask, past_key_values=cache)
        outputs.append(out[0] if isinstance(out, tuple) else out)
    return torch.cat(outputs)


# ---- all of a model --------------------------------------------------------------------------------------------------


def kept_if_same(module: nn.Module, run: Callable[[], Tensor]) -> bool:
    """Whether `run` gives the same with the module's fused forward as with its class's; takes the former off if not."""
    with suppress(TypeError, AttributeError):  # a module that is called in another way stays as it is
        if computes_the_same(module, run):
            return True
    unfuse(module)
    return False


@torch.no_grad()
def fuse_blocks(model: nn.Module, sites: Iterable[Site]) -> list[str]:
    """Fuses every norm and attention block that is known; returns their names."""
    with evaluating(model):
        norms = [name for name, module in model.named_modules() if fuse_norm(module)]
        named = [site.block for site in sites if site.kind == "kv_group"]
        blocks = [name for name in named if fuse_attention_block(model.get_submodule(name))]
        return norms + blocks


def unfuse(module: nn.Module) -> None:
    for name in ("_ppnet_eps", "_ppnet_layer", "forward"):
        module.__dict__.pop(name, None)
