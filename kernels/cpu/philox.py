"""Philox4x32-10, a counter-based generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011."""

from __future__ import annotations

from typing import Any

import numpy as np

from .compiled import compiled

u32, u64 = np.uint32, np.uint64
_MULTIPLIER_0, _MULTIPLIER_1 = u64(0xD2511F53), u64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = u32(0x9E3779B9), u32(0xBB67AE85)


@compiled
def philox(seed: Any, first: Any, words: Any) -> None:
    """words[4j : 4j+4] = Philox4x32-10(key=seed, counter=first + j), the counter in the low two of four words."""
    for j in range(words.size // 4):
        counter = u64(first + u64(j))
        a, b, c, d = u32(counter), u32(counter >> u64(32)), u32(0), u32(0)
        key_0, key_1 = u32(seed), u32(seed >> u64(32))
        for _ in range(10):
            product_0 = u64(_MULTIPLIER_0 * u64(a))
            product_1 = u64(_MULTIPLIER_1 * u64(c))
            a = u32(u32(u32(product_1 >> u64(32)) ^ b) ^ key_0)
            b = u32(product_1)
            c = u32(u32(u32(product_0 >> u64(32)) ^ d) ^ key_1)
            d = u32(product_0)
            key_0 = u32(key_0 + _WEYL_0)
            key_1 = u32(key_1 + _WEYL_1)
        words[4 * j] = a
        words[4 * j + 1] = b
        words[4 * j + 2] = c
        words[4 * j + 3] = d
