"""Random drops (DARE, arXiv 2311.03099): who is kept, and how much of the delta's L1 norm that leaves."""

from __future__ import annotations

from typing import Any

import numpy as np

from ggez_kernels.sparsify import CHUNK, Sparsify

from .compiled import compiled
from .gram import fold
from .philox import philox
from .rounding import widen
from .strips import ADDRESS, CHANGES, CODE, STRIP, Array, check_chunk_start, prepare, thin, widen_delta


def random_words(seed: int, first: int, size: int) -> Array:
    """uint32[size]: the random words of flat indices first, first + 1, ... under the 64-bit key `seed`."""
    skipped = first % 4
    words = np.empty((skipped + size + 3) // 4 * 4, np.uint32)
    philox(np.uint64(seed), np.uint64(first // 4), words)
    return words[skipped : skipped + size]


def keep_mask(sparsify: Sparsify, size: int, *, start: int = 0) -> Array:
    """bool[size]: which of the elements start, start + 1, ... the drop of `sparsify` keeps (its trim ignored)."""
    mask: Array = random_words(sparsify.seed, start, size) < sparsify.keep_limit
    return mask


def l1(base: Array, model: Array, sparsify: Sparsify, *, start: int) -> tuple[Array, Array]:
    """(sum |d|, sum |kept d|) with d = model - base, per chunk of `CHUNK` elements: two float64[chunks].

    The kept deltas are not rescaled. Chunks, `start` and order of summation as for `gram`.
    """
    check_chunk_start(start)
    call = prepare(None, base, [model], None, [sparsify])
    result = np.empty((2, -(-call.size // CHUNK)))
    rows = np.empty((2, STRIP), call.work)
    words = np.empty(STRIP + 4, np.uint32)
    sums = np.empty((2, STRIP))
    _l1(call.table, call.size, start, call.work(1), rows, words, sums, result)
    return result[0], result[1]


@compiled
def _l1(table: Any, size: Any, start: Any, one: Any, rows: Any, words: Any, sums: Any, result: Any) -> None:
    for chunk in range(result.shape[1]):
        sums.fill(0.0)
        begin = chunk * CHUNK
        end = min(size, begin + CHUNK)
        for first in range(begin, end, STRIP):
            n = min(STRIP, end - first)
            base, delta = rows[0, :n], rows[1, :n]
            widen(table[1, ADDRESS], table[1, CODE], first, base)
            widen_delta(table, 0, first, base, delta)
            add_sizes(delta, sums[0])
            if table[0, CHANGES]:
                thin(table, 0, start + first, one, words, delta)
            add_sizes(delta, sums[1])
        result[0, chunk] = fold(sums[0])
        result[1, chunk] = fold(sums[1])


@compiled
def add_sizes(row: Any, sums: Any) -> None:
    for i in range(row.size):
        sums[i] += np.float64(abs(row[i]))
