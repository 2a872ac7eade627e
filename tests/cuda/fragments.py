"""Which element of a matrix each lane's registers hold, from the tables of the PTX ISA, written out by hand.

"Matrix fragments for mma.m16n8k16" has, for element i of a lane, groupID = lane >> 2 and threadID_in_group = lane % 4:
    a     row = groupID where 0 <= i < 2 or 4 <= i < 6, else groupID + 8
          col = (threadID_in_group * 2) + (i & 0x1), and 8 more where i >= 4
    b     row = (threadID_in_group * 2) + (i & 0x1), and 8 more where i >= 2;  col = groupID
    c, d  row = groupID where i < 2, else groupID + 8;  col = (threadID_in_group * 2) + (i & 0x1)
"""

import torch
from torch import Tensor


def a_element(lane: int, i: int) -> tuple[int, int]:
    row = lane >> 2 if i in (0, 1, 4, 5) else (lane >> 2) + 8
    return row, lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_element(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane >> 2


def d_element(lane: int, i: int) -> tuple[int, int]:
    return lane >> 2 if i < 2 else (lane >> 2) + 8, lane % 4 * 2 + (i & 1)


def spread(matrix: Tensor, element, per_lane: int) -> Tensor:
    """(32, per_lane): what every lane holds."""
    return torch.stack([torch.stack([matrix[element(lane, i)] for i in range(per_lane)]) for lane in range(32)])


def collected(held: Tensor, element, shape: tuple[int, int]) -> Tensor:
    """The inverse of spread."""
    matrix = torch.full(shape, float("nan"), dtype=held.dtype)
    for lane in range(32):
        for i in range(held.shape[1]):
            matrix[element(lane, i)] = held[lane, i]
    return matrix
