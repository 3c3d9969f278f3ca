"""Exact thresholds and scales of sparsified deltas, from sweeps over tiles.

Trimming keeps the k entries of largest |delta|. The k-th magnitude is found by radix selection on the bits of
|float32(delta)|, which sort like the magnitudes: one histogram of the high 15 bits, one of the low 16 bits below the
bin that holds the k-th. Entries equal to it are kept from the front until exactly k are kept.
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
from ggez_merge.methods.method import Kernels, Sweep, Tile, summed

HIGH_BITS, LOW_BITS = 15, 16
ABOVE_ALL = 0x7FFFFFFF  # no finite magnitude has more bits set


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

    def high(tile: Tile) -> np.ndarray:
        return np.stack([_histogram(kernels, tile, m, LOW_BITS, HIGH_BITS, 0) for m in selected])

    found = [_bin_of(row, keep[m]) for m, row in zip(selected, (yield Sweep(high)), strict=True)]

    def low(tile: Tile) -> np.ndarray:
        return np.stack([_histogram(kernels, tile, m, 0, LOW_BITS, found[i][0]) for i, m in enumerate(selected)])

    kth: dict[int, int] = {}
    wanted: dict[int, int] = {}  # model -> how many of the entries equal to the threshold are to be kept
    for i, (m, row) in enumerate(zip(selected, (yield Sweep(low)), strict=True)):
        bin_high, rest = found[i]
        bin_low, rest = _bin_of(row, rest)
        kth[m] = (bin_high << LOW_BITS) | bin_low
        if not all_ties and rest < int(row[bin_low]):
            wanted[m] = rest
    last = yield from _last_ties(kernels, kth, wanted)

    def trim(job: int, m: int) -> Sparsify:
        if m not in kth:
            return cut[m]
        at_job, index = last.get(m, (len(sizes), 0))
        return Sparsify(threshold=kth[m], last=KEEP_ALL_LAST if job < at_job else (index if job == at_job else -1))

    return [[trim(job, m) for m in range(len(keep))] for job in range(len(sizes))]


def _histogram(kernels: Kernels, tile: Tile, m: int, shift: int, bits: int, prefix: int) -> np.ndarray:
    return kernels.histogram(tile.base, tile.models[m], shift=shift, bits=bits, prefix=prefix)


def _bin_of(counts: np.ndarray, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest entry, and how many of that bin belong to the k largest."""
    from_top = np.cumsum(counts[::-1])
    position = int(np.searchsorted(from_top, k))
    bin_index = len(counts) - 1 - position
    return bin_index, int(k - (from_top[position] - counts[bin_index]))


def _last_ties(
    kernels: Kernels, kth: dict[int, int], wanted: dict[int, int]
) -> Generator[Sweep, Any, dict[int, tuple[int, int]]]:
    """For each model in `wanted`: (job, flat index) of the last entry equal to its threshold that is still kept."""
    if not wanted:
        return {}

    def count(tile: Tile) -> list[tuple[int, int, dict[int, int]]]:
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
