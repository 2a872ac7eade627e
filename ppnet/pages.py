"""Large pages below weights: with pages of 4 KB a decoding step waits for page tables as well as for the weights.

What torch allocates has pages of 4 KB unless the system is set otherwise (`THP_MEM_ALLOC_ENABLE=1`, glibc's hugetlb
tunable, transparent huge pages on "always").
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from torch import Tensor

import ppnet.extension as extension

PAGE = 2 << 20  # bytes
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def available() -> bool:
    """Whether this system has large pages that a process may ask for, and the compiled module to ask with."""
    with suppress(OSError, RuntimeError):
        return bool(extension.host()) and "[never]" not in SWITCH.read_text()
    return False


def use_large_pages(weights: Iterable[Tensor]) -> None:
    """Gives weights on the CPU large pages, in place, where the system can (Linux 6.1): addresses and values stay.

    Files mapped into memory, as safetensors maps them, keep their pages: a copy of them was not faster.
    """
    if available():
        for weight in weights:
            if weight.device.type == "cpu" and weight.nbytes >= PAGE:
                extension.host().use_large_pages(weight.data_ptr(), weight.nbytes)
