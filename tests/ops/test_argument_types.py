"""What is no tensor, or no list, where an operator wants one: the error names operator, argument and type."""

import inspect
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import ppnet.extension as extension
from ppnet import ops


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


IDX = torch.arange(3)
QUERY, KEY = zeros(1, 4, 2, 8), zeros(1, 2, 5, 8)
WEIGHTS = dict(up=zeros(6, 8), down=zeros(6, 8), gate=zeros(6, 8), up_bias=zeros(6), gate_bias=zeros(6))
MLP = dict(x=zeros(2, 8), **WEIGHTS, down_bias=zeros(8), idx=IDX, z=zeros(3))
LISTS = dict(idx=[IDX, IDX], scale=[zeros(3), None], dim=[0, 0])

LAYER = dict(x=zeros(1, 2, 8), norm=zeros(8), eps=1e-6, cos=zeros(1, 2, 4), sin=zeros(1, 2, 4))
ATTENDED = dict(residual=zeros(1, 2, 8), query=QUERY[:, :2], key=KEY, value=KEY, norm=zeros(8), eps=1e-6)
PROJECTION = dict(out=zeros(16, 8).t(), out_bias=zeros(8), out_idx=torch.arange(16), out_z=zeros(16))

# One valid call of every operator, with every argument that may be a tensor.
CALLS: dict[str, dict[str, Any]] = {
    "attend_mlp_decode": dict(
        **ATTENDED,
        **PROJECTION,
        **{**WEIGHTS, "down": zeros(6, 8).t()},
        down_bias=zeros(8),
        idx=IDX,
        z=zeros(3),
        mask=zeros(2, 5),
    ),
    "gated_act": dict(up=zeros(2, 6), gate=zeros(2, 6), z=zeros(6)),
    "gated_act_backward": dict(dh=zeros(2, 6), up=zeros(2, 6), gate=zeros(2, 6), z=zeros(6), act="silu"),
    "gated_attention": dict(query=QUERY, key=KEY, value=KEY, gate=zeros(2), mask=zeros(2, 5)),
    "gated_attention_decode": dict(
        query=QUERY, key=KEY, value=KEY, groups=IDX[:2], gate=zeros(2), mask=zeros(2, 5), lengths=torch.tensor([5])
    ),
    "gated_mlp": MLP,
    "gated_mlp_decode": MLP,
    "gated_mlp_fused": MLP,
    "gather_rows": dict(src=[zeros(6, 8)] * 2, **LISTS),
    "linear": dict(x=zeros(2, 8), weight=zeros(6, 8), bias=zeros(6)),
    "linear_decode": dict(x=zeros(2, 8), weight=zeros(6, 8), bias=zeros(6), idx=IDX),
    "linear_t_decode": dict(x=zeros(2, 3), weight=zeros(6, 8), bias=zeros(8), idx=IDX, z=zeros(3)),
    "linears_decode": dict(x=zeros(2, 8), weight=[zeros(6, 8)] * 2, bias=[zeros(6), None], idx=[IDX, None]),
    "qkv_decode": dict(
        **LAYER,
        weight=[zeros(4, 8)] * 3,
        bias=[zeros(4), None, zeros(4)],
        idx=[torch.arange(4), None, None],
        q_norm=zeros(4),
        k_norm=zeros(4),
    ),
    "rms_norm": dict(x=zeros(2, 8), weight=zeros(8), eps=1e-6),
    "rotary": dict(query=QUERY, key=KEY[:, :, :2], cos=zeros(1, 2, 8), sin=zeros(1, 2, 8)),
    "row_norms": dict(weight=[zeros(6, 8)] * 2, input_scale=[zeros(8), None], dim=[0, 0]),
    "scatter_rows": dict(grad=[zeros(3, 8)] * 2, **LISTS, size=[6, 6], weight=[zeros(6, 8), None]),
}
NO_OPERATORS = {"attention_path", "linear_choice", "linear_path", "measure_linear"}
# Arguments that may be None without having that for a default.
OPTIONAL = {("gated_act_backward", "gate"), ("gated_act_backward", "z")}


def wrong(value: Any) -> Iterator[tuple[str, Any, str]]:
    """Where in an argument, what it becomes, and what the error says of it."""
    others = {None: "None", 0.5: "of type float", "a": "of type str"}
    for other, found in others.items():
        yield "", other, found
    yield "", numpy.ones(3), "of type numpy.ndarray"
    if isinstance(value, Tensor):
        yield "", [1.0], "of type list"
    elif isinstance(value[0], Tensor):
        yield "[1]", [value[0], 0.5], "of type float"


def test_every_operator_is_here():
    assert set(CALLS) | NO_OPERATORS == {name for name in ops.__all__ if not name.endswith("_ref")}


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", CALLS)
def test_the_error_names_the_argument_and_its_type(name, gradients):
    operator, arguments = getattr(ops, name), CALLS[name]
    parameters = inspect.signature(operator).parameters
    with torch.set_grad_enabled(gradients):
        operator(**arguments)
        for argument, value in arguments.items():
            if not isinstance(value, (Tensor, list)):
                continue
            optional = parameters[argument].default is None or (name, argument) in OPTIONAL
            for where, other, found in wrong(value):
                if other is None and optional:
                    continue
                with pytest.raises(RuntimeError) as error:
                    operator(**{**arguments, argument: other})
                message = str(error.value)
                assert message.startswith(f"{name}: {argument}{where} is {found}; it must be a "), message


def test_a_missing_argument_stays_pythons_own_error():
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'weight'"):
        ops.linear_decode(zeros(2, 8))  # type: ignore[call-arg]


@pytest.mark.skipif(not extension.available(), reason="plain torch names neither operator nor argument")
@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("linear_decode", dict(weight=zeros(6, 7)), "linear_decode: x has shape (2, 8); it must be (T, D), D that of"),
        ("gated_act", dict(up=IDX), "gated_act: up has dtype Long; allowed are Float"),
        ("gated_act", dict(act="swish"), 'gated_act: act is "swish"; allowed are silu'),
        ("gather_rows", dict(idx=[IDX, IDX + 4]), "gather_rows: idx[1][2] is 6; allowed are 0 .. 5"),
    ],
)
def test_other_errors_begin_with_the_operator(name, wrong, message):
    """And not with a file of whoever built the extension."""
    with pytest.raises(RuntimeError) as error:
        getattr(ops, name)(**{**CALLS[name], **wrong})
    assert str(error.value).startswith(message)
    assert error.value.__cause__ is None
