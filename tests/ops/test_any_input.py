"""Any shape, dtype, layout, index or value at every operator: the reference's result, or an error that says why."""

import importlib
import math

import pytest
import torch
from accuracy import EPSILON
from any_input import FLOATING, LAYOUTS, ROW_LAYOUTS, Case, Inputs, attempt, place, spoil
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

import ppnet.extension as extension
from ppnet import ops
from ppnet.ops.gated_act import ACTS
from ppnet.ops.row_norms import row_norms_backward_ref

pytestmark = pytest.mark.skipif(not extension.available(), reason="plain torch names neither operator nor argument")
HALF_OR_FLOAT = FLOATING[:3]
# The package holds the function of this name, so that `import ... as` would give that.
gated_attention_module = importlib.import_module("ppnet.ops.gated_attention")


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def matrix_of(f, d, dim, vector):
    return (f,) if vector else (f, d) if dim == 0 else (d, f)


def items(inputs):
    """(units F, features D, dim, whether (F,), dtype) of up to three tensors."""
    for _ in range(inputs.draw(st.integers(0, 3))):
        vector = inputs.flag(0.2)
        yield inputs.size(), inputs.size(), 0 if vector else inputs.pick([0, 1]), vector, inputs.pick(FLOATING)


def gather_rows(inputs):
    arguments, counts = {"src": [], "idx": [], "scale": [], "dim": []}, []
    for f, d, dim, vector, dtype in items(inputs):
        idx = inputs.index(inputs.size(), f)
        arguments["src"].append(inputs.floating(matrix_of(f, d, dim, vector), dtype))
        arguments["idx"].append(idx)
        arguments["scale"].append(inputs.maybe(idx.shape, wide(dtype)) if len(idx) else None)
        arguments["dim"].append(dim)
        counts.append(f)
    return Case(
        "gather_rows", ops.gather_rows, ops.gather_rows_ref, arguments, exact=lambda i: True, indices={"idx": counts}
    )


def scatter_rows(inputs):
    arguments, counts = {"grad": [], "idx": [], "scale": [], "dim": [], "size": [], "weight": []}, []
    for f, d, dim, vector, dtype in items(inputs):
        idx = inputs.index(inputs.size(), f, unique=True)
        k = len(idx)
        arguments["grad"].append(inputs.floating(matrix_of(k, d, dim, vector), dtype))
        arguments["idx"].append(idx)
        arguments["scale"].append(inputs.maybe((k,), wide(dtype)) if k else None)
        arguments["dim"].append(dim)
        weight = inputs.maybe(matrix_of(f, d, dim, vector), dtype) if f else None
        arguments["weight"].append(weight)
        arguments["size"].append(0 if weight is not None and inputs.flag(0.2) else f)
        counts.append(f)
    n = len(counts)
    return Case(
        "scatter_rows",
        ops.scatter_rows,
        ops.scatter_rows_ref,
        arguments,
        exact=lambda i: i < n,
        magnitude=ops.scatter_rows_ref,
        indices={"idx": counts},
    )


def row_norms(inputs):
    arguments = {"weight": [], "input_scale": [], "dim": []}
    for f, d, dim, vector, dtype in items(inputs):
        arguments["weight"].append(inputs.floating(matrix_of(f, d, dim, vector), dtype))
        arguments["input_scale"].append(None if vector or d == 0 else inputs.maybe((d,), wide(dtype)))
        arguments["dim"].append(dim)
    return Case("row_norms", ops.row_norms, ops.row_norms_ref, arguments)


def row_norms_backward(inputs):
    case = row_norms(inputs)
    weight, dim = case.arguments["weight"], case.arguments["dim"]
    units = [(w.shape[d],) for w, d in zip(weight, dim, strict=True)]
    norm = [inputs.floating(n, wide(w.dtype)).abs() for n, w in zip(units, weight, strict=True)]
    grad = [inputs.floating(n, wide(w.dtype)) for n, w in zip(units, weight, strict=True)]
    arguments = {"grad": grad, "norm": norm, **case.arguments}
    arguments |= {"needs_weight": inputs.flag(0.8), "needs_scale": inputs.flag(0.8)}

    def call(input_scale, **others):
        scales = [torch.empty(0) if s is None else s for s in input_scale]
        return torch.ops.ppnet.row_norms_backward(input_scale=scales, **others)

    def reference(input_scale, **others):  # an empty scale is none, also where it takes the place of one
        scales = [s if s is not None and s.numel() else None for s in input_scale]
        return row_norms_backward_ref(input_scale=scales, **others)

    return Case("row_norms_backward", call, reference, arguments, magnitude=reference)


def leading(inputs):
    return tuple(inputs.size(9) for _ in range(inputs.draw(st.integers(0, 3))))


def act_size(up, gate=None, z=None, act="silu"):
    """Of gated_act's terms: its activations are at most their argument in size, relu2 its square."""
    first = up if gate is None else gate
    h = first * (first if act == "relu2" else 1) * (1 if gate is None else up)
    return h if z is None else h * z


def gated_act_arguments(inputs, acts=ACTS):
    act = inputs.pick(acts)
    shape, dtype = (*leading(inputs), inputs.size()), inputs.pick(FLOATING)
    return {
        "up": inputs.floating(shape, dtype),
        "gate": inputs.maybe(shape, dtype),
        "z": inputs.maybe(shape[-1:], wide(dtype)),
        "act": act,
    }


def gated_act(inputs):
    return Case("gated_act", ops.gated_act, ops.gated_act_ref, gated_act_arguments(inputs), magnitude=act_size)


def gated_act_backward(inputs):
    # Where relu's slope is 0 torch selects, and the kernels multiply: 0 times NaN is NaN.
    arguments = gated_act_arguments(inputs, [act for act in ACTS if not (inputs.special and act == "relu")])
    arguments["dh"] = inputs.floating(arguments["up"].shape, arguments["up"].dtype)
    arguments |= {name: inputs.flag(0.8) for name in ("need_up", "need_gate", "need_z")}

    # 16-bit inputs go through shorter polynomials, of a relative error of 1e-5; dz is float32 all the same.
    short = 128 if arguments["up"].dtype in (torch.bfloat16, torch.float16) else 1

    def sizes(dh, up, gate, z, act, need_up, need_gate, need_z):
        first, through = up if gate is None else gate, dh if z is None else dh * z
        slope = through * (first + 2) * (1 if gate is None else up)
        dup = (slope if gate is None else act_size(through * up, gate, None, act)) if need_up else up.new_empty(0)
        dgate = slope if need_gate and gate is not None else up.new_empty(0)
        dz = (
            (short * dh * act_size(up, gate, None, act)).reshape(math.prod(up.shape[:-1]), up.shape[-1]).sum(0)
            if need_z
            else up.new_empty(0)
        )
        return dup, dgate, dz

    return Case(
        "gated_act_backward",
        ops.gated_act_backward,
        ops.gated_act_backward_ref,
        arguments,
        magnitude=sizes,
    )


def mlp_arguments(inputs, dtype, f, d, layouts, idx_unique):
    idx = inputs.index(inputs.size(), f, idx_unique) if inputs.flag() else None
    gated = inputs.flag()
    return {
        "up": inputs.floating((f, d), dtype, layouts),
        "down": inputs.floating((f, d), dtype, layouts),
        "gate": inputs.floating((f, d), dtype, layouts) if gated else None,
        "up_bias": inputs.maybe((f,), dtype),
        "gate_bias": inputs.maybe((f,), dtype) if gated else None,
        "down_bias": inputs.maybe((d,), dtype),
        "idx": idx,
        "z": inputs.maybe((f if idx is None else len(idx),), wide(dtype)),
        "act": inputs.pick(ACTS),
    }


def mlp_size(x, up, down, gate=None, *, up_bias, gate_bias, down_bias, idx, z, act):
    def kept(t):
        return t if t is None or idx is None else t.index_select(0, idx)

    u = functional.linear(x, kept(up), kept(up_bias))
    g = None if gate is None else functional.linear(x, kept(gate), kept(gate_bias))
    return functional.linear(act_size(u, g, z, act), kept(down).t(), down_bias)


def gated_mlp(inputs):
    dtype, f, d = inputs.pick(FLOATING), inputs.size(), inputs.size()
    arguments = {"x": inputs.floating((*leading(inputs), d), dtype)} | mlp_arguments(inputs, dtype, f, d, LAYOUTS, True)
    composed = ("gated_act", "gather_rows")
    return Case(
        "gated_mlp",
        ops.gated_mlp,
        ops.gated_mlp_ref,
        arguments,
        magnitude=mlp_size,
        underflows=True,
        operators=composed,
        rounds_between=True,
        indices={"idx": [f]},
    )


def gated_mlp_decode(inputs):
    dtype, f, d = inputs.pick(HALF_OR_FLOAT), inputs.size(), inputs.size()
    arguments = {"x": inputs.floating((inputs.size(8), d), dtype)}
    arguments |= mlp_arguments(inputs, dtype, f, d, ROW_LAYOUTS, False)
    return Case(
        "gated_mlp_decode",
        ops.gated_mlp_decode,
        ops.gated_mlp_decode_ref,
        arguments,
        magnitude=mlp_size,
        underflows=True,
        indices={"idx": [f]},
    )


def linear(inputs):
    dtype, f, d = inputs.pick(FLOATING), inputs.size(), inputs.size()
    arguments = {
        "x": inputs.floating((*leading(inputs), d), dtype),
        "weight": inputs.floating((f, d), dtype),
        "bias": inputs.maybe((f,), dtype),
    }
    return Case("linear", ops.linear, ops.linear_ref, arguments, magnitude=ops.linear_ref, is_torchs=True)


def linear_decode(inputs):
    dtype, f, d = inputs.pick(HALF_OR_FLOAT), inputs.size(), inputs.size()
    arguments = {
        "x": inputs.floating((inputs.size(8), d), dtype),
        "weight": inputs.floating((f, d), dtype, ROW_LAYOUTS),
        "bias": inputs.maybe((f,), dtype),
        "idx": inputs.index(inputs.size(), f) if inputs.flag() else None,
    }
    return Case(
        "linear_decode",
        ops.linear_decode,
        ops.linear_decode_ref,
        arguments,
        magnitude=ops.linear_decode_ref,
        indices={"idx": [f]},
    )


def linear_t_decode(inputs):
    dtype, f, d = inputs.pick(HALF_OR_FLOAT), inputs.size(), inputs.size()
    idx = inputs.index(inputs.size(), f) if inputs.flag() else None
    k = f if idx is None else len(idx)
    arguments = {
        "x": inputs.floating((inputs.size(8), k), dtype),
        "weight": inputs.floating((f, d), dtype, ROW_LAYOUTS),
        "bias": inputs.maybe((d,), dtype),
        "idx": idx,
        "z": inputs.maybe((k,), torch.float32),
    }
    return Case(
        "linear_t_decode",
        ops.linear_t_decode,
        ops.linear_t_decode_ref,
        arguments,
        magnitude=ops.linear_t_decode_ref,
        indices={"idx": [f]},
    )


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


OPERATORS = (
    gather_rows, scatter_rows, row_norms, row_norms_backward, gated_act, gated_act_backward, gated_mlp, linear,
    linear_decode, linear_t_decode, gated_mlp_decode, gated_attention_decode, gated_attention, gated_attention_backward,
)  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda function: function.__name__)
@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_any_input(operator, data):
    inputs = Inputs(data)
    case = operator(inputs)
    spoils = inputs.pick([0, 0, 1, 1, 2])
    for _ in range(spoils):
        spoil(case, inputs)
    extension.set_isa(inputs.pick(extension.supported_isas()))
    try:
        attempt(case, spoils > 0)
    finally:
        extension.set_isa("auto")
