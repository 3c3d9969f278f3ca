"""The commonest merges, of one or two models stored alike, in single loops that keep up with memory.

Each loop does for a whole span what the row-by-row way of `linear` and `vote` does, to the bit, in float32. It answers
the largest magnitude of the unrounded result, like `rounding.store`; where that is not finite the caller repeats the
span row by row.

The loops are written once for all storage dtypes, over words: a float32, a half, or two neighbouring bfloat16 as one
32-bit integer, for widening is then a shift or a mask, and no lane of a vector register ever changes place. `low` and
`high` are what a word stands for. Where it is one number only, `high` is zero and all that is made of it is constant,
so that the compiler takes it out of the loop.

For many outputs of the same inputs, `survey` does once what they share, and a loop named `one_...` the rest for each.
These take place in the first-level cache, so what they write would be their only traffic with memory: it can go there
past the caches, without reading first what it overwrites.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray
from numba.core import types
from numba.extending import overload

from .compiled import LINE, compiled, pointer, stream_line
from .rounding import BF16, F16, F32, bits_to_f16, widened

WORDS: dict[int, Any] = {BF16: np.uint32, F16: np.int16, F32: np.float32}  # the type of a word for each storage dtype
SPAN = 4096  # elements
LANES = 256  # running sums of squares of a model: few enough to stay beside the streams in the first-level cache
PIECE = 256  # words between two bursts of stores past the caches, so that arithmetic goes on while they are under way

f32, u32 = np.float32, np.uint32


def words_in_span(like: Any) -> int:
    """How many words of the dtype of `like` a span has: a constant, for the sake of loops with a known end."""
    return SPAN // 2 if like.dtype == np.uint32 else SPAN


@overload(words_in_span)  # type: ignore[untyped-decorator]
def _words_in_span(like: Any) -> Any:
    words = SPAN // 2 if like.dtype == types.uint32 else SPAN

    def constant(like: Any) -> int:
        return words

    return constant


@compiled
def words_of(address: Any, first: Any, like: Any) -> Any:
    """The span from element `first` on of what is stored at `address`, in words of the dtype of `like`."""
    words = words_in_span(like)
    return carray(pointer(address + like.itemsize * words // SPAN * first), words, like.dtype)


def low(word: Any) -> Any:
    raise NotImplementedError


@overload(low)  # type: ignore[untyped-decorator]
def _low(word: Any) -> Any:
    def bf16(word: Any) -> Any:
        return u32(word << u32(16)).view(np.float32)

    def single(word: Any) -> Any:
        return widened(word)

    return bf16 if word == types.uint32 else single


def high(word: Any) -> Any:
    raise NotImplementedError


@overload(high)  # type: ignore[untyped-decorator]
def _high(word: Any) -> Any:
    def bf16(word: Any) -> Any:
        return u32(word & u32(0xFFFF0000)).view(np.float32)

    def none(word: Any) -> Any:
        return f32(0)

    return bf16 if word == types.uint32 else none


def put(words: Any, i: Any, low: Any, high: Any) -> None:
    """Round both parts into a word; right for everything but NaN."""
    raise NotImplementedError


@overload(put)  # type: ignore[untyped-decorator]
def _put(words: Any, i: Any, low: Any, high: Any) -> Any:
    def bf16(words: Any, i: Any, low: Any, high: Any) -> None:
        words[i] = u32(u32(rounded(low) >> u32(16)) | u32(rounded(high) & u32(0xFFFF0000)))

    def f16(words: Any, i: Any, low: Any, high: Any) -> None:
        words[i] = np.int16(bits_to_f16(f32(low).view(np.uint32)))

    def single(words: Any, i: Any, low: Any, high: Any) -> None:
        words[i] = low

    return {types.uint32: bf16, types.int16: f16, types.float32: single}[words.dtype]


@compiled
def rounded(value: Any) -> Any:
    """float32 bits whose upper half is `value` as bfloat16, if it is not NaN."""
    bits = f32(value).view(np.uint32)
    odd = u32(u32(bits >> u32(16)) & u32(1))
    return u32(u32(bits + u32(0x7FFF)) + odd)


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
def back(base: Any, x: Any, rest: Any, delta: Any) -> Any:
    return base if delta == f32(0) else f32(x - rest * delta)


@compiled
def sum_of_two(x: Any, y: Any, weight_x: Any, weight_y: Any, out: Any) -> Any:
    largest = u32(0)
    for i in range(words_in_span(out)):
        lo = weight_x * low(x[i]) + weight_y * low(y[i])
        hi = weight_x * high(x[i]) + weight_y * high(y[i])
        put(out, i, lo, hi)
        largest = larger(lo, hi, largest)
    return largest


@compiled
def towards(base: Any, x: Any, weight: Any, out: Any, squares: Any) -> Any:
    """base + weight * (x - base)"""
    largest = u32(0)
    for block in range(0, words_in_span(out), LANES):
        for lane in range(LANES):
            i = block + lane
            base_lo, base_hi = low(base[i]), high(base[i])
            delta_lo, delta_hi = f32(low(x[i]) - base_lo), f32(high(x[i]) - base_hi)
            squares[lane] += delta_lo * delta_lo + delta_hi * delta_hi
            lo, hi = moved(base_lo, weight * delta_lo), moved(base_hi, weight * delta_hi)
            put(out, i, lo, hi)
            largest = larger(lo, hi, largest)
    return largest


@compiled
def back_from(base: Any, x: Any, rest: Any, out: Any, squares: Any) -> Any:
    """x - rest * (x - base)"""
    largest = u32(0)
    for block in range(0, words_in_span(out), LANES):
        for lane in range(LANES):
            i = block + lane
            base_lo, base_hi = low(base[i]), high(base[i])
            x_lo, x_hi = low(x[i]), high(x[i])
            delta_lo, delta_hi = f32(x_lo - base_lo), f32(x_hi - base_hi)
            squares[lane] += delta_lo * delta_lo + delta_hi * delta_hi
            lo, hi = back(base_lo, x_lo, rest, delta_lo), back(base_hi, x_hi, rest, delta_hi)
            put(out, i, lo, hi)
            largest = larger(lo, hi, largest)
    return largest


@compiled
def towards_two(
    base: Any, x: Any, y: Any, weight_x: Any, weight_y: Any, out: Any, squares_x: Any, squares_y: Any
) -> Any:
    """base + (weight_x * (x - base) + weight_y * (y - base))"""
    largest = u32(0)
    for block in range(0, words_in_span(out), LANES):
        for lane in range(LANES):
            i = block + lane
            base_lo, base_hi = low(base[i]), high(base[i])
            x_lo, x_hi = f32(low(x[i]) - base_lo), f32(high(x[i]) - base_hi)
            y_lo, y_hi = f32(low(y[i]) - base_lo), f32(high(y[i]) - base_hi)
            squares_x[lane] += x_lo * x_lo + x_hi * x_hi
            squares_y[lane] += y_lo * y_lo + y_hi * y_hi
            lo = moved(base_lo, weight_x * x_lo + weight_y * y_lo)
            hi = moved(base_hi, weight_x * x_hi + weight_y * y_hi)
            put(out, i, lo, hi)
            largest = larger(lo, hi, largest)
    return largest


@compiled
def survey(stored_base: Any, stored_x: Any, base: Any, x: Any, squares: Any) -> Any:
    """What many merges of the same span share: its squares, and a copy in the first-level cache, aligned to lines.

    Answers the largest magnitude, as a number.
    """
    largest = u32(0)
    for block in range(0, words_in_span(base), LANES):
        for lane in range(LANES):
            i = block + lane
            base[i], x[i] = stored_base[i], stored_x[i]
            base_lo, base_hi = low(stored_base[i]), high(stored_base[i])
            x_lo, x_hi = low(stored_x[i]), high(stored_x[i])
            delta_lo, delta_hi = f32(x_lo - base_lo), f32(x_hi - base_hi)
            squares[lane] += delta_lo * delta_lo + delta_hi * delta_hi
            largest = larger(base_lo, base_hi, larger(x_lo, x_hi, largest))
    return u32(largest).view(np.float32)


@compiled
def one_towards(base: Any, x: Any, weight: Any, out: Any, target: Any) -> None:
    """base + weight * (x - base), of a surveyed span. See `send` for `target`."""
    for first in range(0, words_in_span(out), PIECE):
        for i in range(first, first + PIECE):
            base_lo, base_hi = low(base[i]), high(base[i])
            lo = moved(base_lo, weight * f32(low(x[i]) - base_lo))
            hi = moved(base_hi, weight * f32(high(x[i]) - base_hi))
            put(out, i, lo, hi)
        send(out, first, target)


@compiled
def one_back_from(base: Any, x: Any, rest: Any, out: Any, target: Any) -> None:
    """x - rest * (x - base), of a surveyed span. See `send` for `target`."""
    for first in range(0, words_in_span(out), PIECE):
        for i in range(first, first + PIECE):
            base_lo, base_hi = low(base[i]), high(base[i])
            x_lo, x_hi = low(x[i]), high(x[i])
            lo = back(base_lo, x_lo, rest, f32(x_lo - base_lo))
            hi = back(base_hi, x_hi, rest, f32(x_hi - base_hi))
            put(out, i, lo, hi)
        send(out, first, target)


@compiled
def one_copy(end: Any, out: Any, target: Any) -> None:
    """One end of the way, of a surveyed span. See `send` for `target`."""
    for first in range(0, words_in_span(out), PIECE):
        for i in range(first, first + PIECE):
            out[i] = end[i]
        send(out, first, target)


@compiled
def one_sum(cached: Any, reals: Any, r: Any, out: Any, target: Any) -> None:
    """base + sum of weight_k * (x_k - base), of surveyed spans. See `linear.hurry_many` for `cached`."""
    count = reals.shape[1]
    base = words_of(cached, 0, out)
    totals = words_of(cached, SPAN * (2 + count), out).ctypes.data
    lower = carray(pointer(totals), PIECE, np.float32)
    upper = carray(pointer(totals + 4 * PIECE), PIECE, np.float32)
    for first in range(0, words_in_span(out), PIECE):
        for k in range(count):
            x = words_of(cached, SPAN * (1 + k), out)
            weight = f32(reals[r, k, 0])
            for i in range(PIECE):
                term_lo = weight * f32(low(x[first + i]) - low(base[first + i]))
                term_hi = weight * f32(high(x[first + i]) - high(base[first + i]))
                lower[i] = term_lo if k == 0 else f32(lower[i] + term_lo)
                upper[i] = term_hi if k == 0 else f32(upper[i] + term_hi)
        for i in range(PIECE):
            word = base[first + i]
            put(out, first + i, moved(low(word), lower[i]), moved(high(word), upper[i]))
        send(out, first, target)


@compiled
def send(out: Any, first: Any, target: Any) -> None:
    """If `target`, a multiple of LINE, is not 0, the piece from `first` on goes there from `out`, past the caches."""
    if target:
        source = out.ctypes.data
        for at in range(out.itemsize * first, out.itemsize * (first + PIECE), LINE):
            stream_line(target + at, source + at)


@compiled
def ballot_of_two(
    base: Any, x: Any, y: Any, lowest: Any, reals: Any, normalize: Any, scale: Any, out: Any, squares: Any
) -> Any:
    """TIES of two trimmed models: elect by sum, disjoint mean; `lowest` are the smallest magnitudes kept."""
    largest = u32(0)
    lowest_x, lowest_y = lowest[0], lowest[1]
    weight_x, rescale_x, weight_y, rescale_y = reals[0, 0], reals[0, 1], reals[1, 0], reals[1, 1]
    squares_x, squares_y = squares[0], squares[1]
    size_x, size_y = abs(weight_x), abs(weight_y)
    for block in range(0, words_in_span(out), LANES):
        for lane in range(LANES):
            i = block + lane
            base_lo, base_hi = low(base[i]), high(base[i])
            x_lo, x_hi = f32(low(x[i]) - base_lo), f32(high(x[i]) - base_hi)
            y_lo, y_hi = f32(low(y[i]) - base_lo), f32(high(y[i]) - base_hi)
            squares_x[lane] += x_lo * x_lo + x_hi * x_hi
            squares_y[lane] += y_lo * y_lo + y_hi * y_hi
            voice_x, voice_y = voice(x_lo, lowest_x, rescale_x, weight_x), voice(y_lo, lowest_y, rescale_y, weight_y)
            lo = moved(base_lo, scale * elected(voice_x, voice_y, size_x, size_y, normalize))
            voice_x, voice_y = voice(x_hi, lowest_x, rescale_x, weight_x), voice(y_hi, lowest_y, rescale_y, weight_y)
            hi = moved(base_hi, scale * elected(voice_x, voice_y, size_x, size_y, normalize))
            put(out, i, lo, hi)
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
