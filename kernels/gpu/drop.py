"""How much of the delta's L1 norm a trim and a random drop leave (DARE, arXiv 2311.03099)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton.language as tl

from ggez_kernels.sparsify import Sparsify

from .chunks import LANES, check_chunk_start, chunk_elements, chunk_launches, chunks, fold
from .launch import ADDRESS, DTYPES, FIELDS, OPTIONS, aligned, check, jit, of_one_dtype, on, row, step, upload
from .rounding import widen
from .sparsify import sparsified

Array = np.ndarray[Any, np.dtype[Any]]


def l1(base: torch.Tensor, model: torch.Tensor, sparsify: Sparsify, *, start: int) -> tuple[Array, Array]:
    """(sum |d|, sum |kept d|) with d = model - base, per chunk of `CHUNK` elements: two float64[chunks].

    The kept deltas are not rescaled. Chunks, `start` and order of summation as for `gram`. Waits for the device.
    """
    check_chunk_start(start)
    check({"base": base, "model": model})
    b, x = of_one_dtype([base, model])
    unscaled = replace(sparsify, rescale=1.0)
    size, device = x.numel(), x.device
    table = upload([start, *row(b), *row(x, unscaled)], device)
    sums = torch.empty(chunks(size), 2, dtype=torch.float64, device=device)
    with on(device):
        for first, count, wide in chunk_launches(size, aligned((b, x))):
            _l1[(count,)](
                table,
                sums[first:],
                first,
                size,
                DTYPE=DTYPES[x.dtype],
                STEP=step([unscaled]),
                ALIGNED=wide,
                **OPTIONS,
            )
    before, after = sums.T.contiguous().cpu().numpy()
    return before, after


@jit
def _l1(
    table: tl.tensor,
    sums: tl.tensor,
    first: tl.int32,
    size: tl.int64,
    DTYPE: tl.constexpr,
    STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    start, base, model = tl.load(table), table + 1, table + 1 + FIELDS
    base_address, model_address = tl.load(base + ADDRESS), tl.load(model + ADDRESS)
    begin, end = chunk_elements(first + program, size, ALIGNED)
    lane = tl.arange(0, LANES)
    all_of_it = tl.zeros([LANES], tl.float64)
    kept = tl.zeros([LANES], tl.float64)
    for at in range(begin, end, LANES):
        exists = at + lane < end
        b = widen(base_address, at + lane, exists, DTYPE, ALIGNED)
        delta = widen(model_address, at + lane, exists, DTYPE, ALIGNED) - b
        all_of_it += tl.abs(delta).to(tl.float64)
        kept += tl.abs(sparsified(delta, model, start + at, lane, STEP, LANES)).to(tl.float64)
    tl.store(sums + 2 * program, fold(all_of_it))
    tl.store(sums + 2 * program + 1, fold(kept))
