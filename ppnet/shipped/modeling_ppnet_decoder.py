"""Decoders whose layers have different numbers of heads and MLP neurons.

Written beside the weights by ppnet. It needs torch and transformers >= 5.14 and nothing else. Stock transformers
reads one width for all layers; these classes build the stock model and then cut each layer's linear modules to the
widths of `config.per_layer_config[layer]`. Which modules these are says `config.ppnet_layout`. The stock forward runs
unchanged, and every module keeps pointing at the one shared config.

`PPNet<Name>` of this file is that class for the model or config class `<Name>` of transformers.
"""

import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

PREFIX = "PPNet"


class LayerConfig:
    """A config some of whose entries are one layer's own; all others are those of the shared one."""

    def __init__(self, shared, own):
        self.__dict__.update(own, _shared=shared)

    def __getattr__(self, name):
        if name == "_shared" or name.startswith("__"):  # a copy that is being made
            raise AttributeError(name)
        return getattr(self._shared, name)


def cut(module, outputs=None, inputs=None):
    """Keeps the first output and input features of a linear module or Conv1D, in place; None keeps all."""
    if isinstance(module, Conv1D):  # stored (in, out)
        module.weight = nn.Parameter(module.weight.detach()[:inputs, :outputs].clone())
        module.nx, module.nf = module.weight.shape
    else:
        module.weight = nn.Parameter(module.weight.detach()[:outputs, :inputs].clone())
        module.out_features, module.in_features = module.weight.shape
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach()[:outputs].clone())


def cut_norm(norm, features):
    """Keeps the first features of a norm over all heads, whose mean square is of these only."""
    norm.variance_epsilon *= len(norm.weight) / features
    norm.weight = nn.Parameter(norm.weight.detach()[:features].clone())


def set_number(layer, name, value, config):
    """Sets an attribute of a module of a layer, or (`<module>.config.<entry>`) what its config says."""
    owner, _, attribute = name.rpartition(".")
    if owner.endswith(".config"):
        module = layer.get_submodule(owner.removesuffix(".config"))
        module.config = LayerConfig(config, {attribute: value})
    else:
        setattr(layer.get_submodule(owner), attribute, value)


class PerLayerWidths:
    """Mixin before a stock model class: builds it at its global widths, then cuts every layer to its own."""

    def __init__(self, config, *args, **kwargs):
        widths = config.to_dict().get("per_layer_config")
        config.per_layer_config = None  # stock constructors read one width, and a per-layer one raises when read
        try:
            super().__init__(config, *args, **kwargs)
        finally:
            config.per_layer_config = widths
        layout = config.ppnet_layout
        layers = self.base_model.get_submodule(layout["layers"])
        for layer, own in zip(layers, config.per_layer_config, strict=True):
            heads = getattr(own, layout["entries"]["heads"])
            kv_heads = heads // layout["queries_per_kv_head"]
            width = config.head_dim
            numbers = {"heads": heads, "kv_heads": kv_heads, "features": heads * width}
            features = {"heads": heads * width, "kv_heads": kv_heads * width}
            features["neurons"] = getattr(own, layout["entries"]["neurons"])
            for name, parts in layout["outputs"].items():
                cut(layer.get_submodule(name), outputs=sum(features[part] for part in parts))
            for name, part in layout["inputs"].items():
                cut(layer.get_submodule(name), inputs=features[part])
            for name, part in layout["norms"].items():
                cut_norm(layer.get_submodule(name), features[part])
            for name, what in layout["attributes"].items():
                set_number(layer, name, numbers[what], config)


def any_head_count(self):
    """In the place of a check that the number of heads divides the width, which it need not."""


def of_global_widths(check):
    """A config's check that may read the one width that there was before, where that of every layer is its own."""

    def run(self):
        allowed = self.allow_global_per_layer_attribute_access
        self.allow_global_per_layer_attribute_access = True
        try:
            check(self)
        finally:
            self.allow_global_per_layer_attribute_access = allowed

    return run


def config_class(name, stock):
    body = {check: of_global_widths(getattr(stock, check)) for check in dir(stock) if check.startswith("validate_")}
    body |= {
        "__module__": __name__,
        "__doc__": stock.__doc__,
        "model_type": f"ppnet_{stock.model_type}",
        "validate_architecture": any_head_count,
    }
    made = strict(type(name, (stock,), body))
    made.register_for_auto_class()
    return made


def model_class(name, stock):
    config = __getattr__(PREFIX + stock.config_class.__name__)
    body = {"__module__": __name__, "__doc__": stock.__doc__, "config_class": config}
    made = type(name, (PerLayerWidths, stock), body)
    made.register_for_auto_class("AutoModelForCausalLM" if issubclass(stock, GenerationMixin) else "AutoModel")
    return made


def __getattr__(name):
    """Makes the class `PPNet<Name>` when it is first asked for."""
    if name in globals():
        return globals()[name]
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not isinstance(stock, type) or not issubclass(stock, (PreTrainedConfig, PreTrainedModel)):
        raise AttributeError(f"{__name__} has no {name}")
    make = config_class if issubclass(stock, PreTrainedConfig) else model_class
    globals()[name] = make(name, stock)
    return globals()[name]
