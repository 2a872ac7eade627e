"""On a GPU, the instructions of csrc/cuda/prim.h give what the emulator gives, register for register."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest
import torch
from planted import run

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))

pytestmark = [
    emulated.needs_emulator,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(NVCC is None, reason="needs nvcc"),
]


def compile_planted(folder: Path, arch: str) -> ctypes.CDLL:
    """planted_prim.cu as a library, by nvcc."""
    source, library = ROOT / "tests" / "cuda" / "planted_prim.cu", folder / "planted_prim.so"
    options = ["-std=c++17", "-O3", f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([str(NVCC), *options, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> ctypes.CDLL:
    major, minor = torch.cuda.get_device_capability()
    return compile_planted(tmp_path_factory.mktemp("planted"), f"sm_{major}{minor}")


def small(*shape: int) -> torch.Tensor:
    """Integers: products and sums are exact in any order."""
    return torch.randint(-8, 9, shape).float()


def cases():
    """(kernel, a, b, shape and dtype of out, n)"""
    for name, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        yield f"mma_{name}", small(32, 8).to(dtype), small(32, 4).to(dtype), (32, 4), torch.float32, 0
        yield f"tile_{name}", small(64, 96).to(dtype), small(96, 64).to(dtype), (64, 64), torch.float32, 96
        yield f"rounding_{name}", torch.randn(999) * 1e-3, None, (999,), torch.int32, 999
    for form in ("x1", "x2", "x4", "x1_trans", "x2_trans", "x4_trans"):
        rows = torch.arange(64 * 8, dtype=torch.int16).view(64, 8)
        yield f"ldmatrix_{form}", rows, torch.randperm(64)[:32].int(), (32, 4), torch.int32, 0
    for size in (4, 8, 16):
        for n in range(size + 1):
            yield f"copy_{size}", torch.randint(1, 99, (64, 16), dtype=torch.int8), None, (64, 16), torch.int8, n
    for name, dtype in (
        ("int", torch.int32),
        ("long", torch.int64),
        ("float", torch.float32),
        ("double", torch.double),
    ):
        for n in (0, 1, 3, 8, 16, 31):
            yield f"shuffles_{name}", (torch.randn(32) * 1e6).to(dtype), None, (6, 4, 32), dtype, n
    yield "votes", torch.randint(0, 2, (32,), dtype=torch.int32), None, (32, 8), torch.int32, 0
    yield "atomics", torch.zeros(1), None, (14,), torch.int32, 0
    yield "places", torch.zeros(1), None, (720,), torch.int32, 0


def test_gpu_gives_what_the_emulator_gives(planted):
    torch.manual_seed(0)
    for name, a, b, shape, dtype, n in cases():
        expected = run(name, a, torch.zeros(shape, dtype=dtype), b, n=n)
        on_gpu = [t.cuda() if t is not None else None for t in (a, b, torch.zeros(shape, dtype=dtype))]
        pointers = [ctypes.c_void_p(t.data_ptr() if t is not None else None) for t in on_gpu]
        torch.cuda.synchronize()
        assert planted.ppnet_planted_prim(name.encode(), *pointers, ctypes.c_int(n)) == 0, name
        torch.cuda.synchronize()
        assert torch.equal(on_gpu[2].cpu(), expected), (name, n)
