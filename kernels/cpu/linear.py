"""Weighted sums of models or of their deltas: linear merges, task arithmetic, DARE, SLERP's last step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..sparsify import Sparsify, Stats
from .compiled import compiled
from .rounding import narrow, widen
from .strips import ABSENT, ADDRESS, CHANGES, CODE, RESCALE, STRIP, WEIGHT, Array, Call, nonfinite_counts, prepare, thin


def linear(
    out: Array,
    base: Array | None,
    models: Sequence[Array],
    weights: Sequence[float],
    *,
    sparsify: Sequence[Sparsify | None] | None = None,
    start: int = 0,
) -> Stats:
    """out = sum w_k x_k, or base + sum w_k (x_k - base); see `ggez_kernels.reference.linear` for the definition.

    Arrays are 1-D, contiguous, of one size, bfloat16, float16, float32 or float64 in any mix; `start` is the flat
    index of the first element in its tensor. The output must not overlap an input. ValueError or TypeError for
    arguments that break this.
    """
    call = prepare(out, base, models, weights, sparsify)
    squares = np.zeros((len(models), STRIP))
    scratch = np.empty((4, STRIP), call.work)
    words = np.empty(STRIP + 4, np.uint32)
    nonfinite_out = _linear(call.table, call.reals, call.size, start, scratch, words, squares)
    return collect(call, base is not None, squares, nonfinite_out)


def collect(call: Call, has_base: bool, squares: Array, nonfinite_out: int) -> Stats:
    """The statistics of a finished call.

    An infinite or NaN input shows in the sum of squares of its delta or, without a base, in the output; only
    if one of them looks bad are the inputs read again and counted.
    """
    count = call.reals.shape[0]
    sums = tuple(squares.sum(axis=1).tolist())
    suspicious = not np.isfinite(sums).all() if has_base else nonfinite_out > 0
    nonfinite = nonfinite_counts(call) if suspicious else (0,) * (count + has_base)
    return Stats(nonfinite, int(nonfinite_out), sums)


@compiled
def _linear(table: Any, reals: Any, size: Any, start: Any, scratch: Any, words: Any, squares: Any) -> Any:
    count = reals.shape[0]
    has_base = table[count, CODE] != ABSENT
    nonfinite_out = 0
    for first in range(0, size, STRIP):
        n = min(STRIP, size - first)
        base, model, delta, mixed = scratch[0, :n], scratch[1, :n], scratch[2, :n], scratch[3, :n]
        if has_base:
            widen(table[count, ADDRESS], table[count, CODE], first, base)
        for k in range(count):
            widen(table[k, ADDRESS], table[k, CODE], first, model)
            if has_base:
                subtract(model, base, delta, squares[k])
                if table[k, CHANGES]:
                    thin(table, k, start + first, reals[k, RESCALE], words, delta)
                accumulate(delta, reals[k, WEIGHT], k == 0, mixed)
            else:
                accumulate(model, reals[k, WEIGHT], k == 0, mixed)
        if has_base:
            if count == 1:
                interpolate(base, model, delta, reals[0, WEIGHT], reals[0, RESCALE], table[0, CHANGES] != 0, mixed)
            else:
                add_to_base(base, mixed)
        nonfinite_out += narrow(mixed, table[count + 1, ADDRESS], table[count + 1, CODE], first)
    return nonfinite_out


@compiled
def subtract(model: Any, base: Any, delta: Any, squares: Any) -> None:
    """delta = model - base; its squares are added up in float64, one running sum per place in the strip."""
    for i in range(delta.size):
        difference = model[i] - base[i]
        delta[i] = difference
        squares[i] += np.float64(difference) * np.float64(difference)


@compiled
def accumulate(row: Any, weight: Any, begins: Any, mixed: Any) -> None:
    if begins:
        for i in range(row.size):
            mixed[i] = weight * row[i]
    else:
        for i in range(row.size):
            mixed[i] += weight * row[i]


@compiled
def add_to_base(base: Any, mixed: Any) -> None:
    """mixed = base + mixed, but base itself, sign of zero included, where nothing is added."""
    zero = mixed.dtype.type(0)
    for i in range(base.size):
        mixed[i] = base[i] if mixed[i] == zero else base[i] + mixed[i]


@compiled
def interpolate(
    base: Any, model: Any, delta: Any, weight: Any, rescale: Any, thinned: Any, mixed: Any
) -> None:
    """One model: mixed holds weight * delta and receives the result; exact at weights 0 and 1."""
    one = mixed.dtype.type(1)
    zero = mixed.dtype.type(0)
    if weight == zero:
        mixed[:] = base
    elif weight == one and not thinned:
        mixed[:] = model
    elif weight < one / mixed.dtype.type(2) or rescale != one:
        add_to_base(base, mixed)
    else:
        rest = one - weight
        for i in range(base.size):
            mixed[i] = base[i] if delta[i] == zero else model[i] - rest * delta[i]
