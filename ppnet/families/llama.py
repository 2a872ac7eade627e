"""llama, mistral, qwen2, qwen3: separate q/k/v/o and gate/up/down projections, SwiGLU, RMSNorm before each sub-layer.

qwen3's q_norm and k_norm have the width of one head and do not change when heads go. `num_key_value_groups` stays,
since whole KV groups are removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ppnet.errors import UnsupportedModelError
from ppnet.families.base import Family, consecutive, decoder_layers, linear_leaf, no_attributes, register
from ppnet.units import Site


def sites(model: nn.Module) -> tuple[Site, ...]:
    """Two sites per layer: KV groups of `self_attn` and neurons of `mlp`."""
    decoder = "model.layers" if hasattr(model, "model") else "layers"
    found: list[Site] = []
    for layer, module in enumerate(decoder_layers(model, decoder)):
        attention, mlp = f"{decoder}.{layer}.self_attn", f"{decoder}.{layer}.mlp"
        head = int(module.self_attn.head_dim)
        groups = module.self_attn.k_proj.out_features // head
        queries, remainder = divmod(module.self_attn.q_proj.out_features, head * groups)
        if remainder:
            raise UnsupportedModelError(
                f"model: {attention} has {module.self_attn.q_proj.out_features // head} query heads for {groups} KV "
                "heads; KV groups need the same number of query heads each."
            )
        per_query, per_key = consecutive(groups, head * queries), consecutive(groups, head)
        found.append(
            Site(
                layer=layer,
                kind="kv_group",
                block=attention,
                units=groups,
                producers=(
                    linear_leaf(model, f"{attention}.q_proj", "q", per_query),
                    linear_leaf(model, f"{attention}.k_proj", "k", per_key),
                    linear_leaf(model, f"{attention}.v_proj", "v", per_key),
                ),
                consumer=linear_leaf(model, f"{attention}.o_proj", "out", per_query),
                attributes=no_attributes,
            )
        )
        neurons = module.mlp.down_proj.in_features
        each = consecutive(neurons, 1)
        found.append(
            Site(
                layer=layer,
                kind="neuron",
                block=mlp,
                units=neurons,
                producers=(
                    linear_leaf(model, f"{mlp}.gate_proj", "gate", each),
                    linear_leaf(model, f"{mlp}.up_proj", "up", each),
                ),
                consumer=linear_leaf(model, f"{mlp}.down_proj", "out", each),
                attributes=no_attributes,
            )
        )
    return tuple(found)


def per_layer_keys(site: Site, kept: int, config: Any) -> Mapping[str, int]:
    if site.kind == "neuron":
        return {"intermediate_size": kept}
    queries = config.num_attention_heads // config.num_key_value_heads
    return {"num_attention_heads": kept * queries, "num_key_value_heads": kept}


def stock_expressible(site: Site, config: Any) -> bool:
    """Whether the stock class can hold fewer units of this kind, when every layer has equally many."""
    return True


def tiny_configs(model_type: str) -> dict[str, Any]:
    common = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    if model_type == "llama":
        return {**common, "attention_bias": True, "mlp_bias": True}
    if model_type == "mistral":
        return {**common, "sliding_window": None}
    return common


register(
    Family(
        name="llama",
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        sites=sites,
        tiny_configs=tiny_configs,
        per_layer_keys=per_layer_keys,
        stock_expressible=stock_expressible,
    )
)
