"""gather_rows and scatter_rows against index_select and index_copy: GB/s and percent of copy bandwidth.

Run: make bench, or python -m pytest benchmarks/bench_rows.py --benchmark-only. Bytes are those that must move (whole
rows where columns are taken, since every cache line holds some); copy bandwidth also counts bytes read + written.
"""

import itertools

import pytest
import torch

import ppnet.extension as extension
from ppnet.ops import gather_rows, scatter_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D, F, KEEP = 4096, 11008, 0.5
WEIGHTS = 2  # rotated, so that no cache holds them: 2 x 90 MB in bf16


def copy_bandwidth():
    """GB/s of copying 256 MB here, read and written."""
    if DEVICE == "cpu":
        return extension.host().copy_bandwidth(256 << 20, torch.get_num_threads())
    src = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    out, times = torch.empty_like(src), []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        out.copy_(src)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return 2 * src.numel() / min(times) * 1e-9


@pytest.fixture(scope="module", autouse=True)
def reuse_memory():
    """Both sides are measured without page faults: those of a fresh output take longer than the copy."""
    if DEVICE == "cpu" and extension.available():
        extension.host().keep_freed_memory()


def measure(benchmark, run, bytes_moved):
    def timed():
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=15, warmup_rounds=3)
    copy = copy_bandwidth()
    rate = bytes_moved / benchmark.stats.stats.median * 1e-9
    benchmark.extra_info |= {
        "GB/s": round(rate, 1),
        "copy GB/s": round(copy, 1),
        "% of copy": round(100 * rate / copy),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else extension.isa(),
        "torch": torch.__version__,
        "D": D,
        "F": F,
        "keep": KEEP,
    }
    print(f"\n{benchmark.name}: {rate:.1f} GB/s, {100 * rate / copy:.0f} % of copy ({copy:.1f} GB/s)")


def case(dim, dtype):
    shape = (F, D) if dim == 0 else (D, F)
    weights = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(WEIGHTS)]
    idx = torch.randperm(F, device=DEVICE)[: int(KEEP * F)].sort().values
    scale = torch.rand(len(idx), device=DEVICE)
    return itertools.cycle(weights), idx, scale, weights[0].element_size() * D


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("provider", ["ppnet", "ppnet-scaled", "index_select"])
def test_gather(benchmark, provider, dim, dtype):
    weights, idx, scale, row = case(dim, dtype)
    z = scale if provider == "ppnet-scaled" else None

    def run():
        if provider == "index_select":
            return next(weights).index_select(dim, idx)
        return gather_rows([next(weights)], [idx], [z], [dim])

    measure(benchmark, run, row * (2 * len(idx) if dim == 0 else len(idx) + F))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("provider", ["ppnet", "ppnet-scaled-dot", "index_copy"])
def test_scatter(benchmark, provider, dim, dtype):
    weights, idx, scale, row = case(dim, dtype)
    grad = next(weights).index_select(dim, idx)

    def run():
        weight = next(weights)
        if provider == "index_copy":
            return torch.zeros_like(weight).index_copy_(dim, idx, grad)
        if provider == "ppnet":
            return scatter_rows([grad], [idx], [None], [dim], [F], [None])
        return scatter_rows([grad], [idx], [scale], [dim], [F], [weight])

    read = len(idx) if provider != "ppnet-scaled-dot" else len(idx) + (F if dim == 1 else len(idx))
    measure(benchmark, run, row * (read + F))
