"""Strips: the few hundred elements that every kernel brings into the first-level cache, widens and works on.

A call is described to the compiled loops by two small tables. `table` (int64) has one row per model, then the
base's row, then the output's; `reals` (the work dtype) holds each model's weight and rescale factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ggez_kernels.sparsify import CHUNK, NAN_KEY, Sparsify

from .compiled import compiled
from .fused import WORDS
from .philox import philox
from .rounding import CODES, F64, count_nonfinite, widen

STRIP = 1024
ADDRESS, CODE, THRESHOLD, LAST, LIMIT, SEED, CHANGES = range(7)
WEIGHT, RESCALE = 0, 1
ABSENT = -1  # CODE of a base that was not given
ALL = 2**32  # LIMIT that drops nothing

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Call:
    """Checked arguments as the compiled loops want them."""

    table: Array
    reals: Array
    size: int
    work: Any  # np.float32 or np.float64
    like: Array | None
    """An empty array of the words of `fused`, for whose type numba compiles its loops: they apply, as all is stored in
    one dtype, and aligned. None if they do not, and are left out."""


def prepare(
    out: Array | None,
    base: Array | None,
    models: Sequence[Array],
    weights: Sequence[float] | None = None,
    sparsify: Sequence[Sparsify | None] | None = None,
    *,
    out_name: str = "the output",
) -> Call:
    """Check the arrays of a call and write its tables; ValueError or TypeError names the array that is wrong."""
    if not models:
        raise ValueError("at least one model is needed")
    count = len(models)
    if weights is not None and len(weights) != count:
        raise ValueError(f"{count} models need {count} weights, found {len(weights)}")
    if sparsify is not None:
        if len(sparsify) != count:
            raise ValueError(f"{count} models need {count} sparsifiers, found {len(sparsify)}")
        if base is None:
            raise ValueError("a sparsifier acts on deltas, and needs a base")
    size = models[0].size
    rows = [row_of(model, size, f"model {k}") for k, model in enumerate(models)]
    rows.append(row_of(base, size, "the base") if base is not None else [0, ABSENT, 0, 0, 0, 0, 0])
    rows.append(row_of(out, size, out_name) if out is not None else [0, ABSENT, 0, 0, 0, 0, 0])
    codes = {row[CODE] for row in rows}
    work: Any = np.float64 if F64 in codes else np.float32
    reals = np.ones((count, 2), work)
    if weights is not None:
        reals[:, WEIGHT] = weights
    for k, how in enumerate(sparsify or ()):
        if how is not None and how.changes:
            seed = how.seed - 2**64 if how.seed >= 2**63 else how.seed
            rows[k][THRESHOLD:] = [how.threshold, how.last, how.keep_limit, seed, 1]
            reals[k, RESCALE] = how.rescale
    stored = codes - {ABSENT}
    like = np.empty(0, WORDS[stored.pop()]) if len(stored) == 1 and work is np.float32 else None
    if like is not None and any(row[ADDRESS] % like.itemsize for row in rows):
        like = None
    return Call(np.array(rows, np.int64), reals, size, work, like)


def row_of(array: Array, size: int, name: str) -> list[int]:
    code = CODES.get(array.dtype)
    if code is None:
        raise TypeError(f"{name} has dtype {array.dtype}; the kernels take bfloat16, float16, float32, float64")
    if array.ndim != 1 or not array.flags.c_contiguous:
        raise ValueError(f"{name} must be contiguous and one-dimensional, found shape {array.shape}")
    if array.size != size:
        raise ValueError(f"{name} has {array.size} elements, model 0 has {size}")
    return [address_of(array), code, 0, 0, 0, 0, 0]


def address_of(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def check_chunk_start(start: int) -> None:
    if start % CHUNK:
        raise ValueError(f"start must be a multiple of {CHUNK}, found {start}")


def nonfinite_counts(call: Call) -> tuple[int, ...]:
    """NaN and infinite elements per input, the base first if there is one: a pass over memory of its own."""
    count = call.table.shape[0] - 2
    inputs = [count] if call.table[count, CODE] != ABSENT else []
    inputs += range(count)
    return tuple(int(count_nonfinite(call.table[row, ADDRESS], call.table[row, CODE], call.size)) for row in inputs)


@compiled
def widen_delta(table: Any, k: Any, first: Any, base: Any, row: Any) -> None:
    """row = model k - base, in the work dtype."""
    widen(table[k, ADDRESS], table[k, CODE], first, row)
    for i in range(row.size):
        row[i] -= base[i]


@compiled
def thin(table: Any, k: Any, first: Any, rescale: Any, words: Any, row: Any) -> None:
    """row = the sparsified row; `first` is the flat index of its first element, `words` room for random ones."""
    n = row.size
    threshold = np.uint32(table[k, THRESHOLD])
    last = table[k, LAST]
    # the elements up to `last` are kept from the threshold on, those after it from the next magnitude on
    cut = n if last >= first + n else max(last - first + 1, 0)
    trim(row, 0, cut, threshold)
    trim(row, cut, n, np.uint32(threshold + np.uint32(1)))
    if table[k, LIMIT] < ALL:
        limit = np.uint32(table[k, LIMIT])
        skipped = first % 4
        philox(np.uint64(table[k, SEED]), np.uint64(first // 4), words[: (skipped + n + 3) // 4 * 4])
        for i in range(n):
            row[i] = row[i] if words[i + skipped] < limit else row.dtype.type(0)
    for i in range(n):
        row[i] *= rescale


@compiled
def trim(row: Any, begin: Any, end: Any, lowest: Any) -> None:
    """Zero what lies below the magnitude key `lowest`."""
    for i in range(begin, end):
        row[i] = row[i] if magnitude_key(row[i]) >= lowest else row.dtype.type(0)


@compiled
def magnitude_key(delta: Any) -> Any:
    """The key of `Sparsify`. A NaN that comes out of arithmetic is quiet, and so never below `NAN_KEY`."""
    bits = np.uint32(np.float32(delta).view(np.uint32) & np.uint32(0x7FFFFFFF))
    return min(bits, np.uint32(NAN_KEY))
