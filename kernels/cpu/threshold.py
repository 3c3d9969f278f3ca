"""Counting magnitudes: the sweeps of an exact radix selection of TIES's k-th largest |delta|."""

from __future__ import annotations

from typing import Any

import numpy as np

from .compiled import compiled
from .rounding import widen
from .strips import ADDRESS, CODE, STRIP, Array, magnitude_key, prepare, widen_delta

TABLES = 4


def histogram(base: Array, model: Array, *, shift: int, bits: int, prefix: int) -> Array:
    """h[v] = how many keys have (key >> shift) & (2**bits - 1) == v and key >> (shift + bits) == prefix.

    key = the 31 low bits of float32(model - base), as in `Sparsify`. Answers int64[2**bits]; the
    histograms of a tensor's tiles add up to the tensor's. Arrays as for `linear`.
    """
    if bits < 1 or shift < 0 or shift + bits > 31:
        raise ValueError(f"shift {shift} and bits {bits} must select some of the 31 bits of a key")
    call = prepare(None, base, [model])
    tables = np.zeros((TABLES, 1 << bits), np.int64)
    rows = np.empty((2, STRIP), call.work)
    keys = np.empty(STRIP, np.uint32)
    _histogram(call.table, call.size, np.uint32(shift), np.uint32(bits), np.uint32(prefix), rows, keys, tables)
    total: Array = tables.sum(axis=0)
    return total


def ties(base: Array, model: Array, threshold: int) -> int:
    """How many elements have key == threshold."""
    call = prepare(None, base, [model])
    rows = np.empty((2, STRIP), call.work)
    keys = np.empty(STRIP, np.uint32)
    return int(_ties(call.table, call.size, np.uint32(threshold), rows, keys))


def nth_tie(base: Array, model: Array, threshold: int, n: int) -> int:
    """The local index of the n-th element (from 0) with key == threshold; IndexError if there are not so many."""
    call = prepare(None, base, [model])
    rows = np.empty((2, STRIP), call.work)
    keys = np.empty(STRIP, np.uint32)
    index = int(_nth_tie(call.table, call.size, np.uint32(threshold), n, rows, keys))
    if index < 0 or n < 0:
        raise IndexError(f"there is no element {n} with key {threshold}")
    return index


@compiled
def fill_keys(table: Any, first: Any, n: Any, rows: Any, keys: Any) -> None:
    base, delta = rows[0, :n], rows[1, :n]
    widen(table[1, ADDRESS], table[1, CODE], first, base)
    widen_delta(table, 0, first, base, delta)
    for i in range(n):
        keys[i] = magnitude_key(delta[i])


@compiled
def _histogram(table: Any, size: Any, shift: Any, bits: Any, prefix: Any, rows: Any, keys: Any, tables: Any) -> None:
    mask = np.uint32((1 << bits) - 1)
    above = np.uint32(shift + bits)
    everything = above == np.uint32(31)
    for first in range(0, size, STRIP):
        n = min(STRIP, size - first)
        fill_keys(table, first, n, rows, keys)
        found = n
        if not everything:
            found = 0
            for i in range(n):
                key = keys[i]
                keys[found] = key
                found += 1 if np.uint32(key >> above) == prefix else 0
        # neighbours often share a bin: taking turns between tables spares them the wait for each other
        for i in range(found):
            tables[i % TABLES, np.uint32(keys[i] >> shift) & mask] += 1


@compiled
def _ties(table: Any, size: Any, threshold: Any, rows: Any, keys: Any) -> Any:
    count = 0
    for first in range(0, size, STRIP):
        n = min(STRIP, size - first)
        fill_keys(table, first, n, rows, keys)
        for i in range(n):
            count += 1 if keys[i] == threshold else 0
    return count


@compiled
def _nth_tie(table: Any, size: Any, threshold: Any, wanted: Any, rows: Any, keys: Any) -> Any:
    seen = 0
    for first in range(0, size, STRIP):
        n = min(STRIP, size - first)
        fill_keys(table, first, n, rows, keys)
        here = 0
        for i in range(n):
            here += 1 if keys[i] == threshold else 0
        if seen + here > wanted:
            for i in range(n):
                if keys[i] == threshold:
                    if seen == wanted:
                        return first + i
                    seen += 1
        seen += here
    return -1
