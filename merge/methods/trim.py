"""Exact thresholds and scales of sparsified deltas, from sweeps over tiles.

Trimming keeps the k entries of largest |delta|. The k-th magnitude is found on the bits of |float32(delta)|, its *key*,
which sorts like the magnitude. A sample says where the k-th key must about be; one sweep counts every key of that
narrow range, and how many lie above it. Should the k-th not be there after all, the sample is repeated with everything.
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

from ggez_kernels.sparsify import KEEP_ALL_LAST, Sparsify
from ggez_merge.methods.method import Array, Kernels, Sweep, Tile, summed

COARSE = 16  # low bits of a key that the sample ignores: what is left, exponent and 7 bits of mantissa, is a *bin*
KEYS = 1 << 31
ABOVE_ALL = KEYS - 1  # no finite magnitude has more bits set
SAMPLE_SLICES = 16  # spread evenly over a tile
SAMPLE_SHARE = 16  # one entry in so many
SMALL = 1 << 22  # entries of a tile that are counted outright: a sample would save nothing
MOST_BINS = 32  # that all models together may have counted key by key, 256 KiB each; one a model if need be


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
    for share in (SAMPLE_SHARE, 1):
        open_models = [m for m in keep if m not in kth]
        if not open_models:
            break

        def sample(tile: Tile, models: list[int] = open_models, share: int = share) -> np.ndarray:
            return np.stack([_bins(kernels, tile.base, tile.models[m], share) for m in models], dtype=counter)

        ranges = {}
        for m, bins in zip(open_models, (yield Sweep(sample)), strict=True):
            low, high = _range(bins, keep[m], total)
            if high - low <= max(1, MOST_BINS // len(open_models)) or share == 1:
                ranges[m] = low << COARSE, high << COARSE

        def count(tile: Tile, ranges: dict[int, tuple[int, int]] = ranges) -> np.ndarray:
            counts = [
                kernels.histogram(tile.base, tile.models[m], low=low, high=high) for m, (low, high) in ranges.items()
            ]
            return np.concatenate(counts, dtype=counter)

        counted: np.ndarray = (yield Sweep(count)) if ranges else np.zeros(0, counter)
        at = 0
        for m, (low, high) in ranges.items():
            counts = counted[at : at + high - low + 1]
            at += high - low + 1
            key, need = _bin_of(counts, keep[m])
            if 0 <= key < high - low:
                kth[m] = low + key
                if need < counts[key]:
                    wanted[m] = need
    return kth, wanted


def _bins(kernels: Kernels, base: Array, model: Array, share: int) -> np.ndarray:
    """How many keys of a sample fall into each bin: of everything if share is 1 or the tile is small."""
    n = len(base)
    if share > 1 and n > SMALL:
        length = n // share // SAMPLE_SLICES
        starts = [i * n // SAMPLE_SLICES for i in range(SAMPLE_SLICES)]
        base, model = (np.concatenate([array[at : at + length] for at in starts]) for array in (base, model))
    return kernels.histogram(base, model, low=0, high=KEYS, shift=COARSE)


def _range(bins: np.ndarray, k: int, total: int) -> tuple[int, int]:
    """The bins [low, high) where the k-th largest of `total` must about be, going by a sample's bins.

    The sample's rank of it is k * sampled / total, give or take three standard deviations of a fair sample at the most.
    """
    sampled = int(bins.sum())
    margin = 0 if sampled == total else 3 * math.isqrt(sampled) // 2 + 1
    rank = k * sampled // total
    upper, _ = _bin_of(bins, max(1, min(sampled, rank - margin)))
    lower, _ = _bin_of(bins, max(1, min(sampled, rank + margin)))
    return lower, upper + 1


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
