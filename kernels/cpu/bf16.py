"""The commonest merges, of one or two bfloat16 models, in single loops that keep up with memory.

Each loop does for a whole span what the row-by-row way of `linear` and `vote` does, to the bit. It takes its elements
in pairs, as 32-bit words: widening is then a shift or a mask, and no lane of a vector register ever changes place.
It answers the largest magnitude of the unrounded result, like `rounding.store`; where that is not finite the caller
repeats the span row by row.

For many outputs of the same inputs, `survey` does once what they share, and a loop named `one_...` the rest for each.
These take place in the first-level cache, so what they write would be their only traffic with memory: it can go there
past the caches, without reading first what it overwrites.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from .compiled import LINE, compiled, pointer, stream_line

SPAN = 4096
WORDS = SPAN // 2
PIECE = 256  # words between two bursts of stores past the caches, so that arithmetic goes on while they are under way
LANES = 512  # running sums of squares for each of two models: they stay in the first-level cache beside four streams

f32, u32 = np.float32, np.uint32


@compiled
def words_of(address: Any, first: Any) -> Any:
    return carray(pointer(address + 2 * first), WORDS, np.uint32)


@compiled
def low(word: Any) -> Any:
    return u32(word << u32(16)).view(np.float32)


@compiled
def high(word: Any) -> Any:
    return u32(word & u32(0xFFFF0000)).view(np.float32)


@compiled
def rounded(value: Any) -> Any:
    """float32 bits whose upper half is `value` as bfloat16, if it is not NaN."""
    bits = f32(value).view(np.uint32)
    odd = u32(u32(bits >> u32(16)) & u32(1))
    return u32(u32(bits + u32(0x7FFF)) + odd)


@compiled
def pack(value_low: Any, value_high: Any) -> Any:
    return u32(u32(rounded(value_low) >> u32(16)) | u32(rounded(value_high) & u32(0xFFFF0000)))


@compiled
def magnitude(value: Any) -> Any:
    return u32(f32(value).view(np.uint32) & u32(0x7FFFFFFF))


@compiled
def larger(value_low: Any, value_high: Any, largest: Any) -> Any:
    return max(largest, max(magnitude(value_low), magnitude(value_high)))


@compiled
def moved(base: Any, by: Any) -> Any:
    return base if by == f32(0) else f32(base + by)


@compiled
def sum_of_two(x: Any, y: Any, weight_x: Any, weight_y: Any, out: Any) -> Any:
    largest = u32(0)
    for i in range(WORDS):
        lo = weight_x * low(x[i]) + weight_y * low(y[i])
        hi = weight_x * high(x[i]) + weight_y * high(y[i])
        out[i] = pack(lo, hi)
        largest = larger(lo, hi, largest)
    return largest


@compiled
def towards(base: Any, x: Any, weight: Any, out: Any, squares: Any) -> Any:
    """base + weight * (x - base)"""
    largest = u32(0)
    for i in range(WORDS):
        base_lo, base_hi = low(base[i]), high(base[i])
        delta_lo, delta_hi = low(x[i]) - base_lo, high(x[i]) - base_hi
        squares[i] += delta_lo * delta_lo + delta_hi * delta_hi
        lo, hi = moved(base_lo, weight * delta_lo), moved(base_hi, weight * delta_hi)
        out[i] = pack(lo, hi)
        largest = larger(lo, hi, largest)
    return largest


@compiled
def back_from(base: Any, x: Any, rest: Any, out: Any, squares: Any) -> Any:
    """x - rest * (x - base)"""
    largest = u32(0)
    zero = f32(0)
    for i in range(WORDS):
        base_lo, base_hi = low(base[i]), high(base[i])
        x_lo, x_hi = low(x[i]), high(x[i])
        delta_lo, delta_hi = x_lo - base_lo, x_hi - base_hi
        squares[i] += delta_lo * delta_lo + delta_hi * delta_hi
        lo = base_lo if delta_lo == zero else f32(x_lo - rest * delta_lo)
        hi = base_hi if delta_hi == zero else f32(x_hi - rest * delta_hi)
        out[i] = pack(lo, hi)
        largest = larger(lo, hi, largest)
    return largest


@compiled
def survey(stored_base: Any, stored_x: Any, base: Any, x: Any, squares: Any) -> Any:
    """What many merges of the same span share: its squares, and a copy in the first-level cache, aligned to lines.

    Answers the largest magnitude, as a number.
    """
    largest = u32(0)
    for i in range(WORDS):
        base[i], x[i] = stored_base[i], stored_x[i]
        base_lo, base_hi = low(stored_base[i]), high(stored_base[i])
        x_lo, x_hi = low(stored_x[i]), high(stored_x[i])
        delta_lo, delta_hi = x_lo - base_lo, x_hi - base_hi
        squares[i] += delta_lo * delta_lo + delta_hi * delta_hi
        largest = larger(base_lo, base_hi, larger(x_lo, x_hi, largest))
    return u32(largest).view(np.float32)


@compiled
def one_towards(base: Any, x: Any, weight: Any, out: Any, target: Any) -> None:
    """base + weight * (x - base), of a surveyed span. See `one_copy` for `target`."""
    source = out.ctypes.data
    for first in range(0, WORDS, PIECE):
        for i in range(first, first + PIECE):
            base_lo, base_hi = low(base[i]), high(base[i])
            lo = moved(base_lo, weight * f32(low(x[i]) - base_lo))
            hi = moved(base_hi, weight * f32(high(x[i]) - base_hi))
            out[i] = pack(lo, hi)
        if target:
            for at in range(4 * first, 4 * (first + PIECE), LINE):
                stream_line(target + at, source + at)


@compiled
def one_back_from(base: Any, x: Any, rest: Any, out: Any, target: Any) -> None:
    """x - rest * (x - base), of a surveyed span. See `one_copy` for `target`."""
    source = out.ctypes.data
    zero = f32(0)
    for first in range(0, WORDS, PIECE):
        for i in range(first, first + PIECE):
            base_lo, base_hi = low(base[i]), high(base[i])
            x_lo, x_hi = low(x[i]), high(x[i])
            delta_lo, delta_hi = x_lo - base_lo, x_hi - base_hi
            lo = base_lo if delta_lo == zero else f32(x_lo - rest * delta_lo)
            hi = base_hi if delta_hi == zero else f32(x_hi - rest * delta_hi)
            out[i] = pack(lo, hi)
        if target:
            for at in range(4 * first, 4 * (first + PIECE), LINE):
                stream_line(target + at, source + at)


@compiled
def one_sum(cached: Any, reals: Any, r: Any, room: Any, out: Any, target: Any) -> None:
    """base + sum of weight_k * (x_k - base): at `cached` stands the base's span, and those of all x after it."""
    source = out.ctypes.data
    count = reals.shape[1]
    lower = carray(pointer(room), PIECE, np.float32)
    upper = carray(pointer(room + 4 * PIECE), PIECE, np.float32)
    for first in range(0, SPAN, 2 * PIECE):
        base = words_of(cached, first)
        for k in range(count):
            x = words_of(cached, first + SPAN * (1 + k))
            weight = f32(reals[r, k, 0])
            for i in range(PIECE):
                term_lo = weight * f32(low(x[i]) - low(base[i]))
                term_hi = weight * f32(high(x[i]) - high(base[i]))
                lower[i] = term_lo if k == 0 else f32(lower[i] + term_lo)
                upper[i] = term_hi if k == 0 else f32(upper[i] + term_hi)
        piece = words_of(source, first)
        for i in range(PIECE):
            piece[i] = pack(moved(low(base[i]), lower[i]), moved(high(base[i]), upper[i]))
        if target:
            for at in range(2 * first, 2 * first + 4 * PIECE, LINE):
                stream_line(target + at, source + at)


@compiled
def one_copy(end: Any, out: Any, target: Any) -> None:
    """One end of the way. If `target`, a multiple of LINE, is not 0, the span goes to that address, past the caches."""
    source = end.ctypes.data
    if target:
        for at in range(0, 4 * WORDS, LINE):
            stream_line(target + at, source + at)
    else:
        for i in range(WORDS):
            out[i] = end[i]


@compiled
def towards_two(
    base: Any, x: Any, y: Any, weight_x: Any, weight_y: Any, out: Any, squares_x: Any, squares_y: Any
) -> Any:
    """base + (weight_x * (x - base) + weight_y * (y - base))"""
    largest = u32(0)
    for block in range(0, WORDS, LANES):
        for i in range(LANES):
            base_lo, base_hi = low(base[block + i]), high(base[block + i])
            x_lo, x_hi = low(x[block + i]) - base_lo, high(x[block + i]) - base_hi
            y_lo, y_hi = low(y[block + i]) - base_lo, high(y[block + i]) - base_hi
            squares_x[i] += x_lo * x_lo + x_hi * x_hi
            squares_y[i] += y_lo * y_lo + y_hi * y_hi
            lo = moved(base_lo, weight_x * x_lo + weight_y * y_lo)
            hi = moved(base_hi, weight_x * x_hi + weight_y * y_hi)
            out[block + i] = pack(lo, hi)
            largest = larger(lo, hi, largest)
    return largest


@compiled
def ballot_of_two(
    base: Any, x: Any, y: Any, lowest: Any, reals: Any, normalize: Any, scale: Any, out: Any, squares: Any
) -> Any:
    """TIES of two trimmed models: elect by sum, disjoint mean; `lowest` are the smallest magnitudes kept."""
    largest = u32(0)
    lowest_x, lowest_y = lowest[0], lowest[1]
    weight_x, rescale_x, weight_y, rescale_y = reals[0, 0], reals[0, 1], reals[1, 0], reals[1, 1]
    squares_x, squares_y = squares[0], squares[1]
    for block in range(0, WORDS, LANES):
        for i in range(LANES):
            base_lo, base_hi = low(base[block + i]), high(base[block + i])
            x_lo, x_hi = low(x[block + i]) - base_lo, high(x[block + i]) - base_hi
            y_lo, y_hi = low(y[block + i]) - base_lo, high(y[block + i]) - base_hi
            squares_x[i] += x_lo * x_lo + x_hi * x_hi
            squares_y[i] += y_lo * y_lo + y_hi * y_hi
            lo = moved(
                base_lo,
                scale
                * elected(
                    voice(x_lo, lowest_x, rescale_x, weight_x),
                    voice(y_lo, lowest_y, rescale_y, weight_y),
                    abs(weight_x),
                    abs(weight_y),
                    normalize,
                ),
            )
            hi = moved(
                base_hi,
                scale
                * elected(
                    voice(x_hi, lowest_x, rescale_x, weight_x),
                    voice(y_hi, lowest_y, rescale_y, weight_y),
                    abs(weight_x),
                    abs(weight_y),
                    normalize,
                ),
            )
            out[block + i] = pack(lo, hi)
            largest = larger(lo, hi, largest)
    return largest


@compiled
def voice(delta: Any, lowest: Any, rescale: Any, weight: Any) -> Any:
    """A model's trimmed, weighted delta."""
    kept = f32(rescale * delta) if magnitude(delta) >= lowest else f32(0)
    return f32(weight * kept)


@compiled
def elected(x: Any, y: Any, size_x: Any, size_y: Any, normalize: Any) -> Any:
    """The disjoint sum or mean of two: agreement is a comparison with zero once the elected sign is flipped away.

    The total of two is -0 only if both are, and none agrees; if it is NaN the result is not finite, and not used.
    """
    zero = f32(0)
    sign = u32(f32(x + y).view(np.uint32) & u32(0x80000000))
    with_x = not u32(f32(x).view(np.uint32) ^ sign).view(np.float32) <= zero
    with_y = not u32(f32(y).view(np.uint32) ^ sign).view(np.float32) <= zero
    mixed = f32((x if with_x else zero) + (y if with_y else zero))
    if not normalize:
        return mixed
    divisor = f32((size_x if with_x else zero) + (size_y if with_y else zero))
    return f32(mixed / (f32(1) if divisor == zero else divisor))
