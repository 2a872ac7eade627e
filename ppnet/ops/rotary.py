"""rotary: rotary position embedding of queries and keys in one pass (Su et al. 2021, as transformers lays it out).

y[d] = x[d] cos[d] - x[d + Dh/2] sin[d]    d < Dh/2
y[d] = x[d] cos[d] + x[d - Dh/2] sin[d]    else
"""

import torch
from torch import Tensor

from ppnet.ops.library import LIBRARY, define, explain, refuse_gradient, same_device

# The operator's own results are (B, T, H, Dh), contiguous.
define("rotary(Tensor query, Tensor key, Tensor cos, Tensor sin) -> (Tensor, Tensor)")

# The packet torch.ops.ppnet.rotary looks its overload up at every call.
_rotary = torch.ops.ppnet.rotary.default


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions' angles.

    Args:
        query: ``(B, H, T, Dh)`` float32, bfloat16 or float16; Dh even. key: ``(B, Hkv, T, Dh)`` of its dtype.
        cos, sin: ``(B, T, Dh)`` or ``(1, T, Dh)`` of its dtype.

    Returns:
        Both, of the same shapes and dtype, laid out as ``(B, T, H, Dh)``; computed in float32, rounded once. Not
        differentiable: it is for generation. Nothing is allocated beside them, and once more what is not contiguous.

    Raises:
        RuntimeError: naming the argument and what is allowed.
    """
    try:
        refuse_gradient("rotary", "transformers' apply_rotary_pos_emb", query, key, cos, sin)
        turned_query, turned_key = _rotary(query, key, cos, sin)
        return turned_query.transpose(1, 2), turned_key.transpose(1, 2)
    except Exception as error:
        explain(error, rotary, locals())
        raise


def rotary_ref(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """rotary in plain torch."""

    def turn(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]

    return turn(query), turn(key)


@torch.library.impl(LIBRARY, "rotary", "CompositeExplicitAutograd")
def _rotary_torch(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    turned_query, turned_key = rotary_ref(query, key, cos, sin)
    return turned_query.transpose(1, 2).contiguous(), turned_key.transpose(1, 2).contiguous()


@torch.library.register_fake("ppnet::rotary", lib=LIBRARY)
def _rotary_fake(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    same_device("rotary", query=query, key=key, cos=cos, sin=sin)
    (batch, heads, tokens, width), groups = query.shape, key.shape[1]
    return query.new_empty(batch, tokens, heads, width), query.new_empty(batch, tokens, groups, width)
