"""qkv_decode and attend_mlp_decode of the CUDA kernels, emulated and on a GPU: float64, bits of their parts, errors."""

import emulated
import pytest
import torch
from accuracy import assert_as_accurate
from layers import SHAPES, attend, by_unit, qkv

from ppnet import ops
from ppnet.ops import attend_mlp_decode, attend_mlp_decode_ref, qkv_decode, qkv_decode_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def to(device, value):
    """A copy of any argument on a device, laid out as it was."""
    if isinstance(value, dict):
        return {name: to(device, each) for name, each in value.items()}
    if isinstance(value, list):
        return [to(device, each) for each in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def wide(value):
    if isinstance(value, list):
        return [wide(each) for each in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check(operator, reference, arguments, device):
    found = operator(**to(device, arguments))
    exact = reference(**{name: wide(value) for name, value in arguments.items()})
    own = reference(**arguments)
    parts = [[y] if isinstance(y, torch.Tensor) else y for y in (found, own, exact)]
    for ours, theirs, truth in zip(*parts, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        if ours.numel() >= 12:  # fewer roundings may be lucky not to matter
            assert_as_accurate(ours.cpu(), theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, device):
    for kept in ("all", "none", "odd"):
        check(qkv_decode, qkv_decode_ref, qkv(*shape, dtype, kept, True, kept != "all"), device)
        options = {"bias": True, "z": True, "act": "gelu"} if kept == "odd" else {"gated": kept == "all"}
        check(attend_mlp_decode, attend_mlp_decode_ref, attend(*shape, dtype, kept=kept, **options), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_its_operators_one_after_the_other(dtype, device):
    """To the bit; the second operator with zeros for what it would have added to the residual before rounding."""
    shape = SHAPES[2]
    batch, tokens, features, _, _, width = shape
    a = to(device, qkv(*shape, dtype, "odd", True, True))
    normed = ops.rms_norm(a["x"], a["norm"], a["eps"]).view(-1, features)
    outputs = ops.linears_decode(normed, a["weight"], a["bias"], idx=a["idx"])
    query, key, value = (y.view(batch, tokens, -1, width) for y in outputs)
    query, key = ops.rms_norm(query, a["q_norm"], a["eps"]), ops.rms_norm(key, a["k_norm"], a["eps"])
    expected = *ops.rotary(query.transpose(1, 2), key.transpose(1, 2), a["cos"], a["sin"]), value.transpose(1, 2)
    for one, other in zip(qkv_decode(**a), expected, strict=True):
        assert torch.equal(one, other)
    b = to(device, attend(*shape, dtype, kept="odd", bias=True, z=True, mask=torch.rand(2, 1, 3, 37) > 0.3))
    zero = torch.zeros_like(b["residual"])
    no_mlp = {"down": by_unit(torch.zeros_like(b["down"])), "down_bias": torch.zeros_like(b["down_bias"])}
    attended = ops.gated_attention_decode(b["query"], b["key"], b["value"], mask=b["mask"])
    flat = attended.transpose(1, 2).reshape(batch * tokens, -1)
    out = ops.linear_t_decode(flat, b["out"].t(), b["out_bias"], idx=b["out_idx"], z=b["out_z"])
    assert torch.equal(attend_mlp_decode(**b | no_mlp | {"residual": zero}), out.view_as(zero))
    no_attention = {"out": by_unit(torch.zeros_like(b["out"])), "out_bias": torch.zeros_like(b["out_bias"])}
    nothing = b | no_attention | no_mlp
    assert torch.equal(attend_mlp_decode(**nothing), b["residual"])


def test_garbage_in_what_is_dropped(device):
    first, second = qkv(*SHAPES[2], torch.float32, "odd"), attend(*SHAPES[2], torch.float32, kept="odd")
    for weight, idx in zip(first["weight"], first["idx"], strict=True):
        weight[[i for i in range(len(weight)) if i not in idx]] = torch.nan
    second["out"][:, [i for i in range(48) if i not in second["out_idx"]]] = torch.nan
    for name in ("up", "gate"):
        second[name][[i for i in range(41) if i not in second["idx"]]] = torch.nan
    second["down"][:, [i for i in range(41) if i not in second["idx"]]] = torch.nan
    assert not any(y.isnan().any() for y in qkv_decode(**to(device, first)))
    assert not attend_mlp_decode(**to(device, second)).isnan().any()


WRONG = [
    ("x", torch.zeros(3, 3, 172)),
    ("norm", torch.zeros(3)),
    ("weight", [torch.zeros(8, 172)] * 2),
    ("cos", torch.zeros(1, 3, 7)),
    ("residual", torch.zeros(2, 3, 172).bfloat16()),
    ("out", torch.zeros(172, 48)),
    ("down", torch.zeros(3, 3)),
    ("query", torch.zeros(2, 6, 2, 8)),
]


@emulated.needs_emulator
@pytest.mark.parametrize(("name", "value"), WRONG, ids=[name for name, _ in WRONG])
def test_errors_are_those_of_the_cpu(name, value):
    operator, arguments = qkv_decode, qkv(*SHAPES[2], torch.float32)
    if name not in arguments:
        operator, arguments = attend_mlp_decode, attend(*SHAPES[2], torch.float32)
    with pytest.raises(RuntimeError) as own:
        operator(**arguments | {name: value})
    with emulated.emulated(), pytest.raises(RuntimeError) as ours:
        operator(**arguments | {name: value})
    assert str(ours.value) == str(own.value) and operator.__name__ in str(own.value)
