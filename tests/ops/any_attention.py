"""The attention operators' cases of any_input."""

import importlib

import pytest
import torch
from accuracy import EPSILON
from any_input import FLOATING, HALF_OR_FLOAT, LAYOUTS, ROW_LAYOUTS, Case, place, wide

from ppnet import ops

# The package holds the function of this name, so that `import ... as` would give that.
gated_attention_module = importlib.import_module("ppnet.ops.gated_attention")


def attention_mask(inputs, full):
    """None, bool or floating, of any shape that broadcasts to (B, H, T, S)."""
    if inputs.flag():
        return None
    shape = [n if inputs.flag(0.7) else 1 for n in full]
    mask = inputs.floating(tuple(shape[inputs.pick([0, 0, 3]) :]), inputs.pick(FLOATING))
    return mask > 0 if inputs.flag() else mask.nan_to_num(-torch.inf, -torch.inf, -torch.inf)


def attention_size(query, key, value, gate, scale, **others):
    if value.numel() == 0 or query.numel() == 0:
        return query
    width = query.shape[-1]
    scores = query.amax() * key.amax() * width * (width**-0.5 if scale is None else abs(scale))
    return torch.full_like(query, (scores + 8) * value.amax() * (1 if gate is None else gate.amax()))


def gated_attention_decode(inputs):
    batch, tokens, width = inputs.size(3), inputs.size(9), inputs.size()
    kv_heads, per_group = inputs.size(4), inputs.size(5)
    keys = inputs.pick([0, 1, 7, 70, 300, 700])
    dtype = inputs.pick(HALF_OR_FLOAT)
    groups = inputs.index(inputs.size(4), kv_heads) if inputs.flag() else None
    kept = kv_heads if groups is None else len(groups)
    heads = kept * per_group
    mask = attention_mask(inputs, (batch, heads, tokens, keys))
    lengths = torch.randint(keys + 1, (batch,), generator=inputs.generator) if inputs.flag() else None
    window = inputs.pick([None, 1, 5])
    # The reference multiplies what is masked for some queries by 0; NaN behind masks has tests of its own.
    inputs.special &= mask is None and lengths is None and window is None and tokens == 1 and keys > 0
    arguments = {
        "query": inputs.floating((batch, heads, tokens, width), dtype),
        "key": inputs.floating((batch, kv_heads, keys, width), dtype, ROW_LAYOUTS),
        "value": inputs.floating((batch, kv_heads, keys, width), dtype, ROW_LAYOUTS),
        "groups": groups,
        "gate": inputs.maybe((kept,), torch.float32),
        "mask": mask,
        "lengths": lengths,
        "scale": inputs.pick([None, 0.3]),
        "window": window,
    }

    return Case(
        "gated_attention_decode",
        ops.gated_attention_decode,
        ops.gated_attention_decode_ref,
        arguments,
        magnitude=attention_size,
        indices={"groups": [kv_heads], "lengths": [keys + 1]},
    )


def gated_attention_arguments(inputs):
    batch, tokens, width = inputs.size(3), inputs.pick([0, 1, 7, 33, 70]), inputs.size()
    kv_heads, per_group, keys = inputs.size(4), inputs.size(5), inputs.pick([0, 1, 7, 70, 200])
    dtype, heads = inputs.pick(FLOATING), kv_heads * per_group
    mask, is_causal, window = (
        attention_mask(inputs, (batch, heads, tokens, keys)),
        inputs.flag(),
        inputs.pick([None, None, 1, 5]),
    )
    # The reference multiplies what is masked for some queries by 0; NaN behind masks has tests of its own.
    inputs.special &= mask is None and not is_causal and window is None and keys > 0
    return {
        "query": inputs.floating((batch, heads, tokens, width), dtype),
        "key": inputs.floating((batch, kv_heads, keys, width), dtype),
        "value": inputs.floating((batch, kv_heads, keys, width), dtype),
        "gate": inputs.maybe((kv_heads,), wide(dtype)),
        "mask": mask,
        "is_causal": is_causal,
        "scale": inputs.pick([None, 0.3]),
        "window": window,
    }


def on_path(inputs, operator):
    """The operator on one of its paths, whatever the processor and the shapes."""
    path = inputs.pick(["gemm", "sdpa"])

    def run(**arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gated_attention_module, "attention_path", lambda *_: path)
            return operator(**arguments)

    return run


def gated_attention(inputs):
    arguments = gated_attention_arguments(inputs)
    return Case(
        "gated_attention",
        on_path(inputs, ops.gated_attention),
        ops.gated_attention_ref,
        arguments,
        magnitude=attention_size,
        free_roundings=4,
    )


def gated_attention_backward(inputs):
    """The gradients of query, key, value and gate, for one gradient of the output in any layout."""
    arguments, layout = gated_attention_arguments(inputs), inputs.pick(LAYOUTS)
    # The gradient of a gate is a float32 sum of what was rounded to query's dtype.
    coarser = EPSILON.get(arguments["query"].dtype, 1) / EPSILON[torch.float32] / 8

    def gradients(attention):
        def run(**arguments):
            leaves = {
                name: t.detach().requires_grad_()
                for name, t in arguments.items()
                if name in ("query", "key", "value", "gate") and t is not None and t.is_floating_point()
            }
            out = attention(**(arguments | leaves))
            dout = (torch.arange(out.numel()).reshape(out.shape) % 9 - 4).to(out)  # the same in every dtype
            return torch.autograd.grad(out, leaves.values(), place(dout, layout))

        return run

    def sizes(query, key, value, gate, scale, **others):
        """A query's weights add up to 1; the gradient of a score is the difference of terms as large as dweight."""
        if value.numel() == 0 or query.numel() == 0:
            return [torch.zeros_like(t) for t in (query, key, value, gate) if t is not None]
        width, gates = query.shape[-1], 1.0 if gate is None else gate.amax()
        rows, most = query.shape[1] * query.shape[2] / key.shape[1], 4.0  # of dout
        through = most * width * value.amax() * gates * (width**-0.5 if scale is None else abs(scale))
        dquery, dkey = through * key.amax(), rows * through * query.amax()
        dvalue, dgate = rows * most * gates, rows * most * width * value.amax() * coarser
        grown = [(query, dquery), (key, dkey), (value, dvalue)] + ([] if gate is None else [(gate, dgate)])
        return [torch.full_like(t, float(size)) for t, size in grown]

    return Case(
        "gated_attention",
        on_path(inputs, gradients(ops.gated_attention)),
        gradients(ops.gated_attention_ref),
        arguments,
        magnitude=sizes,
        free_roundings=4,
    )
