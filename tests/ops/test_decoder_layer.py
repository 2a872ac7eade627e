"""qkv_decode and attend_mlp_decode: against float64 and the operators they are made of; layouts, errors, tracing."""

from functools import partial

import pytest
import torch
from accuracy import assert_as_accurate
from any_input import place
from layers import SHAPES, attend, by_unit, normal, qkv

import ppnet.extension as extension
from ppnet import ops
from ppnet.ops import attend_mlp_decode, attend_mlp_decode_ref, qkv_decode, qkv_decode_ref
from ppnet.ops.gated_act import ACTS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
compiled = pytest.mark.skipif(not extension.available(), reason="needs the compiled extension")


def wide(value):
    """In float64, where the lowest value of a mask's own dtype would no longer be the lowest."""
    if isinstance(value, (list, tuple)):
        return [wide(entry) for entry in value]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return torch.where(value <= torch.finfo(value.dtype).min, -torch.inf, value.double())


def check(operator, reference, draw):
    """Ours against the reference: every rounding of ours is one of its own, which has one more, after each projection.

    Small results are drawn anew until there are enough elements for roundings that are lucky not to matter.
    """
    parts, count = [], 0
    while not parts or 0 < count < 12:
        arguments = draw()
        exact = reference(**{name: wide(value) for name, value in arguments.items()})
        results = [operator(**arguments), reference(**arguments), exact]
        parts.append([[y] if isinstance(y, torch.Tensor) else y for y in results])
        count += parts[-1][0][-1].numel()
    for each in zip(*(zip(*draws, strict=True) for draws in zip(*parts, strict=True)), strict=True):
        assert_as_accurate(*(torch.cat([y.flatten() for y in ys]) for ys in each))
    return parts[-1][0]


# ---- the values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qkv_against_float64(shape, dtype, isa, threads):
    batch, tokens, _, _, _, width = shape
    for kept in ("all", "none", "one", "odd"):
        for bias, norms in ((False, False), (True, True), (True, False)):
            for y in check(qkv_decode, qkv_decode_ref, partial(qkv, *shape, dtype, kept, bias, norms)):
                assert y.shape[0::2] == (batch, tokens) and y.shape[3] == width and y.dtype == dtype
                assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attend_against_float64(shape, dtype, isa, threads):
    for kept in ("all", "none", "one", "odd"):
        for options in ({}, {"bias": True, "z": True}, {"bias": True, "gated": False, "act": "gelu", "scale": 0.3}):
            draw = partial(attend, *shape, dtype, kept=kept, **options)
            (y,) = check(attend_mlp_decode, attend_mlp_decode_ref, draw)
            assert y.shape == shape[:3] and y.dtype == dtype and y.is_contiguous()


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("gated", [True, False])
def test_activations(act, gated, isa):
    for dtype in DTYPES:
        draw = partial(attend, *SHAPES[2], dtype, act=act, gated=gated, bias=True, z=True)
        check(attend_mlp_decode, attend_mlp_decode_ref, draw)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [8, 172, 600])
def test_masks(keys, dtype, isa):
    batch, tokens, _, heads, *_ = shape = SHAPES[2]
    keep = torch.rand(batch, heads, tokens, keys) > 0.4
    padded = torch.arange(keys) >= torch.arange(batch)[:, None] * (keys // 2)
    masks = [
        keep[:, :1],
        keep,
        padded[:, None, None].expand(batch, 1, tokens, keys),
        normal(keys),
        normal(tokens, keys).half(),
    ]
    masks += [torch.where(keep, 0.0, torch.finfo(dtype).min).to(dtype), torch.where(keep, 0.5, -torch.inf).double()]
    for mask in masks:
        check(attend_mlp_decode, attend_mlp_decode_ref, partial(attend, *shape, dtype, keys=keys, mask=mask))


def test_one_mask_for_all_is_none(isa):
    """Without a mask the new tokens are causal among themselves."""
    arguments = attend(*SHAPES[2], torch.float32)
    causal = torch.ones(3, 37, dtype=torch.bool).tril(34)
    assert torch.equal(attend_mlp_decode(**arguments), attend_mlp_decode(**arguments | {"mask": causal}))


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qkv_is_its_operators_one_after_the_other(shape, dtype, isa):
    """To the bit."""
    batch, tokens, features, _, _, width = shape
    for kept, norms in (("all", False), ("odd", True)):
        a = qkv(*shape, dtype, kept, True, norms)
        normed = ops.rms_norm(a["x"], a["norm"], a["eps"]).view(-1, features)
        outputs = ops.linears_decode(normed, a["weight"], a["bias"], idx=a["idx"])
        query, key, value = (y.view(batch, tokens, -1, width) for y in outputs)
        if norms:
            query, key = ops.rms_norm(query, a["q_norm"], a["eps"]), ops.rms_norm(key, a["k_norm"], a["eps"])
        expected = *ops.rotary(query.transpose(1, 2), key.transpose(1, 2), a["cos"], a["sin"]), value.transpose(1, 2)
        for one, other in zip(qkv_decode(**a), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_adds_nothing_leaves_the_residual(dtype, isa):
    arguments = attend(*SHAPES[2], dtype)
    for name in ("out", "down"):
        arguments[name] = by_unit(torch.zeros_like(arguments[name]))
    assert torch.equal(attend_mlp_decode(**arguments), arguments["residual"])
    nothing = attend(*SHAPES[2], dtype, kept="none")
    assert torch.equal(attend_mlp_decode(**nothing), nothing["residual"])


@pytest.mark.parametrize("kept", ["all", "odd"])
def test_the_same_bits_whatever_the_threads(kept, isa):
    """At a size where they share the work."""
    shape, before = (2, 2, 1024, 16, 4, 64), torch.get_num_threads()
    first = qkv(*shape, torch.bfloat16, kept, True, True)
    second = attend(*shape, torch.bfloat16, keys=700, neurons=2048, kept=kept, bias=True, z=True)
    results = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append([*qkv_decode(**first), attend_mlp_decode(**second)])
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


# ---- layouts ---------------------------------------------------------------------------------------------------------


def moved(arguments, layouts, weights=("misaligned", "rows apart")):
    """The same values elsewhere: `layouts` for what may lie anyhow, `weights` for what is read in place."""

    def change(name, value, at):
        if isinstance(value, list):
            return [change(name, entry, at + i) for i, entry in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return value
        if name in ("out", "down"):
            return by_unit(value, weights[at % 2])
        if name in ("weight", "up", "gate", "key", "value"):
            return place(value, weights[at % 2])
        return place(value, layouts[at % len(layouts)])

    return {name: change(name, value, i) for i, (name, value) in enumerate(arguments.items())}


@pytest.mark.parametrize(
    "layouts", [["misaligned"], ["sliced"], ["stepped", "transposed"], ["transposed", "sliced"]], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(layouts, dtype, isa):
    """Views of larger storages, around which there is NaN; the cache's positions may lie anyhow."""
    shape = SHAPES[2]
    for kept in ("all", "odd"):
        for weights in (("misaligned", "rows apart"), ("rows apart", "misaligned")):
            first = qkv(*shape, dtype, kept, True, True)
            for one, other in zip(qkv_decode(**first), qkv_decode(**moved(first, layouts, weights)), strict=True):
                assert torch.equal(one, other)
            second = attend(*shape, dtype, kept=kept, bias=True, z=True, mask=torch.rand(2, 1, 3, 37) > 0.3)
            assert torch.equal(attend_mlp_decode(**second), attend_mlp_decode(**moved(second, layouts, weights)))
    by_position = {name: second[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("key", "value")}
    assert torch.equal(attend_mlp_decode(**second), attend_mlp_decode(**second | by_position))


def test_arguments_are_not_written_to():
    first, second = qkv(*SHAPES[2], torch.float32), attend(*SHAPES[2], torch.float32)
    before = first["x"].clone(), second["residual"].clone()
    query, _, value = qkv_decode(**first)
    attend_mlp_decode(**second).zero_()
    query.zero_()
    value.zero_()
    assert torch.equal(first["x"], before[0]) and torch.equal(second["residual"], before[1])


@pytest.mark.parametrize("shape", [(0, 1, 8, 2, 1, 4), (1, 0, 8, 2, 1, 4), (2, 1, 0, 2, 1, 4)], ids=str)
def test_empty(shape):
    batch, tokens, _, heads, _, width = shape
    query, _, value = qkv_decode(**qkv(*shape, torch.float32))
    assert query.shape == (batch, heads, tokens, width) and value.shape == (batch, 1, tokens, width)
    assert attend_mlp_decode(**attend(*shape, torch.float32)).shape == shape[:3]
    no_cache = attend(*SHAPES[2], torch.float32, keys=0)
    assert attend_mlp_decode(**no_cache).isfinite().all()


@compiled
def test_dropped_units_are_not_read(isa):
    """Whatever the weights of heads and neurons that are not kept hold."""
    first, second = qkv(*SHAPES[2], torch.float32, "odd"), attend(*SHAPES[2], torch.float32, kept="odd")
    for weight, idx in zip(first["weight"], first["idx"], strict=True):
        weight[[i for i in range(len(weight)) if i not in idx]] = torch.nan
    assert not any(y.isnan().any() for y in qkv_decode(**first))
    second["out"][:, [i for i in range(48) if i not in second["out_idx"]]] = torch.nan
    for name in ("up", "gate"):
        second[name][[i for i in range(41) if i not in second["idx"]]] = torch.nan
    second["down"][:, [i for i in range(41) if i not in second["idx"]]] = torch.nan
    assert not attend_mlp_decode(**second).isnan().any()


# ---- the dispatcher --------------------------------------------------------------------------------------------------


def test_opcheck_and_compile():
    first = qkv(*SHAPES[2], torch.float32, "odd", True, True)
    second = attend(*SHAPES[2], torch.float32, kept="odd", bias=True, z=True, mask=torch.rand(2, 1, 3, 37) > 0.3)
    second["scale"] = 0.3
    for operator, arguments in ((torch.ops.ppnet.qkv_decode, first), (torch.ops.ppnet.attend_mlp_decode, second)):
        torch.library.opcheck(operator, (), arguments)
    for function, arguments in ((qkv_decode, first), (attend_mlp_decode, second)):
        traced = torch.compile(function, fullgraph=True, backend="aot_eager")
        for one, other in zip(traced(**arguments), function(**arguments), strict=True):
            assert torch.equal(one, other) and one.stride() == other.stride()


def test_autocast():
    """Tensors are cast; float32 gates, indices and boolean masks stay."""
    first, second = (
        qkv(*SHAPES[2], torch.float32, "odd", True, True),
        attend(*SHAPES[2], torch.float32, bias=True, z=True),
    )

    def narrow(value, name=""):
        if isinstance(value, list):
            return [narrow(entry) for entry in value]
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.bfloat16() if floating and name not in ("z", "out_z") else value

    for function, arguments in ((qkv_decode, first), (attend_mlp_decode, second)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = function(**arguments)
        expected = function(**{name: narrow(value, name) for name, value in arguments.items()})
        for one, other in zip(ours, expected, strict=True):
            assert one.dtype == torch.bfloat16 and torch.equal(one, other)


def test_no_gradients():
    for function, arguments in ((qkv_decode, qkv(*SHAPES[2], torch.float32, "all", True, True)),
                                (attend_mlp_decode, attend(*SHAPES[2], torch.float32, bias=True, z=True))):  # fmt: skip
        for name, value in arguments.items():
            tensor = value[0] if isinstance(value, list) else value
            if not isinstance(tensor, torch.Tensor):
                continue
            learned = tensor.detach().clone().as_strided(tensor.shape, tensor.stride()).requires_grad_()
            changed = arguments | {name: [learned, *value[1:]] if isinstance(value, list) else learned}
            with pytest.raises(RuntimeError, match=rf"{function.__name__}: not differentiable.*torch\.no_grad"):
                function(**changed)
            with torch.no_grad():
                function(**changed)
