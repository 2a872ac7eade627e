"""One call of every operator, at a size where threads share it and memory counts, with the memory it may take.

As a program it prints how far the resident memory of this process rises in each call, beyond its arguments, as JSON.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppnet import ops

ROWS, WIDTH, KEPT = 4096, 1024, 2048  # units, features, kept units
TOKENS = 256


@dataclass
class Call:
    run: Callable[[], Any]
    workspace: int = 0  # bytes that its documentation allows beside the outputs
    across_threads: bool = True  # the same bits whatever the number of threads


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape))).to(dtype)


def kept() -> Tensor:
    return torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))[:KEPT]


def rows_calls() -> dict[str, Call]:
    weight, wide, idx, scale = randn(ROWS, WIDTH), randn(WIDTH, ROWS), kept(), randn(KEPT)
    both, twice = [weight, wide], [idx, idx]
    grad = [randn(KEPT, WIDTH), randn(WIDTH, KEPT)]
    norm = [n.detach() for n in ops.row_norms(both, [scale[:WIDTH]] * 2, [0, 1])]
    # A pass reads what it needs of idx and scale into arrays of its own, and a sum of columns one row of sums per block
    # of rows: in float32, of every 64 rows of the dots, of at most 64 for the norms.
    index, dots = 2 * 16 * ROWS, 4 * ROWS * WIDTH // 64
    return {
        "gather_rows": Call(lambda: ops.gather_rows(both, twice, [scale, None], [0, 1]), index),
        "scatter_rows": Call(
            lambda: ops.scatter_rows(grad, twice, [scale, scale], [0, 1], [ROWS, ROWS], both), index + dots
        ),
        "row_norms": Call(lambda: ops.row_norms(both, [scale[:WIDTH]] * 2, [0, 1]), 4 * ROWS * 64),
        "row_norms_backward": Call(
            lambda: torch.ops.ppnet.row_norms_backward(norm, norm, both, [scale[:WIDTH]] * 2, [0, 1], True, True),
            4 * ROWS * 64 + index,
        ),
    }


def mlp_calls() -> dict[str, Call]:
    x, up, gate, down = (randn(n, WIDTH) for n in (TOKENS, ROWS, ROWS, ROWS))
    u, g, z, idx = randn(4 * TOKENS, ROWS), randn(4 * TOKENS, ROWS), randn(ROWS), kept()
    weights = dict(up=up, down=down, gate=gate, idx=idx, z=z[:KEPT])
    trained = [t.clone().requires_grad_() for t in (x, up, down, gate)]

    def train() -> Any:
        y = ops.gated_mlp(*trained, idx=idx, z=z[:KEPT])
        return torch.autograd.grad(y, trained, x)

    scratchpad = 1 << 20  # of oneDNN
    matrix, activations = 4 * KEPT * WIDTH, 4 * TOKENS * KEPT
    return {
        "gated_act": Call(lambda: ops.gated_act(u, g, z)),
        "gated_act_backward": Call(lambda: ops.gated_act_backward(u, u, g, z, "silu"), 4 * ROWS * 4 * TOKENS // 32),
        # The gathered weights, u, g and h; oneDNN's scratchpad.
        "gated_mlp": Call(lambda: ops.gated_mlp(x, **weights), 3 * matrix + 3 * activations + scratchpad, False),
        # Of the full gradients the last one is still gathered: u, g, du or h, and y.
        "gated_mlp_backward": Call(
            train, matrix + 5 * activations + 2 * 4 * TOKENS * WIDTH + scratchpad, across_threads=False
        ),
        "linear": Call(lambda: ops.linear(x, up), scratchpad, across_threads=False),
    }


def decode_calls() -> dict[str, Call]:
    tokens, dtype = 4, torch.bfloat16
    x, up, gate, down = (randn(n, WIDTH, dtype=dtype) for n in (tokens, ROWS, ROWS, ROWS))
    idx, z, h = kept(), randn(KEPT), randn(tokens, KEPT, dtype=dtype)
    query = randn(2, 32, tokens, 128, dtype=dtype)
    key, value = randn(2, 8, 1000, 128, dtype=dtype), randn(2, 8, 1000, 128, dtype=dtype)
    attention = 4 * 2 * 32 * tokens * math.ceil(1000 / 256) * (128 + 2) + torch.get_num_threads() * (1 << 17)
    return {
        "linear_decode": Call(lambda: ops.linear_decode(x, up, idx=idx), 6 * tokens * WIDTH),
        "linear_t_decode": Call(
            lambda: ops.linear_t_decode(h, down, idx=idx, z=z), 4 * 32 * tokens * WIDTH + 6 * tokens * KEPT
        ),
        "gated_mlp_decode": Call(
            lambda: ops.gated_mlp_decode(x, up, down, gate, idx=idx, z=z), 4 * 32 * tokens * WIDTH + 6 * tokens * WIDTH
        ),
        "gated_attention_decode": Call(lambda: ops.gated_attention_decode(query, key, value), attention),
    }


def calls() -> dict[str, Call]:
    return {**rows_calls(), **mlp_calls(), **decode_calls()}


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


def output_bytes(result: Any) -> int:
    return sum(t.numel() * t.element_size() for t in flat(result))


# --- as a program -----------------------------------------------------------------------------------------------------


def resident(what: str) -> int:
    """Bytes: VmRSS now, or VmHWM, its largest value since it was reset."""
    found = re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def rise(call: Call) -> dict[str, int]:
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    result = call.run()
    return {
        "rise": resident("VmHWM") - before,
        "allowed": output_bytes(result) + call.workspace,
    }


def main() -> None:
    # Code pages, threads' stacks, oneDNN's primitives; not the decode operators, which keep their working memory.
    for call in (rows_calls() | mlp_calls()).values():
        call.run()
    print(json.dumps({name: rise(call) for name, call in calls().items()}))


if __name__ == "__main__":
    main()
