"""gpt2: one fused q|k|v `Conv1D`, biases, LayerNorm, learned positions; a head is a KV group of one query."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ppnet.families.base import Family, consecutive, decoder_layers, linear_leaf, no_attributes, register
from ppnet.units import Site


def _attention_attributes(head: int, kept: int) -> Mapping[str, int]:
    return {"num_heads": kept, "split_size": kept * head}


def sites(model: nn.Module) -> tuple[Site, ...]:
    """Two sites per layer: heads of `attn` and neurons of `mlp`."""
    decoder = "transformer.h" if hasattr(model, "transformer") else "h"
    found: list[Site] = []
    for layer, module in enumerate(decoder_layers(model, decoder)):
        attention, mlp = f"{decoder}.{layer}.attn", f"{decoder}.{layer}.mlp"
        heads, head = int(module.attn.num_heads), int(module.attn.head_dim)
        per_head = consecutive(heads, head)
        fused = torch.cat([per_head + part * heads * head for part in range(3)], dim=1)
        found.append(
            Site(
                layer=layer,
                kind="kv_group",
                block=attention,
                units=heads,
                producers=(linear_leaf(model, f"{attention}.c_attn", "qkv", fused, blocks=(head, head, head)),),
                consumer=linear_leaf(model, f"{attention}.c_proj", "out", per_head),
                attributes=partial(_attention_attributes, head),
            )
        )
        neurons = module.mlp.c_proj.weight.shape[0]
        each = consecutive(neurons, 1)
        found.append(
            Site(
                layer=layer,
                kind="neuron",
                block=mlp,
                units=neurons,
                producers=(linear_leaf(model, f"{mlp}.c_fc", "up", each),),
                consumer=linear_leaf(model, f"{mlp}.c_proj", "out", each),
                attributes=no_attributes,
            )
        )
    return tuple(found)


def per_layer_keys(site: Site, kept: int, config: Any) -> Mapping[str, int]:
    return {"n_inner": kept} if site.kind == "neuron" else {"n_head": kept}


def stock_expressible(site: Site, config: Any) -> bool:
    """The stock class derives the head width from n_embd / n_head, so fewer heads cannot be said."""
    return site.kind == "neuron"


def tiny_configs(model_type: str) -> dict[str, Any]:
    return {
        "vocab_size": 96,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 3,
        "n_inner": 44,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


register(
    Family(
        name="gpt2",
        model_types=("gpt2",),
        sites=sites,
        tiny_configs=tiny_configs,
        per_layer_keys=per_layer_keys,
        stock_expressible=stock_expressible,
    )
)
