"""What is timed: every kernel as a method calls it, its answer as one that can be compared, and its baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ggez_kernels.sparsify import Sparsify, Stats
from ggez_merge.methods.method import Tile
from ggez_merge.methods.trim import n_kept, thresholds

from . import textbook
from .inputs import COARSE, DENSITY, DROPS, HIGH, KEYS, LOW, RATIOS, WEIGHTS, Data, around
from .textbook import Baseline, by_mergekit

Array = np.ndarray[Any, np.dtype[Any]]
Kernels = Any  # the functions of a backend; `ggez_kernels.reference` is their definition
Each = Callable[[Callable[[Data], Any]], list[Any]]  # a function's answers for all tiles, in order
Run = Callable[[Kernels, Sequence[Data], Each], list[Any]]


@dataclass(frozen=True)
class Answer:
    """What the kernel said besides writing its outputs: `exact` to the bit; `near` are sums that depend on tiles."""

    exact: Array
    near: Array


@dataclass(frozen=True)
class Op:
    """`run` calls the kernels and answers their raw answers, which `join` makes one of, outside the timed part."""

    models: int
    arrays: int  # of full size that have to be read or written: what GB/s counts
    run: Run
    join: Callable[[list[Any]], Answer]
    textbook: Baseline
    mergekit: Baseline | None = None
    outputs: int = 1
    based: bool = True  # works on deltas, and tells the sums of their squares
    random: bool = False  # drops at random: no two implementations agree
    apart: Run | None = None  # the same by several calls


def every(call: Callable[[Kernels, Data], Any]) -> Run:
    """One call a tile."""
    return lambda kernels, tiles, each: each(lambda tile: call(kernels, tile))


def interpolation(ratio: float) -> Op:
    return Op(
        models=1,
        arrays=3,
        run=every(lambda k, t: k.linear(t.outs[0], t.base, t.models[:1], [ratio])),
        join=_stats,
        textbook=textbook.interpolate(ratio),
        mergekit=by_mergekit("linear", lambda data: [data.base, data.models[0]], weight=(1 - ratio, ratio)),
    )


def _trim_and_vote(kernels: Kernels, tiles: Sequence[Data], each: Each) -> list[Any]:
    """TIES as the method does it: its sweeps over all tiles, then the vote."""
    total = sum(len(tile.base) for tile in tiles)
    measurement = thresholds(kernels, [total], [n_kept(DENSITY, total)] * 2, all_ties=False)
    answer = None
    while True:
        try:
            sweep = measurement.send(answer)
        except StopIteration as done:
            (trims,) = done.value
            break

        def look(tile: Data, sweep: Any = sweep) -> Any:
            wanted = sweep.only in (None, (0, tile.start))
            return sweep.function(Tile(0, tile.start, tile.base, tile.models)) if wanted else None

        first, *others = (part for part in each(look) if part is not None)
        answer = sum(others, start=first)
    return each(lambda t: kernels.vote(t.outs[0], t.base, t.models, WEIGHTS, sparsify=trims, start=t.start))


def _many(kernels: Kernels, tile: Data) -> Any:
    return kernels.linear_many(tile.outs, tile.base, tile.models[:1], [[ratio] for ratio in RATIOS])


def _one_by_one(kernels: Kernels, tiles: Sequence[Data], each: Each) -> list[Any]:
    """As many merges as there are candidates, one after the other."""

    def merge(number: int) -> Callable[[Data], Any]:
        return lambda tile: kernels.linear(tile.outs[number], tile.base, tile.models[:1], [RATIOS[number]])

    return [each(merge(number)) for number in range(len(RATIOS))]


def _host(value: Any) -> Array:
    return np.asarray(value.cpu() if isinstance(value, torch.Tensor) else value)


def _stats(parts: list[Stats]) -> Answer:
    counts = [[int(n) for n in (*part.nonfinite, part.nonfinite_out)] for part in parts]
    squares = [[float(square) for square in part.delta_squares] for part in parts]
    return Answer(np.sum(counts, axis=0), np.sum(squares, axis=0))


def _stats_of_many(parts: list[list[Stats]]) -> Answer:
    answers = [_stats(list(of_one)) for of_one in zip(*parts, strict=True)]
    return Answer(np.stack([answer.exact for answer in answers]), np.stack([answer.near for answer in answers]))


def _added(parts: list[Any]) -> Answer:
    return Answer(np.asarray(np.sum([_host(part) for part in parts], axis=0, dtype=np.int64)), np.zeros(0))


def _chained(parts: list[Any]) -> Answer:
    return Answer(np.concatenate([_host(part) for part in parts]), np.zeros(0))


def _chained_pairs(parts: list[Any]) -> Answer:
    return _chained([np.stack([_host(side) for side in part], axis=1) for part in parts])


def _all(data: Data) -> list[torch.Tensor]:
    return [data.base, *data.models]


_OF_EACH = {"weight": WEIGHTS, "density": (DENSITY, DENSITY)}

OPS = {
    "linear": Op(
        models=2,
        arrays=3,
        run=every(lambda k, t: k.linear(t.outs[0], None, t.models, [LOW, HIGH])),
        join=_stats,
        textbook=textbook.linear,
        mergekit=by_mergekit("linear", lambda data: data.models, weight=(LOW, HIGH)),
        based=False,
    ),
    "ratio_0.3": interpolation(LOW),
    "ratio_0.7": interpolation(HIGH),
    "many": Op(
        models=1,
        arrays=2 + len(RATIOS),
        run=every(_many),
        join=_stats_of_many,
        textbook=textbook.many,
        outputs=len(RATIOS),
        apart=_one_by_one,
    ),
    "task_arithmetic": Op(
        models=2,
        arrays=4,
        run=every(lambda k, t: k.linear(t.outs[0], t.base, t.models, WEIGHTS)),
        join=_stats,
        textbook=textbook.task_arithmetic,
        mergekit=by_mergekit("task_arithmetic", _all, base=0, weight=WEIGHTS),
    ),
    "ties": Op(
        models=2,
        arrays=7,  # the inputs once to find the thresholds, and once more to vote
        run=_trim_and_vote,
        join=_stats,
        textbook=textbook.ties,
        mergekit=by_mergekit("ties", _all, base=0, **_OF_EACH),
    ),
    "vote": Op(
        models=2,
        arrays=4,
        run=every(lambda k, t: k.vote(t.outs[0], t.base, t.models, WEIGHTS, sparsify=[Sparsify(t.key)] * 2)),
        join=_stats,
        textbook=textbook.vote,
    ),
    "dare": Op(
        models=2,
        arrays=4,
        run=every(lambda k, t: k.linear(t.outs[0], t.base, t.models, WEIGHTS, sparsify=DROPS, start=t.start)),
        join=_stats,
        textbook=textbook.dare,
        mergekit=by_mergekit("dare_linear", _all, base=0, **_OF_EACH),
        random=True,
    ),
    "gram": Op(
        models=2,
        arrays=3,
        run=every(lambda k, t: k.gram(t.models, t.base, start=t.start)),
        join=_chained,
        textbook=textbook.gram,
        outputs=0,
    ),
    "histogram_coarse": Op(
        models=1,
        arrays=2,
        run=every(lambda k, t: k.histogram(t.base, t.models[0], low=0, high=KEYS, shift=COARSE)),
        join=_added,
        textbook=textbook.histogram_coarse,
        outputs=0,
    ),
    "histogram_fine": Op(
        models=1,
        arrays=2,
        run=every(lambda k, t: k.histogram(t.base, t.models[0], low=around(t.key)[0], high=around(t.key)[1])),
        join=_added,
        textbook=textbook.histogram_fine,
        outputs=0,
    ),
    "count_ties": Op(
        models=1,
        arrays=2,
        run=every(lambda k, t: k.ties(t.base, t.models[0], t.key)),
        join=_added,
        textbook=textbook.count_ties,
        outputs=0,
    ),
    "l1": Op(
        models=1,
        arrays=2,
        run=every(lambda k, t: k.l1(t.base, t.models[0], DROPS[0], start=t.start)),
        join=_chained_pairs,
        textbook=textbook.l1,
        outputs=0,
        random=True,
    ),
}
