"""A tensor on another device than its call's: the bindings name it; and which GPUs the kernels run on."""

import re
import types

import emulated
import pytest
import torch

import ppnet.extension as extension
from ppnet.ops.linear_decode import has_kernels

HERE, ELSEWHERE = torch.zeros(6, 8), torch.zeros(6, 8, device="meta")
NONE, LONG = torch.zeros(0), torch.zeros(2, dtype=torch.int64, device="meta")
QUERY, CACHE = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 5, 8)
ATTEND = (QUERY, CACHE, CACHE, None, None, None, None, 1.0, 0)


def attend(position, t):
    return (*ATTEND[:position], t, *ATTEND[position + 1 :])


CALLS = [
    ("row_norms", ([ELSEWHERE], [NONE], [0]), r"weight\[0\]"),
    ("row_norms", ([HERE, ELSEWHERE], [NONE, NONE], [0, 0]), r"weight\[1\]"),
    ("row_norms", ([HERE], [ELSEWHERE[0]], [0]), r"input_scale\[0\]"),
    ("row_norms_backward", ([ELSEWHERE[:, 0]], [HERE[:, 0]], [HERE], [NONE], [0], True, False), r"grad\[0\]"),
    ("row_norms_backward", ([HERE[:, 0]], [ELSEWHERE[:, 0]], [HERE], [NONE], [0], True, False), r"norm\[0\]"),
    ("gated_act", (ELSEWHERE, None, None, "silu"), "up"),
    ("gated_act", (HERE, ELSEWHERE, None, "silu"), "gate"),
    ("gated_act", (HERE, None, ELSEWHERE[0], "silu"), "z"),
    ("gated_act_backward", (ELSEWHERE, HERE, None, None, "silu", True, False, False), "dh"),
    ("gated_attention_decode", attend(0, QUERY.to("meta")), "query"),
    ("gated_attention_decode", attend(1, CACHE.to("meta")), "key"),
    ("gated_attention_decode", attend(2, CACHE.to("meta")), "value"),
    ("gated_attention_decode", attend(3, LONG), "groups"),
    ("gated_attention_decode", attend(4, torch.zeros(2, device="meta")), "gate"),
    ("gated_attention_decode", attend(5, torch.zeros(1, 5, device="meta")), "mask"),
    ("gated_attention_decode", attend(6, LONG[:1]), "lengths"),
]


@pytest.mark.parametrize("library", ["ppnet", pytest.param("ppnet_emulated", marks=emulated.needs_emulator)])
@pytest.mark.parametrize("operator, arguments, name", CALLS)
def test_the_bindings_name_a_tensor_on_another_device(operator, arguments, name, library):
    """Called past the dispatcher, which would choose another device's kernel here, but not between two GPUs."""
    if not extension.available():
        pytest.skip("plain torch has its own words for it")
    call = getattr(getattr(torch.ops, library), operator).default
    with pytest.raises(
        RuntimeError, match=rf"{operator}: {name} is not on the CPU; all tensors of a call must be on one"
    ):
        call.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments)


def test_a_gpu_without_an_image_of_the_kernels(monkeypatch):
    """It is told what to do, and its tensors are torch's; asked once for each GPU."""
    asked = []

    def status(device):
        asked.append(device)
        return "ok" if device == 1 else "no kernel image is available for execution on the device"

    monkeypatch.setattr(extension, "_C", types.SimpleNamespace(cuda_status=status))
    monkeypatch.setattr(extension, "_RUN", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())  # some context
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    said = "no kernel image is available .*; build ppnet for it: PPNET_CUDA_ARCHS=100-real pip install ."
    assert re.fullmatch(said, extension.cuda_status(0))
    assert extension.cuda_status(1) == "ok"
    asked.clear()
    on = [types.SimpleNamespace(is_cpu=False, is_cuda=True, device=torch.device("cuda", i)) for i in (0, 1, 0, 1)]
    assert [has_kernels(x) for x in on] == [False, True, False, True] and asked == [0, 1]
    assert has_kernels(torch.zeros(1)) and not has_kernels(torch.zeros(1, device="meta"))


def test_asking_for_kernels_is_a_constant_of_compiled_graphs(monkeypatch):
    monkeypatch.setattr(extension, "_RUN", {0: True})

    @torch.compile(fullgraph=True, backend="eager")
    def add(x):
        return x + 1 if extension.cuda_runs(0) and not extension.cuda_runs(7) else x

    monkeypatch.setitem(extension._RUN, 7, False)
    assert add(torch.zeros(1)) == 1
