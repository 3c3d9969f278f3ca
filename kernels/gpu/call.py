"""A call of a combining kernel: its checked arguments, its table on the device, room for its statistics.

The table (int64) has a row per input, the base's first if there is one, then a row per output: its address, one more
number that the kernel may need, and its weights. What `Stats` counts is added up in as many zeros at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from ggez_kernels.sparsify import Sparsify, Stats

from .launch import (
    ADDRESS,
    DTYPES,
    FIELDS,
    OPTIONS,
    aligned,
    block_size,
    check,
    jit,
    launches,
    of_one_dtype,
    on,
    row,
    step,
    upload,
)
from .rounding import is_nonfinite, widen

EXTRA, WEIGHTS = tl.constexpr(1), tl.constexpr(2)  # in an output's row, after its ADDRESS


@dataclass(frozen=True)
class Call:
    inputs: Sequence[torch.Tensor]
    outs: Sequence[torch.Tensor]
    has_base: bool
    step: int
    start: int
    table: torch.Tensor
    launches: Sequence[tuple[int, int, int, bool]]
    sums: torch.Tensor
    """float32[programs, models]: sums of squared deltas."""

    @property
    def counts(self) -> torch.Tensor:
        return self.table[-len(self.inputs) - len(self.outs) :]

    def run(self, kernel: Any, **constants: bool) -> None:
        dtype = self.inputs[0].dtype
        with on(self.table.device):
            for begin, end, programs, wide in self.launches:
                kernel[(programs,)](
                    self.table,
                    self.counts,
                    self.sums,
                    begin,
                    end,
                    self.start,
                    len(self.inputs) - self.has_base,
                    len(self.outs),
                    DTYPE=DTYPES[dtype],
                    OUT=DTYPES[self.outs[0].dtype],
                    STEP=self.step,
                    ALIGNED=wide,
                    BLOCK=block_size(dtype),
                    **constants,
                    **OPTIONS,
                )

    def stats(self) -> list[Stats]:
        """The statistics per output, as tensors that hold them once the device gets there."""
        squares: Any = self.sums.sum(0, dtype=torch.float64).unbind()
        nonfinite: Any = self.counts.unbind()
        inputs = nonfinite[: len(self.inputs)]
        return [Stats(inputs, nonfinite_out, squares) for nonfinite_out in nonfinite[len(self.inputs) :]]


def prepare(
    outs: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    sparsify: Sequence[Sparsify | None] | None,
    start: int,
    out_rows: Sequence[Sequence[int]],
) -> Call:
    """Check the arrays of a call and write its table; `out_rows` have everything but the address."""
    named = {f"models[{k}]": model for k, model in enumerate(models)}
    if base is not None:
        named["base"] = base
    check(named | {f"outs[{r}]" if len(outs) > 1 else "out": out for r, out in enumerate(outs)})
    if sparsify is not None:
        if len(sparsify) != len(models):
            raise ValueError(f"{len(models)} models need {len(models)} sparsifiers, found {len(sparsify)}")
        if base is None:
            raise ValueError("a sparsifier acts on deltas, and needs a base")
    inputs = of_one_dtype([*([] if base is None else [base]), *models])
    hows = [*([] if base is None else [None]), *(sparsify or [None] * len(models))]
    plan = list(launches(models[0].numel(), block_size(inputs[0].dtype), aligned([*inputs, *outs])))
    device = models[0].device
    table = [number for tensor, how in zip(inputs, hows, strict=True) for number in row(tensor, how)]
    for out, rest in zip(outs, out_rows, strict=True):
        table += [out.data_ptr(), *rest]
    table += [0] * (len(inputs) + len(outs))
    programs = sum(programs for _, _, programs, _ in plan) if base is not None else 0
    sums = torch.empty(programs, len(models), dtype=torch.float32, device=device)
    return Call(inputs, outs, base is not None, step(sparsify), start, upload(table, device), plan, sums)


def check_weights(models: Sequence[torch.Tensor], weights: Sequence[float]) -> None:
    if not models:
        raise ValueError("at least one model is needed")
    if len(weights) != len(models):
        raise ValueError(f"{len(models)} models need {len(models)} weights, found {len(weights)}")


@jit
def recount(
    suspicious: tl.tensor,
    table: tl.tensor,
    counts: tl.tensor,
    inputs: tl.tensor,
    offsets: tl.tensor,
    exists: tl.tensor,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Count the NaN and infinite elements of every input, if there may be one: they are read again for it.

    There is one if a sum of squared deltas is not finite or, without a base, if an output is not.
    """
    if suspicious:
        for i in range(inputs):
            x = widen(tl.load(table + i * FIELDS + ADDRESS), offsets, exists, DTYPE, ALIGNED)
            bad = tl.sum(is_nonfinite(x).to(tl.int64), 0)
            tl.atomic_add(counts + i, bad, sem="relaxed")


@jit
def add_to_base(base: tl.tensor, mixed: tl.tensor) -> tl.tensor:
    """base + mixed, but base itself, sign of zero included, where nothing is added."""
    return tl.where(mixed == 0, base, base + mixed)
