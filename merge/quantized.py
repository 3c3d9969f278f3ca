"""8-bit weights with scales, as fp8 checkpoints store them, as weights that can be merged."""

from __future__ import annotations

import torch

from ggez_merge.arithmetic import dequantizer
from ggez_merge.errors import Problem, Refused


def dequantize(
    quantized: torch.Tensor, scale: torch.Tensor, *, out_dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """What 8-bit floats and their scales stand for.

        out = float32(quantized) * scale, rounded once to `out_dtype`

    quantized: float8_e4m3fn or float8_e5m2, of any shape. scale: float32, what to multiply by (checkpoints call it
    `weight_scale_inv` or `weight_scale`); one element for all, or, for a matrix [R, C], one for each block: [R / r,
    C / c] (rounded up) for blocks of r by c elements, powers of two, as the 128 by 128 of DeepSeek-V3 (arXiv
    2412.19437, section 3.3.2), or whole rows: [R, 1]. out_dtype: bfloat16, float16 or float32. On the CPU or on a CUDA
    device, to the same bytes. Raises TypeError for other dtypes, Refused for what does not go together.
    """
    out = torch.empty(quantized.shape, dtype=out_dtype, device=quantized.device)
    try:
        dequantizer(str(out.device))(out, quantized.detach(), scale.detach())
    except ValueError as error:
        remedy = "pass contiguous tensors on one device, and a scale of one element or one for each block of a matrix"
        raise Refused(Problem(f"these cannot be dequantized: {error}", remedy=remedy)) from None
    return out
