"""Shared by the tests of scores: data with rewards, permuted models, gate gradients from plain autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from helpers import GatedReference, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ppnet.families import structure_of
from ppnet.units import Site

WORDS = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *"abcdefghij"])}
TEXT = " ".join("abcdefghij"[(i * i + i // 7) % 10] for i in range(300))
IDS = token_ids(batch=4, length=12)
REWARDED = {"input_ids": IDS, "rewards": [1.0, 0.0, 0.5, 0.25], "groups": [0, 0, 1, 1]}
DATA_METHODS = ("activation", "bias", "kl", "mama", "movement", "obs", "reward", "taylor")
METHODS = (*DATA_METHODS, "magnitude")


def words(add_bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of ten words and three special tokens."""
    tokenizer: Any = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


def options_of(method: str) -> dict[str, Any]:
    return {"weights": {"reward": 1.0}} if method == "mama" else {}


def likelihoods(model: nn.Module, ids: Tensor) -> Tensor:
    """log p of every predicted token: (B, T - 1)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def autograd_gates(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """d NLL_b / dm_u of every sequence by plain autograd through gates of ones: site name -> (B, U)."""
    structure = structure_of(model)
    gates = torch.ones(structure.total_units, dtype=torch.float64, requires_grad=True)
    rows = []
    with GatedReference(model, structure, gates):
        for sequence in ids:
            (row,) = torch.autograd.grad(-likelihoods(model, sequence[None]).sum(), gates, retain_graph=True)
            rows.append(row)
    units = [site.units for site in structure.sites]
    return dict(zip((s.name for s in structure.sites), torch.stack(rows).split(units, dim=1), strict=True))


@torch.no_grad()
def permute(model: nn.Module, site: Site, order: Tensor) -> None:
    """Puts unit ``order[u]`` in the place of unit u. The function stays the same."""
    everyone = torch.arange(site.units)
    for leaf in site.leaves:
        module: Any = model.get_submodule(leaf.name)
        target, source = leaf.features(everyone), leaf.features(order)
        tensors = [(module.weight, leaf.weight_dim)]
        if leaf.role != "out" and module.bias is not None:
            tensors.append((module.bias, 0))
        for tensor, dim in tensors:
            tensor.index_copy_(dim, target, tensor.index_select(dim, source))
