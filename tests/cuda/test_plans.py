"""How the CUDA kernels divide a call: every row and position once, workspaces that hold it, within a GPU's limits."""

import ctypes
import itertools

import emulated

pytestmark = emulated.needs_emulator
SIZES = {0: 4, 1: 2, 2: 2}  # of an element of f32, bf16, f16, as csrc/cpu/dtype.h numbers them
WIDTHS = (1, 7, 8, 172, 768, 2048, 4096, 8192, 8200, 12288, 16384, 16392, 40000)
KEPT = (0, 1, 7, 63, 64, 65, 1408, 14336, 100_278)
SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10}  # of a block
SMS = 132


def asked(name, *arguments, answers):
    plan = (ctypes.c_int64 * answers)()
    getattr(emulated.library, f"ppnet_{name}")(*arguments, plan)
    return list(plan)


def linear_t_chunks(dtype, tokens, width, kept):
    function = emulated.library.ppnet_linear_t_chunks
    function.restype = ctypes.c_int64
    return function(dtype, *map(ctypes.c_int64, (tokens, width, kept)))


def pitch(width):
    return -(-width // 8) * 8


def test_chunks_of_linear_t_decode():
    for dtype, tokens, width, kept in itertools.product(SIZES, (1, 2, 3, 8), WIDTHS, KEPT):
        chunks = linear_t_chunks(dtype, tokens, width, kept)
        strips = -(-width * SIZES[dtype] // 512)
        assert 1 <= chunks <= max(1, -(-kept // 64))
        assert chunks == 1 or chunks * strips <= 3 * SMS
        begins = [kept * c // chunks for c in range(chunks + 1)]  # chunk_begin of decode_kernels.h
        assert begins[0] == 0 and begins[-1] == kept and (kept == 0 or begins == sorted(set(begins)))


def test_groups_of_linears_decode():
    for dtype, tokens, width, first in itertools.product(SIZES, (1, 2, 4, 8), WIDTHS, KEPT):
        kept = [first, 5, 0]
        threads, per_warp, tile, tile_bytes, groups, blocks = asked(
            "linear_plan", dtype, ctypes.c_int64(tokens), ctypes.c_int64(width), (ctypes.c_int64 * 3)(*kept),
            ctypes.c_int64(3), answers=6,
        )  # fmt: skip
        rows = threads // 32 * per_warp
        assert groups == sum(-(-k // rows) for k in kept) and 1 <= blocks <= min(groups, 3 * SMS)
        assert tile > 0 and tile * SIZES[dtype] % 16 == 0
        assert tile_bytes == tokens * tile * SIZES[dtype] <= SHARED["sm_89"]


def test_gated_mlp_decode():
    fell_back = set()
    for dtype, tokens, width, kept, gated, gpu in itertools.product(
        SIZES, (1, 2, 3, 8), WIDTHS, KEPT, (False, True), SHARED
    ):
        sizes = map(ctypes.c_int64, (tokens, width, kept))
        fused, threads, vectors, group, shared, chunks, floats = asked(
            "mlp_plan", dtype, *sizes, int(gated), ctypes.c_int64(SHARED[gpu]), answers=7
        )
        row = tokens * pitch(width)
        assert floats >= 2 * tokens * kept + linear_t_chunks(dtype, tokens, width, kept) * row
        if not fused:
            fell_back.add((dtype, tokens, width, gated, gpu))
            continue
        assert threads % 32 == 0 and threads <= 512 and vectors in (1, 2, 4) and group in (1, 2, 4)
        assert threads * vectors * 16 >= width * SIZES[dtype] and shared <= SHARED[gpu]
        assert 1 <= chunks <= max(1, kept) and floats >= chunks * row
    # The one kind of size whose result depends on the GPU, as csrc/cuda/decode.h says.
    assert {w for d, t, w, gated, gpu in fell_back if gpu == "sm_90" and (d, t, gated) == (1, 1, True)} == {
        16392,
        40000,
    }
    narrower = {8200, 12288, 16384}
    assert {w for d, t, w, gated, gpu in fell_back if gpu == "sm_89" and (d, t, gated) == (1, 1, True)} == narrower | {
        16392,
        40000,
    }


def test_parts_of_gated_attention_decode():
    for dtype, batch, groups, (per_group, tokens), keys, width, window in itertools.product(
        SIZES,
        (1, 64),
        (1, 8),
        ((1, 1), (4, 1), (7, 3), (16, 8)),
        (1, 15, 1024, 32_768, 1_000_000),
        (7, 64, 256),
        (0, 512),
    ):
        sizes = (ctypes.c_int64 * 7)(batch, groups, per_group, tokens, keys, width, window)
        tensor_cores, tiles, splits, floats = asked("decode_plan", dtype, sizes, answers=4)
        assert tensor_cores == (SIZES[dtype] == 2 and width % 8 == 0)
        rows, most = per_group * tokens, 8 if tensor_cores else 4
        assert tiles == -(-rows // most) and 1 <= splits <= 128
        assert floats == (batch * groups * splits * rows * (width + 2) if splits > 1 else 0)
        # part_of of decode_positions.h, whatever the length and the window are.
        for length in {0, 1, keys // 3, keys}:
            newest, oldest = length, max(0, length - tokens + 1 - window) if window else 0
            each = -(-max(0, newest - oldest) // (splits * 16)) * 16
            ends = [min(oldest + s * each, newest) for s in range(splits + 1)]
            assert ends[0] == min(oldest, newest) and ends[-1] == newest
