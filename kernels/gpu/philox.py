"""Philox4x32-10, a counter-based generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

Word i of a stream is Philox4x32-10(key=seed, counter=i // 4)[i % 4].
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from .launch import jit

_MULTIPLIER_0, _MULTIPLIER_1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_WEYL_0, _WEYL_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)


@jit
def random_words(seed: tl.tensor, first: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """uint32[BLOCK]: words first, first + 1, ... (an int64) under the 64-bit key `seed`."""
    counter = first // 4 + tl.arange(0, BLOCK // 4)
    a, b, c, d = four_words(seed, counter)
    skipped = first % 4
    if skipped > 0:  # each four of this block are the end of one four and the beginning of the next
        a, b, c, d = shifted(a, b, c, d, seed, counter + 1, skipped)
    place = tl.arange(0, 4)[None, :]
    left = tl.where(place == 0, a[:, None], b[:, None])
    right = tl.where(place == 2, c[:, None], d[:, None])
    return tl.reshape(tl.where(place < 2, left, right), [BLOCK])


@jit
def shifted(
    a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor, seed: tl.tensor, counter: tl.tensor, by: tl.tensor
) -> Any:
    """Four of the eight words a, b, c, d and those of `counter`, from word `by`, which is 1, 2 or 3, on."""
    e, f, g, _ = four_words(seed, counter)
    return (
        tl.where(by == 1, b, tl.where(by == 2, c, d)),
        tl.where(by == 1, c, tl.where(by == 2, d, e)),
        tl.where(by == 1, d, tl.where(by == 2, e, f)),
        tl.where(by == 1, e, tl.where(by == 2, f, g)),
    )


@jit
def four_words(seed: tl.tensor, counter: tl.tensor) -> Any:
    """The counter is in the low two of four words."""
    a = (counter & 0xFFFFFFFF).to(tl.uint32)
    b = (counter >> 32).to(tl.uint32)
    c = tl.zeros_like(a)
    d = tl.zeros_like(a)
    key_0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    key_1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in range(10):
        high_0, low_0 = tl.umulhi(a, _MULTIPLIER_0), a * _MULTIPLIER_0
        high_1, low_1 = tl.umulhi(c, _MULTIPLIER_1), c * _MULTIPLIER_1
        a, b, c, d = high_1 ^ b ^ key_0, low_1, high_0 ^ d ^ key_1, low_0
        key_0 += _WEYL_0
        key_1 += _WEYL_1
    return a, b, c, d
