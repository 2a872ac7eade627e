"""The model of `bench_speculate.py`: a trained gated Llama, and the same function made wide.

A model that trains here in minutes decodes at the speed of Python, not of memory: its 4 MB of weights stay in the
caches. `widen` therefore gives every hidden dimension, head and neuron `factor` copies (after Net2Net, Chen et al.
2016, arXiv 1511.05641): factor² times the weights, the same logits, and at every size the same predictions. What a
draft of it proposes and what is accepted are the trained model's own; the time is that of a model of factor² times its
parameters.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

import ppnet
from ppnet import PuppetConfig

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
STORIES = SHARED / "data" / "tinystories"
SEPARATOR = "<|endoftext|>"
# Of 1.1 M parameters; written by: python benchmarks/quality elastic --subjects tiny --seeds 1 --runs "retrofit prefix
# log sandwich 3". Three gated passes beside every dense one, with prefix masks: what it predicts at small sizes is
# nearest to what the whole model does, of all runs of that study that were tried as drafts.
TRAINED = ROOT / "build" / "quality" / "elastic-tiny" / "retrofit-prefix-log-sandwich-3-0"


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SHARED / "models" / "stories260K", model_max_length=10**9)


def prompts(count: int, length: int) -> list[Tensor]:
    """The first tokens of held-out stories, int64 ``(1, length)`` each."""
    words, found = tokenizer(), []
    for story in (STORIES / "valid.txt").read_text().split(SEPARATOR):
        ids = [words.bos_token_id, *words(story.strip(), add_special_tokens=False)["input_ids"]][:length]
        if len(ids) == length:
            found.append(torch.tensor([ids]))
    return found[:count]


def widen(model: Any, factor: int, dtype: torch.dtype) -> Any:
    """A gated Llama of the same function with `factor` copies of every hidden dimension, head and neuron.

    Copies of a unit follow one another, so a sorted model stays sorted; a plan in multiples of `factor` keeps all
    copies of a unit or none, and is then the same function as the plan of the model itself.
    """
    config = copy.deepcopy(model.config)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, name, factor * getattr(config, name))
    options = PuppetConfig.from_dict(config.ppnet)
    del config.ppnet
    wide = LlamaForCausalLM(config).to(dtype).eval()
    scores = {site.name: torch.zeros(factor * site.units) for site in model.puppet.structure.sites}
    ppnet.wrap(wide, options, scores=scores)
    state = wide.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            state[name].copy_(widened(name, tensor.double(), state[name].shape, factor, config.head_dim))
    return wide


def widened(name: str, tensor: Tensor, shape: torch.Size, factor: int, head: int) -> Tensor:
    """One tensor with copies along every dimension that the wide model has more of."""
    for dim, (own, wanted) in enumerate(zip(tensor.shape, shape, strict=True)):
        if own == wanted:
            continue
        # Heads are copied whole: the rows of q, k and v, and the columns of o, are those of heads.
        heads = ("q_proj", "k_proj", "v_proj").count(name.split(".")[-2]) if dim == 0 else name.count("o_proj")
        parts = tensor.unflatten(dim, (-1, head if heads else 1))
        tensor = parts.repeat_interleave(factor, dim).flatten(dim, dim + 1)
    summed = "proj.weight" in name  # over the copies of its inputs
    return tensor / factor if summed or name == "model.norm.weight" else tensor
