"""Dot products of all pairs of models: what SLERP (Shoemake 1985) and its relatives measure."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ggez_kernels.sparsify import CHUNK

from .rounding import Array, widen, work_dtype

LANES = 1024
"""Running sums per chunk: element i of a chunk goes to sum i % LANES."""


def gram(inputs: Sequence[Array], base: Array | None = None, *, start: int) -> Array:
    """G[c, i, j] = sum of y_i y_j over chunk c of `CHUNK` elements: float64[chunks, K, K].

    y_k = x_k, or x_k - base in the work dtype if there is a base; products and sums in float64.
    `start`, the flat index of the first element in its tensor, is a multiple of `CHUNK`, and a tile ends at one or
    with its tensor. Then the chunks are the tensor's own and each is summed in the order of `chunk_sums`, so that
    `math.fsum` over all of them does not depend on tiles or threads.
    """
    check_chunk_start(start)
    work = work_dtype([base, *inputs])
    rows = [widen(x, work) for x in inputs]
    if base is not None:
        b = widen(base, work)
        rows = [row - b for row in rows]
    doubles = [row.double() for row in rows]
    pairs = [chunk_sums(left * right) for left in doubles for right in doubles]
    result: Array = torch.stack(pairs, dim=1).reshape(-1, len(rows), len(rows)).numpy()
    return result


def check_chunk_start(start: int) -> None:
    if start % CHUNK:
        raise ValueError(f"start must be a multiple of {CHUNK}, found {start}")


def chunk_sums(values: torch.Tensor) -> torch.Tensor:
    """float64[chunks] from float64[n]: LANES running sums, then the upper half added to the lower, ten times."""
    chunks = -(-values.numel() // CHUNK)
    padded = torch.zeros(chunks * CHUNK, dtype=torch.float64)
    padded[: values.numel()] = values
    steps = padded.reshape(chunks, CHUNK // LANES, LANES)
    sums = torch.zeros(chunks, LANES, dtype=torch.float64)
    for step in range(CHUNK // LANES):
        sums = sums + steps[:, step]
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]
