"""The CUDA kernels on the CPU: `ppnet/_emulated.so` (csrc/emulator), which `PPNET_EMULATOR=ON` builds for tests."""

import contextlib
import ctypes
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ppnet

PATH = Path(ppnet.__file__).with_name("_emulated.so")


def _load() -> ctypes.CDLL | None:
    if not PATH.is_file():
        return None
    torch.ops.load_library(PATH)
    library = ctypes.CDLL(str(PATH))
    library.ppnet_emulator_set_seed.argtypes = [ctypes.c_uint64]
    library.ppnet_emulator_seed.restype = ctypes.c_uint64
    library.ppnet_emulator_message.restype = ctypes.c_char_p
    return library


library = _load()
needs_emulator = pytest.mark.skipif(library is None, reason="ppnet/_emulated.so was not built (PPNET_EMULATOR=ON)")
sanitized = library is not None and bool(library.ppnet_emulator_sanitized())
ORDERS = (0, 1, 2)  # 0: threads take turns; the others run ahead of each other in orders of their own
# AddressSanitizer looks at addresses, which do not depend on the order, and takes several times as long.
SEEDS = [1] if sanitized else list(ORDERS)


def operators() -> list[str]:
    """Names of the operators that have emulated kernels."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    return sorted(name.split("::")[1] for name in names if name.startswith("ppnet_emulated::"))


def _define() -> torch.library.Library:
    """Gives every emulated operator the schema of its original."""
    defined = torch.library.Library("ppnet_emulated", "FRAGMENT")
    for name in operators():
        schema = str(getattr(torch.ops.ppnet, name).default._schema)
        defined.define(schema.removeprefix("ppnet::"))
    return defined


_defined = _define()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The order of the threads within."""
    assert library is not None
    before = library.ppnet_emulator_seed()
    library.ppnet_emulator_set_seed(seed)
    try:
        yield
    finally:
        library.ppnet_emulator_set_seed(before)


@contextlib.contextmanager
def emulated(seed: int = 0) -> Iterator[None]:
    """ppnet's operators compute with the emulated CUDA kernels within, on CPU tensors; those without one as ever."""
    kernels = torch.library.Library("ppnet", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            for name in operators():
                kernels.impl(name, getattr(torch.ops.ppnet_emulated, name).default, "CPU")
        with seeded(seed):
            yield
    finally:
        kernels._destroy()
