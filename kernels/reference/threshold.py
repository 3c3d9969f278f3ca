"""Counting magnitudes, to select TIES's k-th largest |delta| exactly (arXiv 2306.01708, section 4)."""

from __future__ import annotations

import numpy as np
import torch

from ggez_kernels.sparsify import NAN_KEY, Counting

from .rounding import Array, widen, work_dtype

COUNTING = Counting(digit_bits=15, most_bins=1 << 21, sample_share=16)


def keys(delta: torch.Tensor) -> torch.Tensor:
    """The 31 low bits of float32(delta), as int32: they order like |delta|, infinity and then NaN (one key) on top."""
    bits = delta.to(torch.float32).view(torch.int32) & 0x7FFFFFFF
    return torch.where(delta.isnan(), NAN_KEY, bits)


def _keys(base: Array, model: Array) -> torch.Tensor:
    work = work_dtype([base, model])
    return keys(widen(model, work) - widen(base, work))


def histogram(base: Array, model: Array, *, low: int, high: int, shift: int = 0) -> Array:
    """h[v] = #{i : low <= key_i < high and (key_i - low) >> shift == v}, then #{i : key_i >= high}; all uint32."""
    if not 0 <= low < high <= 1 << 31 or not 0 <= shift < 31:
        raise ValueError(f"low {low}, high {high} and shift {shift} must select keys of 31 bits")
    key = _keys(base, model).to(torch.int64)
    inside = key[(key >= low) & (key < high)]
    counts = torch.bincount((inside - low) >> shift, minlength=((high - low - 1) >> shift) + 2)
    counts[-1] = (key >= high).sum()
    answer: Array = counts.numpy().astype(np.uint32)
    return answer


def ties(base: Array, model: Array, threshold: int) -> int:
    """#{i : key_i == threshold}."""
    return int((_keys(base, model) == threshold).sum())


def nth_tie(base: Array, model: Array, threshold: int, n: int) -> int:
    """The index of the n-th element (from 0) with key == threshold; IndexError if there are not so many."""
    found = torch.nonzero(_keys(base, model) == threshold).flatten()
    if not 0 <= n < found.numel():
        raise IndexError(f"there is no element {n} with key {threshold}")
    return int(found[n])
