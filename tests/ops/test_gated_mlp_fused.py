"""gated_mlp_fused: the emulated tensor-core kernels against float64, their tiles, edges and plans; tracing, errors."""

import ctypes

import emulated
import pytest
import torch
from accuracy import assert_as_accurate
from any_input import Inputs, attempt, spoil
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_any_input import gated_mlp_fused as any_case

from ppnet.ops import gated_mlp, gated_mlp_fused, gated_mlp_fused_ref
from ppnet.ops.gated_act import ACTS

DTYPES = [torch.bfloat16, torch.float16]
TILES = {1: (32, 64), 2: (64, 128), 3: (128, 128)}  # tokens, columns; a gated neuron takes two columns
seeds = pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=emulated.needs_emulator, id=f"emulated-{seed}") for seed in emulated.SEEDS]
)


def rows(n, d, dtype, aligned=True, device="cpu"):
    """A view, so that strides count: rows of 16-byte aligned ones, or of none."""
    if not aligned:
        return (torch.randn(n, d + 6, device=device) / d**0.5).to(dtype)[:, 3 : d + 3]
    return (torch.randn(n, (d + 7) // 8 * 8 + 16, device=device) / d**0.5).to(dtype)[:, 8 : d + 8]


def case(t, f, d, dtype, glu=True, bias=True, aligned=True, device="cpu"):
    arguments = {"x": 3 * rows(t, d, dtype, aligned, device) * d**0.5}
    arguments |= {name: rows(f, d, dtype, aligned, device) for name in ("up", "down", *["gate"] * glu)}
    if bias:
        sizes = {"up_bias": f, "down_bias": d, **({"gate_bias": f} if glu else {})}
        arguments |= {name: torch.randn(n, device=device).to(dtype) for name, n in sizes.items()}
    return arguments


def in_double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check(arguments, idx=None, scaled=True, act="silu", tile=0, split=0):
    kept = arguments["up"].shape[0] if idx is None else len(idx)
    arguments = arguments | {"idx": idx, "z": torch.randn(kept, device=arguments["x"].device) if scaled else None}
    exact = gated_mlp_fused_ref(**{name: in_double(value) for name, value in arguments.items()}, act=act)
    ours = gated_mlp_fused(**arguments, act=act, tile=tile, split=split)
    assert ours.is_contiguous()
    assert_as_accurate(ours, gated_mlp_fused_ref(**arguments, act=act), exact)
    return ours


def selections(f):
    yield None
    for k in sorted({0, 1, f // 2 | 1, f} & set(range(f + 1))):
        yield torch.randperm(f)[:k]


@seeds
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t, f, d", [(1, 1, 1), (7, 172, 7), (33, 7, 172), (172, 33, 1)])
def test_against_float64(t, f, d, dtype, seed):
    """Ragged edges in every direction; rows of odd widths are not aligned, those of (.., 7, 172) to 8 bytes."""
    with emulated.emulated(seed):
        for i, idx in enumerate(selections(f)):
            check(case(t, f, d, dtype, bias=i % 2 == 0, aligned=i % 3 > 0), idx, scaled=i % 2 == 1)


@seeds
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("glu", [True, False])
def test_tiles_are_crossed(tile, glu, seed):
    """By one in tokens, neurons and features, over several stages of 64; in one part and in several."""
    t, columns = TILES[tile]
    f = 3 * (columns // 2 if glu else columns)
    idx = torch.randperm(f)[: f // 3 + 1]
    dtype = DTYPES[(tile + glu) % 2]
    with emulated.emulated(seed):
        arguments = case(t + 1, f, columns + 8, dtype, glu=glu)
        for split in (1, 2):
            check(arguments, idx, tile=tile, split=split)


@seeds
def test_more_stages_than_the_pipeline_holds(seed):
    with emulated.emulated(seed):
        for tile, depth in ((1, 520), (2, 330), (3, 264)):
            check(case(9, depth, depth, torch.bfloat16), torch.randperm(depth)[: depth - 3], tile=tile, split=1)


@seeds
@pytest.mark.parametrize("act", ACTS)
def test_activations(act, seed):
    with emulated.emulated(seed):
        for dtype in DTYPES:
            for glu in (True, False):
                check(case(18, 50, 40, dtype, glu=glu), torch.randperm(50)[:41], act=act)


@seeds
def test_special_values(seed):
    """What the neurons that are kept hold goes through, what others hold does not; so with tokens."""
    with emulated.emulated(seed):
        arguments = case(5, 50, 40, torch.bfloat16, bias=False)
        for name in ("up", "down", "gate"):
            arguments[name][::2] = float("nan")
        kept = torch.arange(1, 50, 2)
        assert not gated_mlp_fused(**arguments, idx=kept).isnan().any()
        arguments["x"][2, 3] = float("inf")
        arguments["x"][3, 5] = float("nan")
        y = gated_mlp_fused(**arguments, idx=kept)
        assert y[2].isnan().any() and y[3].isnan().all() and y[[0, 1, 4]].isfinite().all()


@seeds
def test_layouts(seed):
    """Tokens on leading axes and strided, repeated neurons, an output of another width, weights of the other order."""
    with emulated.emulated(seed):
        arguments = case(24, 30, 16, torch.bfloat16)
        arguments["x"] = arguments["x"].unflatten(0, (4, 3, 2)).transpose(0, 2)
        check(arguments, torch.tensor([4, 4, 29, 0, 4]))
        arguments["x"] = torch.randn(16, 9).bfloat16().t()
        check(arguments | {"down": rows(30, 23, torch.bfloat16), "down_bias": None}, torch.tensor([3, 1, 2]))
        check(arguments | {"down": torch.randn(16, 30).bfloat16().t()}, torch.tensor([3, 1, 2]))  # library path
        check(arguments | {"x": arguments["x"][:1].expand(5, 16)}, torch.arange(7))


@seeds
def test_nothing(seed):
    with emulated.emulated(seed):
        arguments = case(5, 9, 16, torch.bfloat16)
        none = torch.empty(0, dtype=torch.int64)
        assert torch.equal(gated_mlp_fused(**arguments, idx=none), arguments["down_bias"].expand(5, 16))
        assert not gated_mlp_fused(**(arguments | {"down_bias": None}), idx=none).any()
        assert gated_mlp_fused(**(arguments | {"x": arguments["x"][:0]})).shape == (0, 16)
        assert gated_mlp_fused(**(arguments | {"x": torch.zeros(2, 0, 16).bfloat16()})).shape == (2, 0, 16)
        check(case(5, 9, 16, torch.bfloat16) | {"down": torch.empty(9, 0).bfloat16(), "down_bias": None})
        narrow = {name: torch.empty(n, 0).bfloat16() for name, n in (("x", 5), ("up", 9), ("gate", 9))}
        check(arguments | narrow)


@seeds
def test_the_same_bits_at_every_run(seed):
    arguments, idx = case(70, 300, 136, torch.bfloat16), torch.randperm(300)[:171]
    with emulated.emulated(0):
        first = gated_mlp_fused(**arguments, idx=idx, split=3)
    with emulated.emulated(seed):
        assert torch.equal(gated_mlp_fused(**arguments, idx=idx, split=3), first)


@seeds
@pytest.mark.parametrize("idx", [[0, 9], [-1, 0]])
def test_idx_out_of_range(idx, seed):
    with (
        emulated.emulated(seed),
        pytest.raises(RuntimeError, match=r"hidden_kernel.*assertion failed: .* out of range"),
    ):
        gated_mlp_fused(**case(2, 9, 8, torch.bfloat16), idx=torch.tensor(idx))


@emulated.needs_emulator
def test_plans():
    """Every size has a plan that fits: no part of the neurons is empty, tiles grow with the work."""
    found = {}
    for t in (1, 16, 17, 64, 100, 128, 256, 512, 1024, 100_000):
        for d in (1, 768, 2048, 4096):
            for k in (1, 65, 1408, 2816, 14336):
                chosen = (ctypes.c_int32 * 3)()
                emulated.library.ppnet_gated_mlp_plan(*map(ctypes.c_int64, (t, d, d, k)), 1, chosen)
                hidden, down, splits = chosen
                assert hidden in TILES and down in TILES and 1 <= splits <= min(16, -(-k // 64))
                found[t, d, k] = tuple(chosen)
    # 16 tokens: small tiles and many parts, to fill 132 SMs; 1024: large ones, and one part.
    assert found[16, 2048, 2816][:2] == (1, 1) and found[16, 2048, 2816][2] > 1
    assert found[1024, 2048, 2816] == (3, 3, 1) == found[100_000, 4096, 14336]
    emulated.library.ppnet_gated_mlp_plan(*map(ctypes.c_int64, (5, 8, 8, 0)), 1, chosen)
    assert chosen[2] == 0


@seeds
def test_as_a_path_of_gated_mlp(seed):
    arguments = case(19, 40, 24, torch.bfloat16) | {"idx": torch.tensor([4, 2, 29]), "z": torch.rand(3)}
    with emulated.emulated(seed):
        fused = gated_mlp_fused(**arguments)
        assert torch.equal(gated_mlp(**arguments, path="fused"), fused)
        trained = {n: t.clone().requires_grad_(n in ("x", "up")) for n, t in arguments.items()}
        assert gated_mlp(**trained, path="fused").requires_grad  # the library's
        with torch.no_grad():
            assert torch.equal(gated_mlp(**trained, path="fused"), fused)
        wide = {n: t.float() if t.is_floating_point() else t for n, t in arguments.items()}
        assert torch.equal(gated_mlp(**wide, path="fused"), gated_mlp(**wide))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(gated_mlp(**(wide | {"x": arguments["x"].float()}), path="fused"), fused)
    with pytest.raises(RuntimeError, match="gated_mlp: path is 'gathered'; allowed are library and fused"):
        gated_mlp(**arguments, path="gathered")


@pytest.mark.parametrize("seed", [None, pytest.param(0, marks=emulated.needs_emulator)])
def test_tracing_compile_and_export(seed):
    arguments = case(6, 30, 16, torch.bfloat16) | {"idx": torch.tensor([4, 2, 29]), "z": torch.rand(3)}
    names = ("x", "up", "down", "gate", "up_bias", "gate_bias", "down_bias", "idx", "z")
    x, weights = arguments["x"].clone(), {name: arguments[name].clone() for name in names[1:]}

    class Mlp(torch.nn.Module):
        def forward(self, x):
            return gated_mlp(x, **weights, path="fused")

    def run():
        expected = Mlp()(x)
        assert torch.equal(torch.compile(Mlp(), fullgraph=True, backend="aot_eager")(x), expected)
        assert torch.equal(torch.export.export(Mlp(), (x,)).module()(x), expected)

    if seed is None:
        torch.library.opcheck(torch.ops.ppnet.gated_mlp_fused.default, (x, *weights.values(), "silu"))
        run()
    else:
        with emulated.emulated(seed):
            run()


@pytest.mark.parametrize("seed", [None, pytest.param(0, marks=emulated.needs_emulator)])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.randn(2, 5).bfloat16()}, r"up has shape \(4, 6\); for x of \(2, 5\) it must be \(F, D\)"),
        ({"down": torch.randn(3, 6).bfloat16()}, r"down has shape \(3, 6\); it must be \(F, D\) with F = 4"),
        ({"gate": torch.randn(4, 6)}, "gate has dtype torch.float32; without autocast it must be x's"),
        ({"gate": None}, "gate_bias is given, but gate is None"),
        ({"up_bias": torch.randn(3).bfloat16()}, r"up_bias has shape \(3,\)"),
        ({"x": torch.randn(2, 6).bfloat16().requires_grad_()}, "not differentiable.*use gated_mlp"),
    ],
)
def test_errors(changes, message, seed):
    def attempt():
        with pytest.raises(RuntimeError, match=f"gated_mlp_fused: {message}"):
            gated_mlp_fused(**(case(2, 4, 6, torch.bfloat16) | changes))

    if seed is None:
        attempt()
    else:
        with emulated.emulated(seed):
            attempt()


@emulated.needs_emulator
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.randn(2, 6)}, "x has dtype Float; allowed are BFloat16 and Half"),
        ({"x": torch.randn(2, 5).bfloat16()}, r"x has shape \(2, 5\); it must be \(T, D\), D that of up = \(any, 6\)"),
        ({"down": torch.randn(6, 4).bfloat16().t()}, r"down of shape \(4, 6\) has strides .*unit by unit"),
        ({"gate": torch.randn(4, 6).half()}, "gate has dtype Half; it must be BFloat16"),
        ({"gate_bias": torch.randn(4).bfloat16(), "gate": None}, "gate_bias is given, but gate is not"),
        ({"down_bias": torch.randn(4).bfloat16()}, r"down_bias has shape \(4,\)"),
        ({"idx": torch.tensor([1], dtype=torch.int32)}, "idx has dtype Int; it must be Long"),
        ({"z": torch.rand(3)}, r"z has shape \(3,\); it must be \(K,\) = \(4,\)"),
        ({"z": torch.rand(4).double()}, "z has dtype Double; it must be Float"),
        ({"act": "tanh"}, 'act is "tanh"; allowed are silu, gelu, gelu_tanh, relu and relu2'),
        ({"tile": 4}, "tile is 4; allowed are 1"),
        ({"split": -1}, "split is -1; allowed are 0"),
    ],
)
def test_errors_of_the_kernels_binding(changes, message):
    with_all = {name: None for name in ("up_bias", "gate_bias", "down_bias", "idx", "z")} | {"act": "silu"}
    with_all |= case(2, 4, 6, torch.bfloat16, bias=False) | changes
    with emulated.emulated(), pytest.raises(RuntimeError, match=f"gated_mlp_fused: {message}"):
        torch.ops.ppnet.gated_mlp_fused(**with_all)


@emulated.needs_emulator
@settings(
    deadline=None, derandomize=True, max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(data=st.data())
def test_any_input(data):
    """Any shape, layout and value, and arguments of which one is wrong; indices out of range stop the kernel."""
    inputs = Inputs(data)
    case = any_case(inputs)
    case.indices = {}
    spoiled = inputs.flag(0.3)
    if spoiled:
        spoil(case, inputs)
    with emulated.emulated(inputs.pick(emulated.SEEDS)):
        attempt(case, spoiled)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t, f, d", [(1, 1, 1), (7, 172, 7), (33, 7, 172), (16, 1024, 512), (200, 700, 264)])
def test_gpu(t, f, d, dtype):
    for idx in selections(f):
        idx = None if idx is None else idx.cuda()
        for glu in (True, False):
            for aligned in (True, False):
                arguments = case(t, f, d, dtype, glu=glu, aligned=aligned, device="cuda")
                for tile in (0, *TILES):
                    for split in (0, 3):
                        y = check(arguments, idx, tile=tile, split=split)
                        assert y.shape == (t, d)
