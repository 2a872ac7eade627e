"""The emulated instructions: lane for lane against tables, tiles against a plain product, shuffles, atomics."""

import time

import emulated
import pytest
import torch
from fragments import a_element, b_element, collected, d_element, spread
from planted import run

pytestmark = emulated.needs_emulator

HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}
seeds = pytest.mark.parametrize("seed", emulated.SEEDS)
halves = pytest.mark.parametrize("name", HALVES)


@seeds
@halves
def test_mma_is_exact_in_every_lane(name, seed):
    # Integers: the products and their sums are exact in any order.
    a, b, d = (torch.randint(-8, 9, shape).double() for shape in ((16, 16), (16, 8), (16, 8)))
    registers = [spread(m, e, n).to(HALVES[name]) for m, e, n in ((a, a_element, 8), (b, b_element, 4))]
    out = spread(d, d_element, 4).float()
    run(f"mma_{name}", registers[0].contiguous(), out, registers[1].contiguous(), seed=seed)
    assert torch.equal(collected(out, d_element, (16, 8)).double(), a @ b + d)


@halves
def test_mma_rounds_once(name):
    a, b, d = (torch.randn(shape).to(HALVES[name]).double() for shape in ((16, 16), (16, 8), (16, 8)))
    registers = [spread(m, e, n).to(HALVES[name]) for m, e, n in ((a, a_element, 8), (b, b_element, 4))]
    out = spread(d, d_element, 4).float()
    run(f"mma_{name}", registers[0].contiguous(), out, registers[1].contiguous())
    torch.testing.assert_close(collected(out, d_element, (16, 8)), (a @ b + d).float(), rtol=2**-23, atol=1e-30)


@seeds
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_gives_each_lane_its_elements(count, trans, seed):
    rows = torch.arange(64 * 8, dtype=torch.int16).view(64, 8)  # each value is its own place
    named = torch.randperm(64)[:32].int()
    out = torch.full((32, 4), -1, dtype=torch.int32)
    run(f"ldmatrix_x{count}" + "_trans" * trans, rows, out, named, seed=seed)
    halves = out.view(torch.int16).view(32, 4, 2)
    for m in range(count):
        matrix = rows[named[8 * m : 8 * m + 8].long()]
        expected = (matrix.T if trans else matrix).reshape(
            32, 2
        )  # lane: row lane / 4, columns 2 (lane % 4) and the next
        assert torch.equal(halves[:, m], expected)
    assert not out[:, count:].any()


@seeds
@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_fills_with_zeros(size, seed):
    a = torch.randint(1, 100, (64, 16), dtype=torch.int8)
    for n in range(size + 1):
        out = run(f"copy_{size}", a, torch.zeros_like(a), n=n, seed=seed)
        expected = torch.full_like(a, 99)
        expected[:, :size] = 0
        expected[:, :n] = a[:, :n]
        assert torch.equal(out, expected)


@seeds
@halves
@pytest.mark.parametrize("k", [32, 64, 224])
def test_tile_of_a_product(name, k, seed):
    a, b = torch.randn(64, k).to(HALVES[name]), torch.randn(k, 64).to(HALVES[name])
    out = run(f"tile_{name}", a, torch.empty(64, 64), b, n=k, seed=seed)
    exact = a.double() @ b.double()
    assert ((out - exact).abs() <= k / 16 * 2**-23 * (a.double().abs() @ b.double().abs())).all()


def test_a_tile_takes_milliseconds():
    a, b, out = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.empty(64, 64)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run("tile_f16", a, out, b, n=64)
        times.append(time.perf_counter() - start)
    assert min(times) < (0.5 if emulated.sanitized else 0.02)


DTYPES = {"int": torch.int32, "long": torch.int64, "float": torch.float32, "double": torch.float64}


@seeds
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 3, 8, 16, 31])
def test_shuffles_of_every_width(name, n, seed):
    x = (torch.randn(32) * 1e6).to(DTYPES[name])
    out = run(f"shuffles_{name}", x, torch.empty(6, 4, 32, dtype=x.dtype), n=n, seed=seed)
    lanes = torch.arange(32)
    for i, width in enumerate((1, 2, 4, 8, 16, 32)):
        begin = lanes // width * width
        end = begin + width
        sources = [
            begin + n % width,
            torch.where(lanes - n >= begin, lanes - n, lanes),
            torch.where(lanes + n < end, lanes + n, lanes),
            torch.where((lanes ^ n) < end, lanes ^ n, lanes),
        ]
        for j, source in enumerate(sources):
            assert torch.equal(out[i, j], x[source]), (width, ("shfl", "up", "down", "xor")[j])


@seeds
@pytest.mark.parametrize("yes", [0x00000000, 0x0000FFFF, 0x12345678, 0xFFFFFFFF])
def test_votes_of_two_halves(yes, seed):
    bits = torch.tensor([yes >> lane & 1 for lane in range(32)], dtype=torch.int32)
    out = run("votes", bits, torch.empty(32, 8, dtype=torch.int32), seed=seed).long() & 0xFFFFFFFF
    for lane in range(32):
        half = yes & (0xFFFF if lane < 16 else 0xFFFF0000)
        n = half.bit_count()
        assert out[lane].tolist() == [
            *(half, n > 0, n == 16, 0xFFFFFFFF, n),
            *(yes.bit_count(), yes != 0, yes == 0xFFFFFFFF),
        ]


@seeds
def test_atomics(seed):
    out = run("atomics", torch.zeros(1), torch.zeros(7 + 1 + 3 * 2, dtype=torch.int32), seed=seed)
    add, low, high, lock, guarded, exchanged, wrapped = out[:7].tolist()
    assert (add, low, high, lock, guarded, exchanged, wrapped) == (384, -383, 383, 0, 12, 1, 384 % 10)
    assert out[7:8].view(torch.float32).item() == 192
    assert out[8:10].view(torch.float64).item() == 96
    assert out[10:14].view(torch.int64).tolist() == [384 << 33, 7]


@seeds
def test_places_in_a_grid_of_three_dimensions(seed):
    out = run("places", torch.zeros(1), torch.full((4, 3, 2, 2, 3, 5), -1, dtype=torch.int32), seed=seed)
    axes = torch.meshgrid(*(torch.arange(n) for n in out.shape), indexing="ij")
    bz, by, bx, tz, ty, tx = axes
    assert torch.equal(out.long(), bx + 10 * by + 100 * bz + 1000 * tx + 10000 * ty + 100000 * tz)


def test_dynamic_shared_memory_beyond_48_kb_starts_as_nan():
    n = 100 * 1024 // 4
    a = torch.randint(0, 9, (n,)).float()
    out = run("shared_sum", a, torch.zeros(2), n=n)
    assert out[0] == a.sum() and out[1].isnan()


@halves
def test_every_half_widens_and_rounds_as_in_torch(name):
    bits = torch.arange(1 << 16, dtype=torch.int32)
    values = bits.to(torch.int16).view(HALVES[name])
    wide = run(f"widening_{name}", bits, torch.empty(1 << 16), n=1 << 16)
    assert torch.equal(wide.nan_to_num(7.0), values.float().nan_to_num(7.0))
    assert torch.equal(wide.isnan(), values.isnan())
    finite = values[values.isfinite()].float().sort().values
    middle = (finite[1:].double() + finite[:-1].double()).mul(0.5).float()  # ties
    above, below = (torch.nextafter(middle, torch.tensor(s * torch.inf)) for s in (1, -1))
    extreme = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45, 65519.9, 65520.0])
    x = torch.cat([finite, middle, above, below, extreme, torch.randn(1000)])
    out = run(f"rounding_{name}", x, torch.empty(len(x), dtype=torch.int32), n=len(x))
    rounded = out.to(torch.int16).view(HALVES[name])
    expected = x.to(HALVES[name])
    assert torch.equal(rounded.isnan(), expected.isnan())
    number = ~x.isnan()
    assert torch.equal(rounded[number].view(torch.int16), expected[number].view(torch.int16))
