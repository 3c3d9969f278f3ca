"""8-bit floats with scales, as quantised checkpoints store them, to floats that can be merged."""

from __future__ import annotations

import torch
import triton.language as tl

from ggez_kernels.reference.dequantize import check

from .launch import DTYPES, OPTIONS, aligned, block_size, elements, jit, launches, on
from .rounding import narrow, pointer


def dequantize(out: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor) -> None:
    """out = float32(quantized) * scale, rounded once; see `ggez_kernels.reference.dequantize` for the definition.

    The bits are taken apart, so that GPUs that know no 8-bit floats do the same.
    """
    _, columns, block_rows, block_columns = check(out, quantized, scale)
    count = torch.zeros(1, dtype=torch.int64, device=out.device)
    with on(out.device):
        for begin, end, programs, wide in launches(out.numel(), block_size(torch.uint8), aligned([out, quantized])):
            _dequantize[(programs,)](
                out.data_ptr(),
                quantized.data_ptr(),
                scale,
                count,
                begin,
                end,
                columns,
                block_rows.bit_length() - 1,
                block_columns.bit_length() - 1,
                -(-columns // block_columns),
                OUT=DTYPES[out.dtype],
                E4M3=quantized.dtype == torch.float8_e4m3fn,
                SCALES=scale.numel() > 1,
                ALIGNED=wide,
                BLOCK=block_size(torch.uint8),
                **OPTIONS,
            )


@jit
def _dequantize(
    out: tl.int64,
    quantized: tl.int64,
    scale: tl.tensor,
    count: tl.tensor,
    begin: tl.int64,
    end: tl.int64,
    columns: tl.int64,
    row_shift: tl.int32,
    column_shift: tl.int32,
    scales_per_row: tl.int64,
    OUT: tl.constexpr,
    E4M3: tl.constexpr,
    SCALES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    first, lane, exists = elements(begin, end, ALIGNED, BLOCK)
    offsets = first + lane
    bits = tl.load(pointer(quantized, tl.uint8, ALIGNED) + offsets, mask=exists, other=0).to(tl.int16)
    if E4M3:  # as a half the exponent is 8 too small; all ones is NaN, and nothing infinite
        sign = (bits & 0x80) << 8
        value = (((bits & 0x7F) << 7) | sign).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        value = tl.where((bits & 0x7F) == 0x7F, float("nan"), value)
    else:  # the upper half of a half
        value = (bits << 8).to(tl.float16, bitcast=True).to(tl.float32)
    if SCALES:
        row = offsets // columns
        place = (row >> row_shift) * scales_per_row + ((offsets - row * columns) >> column_shift)
        value *= tl.load(scale + place, mask=exists, other=1.0)
    else:
        value *= tl.load(scale)
    narrow(value, out, offsets, exists, count, OUT, ALIGNED)
