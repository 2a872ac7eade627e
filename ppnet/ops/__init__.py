"""Compiled operators, each with a plain torch reference `<name>_ref`; the only place that says torch.ops.ppnet."""

from ppnet.ops.gated_attention_decode import gated_attention_decode, gated_attention_decode_ref
from ppnet.ops.gated_mlp_decode import gated_mlp_decode, gated_mlp_decode_ref
from ppnet.ops.linear_decode import linear_decode, linear_decode_ref, linear_t_decode, linear_t_decode_ref
from ppnet.ops.row_norms import row_norms, row_norms_ref
from ppnet.ops.rows import gather_rows, gather_rows_ref, scatter_rows, scatter_rows_ref

__all__ = [
    "gated_attention_decode",
    "gated_attention_decode_ref",
    "gated_mlp_decode",
    "gated_mlp_decode_ref",
    "gather_rows",
    "gather_rows_ref",
    "linear_decode",
    "linear_decode_ref",
    "linear_t_decode",
    "linear_t_decode_ref",
    "row_norms",
    "row_norms_ref",
    "scatter_rows",
    "scatter_rows_ref",
]
