"""Exact thresholds and scales of sparsified deltas, from sweeps over tiles.

Trimming keeps the k entries of largest |delta|. The k-th magnitude is found on the bits of |float32(delta)|, its *key*,
which sorts like the magnitude: every sweep counts keys in the bins of a range, and the bin that holds the k-th is the
next range, until a bin is one key. Where histograms are made of single passes through memory, as on a processor, a
sample says first where the k-th must about be; should it not be there after all, everything is counted.
Entries equal to the k-th are kept from the front until exactly k are kept.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Generator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from ggez_kernels.sparsify import KEEP_ALL_LAST, Counting, Sparsify
from ggez_merge.methods.method import Array, Kernels, Sweep, Tile, summed

KEYS = 1 << 31
ABOVE_ALL = KEYS - 1  # no finite magnitude has more bits set
SAMPLE_SLICES = 16  # spread evenly over a tile
SMALL = 1 << 22  # entries of a tile that are counted outright: a sample would save nothing


def n_kept(density: float, n: int) -> int:
    """How many of n entries a density keeps: int(density n), but at least one as long as the density is not zero."""
    if density <= 0 or n == 0:
        return 0
    return n if density >= 1 else max(1, int(density * n))


def thresholds(
    kernels: Kernels, sizes: Sequence[int], keep: Sequence[int], all_ties: bool
) -> Generator[Sweep, Any, list[list[Sparsify]]]:
    """The trim of every job of a group, per model: keep[m] entries of model m over the whole group.

    sizes: elements of each job. With `all_ties` every entry equal to the k-th magnitude is kept, otherwise those that
    come first (in job order, then by flat index), so that exactly keep[m] remain.
    """
    total = sum(sizes)
    selected = [m for m, k in enumerate(keep) if 0 < k < total]
    cut = {m: Sparsify() if k >= total else Sparsify(threshold=ABOVE_ALL, last=-1) for m, k in enumerate(keep)}
    if not selected:
        return [[cut[m] for m in range(len(keep))] for _ in sizes]

    kth, wanted = yield from _select(kernels, total, {m: keep[m] for m in selected})
    last = yield from _last_ties(kernels, total, kth, {} if all_ties else wanted)

    def trim(job: int, m: int) -> Sparsify:
        if m not in kth:
            return cut[m]
        at_job, index = last.get(m, (len(sizes), 0))
        return Sparsify(threshold=kth[m], last=KEEP_ALL_LAST if job < at_job else (index if job == at_job else -1))

    return [[trim(job, m) for m in range(len(keep))] for job in range(len(sizes))]


def _select(
    kernels: Kernels, total: int, keep: dict[int, int]
) -> Generator[Sweep, Any, tuple[dict[int, int], dict[int, int]]]:
    """For each model: the key of its keep[m]-th largest entry of `total`, and how many equal to it are to be kept.

    Models of which all equals are kept are left out of the second answer.
    """
    kth: dict[int, int] = {}
    wanted: dict[int, int] = {}
    counter = np.int64 if total >> 32 else np.uint32  # what tiles' counts are added up in
    ranges = dict.fromkeys(keep, (0, KEYS))
    if kernels.counting.sample_share > 1:
        ranges = yield from _guess(kernels, total, keep, counter)
    while ranges:
        spans = [(m, low, high, _shift(kernels.counting, high - low, len(ranges))) for m, (low, high) in ranges.items()]

        def count(tile: Tile, spans: list[tuple[int, int, int, int]] = spans) -> np.ndarray:
            counts = [
                kernels.histogram(tile.base, tile.models[m], low=low, high=high, shift=shift)
                for m, low, high, shift in spans
            ]
            return np.concatenate(counts).astype(counter, copy=False)

        counted: np.ndarray = yield Sweep(count)
        at = 0
        for m, low, high, shift in spans:
            bins = (high - low) >> shift
            counts = counted[at : at + bins + 1]
            at += bins + 1
            index, need = _bin_of(counts, keep[m])
            if not 0 <= index < bins:  # not where the sample said
                ranges[m] = 0, KEYS
            elif shift:
                ranges[m] = low + (index << shift), low + ((index + 1) << shift)
            else:
                del ranges[m]
                kth[m] = low + index
                if need < counts[index]:
                    wanted[m] = need
    return kth, wanted


def _shift(counting: Counting, width: int, models: int) -> int:
    """How many low bits of a key the next histogram ignores: none if the models' counters for that are few enough."""
    if width <= max(1 << counting.digit_bits, counting.most_bins // models):
        return 0
    return (width - 1).bit_length() - counting.digit_bits


def _guess(
    kernels: Kernels, total: int, keep: dict[int, int], counter: type[np.int64 | np.uint32]
) -> Generator[Sweep, Any, dict[int, tuple[int, int]]]:
    """Where the keep[m]-th largest of `total` must about be, going by a sample of the entries.

    The sample's rank of it is k * sampled / total, give or take three standard deviations of a fair sample at the most.
    """
    shift = (KEYS - 1).bit_length() - kernels.counting.digit_bits

    def sample(tile: Tile) -> np.ndarray:
        bins = [_sampled_bins(kernels, tile.base, tile.models[m], shift) for m in keep]
        return np.stack(bins).astype(counter, copy=False)

    ranges = {}
    for m, bins in zip(keep, (yield Sweep(sample)), strict=True):
        sampled = int(bins.sum())
        margin = 0 if sampled == total else 3 * math.isqrt(sampled) // 2 + 1
        rank = keep[m] * sampled // total
        upper, _ = _bin_of(bins, max(1, min(sampled, rank - margin)))
        lower, _ = _bin_of(bins, max(1, min(sampled, rank + margin)))
        ranges[m] = lower << shift, (upper + 1) << shift
    return ranges


def _sampled_bins(kernels: Kernels, base: Array, model: Array, shift: int) -> np.ndarray:
    """How many keys of a sample fall into each bin: of everything if the tile is small."""
    n = len(base)
    if n > SMALL:
        length = n // kernels.counting.sample_share // SAMPLE_SLICES
        starts = [i * n // SAMPLE_SLICES for i in range(SAMPLE_SLICES)]
        base, model = (np.concatenate([array[at : at + length] for at in starts]) for array in (base, model))
    return kernels.histogram(base, model, low=0, high=KEYS, shift=shift)


def _bin_of(counts: np.ndarray, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest entry (-1 if none), and how many of that bin belong to the k largest."""
    from_top = np.cumsum(counts[::-1], dtype=np.int64)
    position = int(np.searchsorted(from_top, k))
    bin_index = len(counts) - 1 - position
    return bin_index, k - int(from_top[position - 1]) if position else k


def _last_ties(
    kernels: Kernels, total: int, kth: dict[int, int], wanted: dict[int, int]
) -> Generator[Sweep, Any, dict[int, tuple[int, int]]]:
    """For each model in `wanted`: (job, flat index) of the last entry equal to its threshold that is still kept."""
    if not wanted:
        return {}

    def count(tile: Tile) -> list[tuple[int, int, dict[int, int]]]:
        if len(tile.models[0]) == total:  # all are in this tile, so their number does not matter
            return [(tile.job, tile.start, dict(wanted))]
        return [(tile.job, tile.start, {m: kernels.ties(tile.base, tile.models[m], kth[m]) for m in wanted})]

    counted = sorted((yield Sweep(count)), key=lambda entry: entry[:2])
    last = {}
    for m, need in wanted.items():
        so_far = list(accumulate(counts[m] for _, _, counts in counted))
        at = bisect_left(so_far, need)
        job, start, counts = counted[at]
        nth_here = need - (so_far[at] - counts[m]) - 1

        def locate(tile: Tile, m: int = m, nth: int = nth_here) -> int:
            return tile.start + kernels.nth_tie(tile.base, tile.models[m], kth[m], nth)

        last[m] = (job, (yield Sweep(locate, only=(job, start))))
    return last


def match_l1(kernels: Kernels, sparsified: list[list[Sparsify]]) -> Generator[Sweep, Any, list[list[Sparsify]]]:
    """Rescale each sparsified delta to the L1 norm it had: factor = sum|d| / sum|kept d|.

    The factor is 1 where a sum is below 1e-7, or not finite: weights that are not are the run's to judge.
    """

    def sums(tile: Tile) -> list[tuple[int, list[tuple[np.ndarray, np.ndarray]]]]:
        pairs = zip(tile.models, sparsified[tile.job], strict=True)
        return [(tile.job, [kernels.l1(tile.base, x, sparsify, start=tile.start) for x, sparsify in pairs])]

    partials = yield Sweep(sums)

    def factor(job: int, m: int) -> float:
        parts = [models[m] for index, models in partials if index == job]
        before, after = (summed([value for part in parts for value in part[side]]) for side in (0, 1))
        return before / after if 1e-7 <= before < math.inf and 1e-7 <= after < math.inf else 1.0

    return [
        [replace(sparsify, rescale=factor(job, m)) for m, sparsify in enumerate(models)]
        for job, models in enumerate(sparsified)
    ]
