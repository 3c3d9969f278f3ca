"""Counting magnitudes: the sweeps that select TIES's k-th largest |delta| exactly (arXiv 2306.01708, section 4).

These wait for the device: what is to be swept next depends on the answer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from ggez_kernels.sparsify import Counting

from .launch import DTYPES, OPTIONS, THREADS, aligned, check, elements, jit, launches, of_one_dtype, on
from .rounding import magnitude_key, widen

COUNTING = Counting(digit_bits=11, most_bins=0, sample_share=1)

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 8 * THREADS
MOST_PROGRAMS = 1024  # each adds its counters to those of all in the end, so that few is better
MOST_BINS = 2048  # counters that the registers of a warp have room for
LEAST_BINS = 256  # fewer would be another binary, for little


def histogram(base: torch.Tensor, model: torch.Tensor, *, low: int, high: int, shift: int = 0) -> Array:
    """h[v] = how many keys in [low, high) have (key - low) >> shift == v; one more entry counts those >= high.

    key = the 31 low bits of float32(model - base), as in `Sparsify`. Answers int64[((high - low - 1) >> shift) + 2].
    """
    if not 0 <= low < high <= 1 << 31 or not 0 <= shift < 31:
        raise ValueError(f"low {low}, high {high} and shift {shift} must select keys of 31 bits")
    b, x = _pair(base, model)
    bins = ((high - low - 1) >> shift) + 1
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=b.device)
    room = max(LEAST_BINS, triton.next_power_of_2(bins)) if bins <= MOST_BINS else 0
    with on(b.device):
        for begin, end, programs, wide in launches(b.numel(), BLOCK, aligned((b, x))):
            _histogram[(min(programs, MOST_PROGRAMS),)](
                b.data_ptr(),
                x.data_ptr(),
                counts,
                begin,
                end,
                low,
                high - 1,
                shift,
                bins,
                BINS=room,
                ALIGNED=wide,
                **_constants(b),
            )
    answer: Array = counts.cpu().numpy()
    return answer


def ties(base: torch.Tensor, model: torch.Tensor, threshold: int) -> int:
    """How many elements have key == threshold."""
    b, x = _pair(base, model)
    return int(_count_ties(b, x, threshold)[1].sum())


def nth_tie(base: torch.Tensor, model: torch.Tensor, threshold: int, n: int) -> int:
    """The local index of the n-th element (from 0) with key == threshold; IndexError if there are not so many."""
    b, x = _pair(base, model)
    begins, counts = _count_ties(b, x, threshold)
    so_far = np.cumsum(counts, dtype=np.int64)
    block = int(np.searchsorted(so_far, n, side="right"))
    if n < 0 or block == so_far.size:
        raise IndexError(f"there is no element {n} with key {threshold}")
    nth_here = n - int(so_far[block] - counts[block])
    begin = int(begins[block])
    index = torch.empty(1, dtype=torch.int64, device=b.device)
    with on(b.device):
        _find_tie[(1,)](b.data_ptr(), x.data_ptr(), index, begin, b.numel(), threshold, nth_here, **_constants(b))
    return int(index)


def _pair(base: torch.Tensor, model: torch.Tensor) -> list[torch.Tensor]:
    check({"base": base, "model": model})
    return of_one_dtype([base, model])


def _constants(tensor: torch.Tensor) -> dict[str, Any]:
    return {"DTYPE": DTYPES[tensor.dtype], "BLOCK": BLOCK, **OPTIONS}


def _count_ties(base: torch.Tensor, model: torch.Tensor, threshold: int) -> tuple[Array, Array]:
    """int64[blocks] first elements of blocks, int32[blocks] ties in them."""
    spans = list(launches(base.numel(), BLOCK, aligned((base, model))))
    begins = [np.arange(begin, end, BLOCK, dtype=np.int64) for begin, end, _, _ in spans]
    counts = torch.empty(sum(span.size for span in begins), dtype=torch.int32, device=base.device)
    at = 0
    with on(base.device):
        for begin, end, programs, wide in spans:
            _tie_counts[(programs,)](
                base.data_ptr(), model.data_ptr(), counts[at:], begin, end, threshold, ALIGNED=wide, **_constants(base)
            )
            at += programs
    return np.concatenate([np.empty(0, np.int64), *begins]), counts.cpu().numpy()


@jit
def keys(
    base: tl.tensor,
    model: tl.tensor,
    offsets: tl.tensor,
    exists: tl.tensor,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    b = widen(base, offsets, exists, DTYPE, ALIGNED)
    return magnitude_key(widen(model, offsets, exists, DTYPE, ALIGNED) - b)


@jit
def _histogram(
    base: tl.int64,
    model: tl.int64,
    counts: tl.tensor,
    begin: tl.int64,
    end: tl.int64,
    low: tl.int32,
    highest: tl.int32,
    shift: tl.int32,
    bins: tl.int32,
    BINS: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BINS counters are kept by the program and added to `counts` in the end; if BINS is 0, every key is by itself."""
    first, lane, _ = elements(begin, end, ALIGNED, BLOCK)
    limit = end // 16 * 16 if ALIGNED else end
    above = tl.zeros([BLOCK], tl.int32)
    if BINS:
        mine = tl.zeros([BINS], tl.int32)
    for at in range(first, limit, tl.num_programs(0).to(tl.int64) * BLOCK):
        exists = at + lane < limit
        key = keys(base, model, at + lane, exists, DTYPE, ALIGNED)
        above += (exists & (key > highest)).to(tl.int32)
        inside = exists & (key >= low) & (key <= highest)
        place = (key - low) >> shift
        if BINS:
            mine += tl.histogram(place, BINS, mask=inside)
        else:
            tl.atomic_add(counts + place, tl.full([BLOCK], 1, tl.int64), mask=inside, sem="relaxed")
    if BINS:
        place = tl.arange(0, BINS)
        tl.atomic_add(counts + place, mine.to(tl.int64), mask=place < bins, sem="relaxed")
    tl.atomic_add(counts + bins, tl.sum(above, 0).to(tl.int64), sem="relaxed")


@jit
def _tie_counts(
    base: tl.int64,
    model: tl.int64,
    counts: tl.tensor,
    begin: tl.int64,
    end: tl.int64,
    threshold: tl.int32,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    first, lane, exists = elements(begin, end, ALIGNED, BLOCK)
    key = keys(base, model, first + lane, exists, DTYPE, ALIGNED)
    tl.store(counts + tl.program_id(0), tl.sum((exists & (key == threshold)).to(tl.int32), 0))


@jit
def _find_tie(
    base: tl.int64,
    model: tl.int64,
    index: tl.tensor,
    begin: tl.int64,
    end: tl.int64,
    threshold: tl.int32,
    n: tl.int32,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """index[0] = that of the n-th tie from `begin` on, which is not further away than BLOCK."""
    first, lane, exists = elements(begin, end, False, BLOCK)
    tie = (exists & (keys(base, model, first + lane, exists, DTYPE, False) == threshold)).to(tl.int32)
    wanted = (tie == 1) & (tl.cumsum(tie, 0) == n + 1)
    tl.store(index, first + tl.sum(tl.where(wanted, lane, 0), 0))
