"""Counting magnitudes, for an exact radix selection of TIES's k-th largest |delta| (arXiv 2306.01708, section 4)."""

from __future__ import annotations

import torch

from ggez_kernels.sparsify import NAN_KEY

from .rounding import Array, widen, work_dtype


def keys(delta: torch.Tensor) -> torch.Tensor:
    """The 31 low bits of float32(delta), as int32: they order like |delta|, infinity and then NaN (one key) on top."""
    bits = delta.to(torch.float32).view(torch.int32) & 0x7FFFFFFF
    return torch.where(delta.isnan(), NAN_KEY, bits)


def _keys(base: Array, model: Array) -> torch.Tensor:
    work = work_dtype([base, model])
    return keys(widen(model, work) - widen(base, work))


def histogram(base: Array, model: Array, *, shift: int, bits: int, prefix: int) -> Array:
    """h[v] = #{i : (key_i >> shift) & (2**bits - 1) == v and key_i >> (shift + bits) == prefix}; int64[2**bits]."""
    if bits < 1 or shift < 0 or shift + bits > 31:
        raise ValueError(f"shift {shift} and bits {bits} must select some of the 31 bits of a key")
    key = _keys(base, model).to(torch.int64)
    chosen = key[(key >> (shift + bits)) == prefix]
    counts: Array = torch.bincount((chosen >> shift) & ((1 << bits) - 1), minlength=1 << bits).numpy()
    return counts


def ties(base: Array, model: Array, threshold: int) -> int:
    """#{i : key_i == threshold}."""
    return int((_keys(base, model) == threshold).sum())


def nth_tie(base: Array, model: Array, threshold: int, n: int) -> int:
    """The index of the n-th element (from 0) with key == threshold; IndexError if there are not so many."""
    found = torch.nonzero(_keys(base, model) == threshold).flatten()
    if not 0 <= n < found.numel():
        raise IndexError(f"there is no element {n} with key {threshold}")
    return int(found[n])
