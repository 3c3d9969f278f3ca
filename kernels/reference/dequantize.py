"""8-bit floats with scales, as quantised checkpoints store them, to floats that can be merged."""

from __future__ import annotations

import torch

QUANTIZED = (torch.float8_e4m3fn, torch.float8_e5m2)


def dequantize(out: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor) -> None:
    """out = float32(quantized) * scale, rounded once to `out`.

    quantized: float8_e4m3fn or float8_e5m2; out: bfloat16, float16 or float32 of the same shape. scale: float32 of one
    element, or, for matrices [R, C], one per block: [R / r, C / c] (rounded up) for blocks of r by c elements, which
    are the smallest powers of two that are enough (128 by 128 in DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
    """
    rows, columns, block_rows, block_columns = check(out, quantized, scale)
    value = quantized.to(torch.float32).reshape(rows, columns)
    row = torch.arange(rows, device=value.device) // block_rows
    column = torch.arange(columns, device=value.device) // block_columns
    table = scale.reshape(scale.shape if scale.dim() == 2 else (1, 1))
    out.copy_((value * table[row][:, column]).reshape(out.shape))


def check(out: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor) -> tuple[int, int, int, int]:
    """Rows, columns, and rows and columns of a block; TypeError or ValueError by name for what does not go together."""
    if quantized.dtype not in QUANTIZED:
        raise TypeError(f"quantized has dtype {quantized.dtype}, expected one of {', '.join(map(str, QUANTIZED))}")
    if out.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"out has dtype {out.dtype}, expected bfloat16, float16 or float32")
    if scale.dtype != torch.float32:
        raise TypeError(f"scale has dtype {scale.dtype}, expected float32")
    for name, tensor in (("out", out), ("quantized", quantized), ("scale", scale)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
        if tensor.device != quantized.device:
            raise ValueError(f"{name} is on {tensor.device}, quantized on {quantized.device}")
    if out.shape != quantized.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, quantized {tuple(quantized.shape)}")
    if scale.numel() == 1:
        return 1, quantized.numel(), 1, max(1, quantized.numel())
    if quantized.dim() != 2 or scale.dim() != 2:
        raise ValueError(f"a scale of shape {tuple(scale.shape)} needs a matrix, found {tuple(quantized.shape)}")
    rows, columns = quantized.shape
    blocks = [_block(n, parts) for n, parts in zip((rows, columns), scale.shape, strict=True)]
    if 0 in blocks:
        raise ValueError(f"a scale of shape {tuple(scale.shape)} does not cut {tuple(quantized.shape)} into blocks")
    return rows, columns, blocks[0], blocks[1]


def _block(n: int, parts: int) -> int:
    """The smallest power of two of which `parts` cover n; 0 if there is none with exactly so many."""
    size = 1
    while -(-n // size) > parts:
        size *= 2
    return size if -(-n // size) == parts else 0
