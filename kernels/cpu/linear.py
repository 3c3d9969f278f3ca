"""Weighted sums of models or of their deltas: linear merges, task arithmetic, DARE, SLERP's last step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ggez_kernels.arguments import check_candidates
from ggez_kernels.sparsify import Sparsify, Stats

from .compiled import LINE, compiled, drain
from .fused import (
    PIECE,
    SPAN,
    back_from,
    one_back_from,
    one_copy,
    one_sum,
    one_towards,
    sum_of_two,
    survey,
    towards,
    towards_two,
    words_of,
)
from .rounding import F16, item_size, narrow, overflow_bits, widen
from .strips import (
    ABSENT,
    ADDRESS,
    CHANGES,
    CODE,
    RESCALE,
    STRIP,
    WEIGHT,
    Array,
    Call,
    address_of,
    nonfinite_counts,
    prepare,
    row_of,
    thin,
)

STREAM_BYTES = 16 << 20  # outputs larger than that together go past the caches, which could not keep them


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
    scratch = np.empty((4, STRIP), call.work)
    words = np.empty(STRIP + 4, np.uint32)
    squares, sums = running_squares(call)
    nonfinite_out = _linear(call.table, call.reals, call.size, start, call.like, scratch, words, squares, sums)
    return collect(call, base is not None, sums, nonfinite_out)


def linear_many(
    outs: Sequence[Array], base: Array | None, models: Sequence[Array], weights: Sequence[Sequence[float]]
) -> list[Stats]:
    """outs[r] = linear(base, models, weights[r]), to the bit, with the inputs read from memory once.

    A sweep's candidates: one row of weights and one Stats for each output. The outputs have one dtype, and overlap
    neither an input nor each other. Arrays and errors as for `linear`.
    """
    check_candidates(outs, weights)
    if len(outs) == 1:
        return [linear(outs[0], base, models, weights[0])]
    call = prepare(outs[0], base, models, weights[0], out_name="output 0")
    rows = [row_of(out, call.size, f"output {r}") for r, out in enumerate(outs)]
    addresses = np.array([row[ADDRESS] for row in rows])
    reals = np.ones((len(outs), len(models), 2), call.work)
    for r, row in enumerate(weights):
        if len(row) != len(models):
            raise ValueError(f"{len(models)} models need {len(models)} weights, output {r} has {len(row)}")
        reals[r, :, WEIGHT] = row
    streams = sum(out.nbytes for out in outs) > STREAM_BYTES and not ((addresses - addresses[0]) % LINE).any()
    like = None if call.like is None or (addresses % call.like.itemsize).any() else call.like
    scratch = np.empty((len(models) + 3, STRIP), call.work)
    room = np.empty((len(models) + 2) * SPAN * outs[0].itemsize + 8 * PIECE + LINE, np.uint8)
    squares, sums = running_squares(call)
    nonfinite_out = np.zeros(len(outs), np.int64)
    _linear_many(
        call.table,
        addresses,
        reals,
        call.size,
        like,
        harmless(reals[:, :, WEIGHT], call.table[-1, CODE] == F16),
        streams,
        lead(int(addresses[0]), outs[0].itemsize) if streams else 0,
        scratch,
        -(-address_of(room) // LINE) * LINE,
        squares,
        sums,
        nonfinite_out,
    )
    shared = collect(call, base is not None, sums, int(nonfinite_out.sum()))
    return [replace(shared, nonfinite_out=int(count)) for count in nonfinite_out]


def lead(address: int, item_size: int) -> int:
    """Where to begin, at or before element 0, so that all later spans of the array at `address` begin with a line."""
    return -(address % LINE) // item_size


def harmless(weights: Array, halves: bool) -> Any:
    """Inputs below this magnitude give finite outputs, which are at most 3 + 2 sum |w| times as large.

    halves: whether the outputs are float16. NaN, below which there is nothing, if a weight is NaN.
    """
    return np.float32(2.0 ** (14 if halves else 126) / (3 + 2 * np.abs(weights.astype(np.float64)).sum(axis=1).max()))


def running_squares(call: Call) -> tuple[Array, Array]:
    """Room to sum squared deltas, twice per model in the work dtype (see `_linear`) and once in float64."""
    count = call.reals.shape[0]
    return np.zeros((2 * count, STRIP), call.work), np.zeros((count, STRIP))


def collect(call: Call, has_base: bool, sums: Array, nonfinite_out: int) -> Stats:
    """The statistics of a finished call.

    An infinite or NaN input shows in the sum of squares of its delta or, without a base, in the output; only
    if one of them looks bad are the inputs read again and counted.
    """
    count = call.reals.shape[0]
    delta_squares = tuple(sums.sum(axis=1).tolist())
    suspicious = not np.isfinite(sums).all() if has_base else nonfinite_out > 0
    nonfinite = nonfinite_counts(call) if suspicious else (0,) * (count + has_base)
    return Stats(nonfinite, int(nonfinite_out), delta_squares)


@compiled
def _linear(
    table: Any,
    reals: Any,
    size: Any,
    start: Any,
    like: Any,
    scratch: Any,
    words: Any,
    squares: Any,
    sums: Any,
) -> Any:
    count = reals.shape[0]
    fast = False
    if like is not None:
        fast = count <= 2 and can_hurry(table, reals)
    nonfinite_out = 0
    for begin in range(0, size, SPAN):
        end = min(size, begin + SPAN)
        done = False
        if like is not None:
            if fast and end - begin == SPAN:
                done = hurry(table, reals, begin, like, squares) < overflow_bits(table[count + 1, CODE])
        if not done:
            # a span that is repeated has left its squares already: these go where nobody looks
            kept = squares[count:] if fast and end - begin == SPAN else squares[:count]
            for first in range(begin, end, STRIP):
                n = min(STRIP, end - first)
                nonfinite_out += strip(table, reals, first, n, start, scratch, words, kept)
        flush(begin, end, size, squares, sums)
    return nonfinite_out


@compiled
def _linear_many(
    table: Any,
    addresses: Any,
    reals: Any,
    size: Any,
    like: Any,
    limit: Any,
    streams: Any,
    lead: Any,
    scratch: Any,
    cached: Any,
    squares: Any,
    sums: Any,
    nonfinite_out: Any,
) -> None:
    count = reals.shape[1]
    fast = False
    if like is not None:
        fast = table[count, CODE] != ABSENT
    for begin in range(lead, size, SPAN):
        end = min(size, begin + SPAN)
        hurries = fast and begin >= 0 and end - begin == SPAN
        done = False
        if like is not None:
            if hurries:
                done = hurry_many(table, addresses, reals, begin, like, limit, streams, cached, squares)
        if not done:
            # a span that is repeated has left its squares already: these go where nobody looks
            kept = squares[count:] if hurries else squares[:count]
            for first in range(max(begin, 0), end, STRIP):
                n = min(STRIP, end - first)
                strip_many(table, addresses, reals, first, n, scratch, kept, nonfinite_out)
        flush(begin, end, size, squares, sums)
    drain()


@compiled
def hurry_many(
    table: Any,
    addresses: Any,
    reals: Any,
    first: Any,
    like: Any,
    limit: Any,
    streams: Any,
    cached: Any,
    squares: Any,
) -> Any:
    """A span for all outputs; False if it has to be done row by row.

    Spans are handed on as addresses: arrays that numba counts references of would cost as much as the arithmetic. At
    `cached` there is room for those of the base, of all x and of the result, and for what `one_sum` adds up.
    """
    count = reals.shape[1]
    base, x = words_of(cached, 0, like), words_of(cached, SPAN, like)
    result = words_of(cached, SPAN * (1 + count), like)
    stored_base = words_of(table[count, ADDRESS], first, like)
    tame = True
    for k in range(count):
        stored_x = words_of(table[k, ADDRESS], first, like)
        tame &= survey(stored_base, stored_x, base, words_of(cached, SPAN * (1 + k), like), squares[k]) < limit
    if not tame:
        return False
    for r in range(addresses.size):
        out = result if streams else words_of(addresses[r], first, like)
        target = addresses[r] + item_size(table[count + 1, CODE]) * first if streams else 0
        weight = np.float32(reals[r, 0, WEIGHT])
        if count > 1:
            one_sum(cached, reals, r, out, target)
        elif weight == np.float32(0) or weight == np.float32(1):
            one_copy(base if weight == np.float32(0) else x, out, target)
        elif weight < np.float32(0.5):
            one_towards(base, x, weight, out, target)
        else:
            one_back_from(base, x, np.float32(1) - weight, out, target)
    return True


@compiled
def strip_many(
    table: Any, addresses: Any, reals: Any, first: Any, n: Any, scratch: Any, squares: Any, nonfinite_out: Any
) -> None:
    """`strip` for all outputs; `scratch` has rows for the sum, the base, the last model and every delta."""
    count = reals.shape[1]
    has_base = table[count, CODE] != ABSENT
    mixed, base, model = scratch[0, :n], scratch[1, :n], scratch[2, :n]
    for turn in range(0 if has_base else 1, count + 1):
        k = count if turn == 0 else turn - 1
        row = base if turn == 0 else model if has_base else scratch[3 + k, :n]
        widen(table[k, ADDRESS], table[k, CODE], first, row)
        if has_base and turn > 0:
            subtract(model, base, scratch[3 + k, :n], squares[k])
    for r in range(addresses.size):
        for k in range(count):
            accumulate(scratch[3 + k, :n], reals[r, k, WEIGHT], k == 0, mixed)
        if has_base:
            finish(base, model, scratch[3, :n], reals[r], False, mixed)
        nonfinite_out[r] += narrow(mixed, addresses[r], table[count + 1, CODE], first)


@compiled
def can_hurry(table: Any, reals: Any) -> Any:
    """Whether one of the loops of `fused` does what is asked."""
    count = reals.shape[0]
    for k in range(count):
        if table[k, CHANGES]:
            return False
    if count == 2:
        return True
    return table[1, CODE] != ABSENT and reals[0, WEIGHT] != 0 and reals[0, WEIGHT] != 1


@compiled
def hurry(table: Any, reals: Any, first: Any, like: Any, squares: Any) -> Any:
    count = reals.shape[0]
    x = words_of(table[0, ADDRESS], first, like)
    out = words_of(table[count + 1, ADDRESS], first, like)
    base = words_of(table[count, ADDRESS], first, like)
    weight = np.float32(reals[0, WEIGHT])
    if count == 2:
        y = words_of(table[1, ADDRESS], first, like)
        other = np.float32(reals[1, WEIGHT])
        if table[count, CODE] == ABSENT:
            return sum_of_two(x, y, weight, other, out)
        return towards_two(base, x, y, weight, other, out, squares[0], squares[1])
    if weight < np.float32(0.5):
        return towards(base, x, weight, out, squares[0])
    return back_from(base, x, np.float32(1) - weight, out, squares[0])


@compiled
def strip(table: Any, reals: Any, first: Any, n: Any, start: Any, scratch: Any, words: Any, squares: Any) -> Any:
    """One strip, row by row: any number of models, any dtypes; answers the output's NaN and infinite elements."""
    count = reals.shape[0]
    has_base = table[count, CODE] != ABSENT
    base, model, delta, mixed = scratch[0, :n], scratch[1, :n], scratch[2, :n], scratch[3, :n]
    # every helper is called from one place, for its loops are compiled once per call; so the base takes its turn here
    for turn in range(0 if has_base else 1, count + 1):
        k = count if turn == 0 else turn - 1
        row = base if turn == 0 else model
        widen(table[k, ADDRESS], table[k, CODE], first, row)
        if turn == 0:
            continue
        if has_base:
            subtract(model, base, delta, squares[k])
            if table[k, CHANGES]:
                thin(table, k, start + first, reals[k, RESCALE], words, delta)
            row = delta
        accumulate(row, reals[k, WEIGHT], k == 0, mixed)
    if has_base:
        finish(base, model, delta, reals, table[0, CHANGES] != 0, mixed)
    return narrow(mixed, table[count + 1, ADDRESS], table[count + 1, CODE], first)


@compiled
def flush(begin: Any, end: Any, size: Any, squares: Any, sums: Any) -> None:
    """Add the running squares to their float64 sums, every sixteen spans and at the end."""
    if end == size or begin // SPAN % 16 == 15:
        for k in range(sums.shape[0]):
            for i in range(sums.shape[1]):
                sums[k, i] += np.float64(squares[k, i])
                squares[k, i] = squares.dtype.type(0)


@compiled
def subtract(model: Any, base: Any, delta: Any, squares: Any) -> None:
    """delta = model - base; its squares join the running ones."""
    for i in range(delta.size):
        difference = model[i] - base[i]
        delta[i] = difference
        squares[i] += difference * difference


@compiled
def accumulate(row: Any, weight: Any, begins: Any, mixed: Any) -> None:
    """mixed += weight * row; the first term is stored, not added to zero, for the sake of the sign of zero."""
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
def finish(base: Any, model: Any, delta: Any, reals: Any, thinned: Any, mixed: Any) -> None:
    """mixed, a sum of weighted deltas, becomes the result; a single model gets what is exact at weights 0 and 1."""
    zero, one, half = mixed.dtype.type(0), mixed.dtype.type(1), mixed.dtype.type(0.5)
    weight, rescale = reals[0, WEIGHT], reals[0, RESCALE]
    alone = reals.shape[0] == 1
    if alone and (weight == zero or (weight == one and not thinned)):
        end = base if weight == zero else model
        for i in range(base.size):
            mixed[i] = end[i]
    elif alone and weight >= half and rescale == one:
        rest = one - weight
        for i in range(base.size):
            mixed[i] = base[i] if delta[i] == zero else model[i] - rest * delta[i]
    else:
        add_to_base(base, mixed)
