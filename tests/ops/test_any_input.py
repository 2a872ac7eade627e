"""Any shape, dtype, layout, index or value at every operator: the reference's result, or an error that says why."""

import math

import pytest
import torch
from any_attention import gated_attention, gated_attention_backward, gated_attention_decode
from any_input import FLOATING, HALF_OR_FLOAT, LAYOUTS, ROW_LAYOUTS, Case, Inputs, attempt, spoil, wide
from any_layer import attend_mlp_decode, qkv_decode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

import ppnet.extension as extension
from ppnet import ops
from ppnet.ops.gated_act import ACTS
from ppnet.ops.row_norms import row_norms_backward_ref

pytestmark = pytest.mark.skipif(not extension.available(), reason="plain torch names neither operator nor argument")


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


def gated_mlp_fused(inputs):
    """On the CPU the library's; what fits the kernels of GPUs is drawn, and emulated in test_gated_mlp_fused.py."""
    dtype, f, d = inputs.pick(FLOATING[1:3]), inputs.size(), inputs.size()
    arguments = {"x": inputs.floating((*leading(inputs), d), dtype)}
    arguments |= mlp_arguments(inputs, dtype, f, d, ROW_LAYOUTS, False)
    return Case(
        "gated_mlp_fused",
        ops.gated_mlp_fused,
        ops.gated_mlp_fused_ref,
        arguments,
        magnitude=mlp_size,
        underflows=True,
        operators=("gated_mlp", "gated_act", "gather_rows"),
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


def linears_decode(inputs):
    dtype, d = inputs.pick(HALF_OR_FLOAT), inputs.size()
    arguments, rows = {"x": inputs.floating((inputs.size(8), d), dtype), "weight": [], "bias": [], "idx": []}, []
    for _ in range(inputs.draw(st.integers(0, 4))):
        f = inputs.size()
        arguments["weight"].append(inputs.floating((f, d), dtype, ROW_LAYOUTS))
        arguments["bias"].append(inputs.maybe((f,), dtype))
        arguments["idx"].append(inputs.index(inputs.size(), f) if inputs.flag() else None)
        rows.append(f)
    return Case(
        "linears_decode",
        ops.linears_decode,
        ops.linears_decode_ref,
        arguments,
        magnitude=ops.linears_decode_ref,
        indices={"idx": rows},
    )


def rms_norm(inputs):
    inputs.infinite = False  # whether infinity over infinity or the overflow of the squares is seen first is open
    shape, dtype = (*leading(inputs), inputs.size()), inputs.pick(HALF_OR_FLOAT)
    arguments = {"x": inputs.floating(shape, dtype), "weight": inputs.floating(shape[-1:], dtype)}
    arguments["eps"] = inputs.pick([1e-5, 1e-2])
    return Case("rms_norm", ops.rms_norm, ops.rms_norm_ref, arguments, rounds_between=True)


def rotary(inputs):
    batch, tokens, width, dtype = inputs.size(3), inputs.size(9), 2 * inputs.size(40), inputs.pick(HALF_OR_FLOAT)
    angles = (inputs.pick([1, batch]), tokens, width)
    return Case(
        "rotary",
        ops.rotary,
        ops.rotary_ref,
        {
            "query": inputs.floating((batch, inputs.size(5), tokens, width), dtype),
            "key": inputs.floating((batch, inputs.size(5), tokens, width), dtype),
            "cos": inputs.floating(angles, dtype),
            "sin": inputs.floating(angles, dtype),
        },
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


OPERATORS = (
    gather_rows, scatter_rows, row_norms, row_norms_backward, gated_act, gated_act_backward, gated_mlp, gated_mlp_fused,
    linear, linear_decode, linears_decode, linear_t_decode, rms_norm, rotary, gated_mlp_decode, gated_attention_decode,
    gated_attention, gated_attention_backward, qkv_decode, attend_mlp_decode,
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
