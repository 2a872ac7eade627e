"""Decoding steps of accelerated models, and the operators that they call; shared by the tests of fused layers."""

from __future__ import annotations

from collections import Counter

import torch
from helpers import TOLERANCE, tiny, token_ids
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from ppnet import accelerate

FUSED = ["llama", "mistral", "qwen2", "qwen3"]
LAYERS = 3


class Calls(TorchDispatchMode):
    """Counts the calls of ppnet's operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ppnet":
            self.counts[function._schema.name.removeprefix("ppnet::")] += 1
        return function(*args, **(kwargs or {}))

    @property
    def layers(self):
        """How many layers ran as two operators."""
        assert self.counts["qkv_decode"] == self.counts["attend_mlp_decode"]
        return self.counts["qkv_decode"]


def step(model, ids=None, new=1, cache=None, mask=None):
    """Logits of `new` tokens per sequence after the others are in the cache, and the operators that gave them."""
    ids = token_ids(2, 6) if ids is None else ids
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        before = None if mask is None else mask[:, :-new]
        model(ids[:, :-new], past_key_values=cache, use_cache=True, attention_mask=before)
        with Calls() as calls:
            out = model(ids[:, -new:], past_key_values=cache, use_cache=True, attention_mask=mask).logits
    return out, calls


def same(ours, own, factor=1.0):
    return bool((ours - own).abs().max() <= factor * TOLERANCE)


def pair(model_type="llama", **changes):
    """The same model twice, the second accelerated."""
    return tiny(model_type, **changes), accelerate(tiny(model_type, **changes))


def twice(module, args, output):
    """A forward hook."""
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output
