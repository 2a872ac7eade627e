"""gated_attention(path="fused"): the CUDA kernels against float64, every gradient, masks, windows, groups, garbage."""

import importlib

import emulated
import pytest
import torch
from accuracy import EPSILON, assert_as_accurate
from any_input import place
from torch._subclasses.fake_tensor import FakeTensorMode

from ppnet.ops.gated_attention import gated_attention, gated_attention_ref
from ppnet.ops.gated_attention_gemm import Rules

# The package holds the function of this name, so that `import ... as` would give that.
module = importlib.import_module("ppnet.ops.gated_attention")

DTYPES = [torch.bfloat16, torch.float16]
# B, H, Hkv, T, S, Dh: one to three blocks of queries (128, or 64 of Dh 256 and with masks) and keys (64), ragged edges.
SHAPES = [
    (1, 1, 1, 1, 1, 8),
    (2, 2, 1, 7, 172, 64),
    (1, 2, 2, 172, 150, 64),
    (1, 2, 1, 65, 70, 96),
    (1, 2, 1, 130, 130, 128),
    (1, 1, 1, 66, 90, 256),
    (1, 2, 1, 50, 9, 80),
]
RULES = [
    {},
    {"is_causal": True},
    {"is_causal": True, "window": 20},
    {"window": 5, "scale": -0.2},
]


@pytest.fixture(params=["torch", *(pytest.param(s, marks=emulated.needs_emulator) for s in emulated.SEEDS)])
def kernels(request):
    """Plain torch, which computes where there is no kernel; the CUDA kernels, in several orders of their threads."""
    if request.param == "torch":
        yield "torch"
    else:
        with emulated.emulated(request.param):
            yield "cuda"


def tensors(shape, dtype, seed=0, device="cpu"):
    batch, heads, kv_heads, tokens, keys, width = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = (batch, heads, tokens, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, width)
    query, key, value = (torch.randn(n, generator=generator).to(device, dtype) for n in sizes)
    gate = torch.tensor([0.5, 0.0, -1.0, 0.01], device=device)[:kv_heads]
    return [query, key, value, gate], torch.randn(sizes[0], generator=generator).to(device, dtype)


def sdpa(query, key, value, *, gate, mask=None, is_causal=False, window=None, scale=None, groups=None):
    """torch's own attention, with the bias that the rules need."""
    if groups is not None:
        key, value = key[:, groups], value[:, groups]
    tokens, keys = query.shape[2], key.shape[2]
    own, position = torch.arange(keys - tokens, keys)[:, None], torch.arange(keys)
    attend = torch.ones(tokens, keys, dtype=torch.bool)
    attend = attend & (position <= own) if is_causal else attend
    attend = attend & (position > own - window) if window else attend
    bias = torch.zeros((), dtype=query.dtype)
    if mask is not None and mask.dtype == torch.bool:
        attend = attend & mask
    elif mask is not None:
        bias = mask.to(query.dtype)
    bias = torch.where(attend, bias, -torch.inf).to(query.device).expand(query.shape[0], query.shape[1], tokens, keys)
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    out = torch.where((bias > -torch.inf).any(-1, keepdim=True), out, 0)
    return (out * gate.to(out.dtype).repeat_interleave(repeat)[:, None, None]).to(query.dtype)


def with_gradients(attention, leaves, dout, dtype, **arguments):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [t.to(dtype if t.dim() == 4 else wide).detach().requires_grad_() for t in leaves]
    query, key, value, gate = leaves
    out = attention(query, key, value, gate=gate, **arguments)
    return [out, *torch.autograd.grad(out, leaves, dout.to(dtype))]


def fused(*args, **arguments):
    return gated_attention(*args, path="fused", **arguments)


def check(leaves, dout, dtype, **arguments):
    ours = with_gradients(fused, leaves, dout, dtype, **arguments)
    torchs = with_gradients(sdpa, leaves, dout, dtype, **arguments)
    mask = arguments.pop("mask", None)
    mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    exact = with_gradients(gated_attention_ref, leaves, dout, torch.float64, mask=mask, **arguments)
    for a, b, x in zip(ours[:4], torchs[:4], exact[:4], strict=True):
        assert_as_accurate(a, b, x)
    assert_gate_gradient(ours[4], torchs[4], exact[4], leaves, dout, dtype, mask=mask, **arguments)
    assert ours[0].transpose(1, 2).is_contiguous()


def assert_gate_gradient(ours, torchs, exact, leaves, dout, dtype, **arguments):
    """It is the sum of dout times an output that is rounded to dtype, in torch too: so few numbers may be right by
    luck, so the bar is what independent roundings add up to."""
    plain = gated_attention_ref(*(t.double() for t in leaves[:3]), **arguments) * dout.double()
    noise = plain.square().sum((0, 2, 3)).unflatten(0, (len(leaves[3]), -1)).sum(1).sqrt() * EPSILON[dtype] / 2
    assert ours.dtype == torch.float32
    assert ((ours - exact).abs() <= 2 * (torchs - exact).abs() + 2 * noise + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_against_float64(shape, dtype, kernels):
    leaves, dout = tensors(shape, dtype)
    for rule in RULES:
        check(leaves, dout, dtype, **rule)


def masks(shape, dtype):
    batch, heads, _, tokens, keys, _ = shape
    generator = torch.Generator().manual_seed(2)
    keep = torch.rand((batch, heads, tokens, keys), generator=generator) > 0.3
    keep[0, 0, 1] = False  # attends to nothing
    padded = torch.arange(keys) >= torch.arange(batch)[:, None] * (keys // 2)
    return {
        "per head": keep,
        "left padding": padded[:, None, None],
        "padding and causal": padded[:, None, None] & torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens),
        "keys alone": keep[0, 0, 0],
        "bias": torch.randn((batch, 1, tokens, keys), generator=generator).to(dtype),
        "bias of keys": torch.randn((keys,), generator=generator),
        "nothing": torch.zeros((batch, 1, 1, keys), dtype=torch.bool),
    }


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((2, 2, 1, 70, 70, 64), torch.bfloat16),
        ((1, 2, 2, 9, 40, 96), torch.float16),
        ((2, 2, 1, 7, 100, 128), torch.float16),
        ((1, 1, 1, 66, 40, 256), torch.bfloat16),
    ],
)
def test_masks_against_float64(shape, dtype, kernels):
    leaves, dout = tensors(shape, dtype)
    for mask in masks(shape, dtype).values():
        check(leaves, dout, dtype, mask=mask)
    check(leaves, dout, dtype, mask=masks(shape, dtype)["left padding"], is_causal=True, window=30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lowest_value_means_masked(dtype, kernels):
    leaves, dout = tensors((2, 2, 2, 9, 40, 64), torch.bfloat16)
    keep = torch.rand(2, 1, 9, 40) > 0.4
    lowest = torch.where(keep, 0.0, torch.finfo(dtype).min).to(dtype)
    for a, b in zip(
        with_gradients(fused, leaves, dout, torch.bfloat16, mask=lowest),
        with_gradients(fused, leaves, dout, torch.bfloat16, mask=keep),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("groups", [[2], [3, 0], [1, 1], [0, 1, 2, 3], []])
def test_groups(groups, kernels):
    """KV heads that are used, in any order, also twice; the others' gradients are 0."""
    groups = torch.tensor(groups, dtype=torch.int64)
    (query, key, value, gate), dout = tensors((2, 2 * len(groups), 4, 40, 70, 64), torch.bfloat16)
    leaves = [query, key, value, gate[: len(groups)]]
    if len(groups):
        check(leaves, dout, torch.bfloat16, groups=groups, is_causal=True)
    _, _, dkey, dvalue, _ = with_gradients(fused, leaves, dout, torch.bfloat16, groups=groups)
    unused = [g for g in range(4) if g not in groups.tolist()]
    assert not dkey[:, unused].any() and not dvalue[:, unused].any()


def test_lse(kernels):
    (query, key, value, gate), _ = tensors((1, 2, 2, 70, 9, 64), torch.float16)
    _, lse = torch.ops.ppnet.gated_attention_fused(query, key, value, gate, None, None, None, True, 0.1, 0)
    scores = query.double() @ key.double().transpose(-1, -2) * 0.1
    scores = scores.masked_fill(torch.ones(70, 9, dtype=torch.bool).triu(9 - 70 + 1), -torch.inf)
    assert lse.dtype == torch.float32 and (lse[:, :, :61] == -torch.inf).all()
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", ["mask", "mask per query", "window"])
def test_garbage_where_nothing_attends(rule, kernels):
    leaves, dout = tensors((2, 2, 1, 40, 170, 64), torch.bfloat16)
    keep = (torch.arange(170) >= torch.tensor([[3], [71]])) & (torch.arange(170) < 160)
    arguments = {"mask": keep[:, None, None]}
    if rule == "mask per query":
        arguments = {"mask": keep[:, None, None] & (torch.rand(1, 1, 40, 170) > 0.1)}
        keep = arguments["mask"].any(2).any(1)
    elif rule == "window":
        arguments, keep = {"window": 9, "is_causal": True}, (torch.arange(170) > 170 - 40 - 9).expand(2, -1)
    expected = with_gradients(fused, leaves, dout, torch.bfloat16, **arguments)
    for i in (1, 2):
        leaves[i] = torch.where(keep[:, None, :, None], leaves[i], torch.nan)
    for a, b in zip(with_gradients(fused, leaves, dout, torch.bfloat16, **arguments), expected, strict=True):
        assert torch.equal(a, b)


def test_large_scores_and_small_gates(kernels):
    """Scores of some hundreds overflow no exponential; a gate of 2^-20 leaves nothing of a float16 output."""
    (query, key, value, _), dout = tensors((1, 2, 2, 40, 90, 64), torch.float16)
    check([query * 8, key * 8, value, torch.tensor([2.0**-20, 1.0])], dout, torch.float16, is_causal=True)


@pytest.mark.parametrize("layout", ["misaligned", "sliced", "stepped", "transposed", "expanded"])
def test_any_layout(layout, kernels):
    leaves, dout = tensors((2, 4, 2, 9, 70, 64), torch.bfloat16)
    leaves[:3], dout = [place(t, layout) for t in leaves[:3]], place(dout, layout)
    expected = with_gradients(fused, [t.contiguous() for t in leaves], dout.contiguous(), torch.bfloat16)
    query, key, value, gate = (t.detach().requires_grad_() for t in leaves)
    out = fused(query, key, value, gate=gate)
    for a, b in zip([out, *torch.autograd.grad(out, (query, key, value, gate), dout)], expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 2, 2, 3, 3, 64), (1, 2, 2, 0, 3, 64), (1, 2, 2, 3, 0, 64), (1, 0, 0, 3, 3, 64)])
def test_empty(shape, kernels):
    leaves, dout = tensors(shape, torch.bfloat16)
    results = with_gradients(fused, leaves, dout, torch.bfloat16)
    assert results[0].shape == leaves[0].shape and not any(t.any() for t in results)


@pytest.mark.parametrize("dtype, width", [(torch.float32, 16), (torch.bfloat16, 12), (torch.float16, 264)])
def test_what_the_kernel_does_not_take_goes_the_way_of_none(dtype, width, kernels):
    (query, key, value, gate), dout = tensors((2, 4, 4, 9, 11, width), dtype)
    arguments = dict(groups=torch.tensor([3, 1]), mask=torch.rand(2, 1, 1, 11) > 0.3, is_causal=True)
    ours, library = (
        with_gradients(f, [query, key, value, gate[:2]], dout, dtype, **arguments) for f in (fused, gated_attention)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, library, strict=True))


def test_rows_after_the_last_token_leave_the_gates_gradient_alone(kernels):
    """A key of -inf has a weight of 0, and 0 times it would be NaN in the rows of the last tile that are no tokens."""
    (query, key, value, _), dout = tensors((1, 1, 1, 70, 40, 64), torch.bfloat16)
    query[..., 0], key[0, 0, 5, 0] = 1.0, -torch.inf
    leaves, mask = [query, key, value, torch.tensor([0.01])], (torch.arange(40) != 5)
    out, *_, dgate = with_gradients(fused, leaves, dout, torch.bfloat16)
    expected, *_, of_the_others = with_gradients(fused, leaves, dout, torch.bfloat16, mask=mask)
    assert out.isfinite().all() and torch.equal(out, expected)
    torch.testing.assert_close(dgate, of_the_others, rtol=1e-5, atol=1e-5)


@emulated.needs_emulator
def test_the_same_bits_in_every_order():
    leaves, dout = tensors((1, 4, 2, 150, 150, 64), torch.bfloat16)
    results = []
    for seed in emulated.ORDERS:
        with emulated.emulated(seed):
            results.append(with_gradients(fused, leaves, dout, torch.bfloat16, is_causal=True))
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_the_library_path_takes_groups():
    (query, key, value, gate), dout = tensors((2, 4, 4, 20, 30, 16), torch.float32)
    leaves, groups = [query, key, value, gate[:2]], torch.tensor([3, 1])
    ours = with_gradients(gated_attention, leaves, dout, torch.float32, groups=groups)
    exact = with_gradients(gated_attention_ref, leaves, dout, torch.float64, groups=groups)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 4, 2, 20, 20, 16), (1, 2, 2, 30, 9, 16)])
def test_torchs_sdpa_for_gpus(shape):
    """What gated_attention calls for CUDA tensors, here on the CPU."""

    def attention(query, key, value, *, gate, mask=None, is_causal=False, scale=None, window=None):
        rules = Rules(mask, is_causal, module._default_scale(query) if scale is None else scale, window or 0)
        return module._scaled_dot_product(query, key, (value * gate[:, None, None]).to(value.dtype), rules)

    leaves, dout = tensors(shape, torch.float32)
    for mask in [None, *masks(shape, torch.float32).values()]:
        for rule in RULES:
            ours = with_gradients(attention, leaves, dout, torch.float32, mask=mask, **rule)
            exact = with_gradients(gated_attention_ref, leaves, dout, torch.float64, mask=mask, **rule)
            for a, b in zip(ours, exact, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_gradcheck():
    (query, key, value, gate), _ = tensors((1, 2, 2, 3, 4, 4), torch.float64)
    leaves = [t.double().requires_grad_() for t in (query, key, value, gate)]
    mask = torch.rand(1, 1, 3, 4, generator=torch.Generator().manual_seed(0)) > 0.3
    for options in ({"mask": mask}, {"is_causal": True}, {"window": 2}, {"groups": torch.tensor([1, 0])}):
        assert torch.autograd.gradcheck(lambda q, k, v, g, options=options: fused(q, k, v, gate=g, **options), leaves)


def test_opcheck(kernels):
    (query, key, value, gate), _ = tensors((2, 4, 2, 9, 11, 8), torch.bfloat16)
    leaves = [t.requires_grad_() for t in (query, key, value, gate)]
    mask, used = torch.rand(2, 1, 9, 11) > 0.3, torch.rand(2, 11) > 0.1
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*leaves, torch.tensor([1, 0]), mask, used, True, 0.3, 4)
    torch.library.opcheck(torch.ops.ppnet.gated_attention_fused.default, arguments, test_utils=tests)


def test_compile_fullgraph():
    def loss(query, key, value, gate, mask):
        return fused(query, key, value, gate=gate, mask=mask, is_causal=True).float().square().sum()

    leaves, _ = tensors((2, 4, 2, 20, 20, 16), torch.bfloat16)
    mask, results = torch.rand(2, 1, 1, 20) > 0.3, []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = [t.clone().requires_grad_() for t in leaves]
        run(*inputs, mask).backward()
        results.append([t.grad for t in inputs])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced)


def test_autocast():
    (query, key, value, gate), _ = tensors((1, 2, 2, 9, 9, 8), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused(query, key.bfloat16(), value, gate=gate).dtype == torch.bfloat16


def test_autocast_is_that_of_the_tensors_device():
    cpu, half = torch.zeros(1, 2, 9, 8), torch.zeros(1, 2, 9, 8).bfloat16()
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            query, key = (torch.empty(1, 2, 9, 8, device="cuda", dtype=t) for t in (torch.float32, torch.bfloat16))
            module._check(query, key, query, None, None, None, None)
        for device in ("cpu", "meta"):
            with pytest.raises(RuntimeError, match=r"key has shape .* and dtype torch.bfloat16"):
                gated_attention(cpu.to(device), half.to(device), cpu.to(device))
    finally:
        torch.set_autocast_enabled("cuda", before)


@emulated.needs_emulator
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(query=torch.zeros(2, 4, 5, 16)), r"query has dtype Float; allowed are BFloat16 and Half"),
        (dict(query=torch.zeros(2, 4, 5, 12).half()), r"query has Dh = 12; allowed are multiples of 8 up to 256"),
        (dict(value=torch.zeros(2, 2, 6, 16).half()), r"value has shape .*; it must be the shape of key"),
        (
            dict(key=torch.zeros(2, 3, 7, 16).half(), value=torch.zeros(2, 3, 7, 16).half()),
            r"query has 4 heads for 3 KV groups",
        ),
        (dict(groups=torch.tensor([[0]])), r"groups has shape \(1, 1\); it must be \(G,\)"),
        (dict(gate=torch.ones(2).half()), r"gate has dtype Half; it must be Float"),
        (dict(mask=torch.ones(5, 7, dtype=torch.bool)), r"mask has shape \(5, 7\); it must have four axes"),
        (dict(mask=torch.ones(1, 1, 5, 7, dtype=torch.int64)), r"mask has dtype Long; allowed are Bool"),
        (dict(used=torch.ones(7, dtype=torch.bool)), r"used has shape \(7,\); it must be \(B, S\) = \(2, 7\)"),
        (dict(window=-1), r"window is -1; allowed are positions >= 1, or 0"),
    ],
)
def test_errors_of_the_kernel(change, message):
    names = dict(gate=None, groups=None, mask=None, used=None, is_causal=True, scale=1.0, window=0)
    arguments = dict(query=torch.zeros(2, 4, 5, 16).half(), key=torch.zeros(2, 2, 7, 16).half())
    arguments = arguments | dict(value=arguments["key"]) | names | change
    with emulated.emulated(), pytest.raises(RuntimeError, match="gated_attention_fused: " + message):
        torch.ops.ppnet.gated_attention_fused(**arguments)


@emulated.needs_emulator
@pytest.mark.parametrize("seed", emulated.SEEDS)
@pytest.mark.parametrize("groups", [[0, 2], [-1, 0]])
def test_emulated_group_out_of_range(groups, seed):
    (query, key, value, _), _ = tensors((1, 2, 2, 9, 9, 64), torch.bfloat16)
    with emulated.emulated(seed), pytest.raises(RuntimeError, match=r"gated_attention_kernel.*groups out of range"):
        fused(query, key, value, groups=torch.tensor(groups))


def test_errors():
    query, key = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)
    with pytest.raises(RuntimeError, match='path is "flash"; allowed are "fused" and None'):
        gated_attention(query, key, key, path="flash")
    with pytest.raises(RuntimeError, match=r"groups has shape \(1, 1\) and dtype torch.int64; it must be \(G,\) int64"):
        gated_attention(query, key, key, groups=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"query has 4 heads, which is no multiple of the groups' 3"):
        gated_attention(query, key, key, groups=torch.tensor([0, 1, 0]))
    with pytest.raises(RuntimeError, match=r"gate has shape \(2,\) .* it must be \(G,\) = \(1,\) and floating"):
        gated_attention(query, key, key, groups=torch.tensor([1]), gate=torch.ones(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [*SHAPES, (2, 8, 2, 1000, 1333, 64), (2, 8, 2, 700, 700, 128), (1, 4, 2, 500, 900, 256)]
)
def test_gpu(shape, dtype):
    """The kernels of a GPU against the reference in float64 and in dtype, there."""
    leaves, dout = tensors(shape, dtype, device="cuda")
    batch, _, _, tokens, keys, _ = shape
    padded = (torch.arange(keys, device="cuda") >= torch.arange(batch, device="cuda")[:, None])[:, None, None]
    bias = torch.randn(tokens, keys, device="cuda", dtype=dtype)
    for arguments in [*RULES, {"mask": padded, "is_causal": True}, {"mask": bias}]:
        ours, torchs = (with_gradients(f, leaves, dout, dtype, **arguments) for f in (fused, gated_attention_ref))
        again = with_gradients(fused, leaves, dout, dtype, **arguments)
        wide = {n: t.double() if n == "mask" and t.is_floating_point() else t for n, t in arguments.items()}
        exact = with_gradients(gated_attention_ref, leaves, dout, torch.float64, **wide)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        for a, b, x in zip(ours[:4], torchs[:4], exact[:4], strict=True):
            assert_as_accurate(a, b, x)
        assert_gate_gradient(ours[4], torchs[4], exact[4], leaves, dout, dtype, **wide)
