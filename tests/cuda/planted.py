"""Runs the kernels of planted_bugs.cu and planted_prim.cu, by name, in the emulator."""

import ctypes

import emulated
from torch import Tensor


class KernelError(Exception):
    """What the emulator found."""


def run(name: str, a: Tensor, out: Tensor, b: Tensor | None = None, n: int = 0, seed: int = 0) -> Tensor:
    """Runs the kernel on contiguous tensors and returns `out`. Errors: KernelError with the emulator's message."""
    assert emulated.library is not None
    assert a.is_contiguous() and out.is_contiguous() and (b is None or b.is_contiguous())
    launchers = (emulated.library.ppnet_planted_bug, emulated.library.ppnet_planted_prim)
    pointers = [ctypes.c_void_p(t.data_ptr() if t is not None else None) for t in (a, b, out)]
    with emulated.seeded(seed):
        for launcher in launchers:
            error = launcher(name.encode(), *pointers, ctypes.c_int(n))
            if error > 0:
                raise KernelError(emulated.library.ppnet_emulator_message().decode())
            if error == 0:
                return out
    raise ValueError(f"no planted kernel is named {name}")
