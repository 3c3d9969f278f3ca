"""Weights with a low-rank change of theirs, as a tile of an adapted model is read; `reference.low_rank` defines it."""

from __future__ import annotations

from typing import Any

import numpy as np

from .compiled import compiled
from .rounding import CODES, narrow, widen
from .strips import Array, address_of

STRIP = 512  # columns whose factors stay in the caches while rows pass by


def low_rank(out: Array, base: Array, left: Array, right: Array, scale: float, factors: Array | None = None) -> None:
    """out = factors * (base + scale * left right), rounded once: see `ggez_kernels.reference.low_rank`."""
    ones = np.empty(0) if factors is None else factors
    _low_rank(*_place(out), *_place(base), left, right, scale, ones, factors is not None)


def row_squares(sums: Array, base: Array, left: Array, right: Array, scale: float) -> None:
    """sums[i] += the squares of row i of base + scale * left right, in the order of columns."""
    _row_squares(sums, *_place(base), left, right, scale)


def _place(matrix: Array) -> tuple[int, int, int]:
    """Address, dtype and elements from row to row; ValueError for what is no matrix of contiguous rows."""
    if matrix.ndim != 2 or (matrix.size and matrix.shape[1] > 1 and matrix.strides[1] != matrix.itemsize):
        raise ValueError(f"a matrix with contiguous rows is needed, found shape {matrix.shape}")
    return address_of(matrix), CODES[matrix.dtype], matrix.strides[0] // matrix.itemsize


@compiled
def _low_rank(
    out: Any,
    out_code: Any,
    out_width: Any,
    base: Any,
    code: Any,
    width: Any,
    left: Any,
    right: Any,
    scale: Any,
    factors: Any,
    scaled: Any,
) -> None:
    rows, columns = left.shape[0], right.shape[1]
    sums = np.empty(STRIP)
    value = np.empty(STRIP)
    for first in range(0, columns, STRIP):
        n = min(STRIP, columns - first)
        for i in range(rows):
            change(base, code, i * width, left[i], right, first, scale, sums[:n], value[:n])
            if scaled:
                for j in range(n):
                    value[j] = factors[i] * value[j]
            narrow(value[:n], out, out_code, i * out_width + first)


@compiled
def _row_squares(totals: Any, base: Any, code: Any, width: Any, left: Any, right: Any, scale: Any) -> None:
    rows, columns = left.shape[0], right.shape[1]
    sums = np.empty(STRIP)
    value = np.empty(STRIP)
    for first in range(0, columns, STRIP):
        n = min(STRIP, columns - first)
        for i in range(rows):
            change(base, code, i * width, left[i], right, first, scale, sums[:n], value[:n])
            total = totals[i]
            for j in range(n):
                total += value[j] * value[j]
            totals[i] = total


@compiled
def change(
    base: Any, code: Any, start: Any, left: Any, right: Any, first: Any, scale: Any, sums: Any, value: Any
) -> None:
    """value = a strip of a row of base + scale * left right, from column `first` on; `sums` is room for the latter.

    `start` is where the row begins in base. Four products at a time: a sum then travels to the cache and back for every
    fourth only.
    """
    n = sums.size
    sums[:] = 0.0
    whole = left.size // 4 * 4
    for k in range(0, whole, 4):
        end = first + n
        rows = right[k][first:end], right[k + 1][first:end], right[k + 2][first:end], right[k + 3][first:end]
        add_four(left[k : k + 4], *rows, sums)
    for k in range(whole, left.size):
        factor, row = left[k], right[k][first : first + n]
        for j in range(n):
            sums[j] += factor * row[j]
    widen(base, code, start + first, value)
    for j in range(n):
        value[j] += scale * sums[j]


@compiled
def add_four(left: Any, row0: Any, row1: Any, row2: Any, row3: Any, sums: Any) -> None:
    f0, f1, f2, f3 = left[0], left[1], left[2], left[3]
    for j in range(sums.size):
        sums[j] = (((sums[j] + f0 * row0[j]) + f1 * row1[j]) + f2 * row2[j]) + f3 * row3[j]
