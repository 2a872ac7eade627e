"""gpt2: one fused q|k|v `Conv1D`, biases, LayerNorm, learned positions; a head is a KV group of one query."""

from __future__ import annotations

from functools import partial
from typing import Any

from ppnet.families.base import Family, register
from ppnet.families.layout import Layout, per_layer_keys, sites_of, stock_expressible


def layout(config: Any) -> Layout:
    return Layout(
        layers="h",
        attention="attn",
        reads={"qkv": "c_attn"},
        writes="c_proj",
        counts={"num_heads": "heads", "split_size": "features"},
        makes={"up": "c_fc"},
        takes="c_proj",
        heads="n_head",
        kv_heads="",
        neurons="n_inner",
        head_stated=False,
    )


def tiny_configs(model_type: str) -> dict[str, Any]:
    return {
        "vocab_size": 96,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 3,
        "n_inner": 44,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


register(
    Family(
        name="gpt2",
        model_types=("gpt2",),
        sites=partial(sites_of, layout),
        tiny_configs=tiny_configs,
        per_layer_keys=partial(per_layer_keys, layout),
        stock_expressible=partial(stock_expressible, layout),
    )
)
