"""The disjoint mean of TIES."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ggez_kernels.sparsify import Sparsify, Stats

from .drop import sparsified
from .linear import add_to_base, finish, linear
from .rounding import Array, widen, work_dtype


def vote(
    out: Array,
    base: Array,
    models: Sequence[Array],
    weights: Sequence[float],
    *,
    sparsify: Sequence[Sparsify | None] | None = None,
    start: int = 0,
    count: bool = False,
    normalize: bool = True,
    scale: float = 1.0,
) -> Stats:
    """Elect a sign per element, then average the models that agree with it (TIES, arXiv 2306.01708, section 4).

    With D_k = w_k d'_k, the weighted sparsified deltas, everything rounded as in `linear`:

        elected = + if sum_k D_k >= 0 (count: if sum_k sign(D_k) >= 0), else -
        mixed   = sum of the D_k of the elected sign      (0 where there is none; a NaN counts as either)
        divisor = sum of |w_k| over the same k, 1 where that is 0
        out     = b + scale * (mixed / divisor)           (no division unless `normalize`)

    and exactly b where nothing is added. A single model wins every election, so that this is
    `linear(out, base, [x], [scale])`, the sign of w given to the scale, or with weight scale * w if not `normalize`.
    Sums run in the order of the models. Arrays as for `linear`.
    """
    if len(models) == 1:
        sign = float(torch.sign(torch.tensor(weights[0], dtype=torch.float64)))
        weight = scale * (sign if normalize else weights[0])
        return linear(out, base, models, [weight], sparsify=sparsify, start=start)
    work = work_dtype([out, base, *models])
    w = torch.tensor(list(weights), dtype=work)
    b = widen(base, work)
    deltas = [widen(model, work) - b for model in models]
    squares = [float(d.double().square().sum()) for d in deltas]
    hows = list(sparsify) if sparsify is not None else [None] * len(deltas)
    weighted = [weight * sparsified(d, how, start) for weight, d, how in zip(w, deltas, hows, strict=True)]
    total = torch.zeros_like(b)
    for D in weighted:
        total = total + (D.sign() if count else D)
    positive = total >= 0
    mixed = torch.zeros_like(b)
    divisor = torch.zeros_like(b)
    for weight, D in zip(w, weighted, strict=True):
        agrees = torch.where(positive, ~(D <= 0), ~(D >= 0))
        mixed = mixed + torch.where(agrees, D, 0)
        divisor = divisor + torch.where(agrees, weight.abs(), 0)
    if normalize:
        mixed = mixed / torch.where(divisor == 0, 1, divisor)
    mixed = mixed * torch.tensor(scale, dtype=work)
    return finish(add_to_base(b, mixed), out, base, models, squares)
