"""Codes of 8 bits or fewer with scales to float32, a rectangle of a matrix at a time, as a file's readers need it."""

from __future__ import annotations

from typing import Any

from .compiled import compiled


@compiled
def decode(
    out: Any,
    codes: Any,
    values: Any,
    scale: Any,
    zero: Any,
    row: Any,
    column: Any,
    block_rows: Any,
    block_columns: Any,
) -> None:
    """out = (values[codes] - zero) * scale; see `ggez_kernels.reference.decode` for the definition.

    Contiguous arrays of at least one element. What a code stands for is looked up: that takes any format of 8 bits, and
    no longer than taking one apart.
    """
    columns = out.shape[1]
    for i in range(out.shape[0]):
        p = (row + i) // block_rows
        q = 0
        begin, end = 0, block_columns - column
        while begin < columns:
            last = min(columns, end)
            factor, shift = scale[p, q], zero[p, q]
            for j in range(begin, last):
                out[i, j] = (values[codes[i, j]] - shift) * factor
            begin, end, q = end, end + block_columns, q + 1
