"""Weighted sums of models or of their deltas: linear merges, task arithmetic, DARE, SLERP's last step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl

from ggez_kernels.arguments import check_candidates
from ggez_kernels.sparsify import Sparsify, Stats

from .call import EXTRA, WEIGHTS, add_to_base, check_weights, prepare, recount
from .launch import ADDRESS, FIELDS, elements, float_bits, jit
from .rounding import MINUS_ZERO_BITS, is_nonfinite, narrow, number, widen
from .sparsify import sparsified

TOWARDS, BACK, BASE, MODEL = (tl.constexpr(way) for way in range(4))  # what becomes of a single model


def linear(
    out: torch.Tensor,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    sparsify: Sequence[Sparsify | None] | None = None,
    start: int = 0,
) -> Stats:
    """out = sum w_k x_k, or base + sum w_k (x_k - base); see `ggez_kernels.reference.linear` for the definition.

    Tensors are 1-D, contiguous, of one size and on one device, bfloat16, float16 or float32 in any mix; `start` is
    the flat index of the first element in its tensor. The output must not overlap an input. The statistics are
    tensors on the device. ValueError or TypeError for arguments that break this.
    """
    return linear_many([out], base, models, [weights], sparsify=sparsify, start=start)[0]


def linear_many(
    outs: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    weights: Sequence[Sequence[float]],
    *,
    sparsify: Sequence[Sparsify | None] | None = None,
    start: int = 0,
) -> list[Stats]:
    """`linear` with as many rows of weights as outputs, all of one dtype, from one reading of the inputs."""
    check_candidates(outs, weights)
    for row in weights:
        check_weights(models, row)
    alone = base is not None and len(models) == 1
    how = sparsify[0] if sparsify else None
    rows = [_way(row[0], how) if alone else [0, *float_bits(torch.tensor(row))] for row in weights]
    call = prepare(outs, base, models, sparsify, start, rows)
    if alone:
        call.run(_interpolate)
    else:
        call.run(_mix, HAS_BASE=base is not None)
    return call.stats()


def _way(weight: float, how: Sparsify | None) -> list[int]:
    """What becomes of a single model, and the factor of its delta in that."""
    w = torch.tensor([weight], dtype=torch.float32)
    changes = how is not None and how.changes
    if w == 0:
        return [BASE.value, *float_bits(w)]
    if w == 1 and not changes:
        return [MODEL.value, *float_bits(w)]
    if w < 0.5 or (how is not None and how.rescale != 1):
        return [TOWARDS.value, *float_bits(w)]
    return [BACK.value, *float_bits(1 - w)]


@jit
def _mix(
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
    HAS_BASE: tl.constexpr,
) -> None:
    """out_r = sum_k w_rk x_k, or base + sum_k w_rk d'_k: the models come from memory once, then from the cache."""
    first, lane, exists = elements(begin, end, ALIGNED, BLOCK)
    offsets = first + lane
    sums += (tl.cdiv(begin, BLOCK) + tl.program_id(0)) * models
    rows = table
    inputs = models
    if HAS_BASE:
        base = widen(tl.load(table + ADDRESS), offsets, exists, DTYPE, ALIGNED)
        rows += FIELDS
        inputs += 1
    out_rows = rows + models * FIELDS
    squares = tl.zeros([], tl.float32)
    bad = tl.zeros([], tl.int32)
    for r in range(outs):
        out_row = out_rows + r * (WEIGHTS + models)
        # the only number that leaves a zero's sign alone when added to it; `tl.full` takes -0.0 for 0.0
        mixed = tl.full([BLOCK], MINUS_ZERO_BITS, tl.int32).to(tl.float32, bitcast=True)
        for k in range(models):
            row = rows + k * FIELDS
            term = widen(tl.load(row + ADDRESS), offsets, exists, DTYPE, ALIGNED)
            if HAS_BASE:
                term -= base
                if r == 0:
                    square = tl.sum(term * term, 0)
                    squares += square
                    tl.store(sums + k, square)
                term = sparsified(term, row, start + first, lane, STEP, BLOCK)
            mixed += number(out_row + WEIGHTS + k) * term
        if HAS_BASE:
            mixed = add_to_base(base, mixed)
        bad += narrow(mixed, tl.load(out_row + ADDRESS), offsets, exists, counts + inputs + r, OUT, ALIGNED)
    suspicious = is_nonfinite(squares) if HAS_BASE else bad > 0
    recount(suspicious, table, counts, inputs, offsets, exists, DTYPE, ALIGNED)


@jit
def _interpolate(
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
) -> None:
    """A single model, all of whose outputs come from one delta: exact at both ends of the way."""
    first, lane, exists = elements(begin, end, ALIGNED, BLOCK)
    offsets = first + lane
    row = table + FIELDS
    base = widen(tl.load(table + ADDRESS), offsets, exists, DTYPE, ALIGNED)
    model = widen(tl.load(row + ADDRESS), offsets, exists, DTYPE, ALIGNED)
    delta = model - base
    squares = tl.sum(delta * delta, 0)
    tl.store(sums + tl.cdiv(begin, BLOCK) + tl.program_id(0), squares)
    delta = sparsified(delta, row, start + first, lane, STEP, BLOCK)
    for r in range(outs):
        out_row = row + FIELDS + r * (WEIGHTS + 1)
        way = tl.load(out_row + EXTRA)
        part = number(out_row + WEIGHTS) * delta
        if way == BASE:
            value = base
        elif way == MODEL:
            value = model
        elif way == BACK:
            value = tl.where(delta == 0, base, model - part)
        else:
            value = add_to_base(base, part)
        narrow(value, tl.load(out_row + ADDRESS), offsets, exists, counts + 2 + r, OUT, ALIGNED)
    recount(is_nonfinite(squares), table, counts, 2, offsets, exists, DTYPE, ALIGNED)
