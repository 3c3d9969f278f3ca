"""Dot products of all pairs of models: what SLERP, NuSLERP, Karcher means and Model Stock measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ggez_kernels.sparsify import CHUNK

from .compiled import compiled
from .rounding import widen
from .strips import ABSENT, ADDRESS, CODE, STRIP, Array, check_chunk_start, prepare, widen_delta


def gram(inputs: Sequence[Array], base: Array | None = None, *, start: int) -> Array:
    """G[c, i, j] = sum of x_i x_j (of deltas, with a base) over chunk c of `CHUNK` elements: float64[chunks, K, K].

    `start`, the flat index of the first element in its tensor, is a multiple of `CHUNK`, and a tile ends at one or
    with its tensor; then the chunks are the tensor's own, each is summed in a fixed order, and `math.fsum` over
    them does not depend on tiles or threads. See `ggez_kernels.reference.gram` for the definition.
    """
    check_chunk_start(start)
    call = prepare(None, base, inputs)
    count = len(inputs)
    result = np.empty((-(-call.size // CHUNK), count, count))
    rows = np.empty((1 + count, STRIP), call.work)
    sums = np.empty((count * (count + 1) // 2, STRIP))
    _gram(call.table, count, call.size, rows, sums, result)
    return result


@compiled
def _gram(table: Any, count: Any, size: Any, rows: Any, sums: Any, result: Any) -> None:
    for chunk in range(result.shape[0]):
        sums.fill(0.0)
        begin = chunk * CHUNK
        end = min(size, begin + CHUNK)
        for first in range(begin, end, STRIP):
            n = min(STRIP, end - first)
            base = rows[count, :n]
            has_base = table[count, CODE] != ABSENT
            if has_base:
                widen(table[count, ADDRESS], table[count, CODE], first, base)
            pair = 0
            for k in range(count):
                row = rows[k, :n]
                if has_base:
                    widen_delta(table, k, first, base, row)
                else:
                    widen(table[k, ADDRESS], table[k, CODE], first, row)
                for other in range(k + 1):
                    multiply(row, rows[other, :n], sums[pair])
                    pair += 1
        pair = 0
        for k in range(count):
            for other in range(k + 1):
                total = fold(sums[pair])
                result[chunk, k, other] = total
                result[chunk, other, k] = total
                pair += 1


@compiled
def multiply(left: Any, right: Any, sums: Any) -> None:
    for i in range(left.size):
        sums[i] += np.float64(left[i]) * np.float64(right[i])


@compiled
def fold(sums: Any) -> Any:
    """The sum of STRIP numbers, the upper half added to the lower until one is left; destroys them."""
    half = sums.size // 2
    while half > 0:
        for i in range(half):
            sums[i] += sums[half + i]
        half //= 2
    return sums[0]
