"""bert: separate q/k/v projections with biases, a plain MLP in two modules, and a LayerNorm after each residual sum.

An encoder: it sees whole sentences, padded ones through their mask, and predicts no next token. Its forward reads no
number of heads, and the head width follows from the dense config. A branch that gives nothing still has its LayerNorm.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from ppnet.errors import UnsupportedModelError
from ppnet.families.base import Family, consecutive, decoder_layers, linear_leaf, no_attributes, register
from ppnet.units import Site


def _attention_attributes(head: int, kept: int) -> Mapping[str, int]:
    return {"self.num_attention_heads": kept, "self.all_head_size": kept * head}


def sites(model: nn.Module) -> tuple[Site, ...]:
    """Two sites per layer: heads of `attention` and neurons between `intermediate` and `output`."""
    config: Any = model.config
    if config.is_decoder or config.add_cross_attention:
        raise UnsupportedModelError(
            f"model: this {type(model).__name__} has is_decoder={config.is_decoder} and add_cross_attention="
            f"{config.add_cross_attention}; of the bert family only encoders are supported (both False)."
        )
    encoder = "bert.encoder.layer" if hasattr(model, "bert") else "encoder.layer"
    found: list[Site] = []
    for layer, module in enumerate(decoder_layers(model, encoder)):
        name = f"{encoder}.{layer}"
        head = int(module.attention.self.attention_head_size)
        heads = module.attention.self.query.out_features // head
        per_head = consecutive(heads, head)
        found.append(
            Site(
                layer=layer,
                kind="kv_group",
                block=f"{name}.attention",
                units=heads,
                producers=(
                    linear_leaf(model, f"{name}.attention.self.query", "q", per_head),
                    linear_leaf(model, f"{name}.attention.self.key", "k", per_head),
                    linear_leaf(model, f"{name}.attention.self.value", "v", per_head),
                ),
                consumer=linear_leaf(model, f"{name}.attention.output.dense", "out", per_head),
                attributes=partial(_attention_attributes, head),
                norm=f"{name}.attention.output.LayerNorm",
            )
        )
        neurons = module.output.dense.in_features
        each = consecutive(neurons, 1)
        found.append(
            Site(
                layer=layer,
                kind="neuron",
                block=f"{name}.intermediate",
                units=neurons,
                producers=(linear_leaf(model, f"{name}.intermediate.dense", "up", each),),
                consumer=linear_leaf(model, f"{name}.output.dense", "out", each),
                attributes=no_attributes,
                norm=f"{name}.output.LayerNorm",
            )
        )
    return tuple(found)


def per_layer_keys(site: Site, kept: int, config: Any) -> Mapping[str, int]:
    return {"intermediate_size": kept} if site.kind == "neuron" else {"num_attention_heads": kept}


def stock_expressible(site: Site, config: Any) -> bool:
    """The stock class derives the head width from hidden_size / num_attention_heads, so fewer heads cannot be said."""
    return site.kind == "neuron"


def parts(model: nn.Module) -> Mapping[str, Any]:
    """Whether a bare model has the pooling layer, which its stock config does not say."""
    return {"add_pooling_layer": False} if getattr(model, "pooler", True) is None else {}


def tiny_configs(model_type: str) -> dict[str, Any]:
    return {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


register(
    Family(
        name="bert",
        model_types=("bert",),
        sites=sites,
        tiny_configs=tiny_configs,
        per_layer_keys=per_layer_keys,
        stock_expressible=stock_expressible,
        decoder=False,
        parts=parts,
    )
)
