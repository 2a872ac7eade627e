"""Compiled operators, each with a plain torch reference `<name>_ref`; the only place that says torch.ops.ppnet."""

from ppnet.ops.row_norms import row_norms, row_norms_ref
from ppnet.ops.rows import gather_rows, gather_rows_ref, scatter_rows, scatter_rows_ref

__all__ = [
    "gather_rows",
    "gather_rows_ref",
    "row_norms",
    "row_norms_ref",
    "scatter_rows",
    "scatter_rows_ref",
]
