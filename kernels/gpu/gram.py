"""Dot products of all pairs of models: what SLERP, NuSLERP, Karcher means and Model Stock measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl

from .chunks import LANES, check_chunk_start, chunk_elements, chunk_launches, chunks, fold
from .launch import DTYPES, OPTIONS, aligned, check, jit, of_one_dtype, on, upload
from .rounding import widen

Array = np.ndarray[Any, np.dtype[Any]]


def gram(inputs: Sequence[torch.Tensor], base: torch.Tensor | None = None, *, start: int) -> Array:
    """G[c, i, j] = sum of x_i x_j (of deltas, with a base) over chunk c of `CHUNK` elements: float64[chunks, K, K].

    As `ggez_kernels.reference.gram` defines it, and in its order, so that every bit is the same. Waits for the device.
    """
    check_chunk_start(start)
    if not inputs:
        raise ValueError("at least one model is needed")
    named = {f"inputs[{k}]": x for k, x in enumerate(inputs)}
    if base is not None:
        named["base"] = base
    check(named)
    tensors = of_one_dtype([*named.values()])
    xs = tensors[: len(inputs)]
    pairs = [(i, j) for i in range(len(xs)) for j in range(i + 1)]
    # the programs of one chunk are neighbours in time, so that all pairs of its rows come out of the cache
    addresses = [0 if base is None else tensors[-1].data_ptr(), *(xs[k].data_ptr() for pair in pairs for k in pair)]
    size, device = xs[0].numel(), xs[0].device
    table = upload(addresses, device)
    sums = torch.empty(chunks(size), len(pairs), dtype=torch.float64, device=device)
    with on(device):
        for first, count, wide in chunk_launches(size, aligned(tensors)):
            _gram[(count * len(pairs),)](
                table,
                sums[first:],
                first,
                size,
                len(pairs),
                DTYPE=DTYPES[xs[0].dtype],
                DELTA=base is not None,
                ALIGNED=wide,
                **OPTIONS,
            )
    result = np.empty((chunks(size), len(xs), len(xs)))
    left, right = np.array(pairs).T
    result[:, left, right] = result[:, right, left] = sums.cpu().numpy()
    return result


@jit
def _gram(
    table: tl.tensor,
    sums: tl.tensor,
    first: tl.int32,
    size: tl.int64,
    pairs: tl.int32,
    DTYPE: tl.constexpr,
    DELTA: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """One pair in one chunk: sums[chunk - first, pair]. The products of float32 numbers are exact in float64."""
    program = tl.program_id(0).to(tl.int64)
    addresses = table + 1 + program % pairs * 2
    base, left, right = tl.load(table), tl.load(addresses), tl.load(addresses + 1)
    begin, end = chunk_elements(first + program // pairs, size, ALIGNED)
    lane = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float64)
    for at in range(begin, end, LANES):
        exists = at + lane < end
        y = widen(left, at + lane, exists, DTYPE, ALIGNED)
        z = widen(right, at + lane, exists, DTYPE, ALIGNED)
        if DELTA:
            b = widen(base, at + lane, exists, DTYPE, ALIGNED)
            y, z = y - b, z - b
        total += y.to(tl.float64) * z.to(tl.float64)
    tl.store(sums + program, fold(total))
