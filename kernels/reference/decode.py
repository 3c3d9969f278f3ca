"""Codes of 8 bits or fewer with scales to float32, a rectangle of a matrix at a time, as a file's readers need it."""

from __future__ import annotations

import torch

from .rounding import Array


def decode(
    out: Array,
    codes: Array,
    values: Array,
    scale: Array,
    zero: Array,
    row: int,
    column: int,
    block_rows: int,
    block_columns: int,
) -> None:
    """out[i, j] = (values[codes[i, j]] - zero[p, q]) * scale[p, q], each operation rounded to float32, where
    p = (row + i) // block_rows, q = (column + j) // block_columns.

    out: float32 [rows, columns]; codes: uint8 of the same shape; values: float32 [256], what each code stands for;
    scale, zero: float32, one for each block that the rectangle touches; it starts at `row`, `column` of the first.
    """
    rows, columns = out.shape
    p = (row + torch.arange(rows)) // block_rows
    q = (column + torch.arange(columns)) // block_columns
    value = torch.from_numpy(values)[torch.from_numpy(codes).to(torch.int64)]
    zeros, scales = (torch.from_numpy(table)[p][:, q] for table in (zero, scale))
    torch.from_numpy(out).copy_((value - zeros) * scales)
