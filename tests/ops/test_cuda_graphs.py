"""Every kernel in a CUDA graph and on a stream of its own, without hidden synchronisation, against the same call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import every_kernel
import pytest
import torch
from torch import Tensor

CALLS = [
    pytest.param(dtype, name, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for dtype in every_kernel.NARROW
    for name, _, _ in every_kernel.calls(dtype)
]
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def call_of(dtype: torch.dtype, name: str, device: str) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
    """A call as a function of nothing, which gives its outputs in a row, and its inputs."""
    call, arguments = next((call, given) for found, call, given in every_kernel.calls(dtype) if found == name)
    placed = [every_kernel.on(device, argument) for argument in arguments]
    inputs = every_kernel.flat(placed)
    return lambda: every_kernel.flat(call(*placed)), inputs


@torch.no_grad()
def change(inputs: list[Tensor]) -> None:
    """Other values in the same memory: indices and lengths in another order, numbers too, and halved."""
    for t in inputs:
        t.copy_(t.flip(0) / 2 if t.is_floating_point() else t.flip(0))


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """torch's operators that wait for the GPU are errors within."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def agree(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        largest = other.double().abs().max().clamp_min(1e-6).item() if other.numel() else 1.0
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=every_kernel.allowed(dtype) * largest)


def captured(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], Any]]:
    """(Outputs, replay) of a graph; after one call to warm up, which loads kernels and library workspaces."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), no_synchronisation():
        outputs = run()
    return outputs, graph.replay


def check_replay(
    dtype: torch.dtype,
    name: str,
    device: str,
    capture: Callable[[Callable[[], list[Tensor]]], tuple[list[Tensor], Callable[[], Any]]],
) -> None:
    """Captured with some values and replayed with others, twice: what a call gives for those."""
    run, inputs = call_of(dtype, name, device)
    outputs, replay = capture(run)
    for _ in range(2):
        change(inputs)
        for t in outputs:
            t.fill_(torch.nan if t.is_floating_point() else -1)
        replay()
        agree([t.clone() for t in outputs], run(), dtype)


@pytest.mark.parametrize(("dtype", "name"), [pytest.param(*p.values, id=p.id, marks=on_gpu) for p in CALLS])
def test_in_a_graph(dtype, name):
    check_replay(dtype, name, "cuda", captured)


@pytest.mark.parametrize(("dtype", "name"), [pytest.param(*p.values, id=p.id, marks=on_gpu) for p in CALLS])
def test_on_a_stream_of_its_own(dtype, name):
    """Inputs that arrive late on that stream: a kernel on another one would read what was there before."""
    run, inputs = call_of(dtype, name, "cuda")
    run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), no_synchronisation():
        torch.cuda._sleep(20_000_000)  # about 10 ms
        change(inputs)
        found = run()
    torch.cuda.synchronize()
    agree(found, run(), dtype)


@pytest.mark.parametrize("dtype", every_kernel.NARROW, ids=str)
def test_the_check_itself(dtype):
    """With a graph that is no graph, on the CPU; one that replays old values is found out."""

    def capture(run):
        outputs = run()

        def replay():
            for t, new in zip(outputs, run(), strict=True):
                t.copy_(new)

        return outputs, replay

    def stale(run):
        outputs, first = run(), run()
        return outputs, lambda: [t.copy_(old) for t, old in zip(outputs, first, strict=True)]

    for name, _, _ in every_kernel.calls(dtype):
        check_replay(dtype, name, "cpu", capture)
        with pytest.raises(AssertionError):
            check_replay(dtype, name, "cpu", stale)
