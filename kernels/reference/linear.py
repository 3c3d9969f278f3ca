"""Weighted sums of models or of their deltas."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ggez_kernels.arguments import check_candidates
from ggez_kernels.sparsify import Sparsify, Stats

from .drop import sparsified
from .rounding import Array, narrow, nonfinite, widen, work_dtype


def linear(
    out: Array,
    base: Array | None,
    models: Sequence[Array],
    weights: Sequence[float],
    *,
    sparsify: Sequence[Sparsify | None] | None = None,
    start: int = 0,
) -> Stats:
    """A weighted sum; task arithmetic (arXiv 2212.04089) when there is a base.

    All in the work dtype, float64 if any array is float64 and else float32, weights rounded to it first, every
    operation rounded by itself, the result rounded once to `out`:

    - without a base: out = (w_0 x_0 + w_1 x_1) + ...
    - with a base b, d_k = x_k - b, d'_k = sparsified d_k: mixed = (w_0 d'_0 + w_1 d'_1) + ..., out = b + mixed,
      and exactly b (with its sign of zero) where mixed == 0;
    - with a base and a single model, so that both ends of the way are exact: w == 0 gives b; w == 1 gives x if
      nothing is sparsified; w < 0.5, or a rescale other than 1, is as above; else out = x - (1 - w) d' (x where
      that is zero), and b where d' == 0.

    Arrays are 1-D of one size; `start` is the flat index of the first element in its tensor.
    """
    work = work_dtype([out, base, *models])
    w = torch.tensor(list(weights), dtype=work)
    xs = [widen(model, work) for model in models]
    hows = list(sparsify) if sparsify is not None else [None] * len(xs)
    if base is None:
        mixed = w[0] * xs[0]
        for weight, x in zip(w[1:], xs[1:], strict=True):
            mixed = mixed + weight * x
        return finish(mixed, out, None, models, [0.0] * len(xs))
    b = widen(base, work)
    deltas = [x - b for x in xs]
    squares = [float(d.double().square().sum()) for d in deltas]
    thinned = [sparsified(d, how, start) for d, how in zip(deltas, hows, strict=True)]
    if len(xs) == 1:
        how = hows[0] if hows[0] is not None and hows[0].changes else None
        result = _interpolate(b, xs[0], thinned[0], w[0], how)
    else:
        mixed = w[0] * thinned[0]
        for weight, d in zip(w[1:], thinned[1:], strict=True):
            mixed = mixed + weight * d
        result = add_to_base(b, mixed)
    return finish(result, out, base, models, squares)


def linear_many(
    outs: Sequence[Array], base: Array | None, models: Sequence[Array], weights: Sequence[Sequence[float]]
) -> list[Stats]:
    """outs[r] = linear(base, models, weights[r]), to the bit, for all the candidates of a sweep.

    One row of weights and one Stats for each output. The outputs have one dtype, and overlap neither an input nor
    each other.
    """
    check_candidates(outs, weights)
    return [linear(out, base, models, row) for out, row in zip(outs, weights, strict=True)]


def _interpolate(
    b: torch.Tensor, x: torch.Tensor, d: torch.Tensor, w: torch.Tensor, how: Sparsify | None
) -> torch.Tensor:
    if w == 0:
        return b
    if w == 1 and how is None:
        return x
    if w < 0.5 or (how is not None and how.rescale != 1):
        return add_to_base(b, w * d)
    return torch.where(d == 0, b, x - (1 - w) * d)


def add_to_base(b: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    """b + mixed, but b itself, sign of zero included, where nothing is added."""
    return torch.where(mixed == 0, b, b + mixed)


def finish(
    result: torch.Tensor, out: Array, base: Array | None, models: Sequence[Array], squares: Sequence[float]
) -> Stats:
    """Round into `out` and count."""
    inputs = [base, *models] if base is not None else models
    counts = tuple(nonfinite(array) for array in inputs)
    return Stats(counts, narrow(result, out), tuple(squares))
