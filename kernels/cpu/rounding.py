"""Storage dtypes to work rows and back: widening is exact, narrowing rounds once, to nearest even.

In integer operations, but for halves where the processor converts them exactly: it makes no difference to a bit.
Every NaN is narrowed to the one positive quiet NaN without payload.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numba import carray
from numba.core import types
from numba.extending import overload

from .compiled import compiled, f16_of_f32, f32_of_f16, pointer, processor_has

BF16, F16, F32, F64 = 0, 1, 2, 3
CODES: dict[np.dtype[Any], int] = {
    np.dtype(ml_dtypes.bfloat16): BF16,
    np.dtype(np.float16): F16,
    np.dtype(np.float32): F32,
    np.dtype(np.float64): F64,
}

CONVERTS_HALVES = processor_has("f16c", "fullfp16")  # x86, ARM

u16, u32, f32, f64 = np.uint16, np.uint32, np.float32, np.float64
_SMALLEST_NORMAL_HALF = f32(2.0**-14)
_SMALLEST_NORMAL_HALF_BITS = u32(113 << 23)
_HALF_OVERFLOW_BITS = u32(143 << 23)  # 2**16; what rounds up to it from below does so by itself
_ONE_HALF = f32(0.5)  # adding it brings a subnormal half's last bit to float32's last bit
_ONE_HALF_BITS = u32(126 << 23)

# numba widens every integer operation to 64 bits; the u32(...) around each of them lets LLVM undo that


@compiled
def bf16_to_f32(bits: Any) -> Any:
    return u32(u32(bits) << u32(16)).view(np.float32)


@compiled
def f16_to_f32(bits: Any) -> Any:
    if CONVERTS_HALVES:
        return f32_of_f16(u16(bits))
    return f16_to_f32_by_integers(bits)


@compiled
def f16_to_f32_by_integers(bits: Any) -> Any:
    magnitude = u32(u32(bits & u16(0x7FFF)) << u32(13))
    normal = u32(magnitude + u32(112 << 23))
    special = u32(magnitude + u32(224 << 23))
    # 2**-14 * (1 + m) - 2**-14: exact, and never a float32 subnormal that a flush-to-zero mode would lose
    shifted = u32(normal + u32(1 << 23)).view(np.float32)
    subnormal = f32(shifted - _SMALLEST_NORMAL_HALF).view(np.uint32)
    value = special if magnitude >= u32(0x0F800000) else normal
    value = subnormal if magnitude < u32(0x00800000) else value
    return u32(value | u32(u32(bits & u16(0x8000)) << u32(16))).view(np.float32)


def bits_for_halving(value: Any) -> Any:
    """float32 bits that round to a 16-bit format as `value` itself does (value float32 or float64)."""
    raise NotImplementedError


@overload(bits_for_halving)  # type: ignore[untyped-decorator]
def _bits_for_halving(value: Any) -> Any:
    if value == types.float32:

        def reinterpret(value: Any) -> Any:
            return f32(value).view(np.uint32)

        return reinterpret

    def round_to_odd(value: Any) -> Any:
        # rounding float64 -> float32 -> 16 bits would round twice; rounding to odd first loses nothing,
        # because float32 has more than two bits to spare (Boldo & Melquiond 2008)
        near = f32(value)
        bits = near.view(np.uint32)
        lower = u32(bits - u32(1)) if abs(f64(near)) > abs(value) else bits
        return bits if f64(near) == value or value != value else u32(lower | u32(1))

    return round_to_odd


@compiled
def bits_to_bf16(bits: Any) -> Any:
    """Right for everything but NaN."""
    odd = u32(u32(bits >> u32(16)) & u32(1))
    return u16(u32(u32(bits + u32(0x7FFF)) + odd) >> u32(16))


@compiled
def bits_to_f16(bits: Any) -> Any:
    """Right for every number, and for numpy's own NaN, which becomes the one that is stored."""
    if CONVERTS_HALVES:
        return f16_of_f32(u32(bits).view(np.float32))
    return bits_to_f16_by_integers(bits)


@compiled
def bits_to_f16_by_integers(bits: Any) -> Any:
    magnitude = u32(bits & u32(0x7FFFFFFF))
    odd = u32(u32(magnitude >> u32(13)) & u32(1))
    normal = u32(u32(u32(magnitude - u32((112 << 23) - 0xFFF)) + odd) >> u32(13))
    # the float32 addition does the rounding
    shifted = f32(magnitude.view(np.float32) + _ONE_HALF).view(np.uint32)
    value = u32(shifted - _ONE_HALF_BITS) if magnitude < _SMALLEST_NORMAL_HALF_BITS else normal
    value = u32(0x7C00) if magnitude >= _HALF_OVERFLOW_BITS else value
    value = u32(0x7E00) if magnitude > u32(0x7F800000) else value
    return u16(value | u32(u32(bits >> u32(16)) & u32(0x8000)))


def widened(element: Any) -> Any:
    """A stored element as the float it stands for. numba has no 16-bit floats: uint16 is bfloat16, int16 float16."""
    raise NotImplementedError


@overload(widened)  # type: ignore[untyped-decorator]
def _widened(element: Any) -> Any:
    def bf16(element: Any) -> Any:
        return bf16_to_f32(element)

    def f16(element: Any) -> Any:
        return f16_to_f32(u16(element))

    def same(element: Any) -> Any:
        return element

    return {types.uint16: bf16, types.int16: f16}.get(element, same)


@compiled
def widen(address: Any, code: Any, first: Any, row: Any) -> None:
    """row[i] = stored[first + i], exactly, for i < row.size."""
    n = row.size
    if code == BF16:
        unpack(carray(pointer(address + 2 * first), n, np.uint16), row)
    elif code == F16:
        unpack(carray(pointer(address + 2 * first), n, np.int16), row)
    elif code == F32:
        unpack(carray(pointer(address + 4 * first), n, np.float32), row)
    else:
        unpack(carray(pointer(address + 8 * first), n, np.float64), row)


@compiled
def unpack(elements: Any, row: Any) -> None:
    for i in range(row.size):
        row[i] = widened(elements[i])


@compiled
def narrow(row: Any, address: Any, code: Any, first: Any) -> Any:
    """stored[first + i] = row[i], rounded; answers how many stored elements are NaN or infinite.

    The common strip has none, so the fast loops only find the largest magnitude, and are repeated if it tells.
    The row may be changed.
    """
    for _ in range(2):
        if store(row, address, code, first) < overflow_bits(code):
            return 0
        for i in range(row.size):
            row[i] = row[i] if row[i] == row[i] else row.dtype.type(np.nan)
    return count_nonfinite(address + item_size(code) * first, code, row.size)


@compiled
def overflow_bits(code: Any) -> Any:
    """What `store` answers for a row whose rounded elements are not all finite is at least this."""
    if code == BF16:
        return u32(0x7F7F8000)
    if code == F16:
        return u32(0x477FF000)
    return u32(0x7F800000) if code == F32 else u32(0x7FF00000)


@compiled
def item_size(code: Any) -> Any:
    return 2 if code == BF16 or code == F16 else 4 if code == F32 else 8


@compiled
def store(row: Any, address: Any, code: Any, first: Any) -> Any:
    """Round and store; answers the largest magnitude, as the upper 32 bits of its float32 or float64 form."""
    n = row.size
    largest = u32(0)
    if code == BF16:
        halves = carray(pointer(address + 2 * first), n, np.uint16)
        for i in range(n):
            bits = bits_for_halving(row[i])
            halves[i] = bits_to_bf16(bits)
            largest = max(largest, u32(bits & u32(0x7FFFFFFF)))
    elif code == F16:
        halves = carray(pointer(address + 2 * first), n, np.uint16)
        for i in range(n):
            bits = bits_for_halving(row[i])
            halves[i] = bits_to_f16(bits)
            largest = max(largest, u32(bits & u32(0x7FFFFFFF)))
    elif code == F32:
        singles = carray(pointer(address + 4 * first), n, np.float32)
        for i in range(n):
            single = f32(row[i])
            singles[i] = single
            largest = max(largest, u32(single.view(np.uint32) & u32(0x7FFFFFFF)))
    else:
        doubles = carray(pointer(address + 8 * first), n, np.float64)
        for i in range(n):
            double = f64(row[i])
            doubles[i] = double
            largest = max(largest, u32(u32(double.view(np.uint64) >> np.uint64(32)) & u32(0x7FFFFFFF)))
    return largest


@compiled
def count_nonfinite(address: Any, code: Any, size: Any) -> Any:
    """NaN and infinite elements among `size` stored ones."""
    count = 0
    if code == BF16 or code == F16:
        exponent = u16(0x7F80) if code == BF16 else u16(0x7C00)
        halves = carray(pointer(address), size, np.uint16)
        for i in range(size):
            count += 1 if u16(halves[i] & exponent) == exponent else 0
    elif code == F32:
        singles = carray(pointer(address), size, np.float32)
        for i in range(size):
            count += 0 if abs(singles[i]) < f32(np.inf) else 1
    else:
        doubles = carray(pointer(address), size, np.float64)
        for i in range(size):
            count += 0 if abs(doubles[i]) < np.inf else 1
    return count
