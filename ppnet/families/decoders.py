"""Dense decoders that are known by their layout: one entry each.

To add one, add an entry: its layout, where it differs from Llama's, and the config of a tiny random model, on which the
tests run. ``ppnet.inspect(model, verify=True)`` tries whether a layout is right.
"""

from __future__ import annotations

from typing import Any

from ppnet.families.base import TINY
from ppnet.families.layout import Layout, register_layout

SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
NO_DROPOUT = {"attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "hidden_dropout": 0.0}
# Of classes that take the width of a head from the number of heads.
DERIVED = {name: value for name, value in TINY.items() if name != "head_dim"}


# ---- as Llama: separate projections, gate and up ---------------------------------------------------------------------

# The norms of the Gemmas have gains of 1 + weight; those of 2 and 3 have norms of the sub-layers' outputs, too.
register_layout("gemma", Layout(), TINY, {"one KV head": {"num_key_value_heads": 1}})
register_layout("gemma2", Layout(), {**TINY, **SLIDING, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0})
register_layout("gemma3_text", Layout(), {**TINY, **SLIDING, "query_pre_attn_scalar": 8})
register_layout(
    "granite",
    Layout(),
    {
        **TINY, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    {"biases": {"attention_bias": True, "mlp_bias": True}},
)  # fmt: skip
register_layout("smollm3", Layout(), {**TINY, "no_rope_layers": [1, 0, 1]})
# Norms of all queries and of all keys at once.
OLMO = Layout(across={"q_norm": "q", "k_norm": "k"})
register_layout("olmo2", OLMO, TINY, {"biases": {"attention_bias": True}})
register_layout("olmo3", OLMO, {**TINY, **SLIDING})
# Attention and MLP side by side, after one norm.
register_layout("cohere2", Layout(), {**TINY, **SLIDING, "logit_scale": 0.5}, {"biases": {"attention_bias": True}})


def _stablelm_norms(config: Any) -> str | None:
    if not config.qk_layernorm:
        return None
    return "config.qk_layernorm of stablelm gives every head a norm of its own, which ppnet does not take apart."


register_layout(
    "stablelm",
    Layout(counts={"num_heads": "heads", "num_key_value_heads": "kv_heads"}, head_stated=False, refuse=_stablelm_norms),
    {
        **DERIVED,
        **NO_DROPOUT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    {"parallel": {"use_parallel_residual": True}, "biases": {"use_qkv_bias": True}},
)

# ---- fused projections -----------------------------------------------------------------------------------------------

register_layout(
    "phi3",
    Layout(
        reads={"qkv": "qkv_proj"},
        counts={"config.num_attention_heads": "heads", "num_key_value_heads": "kv_heads"},
        makes={"gate_up": "gate_up_proj"},
    ),
    {**TINY, **NO_DROPOUT},
    {"as many KV heads": {"num_key_value_heads": 8}},
)
register_layout("glm4", Layout(makes={"gate_up": "gate_up_proj"}), TINY, {"biases": {"attention_bias": True}})
register_layout(
    "gpt_neox",
    Layout(
        attention="attention",
        head="head_size",
        reads={"qkv": "query_key_value"},
        interleaved=True,
        writes="dense",
        makes={"up": "dense_h_to_4h"},
        takes="dense_4h_to_h",
        kv_heads="",
        head_stated=False,
    ),
    {**DERIVED, **NO_DROPOUT},
    {"one after the other": {"use_parallel_residual": False}},
)


def _bigcode(config: Any) -> Layout:
    """With one KV head for all queries, q, k and v come one after the other; with one each, head by head.

    One KV head is one unit, which stays: of such a model only neurons can go.
    """
    return Layout(
        layers="h",
        attention="attn",
        reads={"qkv": "c_attn"},
        interleaved=not config.multi_query,
        writes="c_proj",
        counts={"num_heads": "heads"},
        makes={"up": "c_fc"},
        takes="c_proj",
        heads="n_head",
        kv_heads="",
        neurons="n_inner",
        head_stated=False,
    )


register_layout(
    "gpt_bigcode",
    _bigcode,
    {
        "vocab_size": 96, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_inner": 44, "n_positions": 64, "attn_pdrop": 0.0,
        "multi_query": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "embd_pdrop": 0.0,
        "resid_pdrop": 0.0, "tie_word_embeddings": False,
    },
    {"one KV head": {"multi_query": True}},
)  # fmt: skip

# ---- plain MLPs ------------------------------------------------------------------------------------------------------

register_layout(
    "starcoder2", Layout(makes={"up": "c_fc"}, takes="c_proj"), {**TINY, **NO_DROPOUT, "residual_dropout": 0.0}
)
register_layout(
    "phi",
    Layout(writes="dense", makes={"up": "fc1"}, takes="fc2"),
    {**TINY, **NO_DROPOUT},
    {"norms of heads": {"qk_layernorm": True, "head_dim": 4}},
)


def _opt_norms(config: Any) -> tuple[str, str]:
    return ("", "") if config.do_layer_norm_before else ("self_attn_layer_norm", "final_layer_norm")


register_layout(
    "opt",
    Layout(
        layers="decoder.layers",
        writes="out_proj",
        counts={"num_heads": "heads"},
        mlp="",
        makes={"up": "fc1"},
        takes="fc2",
        activation="activation_fn",
        post_norms=_opt_norms,
        kv_heads="",
        neurons="ffn_dim",
        head_stated=False,
    ),
    {**DERIVED, "ffn_dim": 44, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0},
    {
        "norms after": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
        "no biases": {"enable_bias": False},
    },
)
