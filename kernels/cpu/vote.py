"""The disjoint mean of TIES: elect a sign per element, then average the models that agree with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..sparsify import Sparsify, Stats
from .compiled import compiled
from .linear import add_to_base, collect, linear, subtract
from .rounding import narrow, widen
from .strips import ADDRESS, CHANGES, CODE, RESCALE, STRIP, WEIGHT, Array, prepare, thin


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
    squares = np.zeros((len(models), STRIP))
    scratch = np.empty((5 + len(models), STRIP), call.work)
    words = np.empty(STRIP + 4, np.uint32)
    factor = call.work(scale)
    nonfinite_out = _vote(
        call.table, call.reals, call.size, start, count, normalize, factor, scratch, words, squares
    )
    return collect(call, True, squares, nonfinite_out)


def alone(weight: float, normalize: bool, scale: float) -> float:
    """The weight with which a single voter, who wins every election, is added."""
    if not normalize:
        return scale * weight
    return scale if weight > 0 else -scale if weight < 0 else 0.0


@compiled
def _vote(
    table: Any,
    reals: Any,
    size: Any,
    start: Any,
    by_count: Any,
    normalize: Any,
    scale: Any,
    scratch: Any,
    words: Any,
    squares: Any,
) -> Any:
    count = reals.shape[0]
    nonfinite_out = 0
    for first in range(0, size, STRIP):
        n = min(STRIP, size - first)
        base, model, total, mixed, divisor = (
            scratch[0, :n],
            scratch[1, :n],
            scratch[2, :n],
            scratch[3, :n],
            scratch[4, :n],
        )
        widen(table[count, ADDRESS], table[count, CODE], first, base)
        total[:] = 0
        mixed[:] = 0
        divisor[:] = 0
        for k in range(count):
            delta = scratch[5 + k, :n]
            widen(table[k, ADDRESS], table[k, CODE], first, model)
            subtract(model, base, delta, squares[k])
            if table[k, CHANGES]:
                thin(table, k, start + first, reals[k, RESCALE], words, delta)
            ballot(delta, reals[k, WEIGHT], by_count, total)
        for k in range(count):
            join(scratch[5 + k, :n], total, reals[k, WEIGHT], mixed, divisor)
        settle(base, divisor, normalize, scale, mixed)
        nonfinite_out += narrow(mixed, table[count + 1, ADDRESS], table[count + 1, CODE], first)
    return nonfinite_out


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
