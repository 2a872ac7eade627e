"""qkv_decode and attend_mlp_decode: against float64 and the operators they are made of; layouts, errors, tracing."""

from functools import partial

import pytest
import torch
from accuracy import assert_as_accurate
from any_input import place

import ppnet.extension as extension
from ppnet import ops
from ppnet.ops import attend_mlp_decode, attend_mlp_decode_ref, qkv_decode, qkv_decode_ref
from ppnet.ops.gated_act import ACTS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # B, T, D, H, Hkv, Dh: 1 to 8 tokens
    (1, 1, 1, 1, 1, 2),
    (1, 7, 7, 7, 1, 14),
    (2, 3, 172, 6, 2, 8),
    (8, 1, 300, 4, 4, 32),
    (2, 4, 64, 8, 2, 172),
]
compiled = pytest.mark.skipif(not extension.available(), reason="needs the compiled extension")


def normal(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(shape)).to(dtype)


def by_unit(t, layout="contiguous"):
    """A weight (D, units) that is stored unit by unit, as `accelerate` leaves it."""
    return place(t.t().contiguous(), layout).t()


def heads_of(kept, width):
    return (kept[:, None] * width + torch.arange(width)).flatten()


def selection(units, kept):
    """None for all; else so many in any order."""
    return None if kept == "all" else torch.randperm(units)[: {"none": 0, "one": 1, "odd": units // 2 | 1}[kept]]


def qkv(batch, tokens, features, heads, groups, width, dtype, kept="all", bias=False, norms=False):
    turns = 100 * torch.rand(batch if tokens % 2 or not batch else 1, tokens, width // 2)
    turns = torch.cat([turns, turns], -1)
    sizes = (heads, groups, groups)
    chosen = [selection(n, kept) for n in sizes[:2]]
    return {
        "x": normal(batch, tokens, features, dtype=dtype),
        "norm": normal(features, dtype=dtype),
        "eps": 1e-5,
        "weight": [normal(n * width, features, dtype=dtype, scale=max(features, 1) ** -0.5) for n in sizes],
        "bias": [normal(n * width, dtype=dtype) if bias else None for n in sizes],
        "cos": turns.cos().to(dtype),
        "sin": turns.sin().to(dtype),
        "idx": [None if c is None else heads_of(c, width) for c in (*chosen, chosen[1])],
        "q_norm": normal(width, dtype=dtype) if norms else None,
        "k_norm": normal(width, dtype=dtype) if norms else None,
    }


def attend(batch, tokens, features, heads, groups, width, dtype, keys=37, neurons=41, kept="all", **others):
    """A layer's second half; `kept` are KV groups, whose queries' heads `query` then has, and neurons."""
    chosen, idx = selection(groups, kept), selection(neurons, kept)
    own = torch.arange(groups) if chosen is None else chosen
    columns = heads_of((own[:, None] * (heads // groups) + torch.arange(heads // groups)).flatten(), width)
    bias, gated = others.get("bias", False), others.get("gated", True)
    count, k = len(own) * heads // groups, neurons if idx is None else len(idx)

    def maybe(wanted, *shape, dtype=dtype, **options):
        return normal(*shape, dtype=dtype, **options) if wanted else None

    return {
        "residual": normal(batch, tokens, features, dtype=dtype),
        "query": normal(batch, tokens, count, width, dtype=dtype).transpose(1, 2),
        "key": normal(batch, len(own), keys, width, dtype=dtype),
        "value": normal(batch, len(own), keys, width, dtype=dtype),
        "out": by_unit(normal(features, heads * width, dtype=dtype, scale=(heads * width) ** -0.5)),
        "norm": normal(features, dtype=dtype),
        "eps": 1e-5,
        "up": normal(neurons, features, dtype=dtype, scale=max(features, 1) ** -0.5),
        "down": by_unit(normal(features, neurons, dtype=dtype, scale=neurons**-0.5)),
        "gate": maybe(gated, neurons, features, scale=max(features, 1) ** -0.5),
        "mask": others.get("mask"),
        "scale": others.get("scale"),
        "out_bias": maybe(bias, features),
        "out_idx": None if chosen is None else columns,
        "out_z": maybe(others.get("z"), count * width, dtype=torch.float32),
        "up_bias": maybe(bias, neurons),
        "gate_bias": maybe(bias and gated, neurons),
        "down_bias": maybe(bias, features),
        "idx": idx,
        "z": maybe(others.get("z"), k, dtype=torch.float32),
        "act": others.get("act", "silu"),
    }


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
    while not parts or 0 < count < 24:
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


# ---- errors ----------------------------------------------------------------------------------------------------------


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
    ({"weight": [WEIGHT[0].t().contiguous().t(), *WEIGHT[1:]]}, r"weight\[0\] of shape \(16, 6\) has strides \(1, 16\)"),
    ({"weight": [WEIGHT[0], WEIGHT[1].half(), WEIGHT[2]]}, r"weight\[1\] has dtype Half; it must be Float"),
    ({"bias": [None, torch.zeros(5), None]}, r"bias\[1\] has shape \(5,\); it must be one entry per output = \(8,\)"),
    ({"idx": [torch.arange(3), None, None]}, r"weight\[0\] has 3 kept rows; they must be whole heads of Dh = 4"),
    ({"idx": [None, torch.arange(4), None]}, r"weight\[2\] has 8 kept rows, but weight\[1\] has 4; k and v need the same"),
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
    ({"residual": torch.zeros(6, 6)}, r"residual has shape \(6, 6\); it must be \(B, T, D\) with at most 8 tokens"),
    ({"residual": torch.zeros(1, 9, 6)}, r"residual has shape \(1, 9, 6\); it must be \(B, T, D\) with at most 8 tokens"),
    ({"residual": torch.zeros(2, 3, 6).double()}, "residual has dtype Double; allowed are Float, BFloat16 and Half"),
    ({"residual": torch.zeros(2, 3, 7)}, r"out has shape \(6, 16\); it must be \(D, H Dh\).* = \(7, 16\)"),
    ({"query": B["query"][:1]}, r"query has shape \(1, 4, 3, 4\); it must be \(B, H, T, Dh\) = \(2, any, 3, any\)"),
    ({"query": B["query"].half()}, r"query has dtype Half; it must be Float \(that of residual\)"),
    ({"query": B["query"][:, :2]}, r"out has shape \(6, 16\); it must be \(D, H Dh\).*H and Dh of query = \(6, 8\)"),
    ({"key": B["key"][:, :, 1:]}, r"value has shape .* it must be the shape of key"),
    ({"key": B["key"].half()}, "key has dtype Half; it must be Float"),
    ({"mask": MASK}, r"mask has shape \(2, 1, 3, 9\); it must broadcast to \(B, H, T, S\) = \(2, 4, 3, 37\)"),
    ({"mask": MASK[..., :1].long()}, "mask has dtype Long; allowed are Bool"),
    ({"out": B["out"].contiguous()}, r"out of shape \(6, 16\) has strides \(16, 1\); its columns must be contig.*accelerate"),
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
    ({"down": torch.zeros(6, 5)}, r"down of shape \(6, 5\) has strides \(5, 1\); its columns must be contig.*accelerate"),
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
