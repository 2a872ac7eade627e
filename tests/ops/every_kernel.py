"""Every operator with CUDA kernels, once per dtype, at small odd shapes: against the same call on the CPU.

As a program it is what compute-sanitizer watches on a GPU (benchmarks/gpu.sh); where there is none it runs the emulated
kernels. Its arguments are the dtypes: float32, bfloat16, float16; default: all. Shapes cross tiles and warps in every
direction, and none of them is a multiple of anything.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import emulated
import layers
import torch
from accuracy import EPSILON
from torch import Tensor

from ppnet import ops

NARROW = (torch.float32, torch.bfloat16, torch.float16)
WIDTH, UNITS, KEPT, TOKENS = 172, 71, 37, 7


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(n * 31**i for i, n in enumerate(shape)))
    return (torch.randn(*shape, generator=generator) / 4).to(dtype)


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [t for each in results for t in flat(each)]


def calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[..., Any], list[Any]]]:
    """Names, functions of the arguments, and the arguments: tensors, lists of them, or what no device minds."""
    torch.manual_seed(0)
    x, up, gate, down = (randn(n, WIDTH, dtype=dtype) for n in (TOKENS, UNITS, UNITS, UNITS))
    idx = torch.randperm(UNITS, generator=torch.Generator().manual_seed(0))[:KEPT]
    z, bias = randn(KEPT), randn(UNITS, dtype=dtype)
    both, grad = [up, up.t().contiguous()], [down[:KEPT], gate[:KEPT].t().contiguous()]
    yield "gather_rows", lambda w, i, s: ops.gather_rows(w, [i, i], [s, None], [0, 1]), [both, idx, z]
    yield (
        "scatter_rows",
        lambda g, w, i, s: ops.scatter_rows(g, [i, i], [s, s], [0, 1], [UNITS, UNITS], w),
        [grad, both, idx, z],
    )
    yield "row_norms", lambda w, s: ops.row_norms(w, [s, s], [0, 1]), [both, randn(WIDTH)]

    def norms(w: list[Tensor], s: Tensor) -> Any:
        leaves = [t.detach().requires_grad_() for t in (*w, s)]
        ours = ops.row_norms(leaves[:2], [leaves[2], leaves[2]], [0, 1])
        return torch.autograd.grad(sum(y.square().sum() for y in ours), leaves)

    yield "row_norms_backward", norms, [both, randn(WIDTH)]
    yield "gated_act", lambda u, g, s: ops.gated_act(u, g, s), [up, gate, randn(WIDTH)]
    yield (
        "gated_act_backward",
        lambda d, u, g, s: ops.gated_act_backward(d, u, g, s, "gelu"),
        [down, up, gate, randn(WIDTH)],
    )
    yield "linear_decode", lambda a, w, b, i: ops.linear_decode(a, w, b, idx=i), [x, up, bias, idx]
    yield "linears_decode", lambda a, w, v, i: ops.linears_decode(a, [w, v], idx=[i, None]), [x, up, gate, idx]
    yield "linear_t_decode", lambda a, w, i, s: ops.linear_t_decode(a, w, idx=i, z=s), [x[:, :KEPT], down, idx, z]
    yield (
        "gated_mlp_decode",
        lambda a, u, d, g, i, s: ops.gated_mlp_decode(a, u, d, g, idx=i, z=s),
        [x, up, down, gate, idx, z],
    )
    yield "rms_norm", lambda a, w: ops.rms_norm(a, w, 1e-6), [up, gate[0]]
    query, key, value = (randn(2, n, s, 24, dtype=dtype) for n, s in ((6, 3), (3, 133), (3, 133)))
    angles = randn(2, 3, 24, dtype=dtype)
    yield "rotary", lambda q, k, a: ops.rotary(q, k, a, a), [query, key[:, :, :3], angles]
    groups, gates, lengths = torch.tensor([2, 0]), randn(2), torch.tensor([133, 40])
    yield (
        "gated_attention_decode",
        lambda q, k, v, g, s, n: ops.gated_attention_decode(q, k, v, groups=g, gate=s, lengths=n, window=100),
        [query[:, :4], key, value, groups, gates, lengths],
    )
    layer = layers.attend(2, 3, 72, 6, 2, 24, dtype, keys=133, neurons=UNITS, kept="odd", bias=True, z=True)
    names = [name for name, value in layer.items() if isinstance(value, Tensor)]
    yield (
        "attend_mlp_decode",
        lambda *given: ops.attend_mlp_decode(**layer | dict(zip(names, given, strict=True))),
        [layer[name] for name in names],
    )
    first = layers.qkv(2, 3, 72, 6, 2, 24, dtype, "odd", True, True)
    parts = [first["x"], first["norm"], first["weight"], first["bias"], first["idx"], first["q_norm"], first["k_norm"]]
    yield (
        "qkv_decode",
        lambda a, n, w, b, i, q, k, t: ops.qkv_decode(a, n, 1e-5, w, b, t, t, idx=i, q_norm=q, k_norm=k),
        [*parts, randn(2, 3, 24, dtype=dtype)],
    )
    if dtype == torch.float32:
        return
    tokens = randn(70, WIDTH, dtype=dtype)
    yield (
        "gated_mlp_fused",
        lambda a, u, d, g, i, s: ops.gated_mlp_fused(a, u, d, g, idx=i, z=s),
        [tokens, up, down, gate, idx, z],
    )
    query, key, value = (randn(2, n, 75, 64, dtype=dtype) for n in (4, 3, 3))

    def attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Any:
        q, k, v, s = (t.detach().requires_grad_() for t in (q, k, v, s))
        y = ops.gated_attention(q, k, v, gate=s, groups=g, is_causal=True, path="fused")
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), (q, k, v, s))]

    yield "gated_attention_fused", attention, [query, key, value, groups, gates]


def on(device: str, argument: Any) -> Any:
    return [on(device, each) for each in argument] if isinstance(argument, list) else argument.to(device)


def errors(dtype: torch.dtype, device: str) -> Iterator[tuple[str, float]]:
    """For every call of a dtype its name, and how far the kernels of CUDA are from those of the CPU, of the largest."""
    for name, call, arguments in calls(dtype):
        expected = flat(call(*arguments))
        if device == "cuda":
            found = [t.cpu() for t in flat(call(*on(device, arguments)))]
        else:
            with emulated.emulated():
                found = flat(call(*arguments))
        yield (
            name,
            max(
                ((one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-6)).item()
                for one, other in zip(found, expected, strict=True)
                if other.numel()
            ),
        )


def allowed(dtype: torch.dtype) -> float:
    return 8 * EPSILON[dtype]


def chosen(names: list[str]) -> list[torch.dtype]:
    """The dtypes of these names; none: all."""
    known = {str(dtype).removeprefix("torch."): dtype for dtype in NARROW}
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"every_kernel: {', '.join(unknown)} is no dtype of the kernels; known are {', '.join(known)}")
    return [known[name] for name in names] or list(NARROW)


def main(names: list[str]) -> int:
    wrong, dtypes = 0, chosen(names)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and emulated.library is None:
        sys.exit("every_kernel: neither a GPU nor the emulated kernels (PPNET_EMULATOR=ON) are here")
    for dtype in dtypes:
        for name, error in errors(dtype, device):
            bad = not error <= allowed(dtype)
            wrong += bad
            print(f"{name:24} {str(dtype).removeprefix('torch.'):9} {error:.1e}{'  WRONG' if bad else ''}")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
