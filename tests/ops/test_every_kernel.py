"""every_kernel.py, which compute-sanitizer watches on a GPU, with the emulated kernels: no operator is missing."""

import emulated
import every_kernel
import pytest

pytestmark = emulated.needs_emulator


def test_none_is_left_out():
    named = {name for dtype in every_kernel.NARROW for name, _, _ in every_kernel.calls(dtype)}
    assert {*emulated.operators()} - {"gated_attention_fused_backward"} == named  # which gated_attention_fused calls


@pytest.mark.parametrize("dtype", every_kernel.NARROW, ids=str)
def test_every_kernel(dtype):
    wrong = {name: e for name, e in every_kernel.errors(dtype, "cpu") if not e <= every_kernel.allowed(dtype)}
    assert not wrong
