"""Llama, Mistral, Qwen2 and Qwen3 whose layers have different numbers of heads and MLP neurons.

Written beside the weights by ppnet. It needs torch and transformers >= 5.14 and nothing else. Stock transformers
reads one width for all layers; these classes build the stock model and then cut each layer's linear modules to the
widths of `config.per_layer_config[layer]`: `num_attention_heads`, `num_key_value_heads` and `intermediate_size`. The
stock forward runs unchanged, and every module keeps pointing at the one shared config.
"""

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)


def cut(linear: nn.Linear, outputs: int | None = None, inputs: int | None = None) -> None:
    """Keeps the first output and input features of a linear module, in place; None keeps all."""
    linear.weight = nn.Parameter(linear.weight.detach()[:outputs, :inputs].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[:outputs].clone())
    linear.out_features, linear.in_features = linear.weight.shape


class PerLayerWidths:
    """Mixin before a stock model class: builds it at its global widths, then cuts every layer to its own."""

    def __init__(self, config):
        widths = config.to_dict().get("per_layer_config")
        config.per_layer_config = None  # stock constructors read one width, and a per-layer one raises when read
        try:
            super().__init__(config)
        finally:
            config.per_layer_config = widths
        for layer, own in zip(self.base_model.layers, config.per_layer_config, strict=True):
            queries = own.num_attention_heads * layer.self_attn.head_dim
            keys = own.num_key_value_heads * layer.self_attn.head_dim
            cut(layer.self_attn.q_proj, outputs=queries)
            cut(layer.self_attn.k_proj, outputs=keys)
            cut(layer.self_attn.v_proj, outputs=keys)
            cut(layer.self_attn.o_proj, inputs=queries)
            cut(layer.mlp.gate_proj, outputs=own.intermediate_size)
            cut(layer.mlp.up_proj, outputs=own.intermediate_size)
            cut(layer.mlp.down_proj, inputs=own.intermediate_size)
            layer.mlp.intermediate_size = own.intermediate_size


class AnyHeadCount:
    """Mixin before a stock config: kept heads need not divide the width, because head_dim is always stated."""

    def validate_architecture(self):
        pass


@strict
class PPNetLlamaConfig(AnyHeadCount, LlamaConfig):
    model_type = "ppnet_llama"


class PPNetLlamaModel(PerLayerWidths, LlamaModel):
    config_class = PPNetLlamaConfig


class PPNetLlamaForCausalLM(PerLayerWidths, LlamaForCausalLM):
    config_class = PPNetLlamaConfig


@strict
class PPNetMistralConfig(AnyHeadCount, MistralConfig):
    model_type = "ppnet_mistral"


class PPNetMistralModel(PerLayerWidths, MistralModel):
    config_class = PPNetMistralConfig


class PPNetMistralForCausalLM(PerLayerWidths, MistralForCausalLM):
    config_class = PPNetMistralConfig


@strict
class PPNetQwen2Config(AnyHeadCount, Qwen2Config):
    model_type = "ppnet_qwen2"


class PPNetQwen2Model(PerLayerWidths, Qwen2Model):
    config_class = PPNetQwen2Config


class PPNetQwen2ForCausalLM(PerLayerWidths, Qwen2ForCausalLM):
    config_class = PPNetQwen2Config


@strict
class PPNetQwen3Config(AnyHeadCount, Qwen3Config):
    model_type = "ppnet_qwen3"


class PPNetQwen3Model(PerLayerWidths, Qwen3Model):
    config_class = PPNetQwen3Config


class PPNetQwen3ForCausalLM(PerLayerWidths, Qwen3ForCausalLM):
    config_class = PPNetQwen3Config


for config in (PPNetLlamaConfig, PPNetMistralConfig, PPNetQwen2Config, PPNetQwen3Config):
    config.register_for_auto_class()
for model in (PPNetLlamaModel, PPNetMistralModel, PPNetQwen2Model, PPNetQwen3Model):
    model.register_for_auto_class("AutoModel")
for causal_lm in (PPNetLlamaForCausalLM, PPNetMistralForCausalLM, PPNetQwen2ForCausalLM, PPNetQwen3ForCausalLM):
    causal_lm.register_for_auto_class("AutoModelForCausalLM")
