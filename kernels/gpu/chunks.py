"""Chunks: what `gram` and `l1` sum over, in the one order that makes their sums the same on every device.

Element i of a chunk goes to running sum i % LANES; then the upper half of the sums is added to the lower, ten times.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from ggez_kernels.sparsify import CHUNK

from .launch import jit

LANES = tl.constexpr(1024)
_CHUNK = tl.constexpr(CHUNK)


def check_chunk_start(start: int) -> None:
    if start % CHUNK:
        raise ValueError(f"start must be a multiple of {CHUNK}, found {start}")


def chunks(size: int) -> int:
    return -(-size // CHUNK)


def chunk_launches(size: int, is_aligned: bool) -> Iterator[tuple[int, int, bool]]:
    """(first chunk, how many, ALIGNED) of the launches that cover `size` elements.

    The last chunk gets one of its own where it is not a multiple of 16 elements, as accesses are then narrow.
    """
    whole = chunks(size) if size % 16 == 0 else size // CHUNK
    for first, count, wide in ((0, whole, is_aligned), (whole, chunks(size) - whole, False)):
        if count:
            yield first, count, wide


@jit
def chunk_elements(chunk: tl.tensor, size: tl.tensor, ALIGNED: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Where a chunk, an int64, begins and ends."""
    begin = chunk * _CHUNK
    end = tl.minimum(begin + _CHUNK, size)
    if ALIGNED:  # so it is, as the compiler sees
        end = end // 16 * 16
    return begin, end


@jit
def fold(sums: tl.tensor) -> tl.tensor:
    """The sum of LANES numbers, which the order of two summands cannot change."""
    for _ in tl.static_range(9):
        sums = tl.sum(tl.reshape(sums, [2, sums.shape[0] // 2]), 0)
    return tl.sum(sums, 0)
