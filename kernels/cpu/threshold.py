"""Counting magnitudes: the sweeps that select TIES's k-th largest |delta| exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from ggez_kernels.sparsify import Counting

from .compiled import compiled, pointer
from .rounding import BF16, F16, F32, widen, widened
from .strips import ADDRESS, CODE, STRIP, Array, magnitude_key, prepare, widen_delta

TABLES = 4
LANES = 16
COUNTING = Counting(digit_bits=15, most_bins=1 << 21, sample_share=16)


def histogram(base: Array, model: Array, *, low: int, high: int, shift: int = 0) -> Array:
    """h[v] = how many keys in [low, high) have (key - low) >> shift == v; one more entry counts those >= high.

    key = the 31 low bits of float32(model - base), as in `Sparsify`. Answers uint32[((high - low - 1) >> shift) + 2];
    the histograms of a tensor's tiles add up to the tensor's. Arrays as for `linear`.
    """
    if not 0 <= low < high <= 1 << 31 or not 0 <= shift < 31:
        raise ValueError(f"low {low}, high {high} and shift {shift} must select keys of 31 bits")
    call = prepare(None, base, [model])
    bins = ((high - low - 1) >> shift) + 1
    if call.size >= 1 << 32:
        raise ValueError(f"{call.size} elements in one call overflow 32-bit counters: count tiles and add up")
    tables = np.zeros((TABLES if high - low == 1 << 31 else 1, bins + 1), np.uint32)
    rows = np.empty((2, STRIP), call.work)
    keys, marks = np.empty(STRIP, np.uint32), np.empty(STRIP // LANES, np.uint32)
    _histogram(call.table, call.size, np.uint32(low), np.int64(high), np.uint32(shift), rows, keys, marks, tables)
    total: Array = tables[0] if len(tables) == 1 else tables.sum(axis=0, dtype=np.uint32)
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
    model, start = table[0, ADDRESS], table[1, ADDRESS]
    code = table[0, CODE] if table[0, CODE] == table[1, CODE] else -1
    if code == BF16:  # those stored alike are the commonest, and need no way through memory
        keys_of(model + 2 * first, start + 2 * first, np.uint16, keys[:n])
        return
    if code == F16:
        keys_of(model + 2 * first, start + 2 * first, np.int16, keys[:n])
        return
    if code == F32:
        keys_of(model + 4 * first, start + 4 * first, np.float32, keys[:n])
        return
    base, delta = rows[0, :n], rows[1, :n]
    widen(table[1, ADDRESS], table[1, CODE], first, base)
    widen_delta(table, 0, first, base, delta)
    for i in range(n):
        keys[i] = magnitude_key(delta[i])


@compiled
def keys_of(model: Any, base: Any, dtype: Any, keys: Any) -> None:
    x, start = carray(pointer(model), keys.size, dtype), carray(pointer(base), keys.size, dtype)
    for i in range(keys.size):
        keys[i] = magnitude_key(widened(x[i]) - widened(start[i]))


@compiled
def _histogram(
    table: Any, size: Any, low: Any, high: Any, shift: Any, rows: Any, keys: Any, marks: Any, tables: Any
) -> None:
    width = np.uint32(high - low)
    above = 0
    for first in range(0, size, STRIP):
        n = min(STRIP, size - first)
        fill_keys(table, first, n, rows, keys)
        if tables.shape[0] == TABLES:
            # neighbours often share a bin: taking turns between tables spares them the wait for each other
            for i in range(n):
                tables[i % TABLES, keys[i] >> shift] += np.uint32(1)
            continue
        for i in range(n):
            above += 1 if keys[i] >= high else 0
        # few keys are inside: vector comparisons mark them, a bit for each of LANES runs of the strip
        run = (n + LANES - 1) // LANES
        for i in range(n, run * LANES):
            keys[i] = np.uint32(low - 1)  # outside; what high bits there are to fill
        for g in range(run):
            marks[g] = 0
        for lane in range(LANES):
            for g in range(run):
                inside = np.uint32(keys[lane * run + g] - low) < width
                marks[g] |= np.uint32(inside) << np.uint32(lane)
        for g in range(run):
            mark = marks[g]
            lane = 0
            while mark:
                if mark & np.uint32(1):
                    tables[0, np.uint32(keys[lane * run + g] - low) >> shift] += np.uint32(1)
                mark >>= np.uint32(1)
                lane += 1
    tables[0, tables.shape[1] - 1] += np.uint32(above)


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
