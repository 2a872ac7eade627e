"""How a provider is timed: by the host's clock on a processor, by events around replays of a CUDA graph on a GPU.

A kernel of some microseconds runs shorter than a launch from Python takes. On a GPU a provider's calls over all of its
inputs are therefore captured once into a graph, whose replays are timed; what it takes as it is called is told beside
it ("eager"), so that the cost of launching is seen. A provider that cannot be captured, because it synchronises or
replays graphs of its own, is timed as it is called, by events, and marked so.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import torch

How = Literal["host", "graph", "eager"]
Run = Callable[[], Any]
LEAST_CALLS = 16  # in a graph, unless they take long


class Timed(Protocol):
    """One provider, warmed up. `how` it is timed; `calls`: per sample."""

    how: How
    calls: int

    def sample(self) -> float:
        """Seconds per call, measured now."""

    def eager(self) -> float | None:
        """Seconds per call as it is called from Python, where `sample` is of a graph."""


class HostTimed:
    """`calls` in a row between two looks at a clock that waits for queued work."""

    how: How = "host"

    def __init__(self, run: Run, now: Callable[[], float], window: float) -> None:
        self._run, self._now, self.calls = run, now, 1
        run()
        once = min(self.sample() for _ in range(3))
        self.calls = min(1000, max(1, math.ceil(window / max(once, 1e-7))))

    def sample(self) -> float:
        start = self._now()
        for _ in range(self.calls):
            self._run()
        return (self._now() - start) / self.calls

    def eager(self) -> float | None:
        return None


class Gpu(Protocol):
    """What timing needs of a GPU."""

    def capture(self, run: Run) -> Run:
        """A function that replays the kernels that `run` launches. RuntimeError where they cannot be captured."""

    def elapsed(self, run: Run) -> float:
        """Seconds on the GPU between what is queued before and after `run`."""


class GpuTimed:
    """Replays of a graph of whole passes over all inputs of a provider (its length); else calls from Python."""

    def __init__(self, run: Run, gpu: Gpu, window: float) -> None:
        self._run, self._gpu = run, gpu
        self._inputs = max(1, len(run)) if hasattr(run, "__len__") else 1
        run()  # compiles, loads kernels, tunes
        self._eager_calls = 1
        once = min(self._called() for _ in range(3))
        self._eager_calls = min(1000, max(1, math.ceil(window / max(once, 1e-7))))
        # Between two replays a GPU rests for a microsecond or two: a graph of some calls makes little of it.
        passes = min(math.ceil(LEAST_CALLS / self._inputs), math.ceil(window / 2 / max(once * self._inputs, 1e-7)))
        self._captured = max(1, passes) * self._inputs
        self.how: How = "graph"
        try:
            self._replay = gpu.capture(self._passes)
        except RuntimeError:
            self.how, self.calls = "eager", self._eager_calls
            return
        replay = min(gpu.elapsed(self._replay) for _ in range(2))
        self._replays = min(1000, max(1, math.ceil(window / max(replay, 1e-7))))
        self.calls = self._replays * self._captured

    def sample(self) -> float:
        if self.how == "eager":
            return self._called()

        def replays() -> None:
            for _ in range(self._replays):
                self._replay()

        return self._gpu.elapsed(replays) / self.calls

    def eager(self) -> float | None:
        return self._called() if self.how == "graph" else None

    def _passes(self) -> None:
        for _ in range(self._captured):
            self._run()

    def _called(self) -> float:
        def calls() -> None:
            for _ in range(self._eager_calls):
                self._run()

        return self._gpu.elapsed(calls) / self._eager_calls


class Cuda:
    """A GPU through torch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # One stream for warming up and capturing: libraries keep a workspace for each.
        self._own = torch.cuda.Stream(device)

    def capture(self, run: Run) -> Run:
        current = torch.cuda.current_stream(self.device)
        stream = self._own if current == torch.cuda.default_stream(self.device) else current
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            run()
        current.wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads of the process (compilers', the profiler's) do not spoil the capture.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                run()
            graph.replay()
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            torch.cuda.set_stream(current)  # a capture that fails at its end leaves its own
            del graph
            gc.collect()
            # The error of a spoilt capture must not come up in the next call. One of a kernel does, again and again.
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize(self.device)
            raise
        return graph.replay

    def elapsed(self, run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            torch.cuda.synchronize(self.device)
            start.record()
            run()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) * 1e-3


@contextlib.contextmanager
def off_the_default_stream(device: torch.device) -> Iterator[None]:
    """A stream that can be captured, where there are streams: backward passes run on that of their forward."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
    torch.cuda.synchronize(device)
