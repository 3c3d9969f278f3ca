"""The disjoint mean of TIES: elect a sign per element, then average the models that agree with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ggez_kernels.arguments import alone
from ggez_kernels.sparsify import Sparsify, Stats

from .compiled import compiled
from .fused import SPAN, ballot_of_two, words_of
from .linear import add_to_base, collect, flush, linear, running_squares, subtract
from .rounding import narrow, overflow_bits, widen
from .strips import (
    ADDRESS,
    ALL,
    CHANGES,
    CODE,
    LAST,
    LIMIT,
    RESCALE,
    STRIP,
    THRESHOLD,
    WEIGHT,
    Array,
    prepare,
    thin,
)


def vote(
    out: Array,
    base: Array,
    models: Sequence[Array],
    weights: Sequence[float],
    *,
    sparsify: Sequence[Sparsify | None] | None = None,
    start: int = 0,
    count: bool = False,
    normalize: bool = True,
    scale: float = 1.0,
) -> Stats:
    """out = base + scale * (mean of the weighted deltas of the elected sign); see `ggez_kernels.reference.vote`.

    Arrays and errors as for `linear`.
    """
    if len(models) == 1 and len(weights) == 1:
        return linear(out, base, models, [alone(weights[0], normalize, scale)], sparsify=sparsify, start=start)
    call = prepare(out, base, models, weights, sparsify)
    scratch = np.empty((5 + len(models), STRIP), call.work)
    words = np.empty(STRIP + 4, np.uint32)
    squares, sums = running_squares(call)
    factor = call.work(scale)
    nonfinite_out = _vote(
        call.table,
        call.reals,
        call.size,
        start,
        call.like,
        count,
        normalize,
        factor,
        scratch,
        words,
        squares,
        sums,
    )
    return collect(call, True, sums, nonfinite_out)


@compiled
def _vote(
    table: Any,
    reals: Any,
    size: Any,
    start: Any,
    like: Any,
    by_count: Any,
    normalize: Any,
    scale: Any,
    scratch: Any,
    words: Any,
    squares: Any,
    sums: Any,
) -> Any:
    count = reals.shape[0]
    lowest = np.empty(count, np.uint32)
    nonfinite_out = 0
    for begin in range(0, size, SPAN):
        end = min(size, begin + SPAN)
        fast = False
        done = False
        if like is not None:
            if count == 2 and not by_count and end - begin == SPAN:
                fast = can_hurry(table, start + begin, lowest)
            if fast:
                largest = hurry(table, reals, begin, like, lowest, normalize, scale, squares)
                done = largest < overflow_bits(table[count + 1, CODE])
        if not done:
            # a span that is repeated has left its squares already: these go where nobody looks
            kept = squares[count:] if fast else squares[:count]
            for first in range(begin, end, STRIP):
                n = min(STRIP, end - first)
                nonfinite_out += strip(table, reals, first, n, start, by_count, normalize, scale, scratch, words, kept)
        flush(begin, end, size, squares, sums)
    return nonfinite_out


@compiled
def can_hurry(table: Any, first: Any, lowest: Any) -> Any:
    """Whether each model keeps the same magnitudes, from lowest[k] on, throughout the span and drops none at random."""
    for k in range(lowest.size):
        if table[k, CHANGES] and table[k, LIMIT] < ALL:
            return False
        lowest[k] = np.uint32(table[k, THRESHOLD])
        if table[k, CHANGES] and table[k, LAST] < first + SPAN - 1:
            if table[k, LAST] >= first:
                return False
            lowest[k] = np.uint32(table[k, THRESHOLD] + 1)
    return True


@compiled
def hurry(table: Any, reals: Any, first: Any, like: Any, lowest: Any, normalize: Any, scale: Any, squares: Any) -> Any:
    return ballot_of_two(
        words_of(table[2, ADDRESS], first, like),
        words_of(table[0, ADDRESS], first, like),
        words_of(table[1, ADDRESS], first, like),
        lowest,
        reals,
        normalize,
        np.float32(scale),
        words_of(table[3, ADDRESS], first, like),
        squares,
    )


@compiled
def strip(
    table: Any,
    reals: Any,
    first: Any,
    n: Any,
    start: Any,
    by_count: Any,
    normalize: Any,
    scale: Any,
    scratch: Any,
    words: Any,
    squares: Any,
) -> Any:
    """One strip, row by row: any number of models, any dtypes; answers the output's NaN and infinite elements."""
    count = reals.shape[0]
    base, model, total = scratch[0, :n], scratch[1, :n], scratch[2, :n]
    mixed, divisor = scratch[3, :n], scratch[4, :n]
    for i in range(n):
        total[i] = mixed[i] = divisor[i] = total.dtype.type(0)
    for turn in range(count + 1):
        k = count if turn == 0 else turn - 1
        widen(table[k, ADDRESS], table[k, CODE], first, base if turn == 0 else model)
        if turn == 0:
            continue
        delta = scratch[5 + k, :n]
        subtract(model, base, delta, squares[k])
        if table[k, CHANGES]:
            thin(table, k, start + first, reals[k, RESCALE], words, delta)
        ballot(delta, reals[k, WEIGHT], by_count, total)
    for k in range(count):
        join(scratch[5 + k, :n], total, reals[k, WEIGHT], mixed, divisor)
    settle(base, divisor, normalize, scale, mixed)
    return narrow(mixed, table[count + 1, ADDRESS], table[count + 1, CODE], first)


@compiled
def ballot(delta: Any, weight: Any, by_count: Any, total: Any) -> None:
    """Weigh the delta in place and add it, or its sign, to the total that elects."""
    zero, one = total.dtype.type(0), total.dtype.type(1)
    if by_count:
        for i in range(delta.size):
            delta[i] *= weight
            total[i] += (one if delta[i] > zero else zero) - (one if delta[i] < zero else zero)
    else:
        for i in range(delta.size):
            delta[i] *= weight
            total[i] += delta[i]


@compiled
def join(delta: Any, total: Any, weight: Any, mixed: Any, divisor: Any) -> None:
    """Add the weighted delta where its sign is the elected one; NaN agrees with either, so that it shows."""
    zero = total.dtype.type(0)
    size = abs(weight)
    for i in range(delta.size):
        agrees = not delta[i] <= zero if total[i] >= zero else not delta[i] >= zero
        mixed[i] += delta[i] if agrees else zero
        divisor[i] += size if agrees else zero


@compiled
def settle(base: Any, divisor: Any, normalize: Any, scale: Any, mixed: Any) -> None:
    zero, one = mixed.dtype.type(0), mixed.dtype.type(1)
    if normalize:
        for i in range(base.size):
            mixed[i] /= one if divisor[i] == zero else divisor[i]
    for i in range(base.size):
        mixed[i] *= scale
    add_to_base(base, mixed)
