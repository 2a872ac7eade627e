"""The emulator finds every planted bug, and none in the same kernels without it."""

import os

import emulated
import pytest
import torch
from planted import KernelError, run

pytestmark = emulated.needs_emulator

N = 256
SEEDS = range(1, 9)


def floats(n: int) -> torch.Tensor:
    return torch.arange(1, n + 1, dtype=torch.float32)


def moved(x: torch.Tensor) -> torch.Tensor:
    """What write_after_read computes: four rounds of taking the next thread's value."""
    for _ in range(4):
        x = torch.cat([x[1:-1], x[-2:]])
    return x


def copied_sums(a: torch.Tensor, width: int) -> torch.Tensor:
    return a.view(-1, width).flip(1).sum(0)


# name: input, expected output, n, whether threads that take turns reveal the bug
RACES = {
    "read_after_write": (floats(N), floats(N).flip(0), 0, True),
    "write_after_read": (floats(N), moved(floats(N)), 0, False),
    "warp_synchronous": (floats(32), floats(32).flip(0), 0, True),
    "missing_wait": (floats(4 * N), floats(4 * N).flip(0), 0, True),
    "pipeline": (floats(5 * 32), copied_sums(floats(5 * 32), 32), 5, True),
    "copy_too_early": (floats(6 * 64), copied_sums(floats(6 * 64), 64), 6, False),
}


@pytest.mark.parametrize("name", RACES)
def test_correct_kernels_pass_under_every_seed(name):
    a, expected, n, _ = RACES[name]
    for seed in (0, *SEEDS):
        assert torch.equal(run(name, a, torch.zeros_like(expected), n=n, seed=seed), expected), seed


@pytest.mark.parametrize("name", RACES)
def test_races_are_found(name):
    a, expected, n, by_turns = RACES[name]
    found = [
        not torch.equal(run(f"{name}!", a, torch.zeros_like(expected), n=n, seed=s), expected) for s in (0, *SEEDS)
    ]
    assert found[0] == by_turns
    assert any(found[1:3]), "the seeds of the operators' tests"


def test_a_seed_repeats_its_order():
    for seed in SEEDS:
        first, second = (run("write_after_read!", floats(N), torch.zeros(N), seed=seed) for _ in range(2))
        assert torch.equal(first, second)


# name: n, message
MISUSES = {
    "divergent_barrier": (32, r"__syncthreads, while thread \(\d+, 0, 0\) waits in the __syncthreads of another line"),
    "early_return": (77, "__syncthreads"),
    "late_barrier": (77, "__syncthreads"),
    "half_a_shuffle": (16, r"waits in __(shfl_sync|syncthreads), while .* waits in __(shfl_sync|syncthreads)"),
    "returned_lane": (3, r"returned"),
    "unlike_masks": (16, r"__ballot_sync with mask 0x\w+, while lane \d+ waits in __ballot_sync with mask 0x\w+"),
    "lane_outside_of_mask": (1, r"__shfl_down_sync reads lane 16, which is not in the mask 0x0000ffff"),
    "not_in_own_mask": (0xFFF0, r"__shfl_sync with mask 0x0000fff0, which does not name the calling lane"),
    "unlike_operations": (16, r"with mask 0xffffffff, while lane \d+ waits in __"),
    "misaligned_copy": (1, r"cp_async of 16 bytes from 0x\w+ to 0x\w+, which must be aligned to them"),
    "misaligned_row": (1, "ldmatrix of a row that is not aligned to 16 bytes"),
    "copied_shared_write": (N, "cp_async to an address outside of shared memory"),
    "failing_assertion": (77, "assertion failed: .*planted"),
}


@pytest.mark.parametrize("seed", emulated.SEEDS)
@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_an_error_with_its_place(name, seed):
    n, message = MISUSES[name]
    with pytest.raises(KernelError, match=message) as error:
        run(name, floats(N), torch.zeros(N), n=n, seed=seed)
    text = str(error.value)
    assert f"emulated kernel {name}(Arguments), block (0, 0, 0), thread (" in text
    assert "planted_bugs.cu:" in text and f" ({name})" in text
    assert (f", seed {seed}:" in text) == (seed > 0)
    if name == "failing_assertion":
        assert "thread (77, 0, 0)" in text
    # The next launch is as good as the first.
    a, expected, _, _ = RACES["read_after_write"]
    assert torch.equal(run("read_after_write", a, torch.zeros(N)), expected)


@pytest.mark.parametrize("name, message", [("too_many_threads", "1 .. 1024 threads"), ("too_much_shared", "227 KB")])
def test_launches_that_a_gpu_refuses(name, message):
    with pytest.raises(KernelError, match=message):
        run(name, floats(1), torch.zeros(1))


def test_write_beyond_dynamic_shared_memory_is_found():
    if emulated.sanitized:
        pytest.skip("AddressSanitizer ends the process there")
    for index in (N, -1, N + 100):
        with pytest.raises(KernelError, match="wrote outside of its 1024 bytes of dynamic shared memory"):
            run("dynamic_shared_write", floats(N), torch.zeros(N), n=index)


OUT_OF_BOUNDS = [
    "static_shared_read",
    "static_shared_write",
    "dynamic_shared_read",
    "dynamic_shared_write",
    "global_read",
    "copied_global_read",
]


def in_child(name: str, n: int) -> tuple[int, str]:
    """Runs the kernel in a child process, which a report ends: its status and what it wrote."""
    a, out = floats(N), torch.zeros(N)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        try:
            run(name, a, out, n=n)
        except KernelError:
            os._exit(3)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


@pytest.mark.skipif(not emulated.sanitized, reason="needs AddressSanitizer: make sanitize")
@pytest.mark.parametrize("index", [N, -1])
@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_out_of_bounds_is_reported_by_address_sanitizer(name, index):
    assert in_child(name, N - 1) == (0, "")
    status, report = in_child(name, index)
    assert status != 0
    assert "ERROR: AddressSanitizer" in report and "planted_bugs.cu" in report
