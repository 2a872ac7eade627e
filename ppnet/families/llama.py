"""llama, mistral, qwen2, qwen3: separate q/k/v/o and gate/up/down projections, SwiGLU, RMSNorm before each sub-layer.

qwen3's q_norm and k_norm have the width of one head and do not change when heads go. `num_key_value_groups` stays,
since whole KV groups are removed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ppnet.families.base import TINY, Family, register
from ppnet.families.layout import Layout, per_layer_keys, sites_of, stock_expressible


def layout(config: Any) -> Layout:
    return Layout()


def tiny_configs(model_type: str) -> dict[str, Any]:
    if model_type == "llama":
        return {**TINY, "attention_bias": True, "mlp_bias": True}
    if model_type == "mistral":
        return {**TINY, "sliding_window": None}
    return dict(TINY)


register(
    Family(
        name="llama",
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        sites=partial(sites_of, layout),
        tiny_configs=tiny_configs,
        per_layer_keys=partial(per_layer_keys, layout),
        stock_expressible=partial(stock_expressible, layout),
    )
)
