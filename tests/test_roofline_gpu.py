"""The roofline on a GPU, with a fake one: how providers are timed there, and what of the cases differs."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from test_roofline import FakeMachine, fake_case, fake_row, result_of

from ppnet.roofline import case as cases
from ppnet.roofline import measure
from ppnet.roofline import result as results
from ppnet.roofline.case import OPERATORS, copies, each
from ppnet.roofline.result import Result
from ppnet.roofline.timing import GpuTimed


def test_copies_on_a_gpu_exceed_its_cache_where_memory_permits(monkeypatch):
    free = [100 << 30]
    properties = types.SimpleNamespace(L2_cache_size=60 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 0))
    assert len(copies(object, 64 << 10, "cuda")) == 3 * 60 * 16
    assert len(copies(object, 1e9, "cuda")) == 2 and len(copies(object, 1, "cuda")) == cases.MOST_ON_GPU
    free[0] = 64 << 20
    assert len(copies(object, 64 << 10, "cuda")) == 128 and len(copies(object, 1e9, "cuda")) == 2


class FakeGpu:
    """Calls cost what launching takes, unless they are captured: then a replay costs what their kernels take."""

    def __init__(self, launch, refuses=False):
        self.launch, self.refuses, self.seconds, self.kernels = launch, refuses, 0.0, None

    def kernel(self, seconds):
        def run():
            if self.kernels is None:
                self.seconds += max(seconds, self.launch)
            else:
                self.kernels.append(seconds)

        return run

    def capture(self, run):
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.kernels = []
        run()
        captured, self.kernels = self.kernels, None

        def replay():
            self.seconds += sum(captured)

        replay.kernels = len(captured)
        return replay

    def elapsed(self, run):
        start = self.seconds
        run()
        return self.seconds - start


def test_short_kernels_are_timed_in_a_graph():
    gpu = FakeGpu(launch=1e-5)
    kernel, seen = gpu.kernel(2e-6), []

    def run(i):
        seen.append(i)
        kernel()

    timed = GpuTimed(each(range(100), run), gpu, 0.02)
    assert timed.how == "graph" and timed.sample() == pytest.approx(2e-6) and timed.eager() == pytest.approx(1e-5)
    # A graph of 100 calls takes 0.2 ms.
    assert timed.calls == pytest.approx(100 * 100, abs=100) and set(seen) == set(range(100))
    few = GpuTimed(each(range(3), lambda i: kernel()), gpu, 0.02)
    assert few._replay.kernels == 18  # whole passes, at least LEAST_CALLS
    long = GpuTimed(each(range(3), lambda i: gpu.kernel(0.1)()), gpu, 0.02)
    assert long._replay.kernels == 3 and long.calls == 3 and long.sample() == pytest.approx(0.1)


def test_what_cannot_be_captured_is_timed_as_it_is_called():
    gpu = FakeGpu(launch=1e-5, refuses=True)
    timed = GpuTimed(gpu.kernel(2e-6), gpu, 0.02)
    assert timed.how == "eager" and timed.sample() == pytest.approx(1e-5) and timed.eager() is None
    assert timed.calls == 1000


def test_a_row_of_a_gpu_says_how_it_was_timed(tmp_path):
    gpu, refusing = FakeGpu(launch=1e-5), FakeGpu(launch=1e-5, refuses=True)
    machine = FakeMachine(copy=10.0)
    owner = {}

    def setup():
        owner.update({gpu.kernel(4e-6): gpu, refusing.kernel(4e-6): refusing})
        return dict(zip(("ppnet", "synchronising"), owner, strict=True))

    machine.timed = lambda run: GpuTimed(run, owner[run], cases.WINDOW)
    row = measure(fake_case(setup), machine, seconds=0.0, least=2)
    assert row.timing == {"ppnet": "graph", "synchronising": "eager"} and list(row.eager) == ["ppnet"]
    assert row.faster["synchronising"] == pytest.approx(2.5) and row.eager["ppnet"].median == pytest.approx(1e-5)
    result = result_of(row)
    (tmp_path / "result.json").write_text(result.to_json())
    assert Result.load(tmp_path) == result
    head, *lines = (line.split(",") for line in result.to_csv().splitlines())
    found = [dict(zip(head, line, strict=True)) for line in lines]
    assert [(one["timing"], one["eager seconds"]) for one in found] == [("graph", "1e-05"), ("eager", "")]


def test_a_case_that_fails_does_not_end_a_run_on_a_gpu(monkeypatch, tmp_path):
    class Gpu(FakeMachine):
        def __init__(self, device, rounds):
            super().__init__(copy=10.0)

        def to_dict(self):
            return result_of().machine

    def fails():
        raise RuntimeError("CUDA error: an illegal memory access")

    def succeeds():
        return {"ppnet": lambda: None}

    made = [fake_case(fails, variant="bad"), fake_case(succeeds, variant="good")]
    monkeypatch.setattr(results, "Machine", Gpu)
    monkeypatch.setattr(results, "chosen", lambda *given: made)
    monkeypatch.setattr(results, "off_the_default_stream", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        results, "measure", lambda case, *given, **named: case.setup() and fake_row(variant=case.variant)
    )
    found = results.run(size="tiny", device="cuda")
    assert [row.variant for row in found.rows] == ["good"] and "illegal" in found.failed["fake: bad, fp32"]
    (tmp_path / "result.json").write_text(found.to_json())
    assert Result.load(tmp_path) == found
    with pytest.raises(RuntimeError, match="illegal"):
        results.run(size="tiny", device="cpu")


def test_decode_attention_goes_to_64_sequences_of_32768_positions():
    for size in ("full", "quick"):
        made = list(OPERATORS["gated_attention_decode"](size, torch.device("cuda")))
        swept = {(case.shape["batch"], case.shape["keys"]) for case in made if case.keep == 1}
        assert swept == {(batch, keys) for batch in (1, 8, 64) for keys in (1024, 8192, 32768)}
        labels = [(case.label, *case.shape.values(), case.keep) for case in made]
        assert len(labels) == len(set(labels))


def test_decode_attention_of_many_sequences_agrees(monkeypatch):
    """The sweep of a GPU, on the CPU."""
    from ppnet.roofline.cases import gated_attention_decode as attention

    for repeatable in (attention.REPEATABLE, 0):
        monkeypatch.setattr(attention, "REPEATABLE", repeatable)
        for dtype, heads, kv, width, keys, batch, keeps in attention._on_gpu("tiny"):
            for keep in keeps:
                made = attention._providers(batch, heads, kv, width, keys, keep, dtype, torch.device("cpu"))
                want = made["ppnet"]()
                assert want.shape[0] == batch and ("eager" in made) == (repeatable > 0)
                for name in made.keys() - {"ppnet", "dense"}:
                    torch.testing.assert_close(made[name](), want, atol=0.02, rtol=0.02, msg=name)
