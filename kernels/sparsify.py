"""What every backend of the kernels is told, and what it answers: `Sparsify` in, `Stats` out, `Counting` in advance."""

from __future__ import annotations

import math
from dataclasses import dataclass

KEEP_ALL_LAST = 2**63 - 1
"""`Sparsify.last` when every element at the threshold is kept."""

NAN_KEY = 0x7FC00000
"""The magnitude key of every NaN, whatever its payload."""

CHUNK = 65536
"""Elements per partial sum of `gram` and `l1`, counted from the start of the tensor."""


@dataclass(frozen=True)
class Sparsify:
    """What happens to one model's delta d before it is combined: d' = kept ? rescale * d : 0.

    kept = trimmed-in and not dropped, where for the element at flat index i of its tensor

    - trim (TIES, arXiv 2306.01708): `key > threshold or (key == threshold and i <= last)`, with
      key = the 31 low bits of float32(d), which order like |d|: infinity above every number, and above it NaN,
      always with the key `NAN_KEY`;
    - drop (DARE, arXiv 2311.03099): `Philox4x32-10(key=seed, counter=i // 4)[i % 4] < floor(keep * 2**32)`.

    The defaults keep everything unchanged.
    """

    threshold: int = 0
    last: int = KEEP_ALL_LAST
    keep: float = 1.0
    seed: int = 0
    rescale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 2**31:
            raise ValueError(f"threshold must be a 31-bit magnitude key, found {self.threshold}")
        if not -1 <= self.last <= KEEP_ALL_LAST:
            raise ValueError(f"last must be a flat index or -1, found {self.last}")
        if not 0.0 <= self.keep <= 1.0:
            raise ValueError(f"keep must be a probability, found {self.keep}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be a 64-bit key, found {self.seed}")
        if not math.isfinite(self.rescale):
            raise ValueError(f"rescale must be finite, found {self.rescale}")

    @property
    def keep_limit(self) -> int:
        """The random 32-bit words below this limit keep their element (2**32: all do)."""
        return int(self.keep * 2**32)

    @property
    def trims(self) -> bool:
        return self.threshold > 0 or self.last != KEEP_ALL_LAST

    @property
    def drops(self) -> bool:
        return self.keep_limit < 2**32

    @property
    def changes(self) -> bool:
        """False when the delta passes through untouched."""
        return self.trims or self.drops or self.rescale != 1.0


@dataclass(frozen=True)
class Counting:
    """How a backend likes to look for the k-th largest key: what it counts best in one sweep."""

    digit_bits: int
    """A sweep over a wide range has 2**digit_bits bins."""
    most_bins: int
    """Up to so many bins, of all models together, a sweep may count key by key instead."""
    sample_share: int
    """One entry in so many is counted first to narrow the range; 1 if that saves nothing."""


@dataclass(frozen=True)
class Stats:
    """What a combining kernel saw on its way.

    `nonfinite`: NaN and infinite elements per input, the base first if one was given. `nonfinite_out`: the same
    for the output, after rounding. `delta_squares`: the sum of (x_k - base)^2 per model, before any sparsifying;
    zeros without a base. It is a diagnostic: its last digits depend on how a tensor was cut into tiles, and single
    squares are formed in the work dtype, so that in float32 a |delta| under 1e-22 or over 1e19 is lost or infinite.
    """

    nonfinite: tuple[int, ...]
    nonfinite_out: int
    delta_squares: tuple[float, ...]
