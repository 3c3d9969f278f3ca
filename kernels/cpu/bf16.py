"""The commonest merges, of one or two bfloat16 models, in single loops that keep up with memory.

Each loop does for a whole span what the row-by-row way of `linear` and `vote` does, to the bit. It takes its elements
in pairs, as 32-bit words: widening is then a shift or a mask, and no lane of a vector register ever changes place.
It answers the largest magnitude of the unrounded result, like `rounding.store`; where that is not finite the caller
repeats the span row by row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from .compiled import compiled, pointer

SPAN = 4096
WORDS = SPAN // 2
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
