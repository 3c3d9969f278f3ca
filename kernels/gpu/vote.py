"""The disjoint mean of TIES: elect a sign per element, then average the models that agree with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl

from ggez_kernels.arguments import alone
from ggez_kernels.sparsify import Sparsify, Stats

from .call import EXTRA, WEIGHTS, add_to_base, check_weights, prepare, recount
from .launch import ADDRESS, FIELDS, elements, float_bits, jit
from .linear import linear
from .rounding import is_nonfinite, narrow, number, widen
from .sparsify import sparsified


def vote(
    out: torch.Tensor,
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    sparsify: Sequence[Sparsify | None] | None = None,
    start: int = 0,
    count: bool = False,
    normalize: bool = True,
    scale: float = 1.0,
) -> Stats:
    """out = base + scale * (mean of the weighted deltas of the elected sign); see `ggez_kernels.reference.vote`.

    Tensors, statistics and errors as for `linear`.
    """
    check_weights(models, weights)
    if len(models) == 1:
        return linear(out, base, models, [alone(weights[0], normalize, scale)], sparsify=sparsify, start=start)
    row = float_bits(torch.tensor([scale, *weights]))
    call = prepare([out], base, models, sparsify, start, [row])
    call.run(_vote, COUNT=count, NORMALIZE=normalize)
    return call.stats()[0]


@jit
def _vote(
    table: tl.tensor,
    counts: tl.tensor,
    sums: tl.tensor,
    begin: tl.int64,
    end: tl.int64,
    start: tl.int64,
    models: tl.int32,
    outs: tl.int32,
    DTYPE: tl.constexpr,
    OUT: tl.constexpr,
    STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    NORMALIZE: tl.constexpr,
) -> None:
    """Elect, then average: the second loop finds the models in the cache, and two sums fewer take up registers."""
    first, lane, exists = elements(begin, end, ALIGNED, BLOCK)
    offsets = first + lane
    sums += (tl.cdiv(begin, BLOCK) + tl.program_id(0)) * models
    rows = table + FIELDS
    out_row = rows + models * FIELDS
    base = widen(tl.load(table + ADDRESS), offsets, exists, DTYPE, ALIGNED)
    squares = tl.zeros([], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(models):
        row = rows + k * FIELDS
        delta = widen(tl.load(row + ADDRESS), offsets, exists, DTYPE, ALIGNED) - base
        square = tl.sum(delta * delta, 0)
        squares += square
        tl.store(sums + k, square)
        ballot = number(out_row + WEIGHTS + k) * sparsified(delta, row, start + first, lane, STEP, BLOCK)
        if COUNT:
            total += (ballot > 0).to(tl.float32) - (ballot < 0).to(tl.float32)
        else:
            total += ballot
    elected = total >= 0
    mixed = tl.zeros([BLOCK], tl.float32)
    divisor = tl.zeros([BLOCK], tl.float32)
    for k in range(models):
        row = rows + k * FIELDS
        weight = number(out_row + WEIGHTS + k)
        delta = widen(tl.load(row + ADDRESS), offsets, exists, DTYPE, ALIGNED) - base
        ballot = weight * sparsified(delta, row, start + first, lane, STEP, BLOCK)
        agrees = ~(tl.where(elected, ballot, -ballot) <= 0)  # NaN agrees with either sign, so that it shows
        mixed += tl.where(agrees, ballot, 0.0)
        if NORMALIZE:
            divisor += tl.where(agrees, tl.abs(weight), 0.0)
    if NORMALIZE:
        mixed = tl.div_rn(mixed, tl.where(divisor == 0, 1.0, divisor))
    mixed = add_to_base(base, mixed * number(out_row + EXTRA))
    narrow(mixed, tl.load(out_row + ADDRESS), offsets, exists, counts + 1 + models, OUT, ALIGNED)
    recount(is_nonfinite(squares), table, counts, 1 + models, offsets, exists, DTYPE, ALIGNED)
