"""What holds of every operator alike: concurrent calls, reproducible bits, memory."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from every_operator import calls, flat, output_bytes

import ppnet
import ppnet.extension as extension

CALLS = calls()
compiled = pytest.mark.skipif(not extension.available(), reason="the working memory of plain torch is its own")
every_operator = pytest.mark.parametrize("name", CALLS)


def equal(a, b):
    return all(torch.equal(s, t) for s, t in zip(flat(a), flat(b), strict=True))


@every_operator
def test_concurrent_calls(name):
    """Two Python threads at once: each gets what a call alone gives."""
    run = CALLS[name].run
    expected, wrong, start = run(), [], threading.Barrier(2)

    def repeat():
        start.wait()
        try:
            wrong.extend("another result" for _ in range(2) if not equal(run(), expected))
        except Exception as error:  # reported by the main thread
            wrong.append(error)

    threads = [threading.Thread(target=repeat) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@every_operator
def test_the_same_bits_at_every_run(name, isa):
    """And whatever the number of threads, apart from what the library's matrix products compute."""
    run, before = CALLS[name].run, torch.get_num_threads()
    first = run()
    try:
        for threads in (1, 2, 3) if CALLS[name].across_threads else (before,):
            torch.set_num_threads(threads)
            assert equal(first, run())
    finally:
        torch.set_num_threads(before)


@compiled
@every_operator
def test_allocates_its_outputs_and_workspace(name):
    """What torch's allocator gives: the profiler sees every tensor, also short-lived ones."""
    run = CALLS[name].run
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert peak <= output_bytes(result) + CALLS[name].workspace + 4096


@compiled
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs the peak of the resident memory")
def test_resident_memory_rises_by_outputs_and_workspace():
    """What a process takes, working memory in C++ included, which no profiler sees.

    glibc gives memory of 64 KB and more back at once, so that no call lives on what another one left.
    """
    paths = [str(Path(ppnet.__file__).parents[1]), str(Path(__file__).parent)]
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    env = os.environ | malloc | {"PYTHONPATH": os.pathsep.join(paths)}
    program = Path(__file__).with_name("every_operator.py")
    done = subprocess.run([sys.executable, str(program)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    slack = 6 << 20  # large pages are 2 MB each, and the operators ask for them below large outputs
    for name, found in json.loads(done.stdout).items():
        assert found["rise"] <= found["allowed"] + slack, (name, found)
