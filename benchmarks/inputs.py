"""What the kernels are timed on: weights like a transformer's, two fine-tunes of them, and each method's numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from ggez_kernels.sparsify import CHUNK, Sparsify

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype("f2"), "float32": np.dtype("f4")}
WEIGHTS = (0.4, 0.5)
LOW, HIGH = 0.3, 0.7  # ratios: below a half a merge starts from the base, from there on from the model
RATIOS = tuple(i / 10 for i in range(11))  # the candidates of a sweep, both ends included
DENSITY = 0.5
DROPS = [Sparsify(keep=DENSITY, seed=seed, rescale=1 / DENSITY) for seed in (1, 2)]
COARSE = 16  # low bits of a key that the first histogram ignores
KEYS = 1 << 31


@dataclass(frozen=True)
class Data:
    """A base, two tuned models and room for results: numpy arrays for the CPU's kernels, torch tensors for others."""

    base: Any
    models: Sequence[Any]
    outs: Sequence[Any]
    key: int  # of the first model's median |delta|, or about: where TIES with density 0.5 trims
    start: int = 0  # flat index of the first element

    def part(self, begin: int, end: int) -> Data:
        """Views of some of the elements."""
        return replace(self.map(lambda array: array[begin:end]), start=self.start + begin)

    def tiles(self, n: int) -> list[Data]:
        """All elements in parts of n, a multiple of `CHUNK`."""
        return [self.part(begin, begin + n) for begin in range(0, len(self.base), n)]

    def map(self, move: Callable[[Any], Any]) -> Data:
        """The same with every array replaced."""
        models, outs = [move(model) for model in self.models], [move(out) for out in self.outs]
        return replace(self, base=move(self.base), models=models, outs=outs)


def make(elements: int, dtype: np.dtype[Any], n_outs: int) -> Data:
    """N(0, 0.02²), and twice the same plus N(0, 0.001²)."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(elements, np.float32) * np.float32(0.02)
    models = [(base + rng.standard_normal(elements, np.float32) * np.float32(0.001)).astype(dtype) for _ in range(2)]
    base = base.astype(dtype)
    delta = models[0][:CHUNK].astype(np.float32) - base[:CHUNK].astype(np.float32)
    keys = np.sort(np.abs(delta).view(np.uint32))
    key = int(keys[len(keys) // 2])
    return Data(base, models, [np.zeros(elements, dtype) for _ in range(n_outs)], key)


def around(key: int) -> tuple[int, int]:
    """[low, high): the keys that a second histogram looks at, the coarse bin of `key` and its neighbours."""
    coarse = key >> COARSE
    return (coarse - 1) << COARSE, (coarse + 2) << COARSE
