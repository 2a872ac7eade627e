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
SCRATCHPAD = 1 << 20  # bytes, of oneDNN's products: the one allowance that is measured and not derived


def threads() -> int:
    return torch.get_num_threads()


@dataclass
class Call:
    run: Callable[[], Any]
    workspace: float = 0  # bytes: what its docstring says, beside the outputs
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
    # Of the weights the first has its units along the rows, the second along the contiguous axis.
    gather = 2 * 4 * KEPT + ROWS / 8 + threads() * 5000
    scatter = 2 * 4 * (ROWS + 2 * KEPT) + ROWS / 8 + 4 * ROWS + 4 * ROWS * WIDTH / 64 + threads() * 5000
    return {
        "gather_rows": Call(lambda: ops.gather_rows(both, twice, [scale, None], [0, 1]), gather),
        "scatter_rows": Call(
            lambda: ops.scatter_rows(grad, twice, [scale, scale], [0, 1], [ROWS, ROWS], both), scatter
        ),
        "row_norms": Call(lambda: ops.row_norms(both, [scale[:WIDTH]] * 2, [0, 1]), 4 * ROWS * WIDTH / 256),
        "row_norms_backward": Call(
            lambda: torch.ops.ppnet.row_norms_backward(norm, norm, both, [scale[:WIDTH]] * 2, [0, 1], True, True),
            2 * 4 * (ROWS + WIDTH) + 4 * ROWS / 256 * WIDTH,
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

    matrix, activations, index = 4 * KEPT * WIDTH, 4 * TOKENS * KEPT, 3 * 4 * KEPT
    # While the last gradient is made: u and g, h, the gradient of one weight's kept rows; and y, which is autograd's.
    backward = 3 * activations + matrix + 4 * TOKENS * WIDTH + 4 * (ROWS + 2 * KEPT) + threads() * 5000
    return {
        "gated_act": Call(lambda: ops.gated_act(u, g, z)),
        "gated_act_backward": Call(lambda: ops.gated_act_backward(u, u, g, z, "silu"), 4 * ROWS * 4 * TOKENS / 32),
        "gated_mlp": Call(
            lambda: ops.gated_mlp(x, **weights),
            3 * matrix + 3 * activations + index + threads() * 5000 + SCRATCHPAD,
            False,
        ),
        "gated_mlp_backward": Call(train, backward + SCRATCHPAD, across_threads=False),
        "linear": Call(lambda: ops.linear(x, up), SCRATCHPAD, across_threads=False),
    }


def decode_calls() -> dict[str, Call]:
    tokens, dtype = 4, torch.bfloat16
    x, up, gate, down = (randn(n, WIDTH, dtype=dtype) for n in (tokens, ROWS, ROWS, ROWS))
    idx, z, h = kept(), randn(KEPT), randn(tokens, KEPT, dtype=dtype)
    query = randn(2, 32, tokens, 128, dtype=dtype)
    key, value = randn(2, 8, 1000, 128, dtype=dtype), randn(2, 8, 1000, 128, dtype=dtype)

    angles = randn(1, 1000, 128, dtype=dtype)

    def padded(width: int) -> int:  # a token in its dtype and in float32
        return (2 + 4) * tokens * (width + 64)

    sums = 32 * 4 * tokens * (WIDTH + 64)
    attention = 4 * 2 * 32 * tokens * 2 * (128 + 2) + threads() * (72 * 1024 + 4 * (32 // 8) * tokens * (128 + 512))
    return {
        "linear_decode": Call(lambda: ops.linear_decode(x, up, idx=idx), padded(WIDTH)),
        "linears_decode": Call(lambda: ops.linears_decode(x, [up, gate], idx=[idx, None]), padded(WIDTH)),
        "linear_t_decode": Call(lambda: ops.linear_t_decode(h, down, idx=idx, z=z), padded(KEPT) + sums),
        "gated_mlp_decode": Call(lambda: ops.gated_mlp_decode(x, up, down, gate, idx=idx, z=z), padded(WIDTH) + sums),
        "gated_attention_decode": Call(lambda: ops.gated_attention_decode(query, key, value), attention),
        "rms_norm": Call(lambda: ops.rms_norm(up, up[0], 1e-6)),
        "rotary": Call(lambda: ops.rotary(key, value[:, :5], angles, angles)),
        **layer_calls(),
    }


def layer_calls() -> dict[str, Call]:
    """A decoder layer of 16 heads in 4 KV groups, for 2 sequences of 2 new tokens each."""
    sequences, tokens, heads, groups, width, dtype = 2, 2, 16, 4, 64, torch.bfloat16
    x, norm = randn(sequences, tokens, WIDTH, dtype=dtype), randn(WIDTH, dtype=dtype)
    weight = [randn(n * width, WIDTH, dtype=dtype) for n in (heads, groups, groups)]
    angles, turn = randn(1, tokens, width, dtype=dtype), randn(width, dtype=dtype)
    query = randn(sequences, heads, tokens, width, dtype=dtype)
    key, value = (randn(sequences, groups, 700, width, dtype=dtype) for _ in range(2))
    out, up, down, gate = (randn(n, WIDTH, dtype=dtype) for n in (heads * width, ROWS, ROWS, ROWS))
    idx, z, few = kept(), randn(KEPT), sequences * tokens
    padded = (2 + 4) * few * (WIDTH + 64)  # the tokens in their dtype and in float32
    sums = 32 * 4 * few * (WIDTH + 64)
    per_thread = 72 * 1024 + 4 * (heads // groups) * tokens * (width + 512)
    attention = 4 * sequences * heads * tokens * 2 * (width + 2) + threads() * per_thread
    return {
        "qkv_decode": Call(
            lambda: ops.qkv_decode(x, norm, 1e-6, weight, [None] * 3, angles, angles, q_norm=turn, k_norm=turn),
            2 * few * (WIDTH + 2 * (heads + groups) * width) + padded,
        ),
        "attend_mlp_decode": Call(
            lambda: ops.attend_mlp_decode(x, query, key, value, out.t(), norm, 1e-6, up, down.t(), gate, idx=idx, z=z),
            2 * few * (heads * width + 2 * WIDTH) + max(attention, padded + sums),
        ),
    }


def attention_calls() -> dict[str, Call]:
    """In bfloat16, on the path that the processor gets, and in float32, which is torch's flash attention everywhere."""
    heads, kv_heads, tokens, width = 8, 4, 512, 64
    mask, gate = randn(tokens, tokens) > -1, randn(kv_heads)

    def trained(dtype: torch.dtype) -> list[Tensor]:
        shapes = [(1, n, tokens, width) for n in (heads, kv_heads, kv_heads)]
        return [randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]

    half, full = trained(torch.bfloat16), trained(torch.float32)

    def train(leaves: list[Tensor]) -> Any:
        y = ops.gated_attention(*leaves, is_causal=True)
        return torch.autograd.grad(y, leaves, leaves[0].detach())

    def call(leaves: list[Tensor], **rules: Any) -> Any:
        with torch.no_grad():
            return ops.gated_attention(*leaves, **rules)

    def flash(blocks: int) -> int:
        return threads() * blocks * 4 * 256 * (512 + 2 + width)

    queries, keys, lse = heads * tokens * width, kv_heads * tokens * width, 4 * heads * tokens
    gemm, rule = 2 * heads * 256 * tokens, 2 * 256 * tokens  # a block of scores; a causal rule within it
    scores = tokens * tokens
    return {
        "gated_attention": Call(
            lambda: call(half, is_causal=True), max(2 * gemm + 2 * queries + rule, flash(1)) + lse + SCRATCHPAD, False
        ),
        # Beside the workspace the output, which is autograd's.
        "gated_attention_backward": Call(
            lambda: train(half),
            max(3 * gemm + 2 * 2 * queries + 3 * 4 * keys + rule, flash(2) + 2 * (queries + 2 * keys))
            + 2 * queries
            + lse
            + SCRATCHPAD,
            False,
        ),
        "gated_attention float32": Call(
            lambda: call(full, mask=mask, gate=gate), 3 * 4 * keys + (4 + 3) * scores + flash(1) + lse, False
        ),
        "gated_attention_backward float32": Call(
            lambda: train(full), 4 * (queries + 2 * keys) + flash(2) + 4 * queries + 2 * lse, False
        ),
    }


def calls() -> dict[str, Call]:
    return {**rows_calls(), **mlp_calls(), **decode_calls(), **attention_calls()}


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


def rise(call: Call) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    result = call.run()
    return {
        "rise": resident("VmHWM") - before,
        "allowed": output_bytes(result) + call.workspace,
    }


def main() -> None:
    # Code pages, threads' stacks, oneDNN's primitives; not the decode operators, which keep their working memory.
    for call in (rows_calls() | mlp_calls() | attention_calls()).values():
        call.run()
    print(json.dumps({name: rise(call) for name, call in calls().items()}))


if __name__ == "__main__":
    main()
