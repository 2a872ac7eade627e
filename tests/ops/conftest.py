"""Fixtures of the operators' tests: every instruction set of this processor, one and two threads."""

import contextlib
import zlib

import emulated
import pytest
import torch

import ppnet.extension as extension


@pytest.fixture(autouse=True)
def seed(request):
    """The same random values in every run of a test, whichever others run with it."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


ISAS = extension.supported_isas() or ["torch"]
EMULATED = [pytest.param(seed, id=f"emulated-{seed}", marks=emulated.needs_emulator) for seed in emulated.SEEDS]


@contextlib.contextmanager
def chosen(isa):
    if isa != "torch":
        extension.set_isa(isa)
    yield
    if isa != "torch":
        extension.set_isa("auto")


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set this processor has; "torch" without the extension."""
    with chosen(request.param):
        yield request.param


@pytest.fixture(params=[*ISAS, *EMULATED])
def kernels(request):
    """As isa; and "cuda", the CUDA kernels on the CPU, in several orders of their threads."""
    if isinstance(request.param, int):
        with emulated.emulated(request.param):
            yield "cuda"
    else:
        with chosen(request.param):
            yield request.param


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=[*EMULATED, pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request):
    """Where tensors go for the CUDA kernels alone: the CPU, emulated under one seed; or a GPU."""
    if request.param == "cuda":
        yield "cuda"
    else:
        with emulated.emulated(request.param):
            yield "cpu"


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
