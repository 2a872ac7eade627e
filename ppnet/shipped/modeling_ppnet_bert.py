"""BERT whose layers have different numbers of heads and MLP neurons.

Written beside the weights by ppnet. It needs torch and transformers >= 5.14 and nothing else. Stock transformers
reads one width for all layers; these classes build the stock model and then cut each layer's linear modules to the
widths of `config.per_layer_config[layer]`: `num_attention_heads` and `intermediate_size`. The head width stays
hidden_size / num_attention_heads of the global config. The stock forward runs unchanged, and every module keeps
pointing at the one shared config.
"""

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)


def cut(linear: nn.Linear, outputs: int | None = None, inputs: int | None = None) -> None:
    """Keeps the first output and input features of a linear module, in place; None keeps all."""
    linear.weight = nn.Parameter(linear.weight.detach()[:outputs, :inputs].clone())
    linear.bias = nn.Parameter(linear.bias.detach()[:outputs].clone())
    linear.out_features, linear.in_features = linear.weight.shape


class PerLayerWidths:
    """Mixin before a stock model class: builds it at its global widths, then cuts every layer to its own."""

    def __init__(self, config, **kwargs):
        widths = config.to_dict().get("per_layer_config")
        config.per_layer_config = None  # stock constructors read one width, and a per-layer one raises when read
        try:
            super().__init__(config, **kwargs)
        finally:
            config.per_layer_config = widths
        for layer, own in zip(self.base_model.encoder.layer, config.per_layer_config, strict=True):
            attention = layer.attention.self
            attention.num_attention_heads = own.num_attention_heads
            attention.all_head_size = own.num_attention_heads * attention.attention_head_size
            for projection in (attention.query, attention.key, attention.value):
                cut(projection, outputs=attention.all_head_size)
            cut(layer.attention.output.dense, inputs=attention.all_head_size)
            cut(layer.intermediate.dense, outputs=own.intermediate_size)
            cut(layer.output.dense, inputs=own.intermediate_size)


@strict
class PPNetBertConfig(BertConfig):
    model_type = "ppnet_bert"

    def validate_architecture(self):
        pass  # kept heads need not divide the width


class PPNetBertModel(PerLayerWidths, BertModel):
    config_class = PPNetBertConfig

    def __init__(self, config, add_pooling_layer=None):
        if add_pooling_layer is None:
            add_pooling_layer = getattr(config, "add_pooling_layer", True)
        super().__init__(config, add_pooling_layer=add_pooling_layer)


class PPNetBertForMaskedLM(PerLayerWidths, BertForMaskedLM):
    config_class = PPNetBertConfig


class PPNetBertForSequenceClassification(PerLayerWidths, BertForSequenceClassification):
    config_class = PPNetBertConfig


class PPNetBertForTokenClassification(PerLayerWidths, BertForTokenClassification):
    config_class = PPNetBertConfig


class PPNetBertForQuestionAnswering(PerLayerWidths, BertForQuestionAnswering):
    config_class = PPNetBertConfig


PPNetBertConfig.register_for_auto_class()
PPNetBertModel.register_for_auto_class("AutoModel")
PPNetBertForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
PPNetBertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
PPNetBertForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
PPNetBertForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
