"""Compiled operators, each with a plain torch reference `<name>_ref`; the only place that says torch.ops.ppnet."""

from ppnet.ops.decoder_layer import attend_mlp_decode, attend_mlp_decode_ref, qkv_decode, qkv_decode_ref
from ppnet.ops.gated_act import gated_act, gated_act_backward, gated_act_backward_ref, gated_act_ref
from ppnet.ops.gated_attention import attention_path, gated_attention, gated_attention_ref
from ppnet.ops.gated_attention_decode import gated_attention_decode, gated_attention_decode_ref
from ppnet.ops.gated_mlp import gated_mlp
from ppnet.ops.gated_mlp_decode import gated_mlp_decode, gated_mlp_decode_ref
from ppnet.ops.gated_mlp_fused import gated_mlp_fused, gated_mlp_fused_ref
from ppnet.ops.linear import linear, linear_choice, linear_path, linear_ref, measure_linear
from ppnet.ops.linear_decode import linear_decode, linear_decode_ref, linear_t_decode, linear_t_decode_ref
from ppnet.ops.linears_decode import linears_decode, linears_decode_ref
from ppnet.ops.mlp import gated_mlp_ref
from ppnet.ops.rms_norm import rms_norm, rms_norm_ref
from ppnet.ops.rotary import rotary, rotary_ref
from ppnet.ops.row_norms import row_norms, row_norms_ref
from ppnet.ops.rows import gather_rows, gather_rows_ref, scatter_rows, scatter_rows_ref

__all__ = [
    "attend_mlp_decode",
    "attend_mlp_decode_ref",
    "attention_path",
    "gated_act",
    "gated_act_backward",
    "gated_act_backward_ref",
    "gated_act_ref",
    "gated_attention",
    "gated_attention_decode",
    "gated_attention_decode_ref",
    "gated_attention_ref",
    "gated_mlp",
    "gated_mlp_decode",
    "gated_mlp_decode_ref",
    "gated_mlp_fused",
    "gated_mlp_fused_ref",
    "gated_mlp_ref",
    "gather_rows",
    "gather_rows_ref",
    "linear",
    "linear_choice",
    "linear_decode",
    "linear_decode_ref",
    "linear_path",
    "linear_ref",
    "linear_t_decode",
    "linear_t_decode_ref",
    "linears_decode",
    "linears_decode_ref",
    "measure_linear",
    "qkv_decode",
    "qkv_decode_ref",
    "rms_norm",
    "rms_norm_ref",
    "rotary",
    "rotary_ref",
    "row_norms",
    "row_norms_ref",
    "scatter_rows",
    "scatter_rows_ref",
]
