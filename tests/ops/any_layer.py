"""The decoder layer's operators in any_input: shapes, layouts and errors; test_decoder_layer measures accuracy."""

import torch
from any_input import HALF_OR_FLOAT, ROW_LAYOUTS, Case, place

from ppnet import ops
from ppnet.ops.gated_act import ACTS

COARSE = 1e4  # of the sums: what a wrong row or lane exceeds, and roundings between norms never do


def sequences(inputs):
    """(B, T) of at most 8 tokens."""
    batch = inputs.size(4)
    return batch, inputs.size(8 // max(batch, 1))


def by_unit(inputs, features, units, dtype):
    return inputs.floating((units, features), dtype, ROW_LAYOUTS).t()


def coarse(reference):
    def sizes(**arguments):
        y = reference(**arguments)
        return torch.full_like(y, COARSE) if isinstance(y, torch.Tensor) else [torch.full_like(t, COARSE) for t in y]

    return sizes


def qkv_decode(inputs):
    inputs.special = False  # norms spread it over all results
    (batch, tokens), d, dtype = sequences(inputs), inputs.size(), inputs.pick(HALF_OR_FLOAT)
    width, heads, groups = 2 * max(inputs.size(20), 1), inputs.size(5), inputs.size(3)
    rows = [n * width for n in (heads, groups, groups)]
    angles = (inputs.pick([1, batch]), tokens, width)
    arguments = {
        "x": inputs.floating((batch, tokens, d), dtype),
        "norm": inputs.floating((d,), dtype),
        "eps": inputs.pick([1e-5, 1e-2]),
        "weight": [inputs.floating((n, d), dtype, ROW_LAYOUTS) for n in rows],
        "bias": [inputs.maybe((n,), dtype) for n in rows],
        "cos": inputs.floating(angles, dtype),
        "sin": inputs.floating(angles, dtype),
        "idx": [inputs.index(n, n) if inputs.flag() else None for n in rows],
        "q_norm": inputs.maybe((width,), dtype),
        "k_norm": inputs.maybe((width,), dtype),
    }
    return Case(
        "qkv_decode",
        ops.qkv_decode,
        ops.qkv_decode_ref,
        arguments,
        magnitude=coarse(ops.qkv_decode_ref),
        rounds_between=True,
        indices={"idx": rows},
    )


def attend_mlp_decode(inputs):
    inputs.special = False
    (batch, tokens), d, dtype = sequences(inputs), inputs.size(), inputs.pick(HALF_OR_FLOAT)
    width, groups, keys, n = inputs.size(), inputs.size(3), inputs.pick([0, 1, 7, 70, 600]), inputs.size()
    heads = groups * inputs.size(4)
    features, gated = heads * width, inputs.flag()
    idx = inputs.index(inputs.size(), n) if inputs.flag() else None
    arguments = {
        "residual": inputs.floating((batch, tokens, d), dtype),
        "query": inputs.floating((batch, heads, tokens, width), dtype),
        "key": inputs.floating((batch, groups, keys, width), dtype, ROW_LAYOUTS),
        "value": inputs.floating((batch, groups, keys, width), dtype, ROW_LAYOUTS),
        "out": by_unit(inputs, d, features, dtype),
        "norm": inputs.floating((d,), dtype),
        "eps": inputs.pick([1e-5, 1e-2]),
        "up": inputs.floating((n, d), dtype, ROW_LAYOUTS),
        "down": by_unit(inputs, d, n, dtype),
        "gate": inputs.floating((n, d), dtype, ROW_LAYOUTS) if gated else None,
        "mask": place(torch.rand(tokens, keys, generator=inputs.generator) > 0.3, "stepped") if inputs.flag() else None,
        "scale": inputs.pick([None, 0.3]),
        "out_bias": inputs.maybe((d,), dtype),
        "out_idx": inputs.index(features, features) if inputs.flag() else None,
        "out_z": inputs.maybe((features,), torch.float32),
        "up_bias": inputs.maybe((n,), dtype),
        "gate_bias": inputs.maybe((n,), dtype) if gated else None,
        "down_bias": inputs.maybe((d,), dtype),
        "idx": idx,
        "z": inputs.maybe((n if idx is None else len(idx),), torch.float32),
        "act": inputs.pick(ACTS),
    }
    return Case(
        "attend_mlp_decode",
        ops.attend_mlp_decode,
        ops.attend_mlp_decode_ref,
        arguments,
        magnitude=coarse(ops.attend_mlp_decode_ref),
        rounds_between=True,
        indices={"idx": [n], "out_idx": [features]},
    )
