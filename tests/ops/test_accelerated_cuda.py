"""Accelerated models on the CUDA kernels, emulated and on a GPU: logits and tokens of the plain model, any size."""

from copy import deepcopy

import pytest
import torch
from decoding import FUSED, LAYERS, Calls, pair, step
from helpers import DECODERS, TOLERANCE, generate, tiny, token_ids
from plans import random_plan

from ppnet import accelerate, compact, resize, wrap


def as_exact(ours, own, exact):
    """At most twice torch's own error, against float64: a GPU's products and SDPA sum in orders of their own."""
    error, own_error = ((logits.double() - exact).abs().max() for logits in (ours, own))
    return bool(error <= 2 * own_error + TOLERANCE)


@pytest.mark.parametrize("model_type", DECODERS)
def test_steps(model_type, device):
    plain, model = (each.to(device) for each in pair(model_type))
    for sequences, new in ((2, 1), (1, 3)):
        ids = token_ids(sequences, new + 5).to(device)
        ours, calls = step(model, ids, new)
        assert calls.layers == (LAYERS if model_type in FUSED else 0)
        assert sum(calls.counts.values()) > LAYERS
        assert as_exact(ours, step(plain, ids, new)[0], step(deepcopy(plain).double(), ids, new)[0])


def test_generate(device):
    plain, model = (each.to(device) for each in pair("llama"))
    ids = token_ids(2, 5).to(device)
    padding = torch.ones_like(ids)
    padding[0, :2] = 0
    # On a GPU transformers would compile the plain model for a static cache.
    for options in ({"attention_mask": padding}, {"cache_implementation": "static", "disable_compile": True}):
        with Calls() as calls:
            tokens = generate(model, ids, **options)
        assert torch.equal(tokens, generate(plain, ids, **options)) and calls.layers >= 9 * LAYERS


def test_compacted_and_resized(device):
    dense = tiny("qwen3").to(device)
    small = compact(dense, random_plan(dense))
    ids = token_ids(1, 6).to(device)
    own, exact = step(small, ids)[0], step(deepcopy(small).double(), ids)[0]
    ours, calls = step(accelerate(small), ids)
    assert calls.layers == LAYERS and as_exact(ours, own, exact)
    model = wrap(tiny("llama").to(device))
    resize(model, 0.7)
    own, exact = step(model, ids)[0], step(deepcopy(model).double(), ids)[0]
    ours, calls = step(accelerate(model), ids)
    assert calls.layers == LAYERS and as_exact(ours, own, exact)
