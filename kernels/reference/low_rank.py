"""Weights with a low-rank change of theirs: what LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353) adapters say."""

from __future__ import annotations

import torch

from .rounding import Array, narrow, tensor


def low_rank(out: Array, base: Array, left: Array, right: Array, scale: float, factors: Array | None = None) -> None:
    """out[i, j] = factors[i] * (base[i, j] + scale * (left[i, 0] right[0, j] + left[i, 1] right[1, j] + ...)).

    All in float64, every operation rounded by itself, the sum in this order; then rounded once to `out`. Without
    `factors` there is no such product. out: [rows, columns]; base: the same, perhaps columns of a wider matrix; left:
    float64[rows, r], right: float64[r, columns], factors: float64[rows]. So an element depends on its own row and
    column alone, however a matrix is cut up.
    """
    value = _sum(base, left, right, scale)
    if factors is not None:
        value = torch.from_numpy(factors)[:, None] * value
    for row, target in zip(value, out, strict=True):
        narrow(row, target)


def row_squares(sums: Array, base: Array, left: Array, right: Array, scale: float) -> None:
    """sums[i] += the squares of row i of base + scale * left right: float64[rows], added in the order of columns."""
    totals = torch.from_numpy(sums)
    for column in _sum(base, left, right, scale).T:
        totals += column * column


def _sum(base: Array, left: Array, right: Array, scale: float) -> torch.Tensor:
    change = torch.zeros(base.shape, dtype=torch.float64)
    for column, row in zip(torch.from_numpy(left).T, torch.from_numpy(right), strict=True):
        change = change + column[:, None] * row
    return tensor(base).double() + scale * change
