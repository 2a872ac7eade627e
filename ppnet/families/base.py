"""The family protocol and its registry.

A family *names tensors*: for each layer it returns sites made of leaves (`ppnet.units`). It never copies a
forward: removing whole units only changes the sizes of linear modules and a few integer attributes, so the upstream
forward keeps working. To add a dense decoder, add an entry to `ppnet.families.decoders`; for what a `Layout` cannot
say, add a file to this folder that registers a `Family`. Discovery, tests, masks, costs and compaction follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ppnet.errors import UnsupportedModelError
from ppnet.units import ORDER, Leaf, Site, Structure, leaf_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """How one group of model types is laid out.

    Attributes:
        name: the family's name.
        model_types: the `config.model_type` values it covers.
        sites: model -> its sites.
        tiny_configs: model type -> config of a tiny random model, for tests.
        per_layer_keys: (site, kept units, dense config) -> the config entries that describe the kept width.
        stock_expressible: (site, dense config) -> whether the stock class can hold fewer units there.
        decoder: whether its models predict the next token. Encoders have no loss of their own, read every sentence
            whole with their tokenizer's special tokens, and do not generate.
        parts: model -> config entries of its shipped class that say which optional parts it has.
        variants: for tests, by a name: entries of a tiny config that change where units are.
        shipped: the stem of its modelling file, ``modeling_ppnet_<stem>.py`` in `ppnet.shipped`; empty: its name.
    """

    name: str
    model_types: tuple[str, ...]
    sites: Callable[[nn.Module], tuple[Site, ...]]
    tiny_configs: Callable[[str], dict[str, Any]]
    per_layer_keys: Callable[[Site, int, Any], Mapping[str, int]]
    stock_expressible: Callable[[Site, Any], bool]
    decoder: bool = True
    parts: Callable[[nn.Module], Mapping[str, Any]] = lambda model: {}
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shipped: str = ""

    @property
    def stem(self) -> str:
        return self.shipped or self.name


# Config of a tiny random decoder, which tests run on.
TINY: dict[str, Any] = {
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

FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Adds a family to the registry: one entry per model type."""
    for model_type in family.model_types:
        FAMILIES[model_type] = family
    return family


def is_decoder(model: Any) -> bool:
    """Whether a model, dense, gated or compacted, predicts the next token; those of unknown families are taken to."""
    import ppnet.families  # noqa: F401  (registers every family of the folder)

    model_type = str(getattr(getattr(model, "config", None), "model_type", None)).removeprefix("ppnet_")
    family = FAMILIES.get(model_type)
    return family is None or family.decoder


def predicts_tokens(model: Any) -> bool:
    """Whether a model has a head that gives logits of tokens (B, T, V): bare models and classifiers have none."""
    head = getattr(model, "get_output_embeddings", None)
    return head is not None and head() is not None


def check_decoder(model: Any, wanted: str) -> None:
    """Refuses an encoder.

    Args:
        wanted: what only decoders have, for the message.

    Raises:
        UnsupportedModelError: the model does not predict the next token.
    """
    if not is_decoder(model):
        raise UnsupportedModelError(
            f"model: a {type(model).__name__} is an encoder, which has no {wanted}; give a causal language model."
        )


def no_attributes(kept: int) -> Mapping[str, int]:
    """For sub-layers whose forward reads widths from tensors alone."""
    return {}


def consecutive(units: int, width: int, start: int = 0) -> Tensor:
    """Index table of units that own `width` consecutive features each: int64 ``(units, width)``."""
    return torch.arange(units * width).view(units, width) + start


def decoder_layers(model: nn.Module, name: str) -> Iterable[Any]:
    """The layers in the list `name`. Their classes are upstream's; a family knows their attributes."""
    return cast(nn.ModuleList, model.get_submodule(name))


def linear_leaf(model: nn.Module, name: str, role: str, index: Tensor, blocks: tuple[int, ...] = ()) -> Leaf:
    """A leaf for an `nn.Linear` or a transformers `Conv1D`.

    Raises:
        UnsupportedModelError: the module is a subclass that computes something else (quantised, LoRA, tensor parallel).
    """
    from transformers.pytorch_utils import Conv1D

    module = model.get_submodule(name)
    produces = role != "out"
    if type(module) is nn.Linear:
        return Leaf(name, index, 0 if produces else 1, role, blocks)
    if type(module) is Conv1D:
        return Leaf(name, index, 1 if produces else 0, role, blocks)
    raise UnsupportedModelError(
        f"model: {name} is a {type(module).__module__}.{type(module).__name__}; only torch.nn.Linear and transformers "
        "Conv1D can be gated. Dequantise the model, or merge adapters first (model = model.merge_and_unload())."
    )


def structure_of(model: nn.Module) -> Structure:
    """Finds the units of a model.

    Raises:
        UnsupportedModelError: no config, an unknown model type, or a model that was already compacted.
    """
    import ppnet.families  # noqa: F401  (registers every family of the folder)

    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise UnsupportedModelError(
            f"model: {type(model).__name__} has no config.model_type; ppnet needs a Hugging Face PreTrainedModel."
        )
    if model_type.startswith("ppnet_"):
        raise UnsupportedModelError(
            f"model: config.model_type is {model_type!r}, so this model was already compacted and its layers have "
            "different widths. Wrap or compact the dense model it came from; a compacted model can be trained as it is."
        )
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModelError(
            f"model: config.model_type {model_type!r} is not supported. Supported: {', '.join(sorted(FAMILIES))}. "
            "ppnet.discover(model) looks for the units of other dense decoders; to add a family for good, add an entry "
            "to ppnet/families/decoders.py."
        )
    if hasattr(model, "peft_config"):
        raise UnsupportedModelError(
            "model: PEFT adapters are attached, and gates placed below them would not gate the adapter path. "
            "Merge them first: model = model.merge_and_unload()."
        )
    sites = family.sites(model)
    embeddings = cast(nn.Embedding, cast("PreTrainedModel", model).get_input_embeddings()).weight
    # Embeddings may be narrower than the layers (OPT-350m), whose width is what the first sub-layer reads.
    first = sites[0].producers[0]
    width = leaf_module(model, first).weight.shape[1 - first.weight_dim]
    return Structure(
        family=family.name,
        model_type=model_type,
        layers=1 + max(site.layer for site in sites),
        width=int(width),
        vocabulary=int(embeddings.shape[0]),
        sites=sites,
        order=str(getattr(config, ORDER, "")),
    )
