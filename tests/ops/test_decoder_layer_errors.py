"""Errors of qkv_decode and attend_mlp_decode: operator, argument, its value, what is allowed."""

import pytest
import torch
from layers import attend, qkv

import ppnet.extension as extension
from ppnet.ops import attend_mlp_decode, qkv_decode

compiled = pytest.mark.skipif(not extension.available(), reason="needs the compiled extension")
A = qkv(2, 3, 6, 4, 2, 4, torch.float32, "all", True, True)
WEIGHT, BIAS = A["weight"], A["bias"]
QKV_ERRORS = [
    ({"x": torch.zeros(6, 6)}, r"x has shape \(6, 6\); it must be \(B, T, D\) with at most 8 tokens in all"),
    ({"x": torch.zeros(3, 3, 6)}, r"x has shape \(3, 3, 6\); it must be \(B, T, D\) with at most 8 tokens in all"),
    ({"x": torch.zeros(2, 3, 6).double()}, "x has dtype Double; allowed are Float, BFloat16 and Half"),
    ({"x": torch.zeros(2, 3, 7)}, r"weight\[0\] has shape \(16, 6\); it must be \(N, D\) = \(any, 7\), D that of x"),
    ({"norm": torch.zeros(5)}, r"norm has shape \(5,\); it must be \(D,\), D that of x = \(6,\)"),
    ({"norm": torch.zeros(6).half()}, "norm has dtype Half; it must be Float"),
    ({"weight": WEIGHT[:2]}, "weight has 2 entries; it needs those of q, k and v"),
    ({"weight": [], "bias": [], "idx": []}, "weight has 0 entries; it needs those of q, k and v"),
    ({"weight": [*WEIGHT, WEIGHT[0]]}, "weight has 4 entries"),
    ({"bias": BIAS[:2]}, "bias has 2 entries, but weight has 3"),
    ({"idx": [None]}, "idx has 1 entries, but weight has 3"),
    ({"weight": [WEIGHT[0].t().contiguous().t(), *WEIGHT[1:]]}, r"weight\[0\] of shape \(16, 6\) has strides"),
    ({"weight": [WEIGHT[0], WEIGHT[1].half(), WEIGHT[2]]}, r"weight\[1\] has dtype Half; it must be Float"),
    ({"bias": [None, torch.zeros(5), None]}, r"bias\[1\] has shape \(5,\); it must be one entry per output = \(8,\)"),
    ({"idx": [torch.arange(3), None, None]}, r"weight\[0\] has 3 kept rows; they must be whole heads of Dh = 4"),
    ({"idx": [None, torch.arange(4), None]}, r"weight\[2\] has 8 kept rows, but weight\[1\] has 4; k and v"),
    ({"idx": [None, torch.arange(5, 9), None]}, r"idx\[1\]\[3\] is 8; allowed are 0 \.\. 7"),
    ({"idx": [torch.arange(4).int(), None, None]}, r"idx\[0\] has dtype Int; it must be Long"),
    ({"q_norm": torch.zeros(5)}, r"q_norm has shape \(5,\); it must be \(Dh,\), Dh the last axis of cos = \(4,\)"),
    ({"k_norm": torch.zeros(4).half()}, "k_norm has dtype Half; it must be Float"),
    ({"cos": torch.zeros(3, 4)}, r"cos has shape \(3, 4\); it must be \(B or 1, T, Dh\)"),
    ({"cos": torch.zeros(3, 3, 4)}, r"cos has shape \(3, 3, 4\); it must be \(B or 1, T, Dh\) = \(2, 3, 4\)"),
    ({"cos": torch.zeros(2, 3, 1)}, r"cos has shape \(2, 3, 1\); its last axis, Dh, must be even and not empty"),
    ({"cos": torch.zeros(2, 3, 0)}, r"cos has shape \(2, 3, 0\); its last axis, Dh, must be even and not empty"),
    ({"cos": torch.zeros(2, 3, 4).half()}, r"cos has dtype Half; it must be Float \(that of x\)"),
    ({"sin": torch.zeros(1, 3, 4)}, r"sin has shape \(1, 3, 4\); it must be that of cos, \(2, 3, 4\)"),
]  # fmt: skip


@compiled
@pytest.mark.parametrize("changes, message", QKV_ERRORS)
def test_errors_of_qkv_name_the_argument(changes, message):
    with pytest.raises(RuntimeError, match=f"^qkv_decode: {message}"):
        qkv_decode(**A | changes)


B = attend(2, 3, 6, 4, 2, 4, torch.float32, neurons=5, bias=True, z=True)
MASK = torch.zeros(2, 1, 3, 9, dtype=torch.bool)
ATTEND_ERRORS = [
    ({"residual": torch.zeros(6, 6)}, r"residual has shape \(6, 6\); it must be \(B, T, D\) with at most"),
    ({"residual": torch.zeros(1, 9, 6)}, r"residual has shape \(1, 9, 6\); it must be \(B, T, D\) with at most"),
    ({"residual": torch.zeros(2, 3, 6).double()}, "residual has dtype Double; allowed are Float, BFloat16 and Half"),
    ({"residual": torch.zeros(2, 3, 7)}, r"out has shape \(6, 16\); it must be \(D, H Dh\).* = \(7, 16\)"),
    ({"query": B["query"][:1]}, r"query has shape \(1, 4, 3, 4\); it must be \(B, H, T, Dh\) = \(2, any, 3, any\)"),
    ({"query": B["query"].half()}, r"query has dtype Half; it must be Float \(that of residual\)"),
    ({"query": B["query"][:, :2]}, r"out has shape \(6, 16\); it must be \(D, H Dh\).*H and Dh of query = \(6, 8\)"),
    ({"key": B["key"][:, :, 1:]}, r"value has shape .* it must be the shape of key"),
    ({"key": B["key"].half()}, "key has dtype Half; it must be Float"),
    ({"mask": MASK}, r"mask has shape \(2, 1, 3, 9\); it must broadcast to \(B, H, T, S\) = \(2, 4, 3, 37\)"),
    ({"mask": MASK[..., :1].long()}, "mask has dtype Long; allowed are Bool"),
    ({"out": B["out"].contiguous()}, r"out of shape \(6, 16\) has strides \(16, 1\); its columns must be .*accelerate"),
    ({"out": torch.zeros(16)}, r"out has shape \(16,\); it must be \(D, H Dh\)"),
    ({"out": B["out"].half()}, r"out has dtype Half; it must be Float \(that of residual\)"),
    ({"out_bias": torch.zeros(7)}, r"out_bias has shape \(7,\)"),
    ({"out_bias": torch.zeros(6).half()}, "out_bias has dtype Half"),
    ({"out_idx": torch.arange(8)}, r"out_idx has shape \(8,\); it must be \(H Dh,\), as query has = \(16,\)"),
    ({"out_idx": torch.arange(1, 17)}, r"out_idx\[15\] is 16; allowed are 0 \.\. 15"),
    ({"out_z": torch.zeros(4)}, r"out_z has shape \(4,\); it must be \(K,\) = \(16,\)"),
    ({"out_z": torch.zeros(16).half()}, "out_z has dtype Half; it must be Float"),
    ({"norm": torch.zeros(4)}, r"norm has shape \(4,\); it must be \(D,\), D that of residual = \(6,\)"),
    ({"up": torch.zeros(5, 7)}, r"up has shape \(5, 7\); it must be \(N, D\), D that of residual = \(any, 6\)"),
    ({"up": torch.zeros(6, 5).t()}, r"up of shape \(5, 6\) has strides \(1, 5\); its rows must be contiguous"),
    ({"gate": torch.zeros(4, 6)}, r"gate has shape \(4, 6\); it must be \(F, D\), as up = \(5, 6\)"),
    ({"gate": None}, "gate_bias is given, but gate is not"),
    ({"down": torch.zeros(6, 5)}, r"down of shape \(6, 5\) has strides \(5, 1\); its columns must be .*accelerate"),
    ({"down": torch.zeros(5, 6).t()[:, :4]}, r"down has shape \(6, 4\); it must be \(D, N\), as up has = \(6, 5\)"),
    ({"down_bias": torch.zeros(5)}, r"down_bias has shape \(5,\)"),
    ({"up_bias": torch.zeros(6)}, r"up_bias has shape \(6,\)"),
    ({"idx": torch.tensor([5]), "z": None}, r"idx\[0\] is 5; allowed are 0 \.\. 4"),
    ({"z": torch.zeros(4)}, r"z has shape \(4,\); it must be \(K,\) = \(5,\)"),
    ({"act": "tanh"}, 'act is "tanh"; allowed are silu, gelu, gelu_tanh, relu and relu2'),
]  # fmt: skip


@compiled
@pytest.mark.parametrize("changes, message", ATTEND_ERRORS)
def test_errors_of_attend_name_the_argument(changes, message):
    with pytest.raises(RuntimeError, match=f"^attend_mlp_decode: {message}"):
        attend_mlp_decode(**B | changes)


def test_one_device():
    with pytest.raises(RuntimeError, match=r"qkv_decode: all tensors .* x is on cpu, k_norm is on meta"):
        qkv_decode(**A | {"k_norm": A["k_norm"].to("meta")})
    with pytest.raises(RuntimeError, match=r"attend_mlp_decode: all tensors .* residual is on cpu, down is on meta"):
        attend_mlp_decode(**B | {"down": B["down"].to("meta")})
