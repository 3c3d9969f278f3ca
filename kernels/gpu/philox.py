"""Philox4x32-10, a counter-based generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

Word i of a stream is Philox4x32-10(key=seed, counter=i // 4)[i % 4].
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from .launch import jit


@jit
def random_words(seed: tl.tensor, first: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """uint32[BLOCK]: words first, first + 1, ... (an int64) under the 64-bit key `seed`."""
    if first % 4 == 0:
        words = by_fours(seed, first, BLOCK)
    else:
        words = one_by_one(seed, first, BLOCK)
    return words


@jit
def by_fours(seed: tl.tensor, first: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    a, b, c, d = four_words(seed, first // 4 + tl.arange(0, BLOCK // 4))
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@jit
def one_by_one(seed: tl.tensor, first: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Whatever `first`: each element generates all four words of its counter and keeps one."""
    index = first + tl.arange(0, BLOCK)
    a, b, c, d = four_words(seed, index // 4)
    place = index % 4
    return tl.where(place < 2, tl.where(place == 0, a, b), tl.where(place == 2, c, d))


@jit
def four_words(seed: tl.tensor, counter: tl.tensor) -> Any:
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, tl.zeros_like(low), tl.zeros_like(low))
