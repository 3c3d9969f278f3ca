"""Sparsified deltas: the trim of TIES (arXiv 2306.01708), the random drop of DARE (arXiv 2311.03099)."""

from __future__ import annotations

import torch

from ggez_kernels.sparsify import Sparsify

from .gram import check_chunk_start, chunk_sums
from .rounding import Array, widen, work_dtype
from .threshold import keys

_LOW = 0xFFFFFFFF


def philox(seed: int, counter: torch.Tensor) -> torch.Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): int64[n, 4] words of 32 bits for int64[n] counters, 64-bit key `seed`."""
    a, b = counter & _LOW, counter >> 32
    c, d = torch.zeros_like(counter), torch.zeros_like(counter)
    key_0, key_1 = seed & _LOW, seed >> 32
    for _ in range(10):
        # the products may wrap as int64: their 64 bits are right all the same
        product_0, product_1 = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (
            ((product_1 >> 32) & _LOW) ^ b ^ key_0,
            product_1 & _LOW,
            ((product_0 >> 32) & _LOW) ^ d ^ key_1,
            product_0 & _LOW,
        )
        key_0, key_1 = (key_0 + 0x9E3779B9) & _LOW, (key_1 + 0xBB67AE85) & _LOW
    return torch.stack([a, b, c, d], dim=1)


def random_words(seed: int, first: int, size: int) -> Array:
    """uint32[size]: the random words of flat indices first, first + 1, ... under the 64-bit key `seed`."""
    counter = torch.arange(first // 4, (first + size + 3) // 4, dtype=torch.int64)
    words: Array = philox(seed, counter).flatten()[first % 4 :][:size].numpy().astype("uint32")
    return words


def keep_mask(sparsify: Sparsify, size: int, *, start: int = 0) -> Array:
    """bool[size]: which of the elements start, start + 1, ... the drop of `sparsify` keeps (its trim ignored).

    Element i is kept iff Philox4x32-10(key=seed, counter=i // 4)[i % 4] < floor(keep * 2**32).
    """
    mask: Array = random_words(sparsify.seed, start, size) < sparsify.keep_limit
    return mask


def sparsified(delta: torch.Tensor, how: Sparsify | None, start: int) -> torch.Tensor:
    """d' = kept ? rescale * d : 0, as `Sparsify` defines it."""
    if how is None or not how.changes:
        return delta
    key = keys(delta)
    kept = key >= how.threshold
    index = torch.arange(start, start + delta.numel(), dtype=torch.int64)
    kept &= (key > how.threshold) | (index <= how.last)
    if how.drops:
        kept &= torch.from_numpy(keep_mask(how, delta.numel(), start=start))
    return torch.where(kept, torch.tensor(how.rescale, dtype=delta.dtype) * delta, 0)


def l1(base: Array, model: Array, sparsify: Sparsify, *, start: int) -> tuple[Array, Array]:
    """(sum |d|, sum |kept d|) with d = model - base, per chunk of `CHUNK` elements: two float64[chunks].

    The kept deltas are not rescaled. Chunks, `start` and order of summation as for `gram`.
    """
    check_chunk_start(start)
    work = work_dtype([base, model])
    delta = widen(model, work) - widen(base, work)
    unscaled = Sparsify(sparsify.threshold, sparsify.last, sparsify.keep, sparsify.seed)
    kept = sparsified(delta, unscaled, start)
    return chunk_sums(delta.abs().double()).numpy(), chunk_sums(kept.abs().double()).numpy()
