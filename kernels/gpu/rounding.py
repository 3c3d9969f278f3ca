"""Storage dtypes to float32 and back: widening is exact, narrowing rounds once, to nearest even."""

from __future__ import annotations

import triton.language as tl

from ggez_kernels.sparsify import NAN_KEY

from .launch import WIDEST, jit

_INFINITY = tl.constexpr(float("inf"))
_BF16_OVERFLOW = tl.constexpr(2.0**128 - 2.0**119)  # the least that rounds to infinity
_F16_OVERFLOW = tl.constexpr(65520.0)
_NAN_KEY = tl.constexpr(NAN_KEY)
MINUS_ZERO_BITS = tl.constexpr(-(2**31))
_WIDEST = tl.constexpr(WIDEST)


@jit
def pointer(address: tl.tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """An integer address as a pointer; that it is a multiple of 16 is what the widest accesses need to know."""
    place = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        place = tl.multiple_of(place, _WIDEST)
    return place


@jit
def widen(
    address: tl.tensor, offsets: tl.tensor, exists: tl.tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr
) -> tl.tensor:
    """float32 of the elements at `offsets`, 0 for those that do not exist."""
    return tl.load(pointer(address, DTYPE, ALIGNED) + offsets, mask=exists, other=0.0).to(tl.float32)


@jit
def narrow(
    value: tl.tensor,
    address: tl.tensor,
    offsets: tl.tensor,
    exists: tl.tensor,
    count: tl.tensor,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Round and store, every NaN as the same one; add to *count, and answer, how many stored are NaN or infinite."""
    BITS: tl.constexpr = tl.int32 if DTYPE == tl.float32 else tl.int16
    NAN: tl.constexpr = 0x7FC00000 if DTYPE == tl.float32 else 0x7FC0 if DTYPE == tl.bfloat16 else 0x7E00
    OVERFLOW: tl.constexpr = (
        _INFINITY if DTYPE == tl.float32 else _BF16_OVERFLOW if DTYPE == tl.bfloat16 else _F16_OVERFLOW
    )
    nonfinite = tl.sum((exists & ~(tl.abs(value) < OVERFLOW)).to(tl.int32), 0)
    bits = value.to(DTYPE).to(BITS, bitcast=True)
    if nonfinite > 0:
        bits = tl.where(value != value, NAN, bits)  # processors differ in the NaN that they round to
        tl.atomic_add(count, nonfinite.to(tl.int64), sem="relaxed")
    tl.store(pointer(address, BITS, ALIGNED) + offsets, bits, mask=exists)
    return nonfinite


@jit
def number(place: tl.tensor) -> tl.tensor:
    """The float32 whose bits are in the table."""
    return tl.load(place).to(tl.int32).to(tl.float32, bitcast=True)


@jit
def magnitude_key(delta: tl.tensor) -> tl.tensor:
    """The key of `Sparsify`, an int32. A NaN that comes out of arithmetic is quiet, and so never below `NAN_KEY`."""
    return tl.minimum(delta.to(tl.int32, bitcast=True) & 0x7FFFFFFF, _NAN_KEY)


@jit
def is_nonfinite(value: tl.tensor) -> tl.tensor:
    return ~(tl.abs(value) < _INFINITY)
