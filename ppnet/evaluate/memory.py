"""How much memory something takes: the peak of torch's own allocations while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], Any]) -> int:
    """Bytes that torch's CPU allocator holds at most during ``run()``, above what it held before.

    What was allocated before and is freed in `run` counts as negative. Working memory of operators that does not come
    from torch's allocator is not seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    live = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most
