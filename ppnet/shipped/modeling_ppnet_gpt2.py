"""GPT-2 whose layers have different numbers of heads and MLP neurons.

Written beside the weights by ppnet. It needs torch and transformers >= 5.14 and nothing else. Stock transformers
reads one width for all layers; these classes build the stock model and then cut each layer's Conv1D modules to the
widths of `config.per_layer_config[layer]`: `n_head` and `n_inner`. The head width stays n_embd / n_head of the global
config. The stock forward runs unchanged, and every module keeps pointing at the one shared config.
"""

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.pytorch_utils import Conv1D


def cut(conv: Conv1D, outputs: int | None = None, inputs: int | None = None) -> None:
    """Keeps the first output and input features of a Conv1D (weight stored in, out), in place; None keeps all."""
    conv.weight = nn.Parameter(conv.weight.detach()[:inputs, :outputs].clone())
    conv.bias = nn.Parameter(conv.bias.detach()[:outputs].clone())
    conv.nx, conv.nf = conv.weight.shape


class PerLayerWidths:
    """Mixin before a stock model class: builds it at its global widths, then cuts every layer to its own."""

    def __init__(self, config):
        widths = config.to_dict().get("per_layer_config")
        config.per_layer_config = None  # stock constructors read one width, and a per-layer one raises when read
        try:
            super().__init__(config)
        finally:
            config.per_layer_config = widths
        for layer, own in zip(self.base_model.h, config.per_layer_config, strict=True):
            attention = layer.attn
            attention.num_heads = own.n_head
            attention.split_size = own.n_head * attention.head_dim
            cut(attention.c_attn, outputs=3 * attention.split_size)
            cut(attention.c_proj, inputs=attention.split_size)
            cut(layer.mlp.c_fc, outputs=own.n_inner)
            cut(layer.mlp.c_proj, inputs=own.n_inner)


@strict
class PPNetGPT2Config(GPT2Config):
    model_type = "ppnet_gpt2"

    def validate_architecture(self):
        pass  # kept heads need not divide the width


class PPNetGPT2Model(PerLayerWidths, GPT2Model):
    config_class = PPNetGPT2Config


class PPNetGPT2LMHeadModel(PerLayerWidths, GPT2LMHeadModel):
    config_class = PPNetGPT2Config


PPNetGPT2Config.register_for_auto_class()
PPNetGPT2Model.register_for_auto_class("AutoModel")
PPNetGPT2LMHeadModel.register_for_auto_class("AutoModelForCausalLM")
