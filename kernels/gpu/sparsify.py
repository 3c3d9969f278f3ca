"""What happens to a delta before it is combined: trim and drop, as `ggez_kernels.sparsify.Sparsify` defines them."""

from __future__ import annotations

import triton.language as tl

from .launch import ALL, DROP, LAST, LIMIT, RESCALE, SEED, THRESHOLD, UNTOUCHED, jit
from .philox import random_words
from .rounding import magnitude_key, number


@jit
def sparsified(
    delta: tl.tensor, row: tl.tensor, index: tl.tensor, lane: tl.tensor, STEP: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """d' = kept ? rescale * d : 0; `row` points to the model's row of the table, `index` is that of the first element.

    STEP, one of UNTOUCHED, TRIM and DROP, is as much as the compiled code can do.
    """
    if STEP != UNTOUCHED:
        delta = trimmed(delta, row, index, lane, BLOCK)
        if STEP == DROP:
            limit = tl.load(row + LIMIT)
            if limit < ALL:
                kept = random_words(tl.load(row + SEED), index, BLOCK) < limit.to(tl.uint32)
                delta = tl.where(kept, delta, 0.0)
        delta = number(row + RESCALE) * delta
    return delta


@jit
def trimmed(delta: tl.tensor, row: tl.tensor, index: tl.tensor, lane: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    threshold = tl.load(row + THRESHOLD).to(tl.int32)
    last = tl.minimum(tl.maximum(tl.load(row + LAST) - index, -1), BLOCK).to(tl.int32)
    key = magnitude_key(delta)
    return tl.where((key > threshold) | ((key == threshold) & (lane <= last)), delta, 0.0)
