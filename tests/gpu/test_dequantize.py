"""8-bit floats on a GPU: every code, every kind of scale, as torch widens them."""

from __future__ import annotations

import pytest
import torch

from ggez_kernels.gpu.dequantize import dequantize as on_gpu
from ggez_kernels.reference.dequantize import dequantize as definition

OUTS = (torch.bfloat16, torch.float16, torch.float32)


def codes(dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    """Every one of the 256 codes, over and over."""
    return torch.arange(rows * columns).to(torch.uint8).reshape(rows, columns).view(dtype)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    nan = expected.isnan()
    integers = torch.int32 if found.dtype == torch.float32 else torch.int16
    return bool((found.isnan() == nan).all() and torch.equal(found.view(integers)[~nan], expected.view(integers)[~nan]))


@pytest.mark.parametrize("out_dtype", OUTS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    ("rows", "columns", "scales"),
    [(1, 256, (1,)), (3, 97, ()), (16, 64, (2, 4)), (5, 130, (5, 5)), (129, 20, (2, 1)), (0, 4, ())],
)
def test_the_bits_of_the_definition(
    rows: int, columns: int, scales: tuple[int, ...], dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    quantized = codes(dtype, rows, columns)
    scale = torch.rand(scales, generator=torch.Generator().manual_seed(0)) + 0.01
    found, expected = (torch.full((rows, columns), torch.nan, dtype=out_dtype) for _ in range(2))
    definition(expected, quantized, scale)
    on_gpu(found, quantized, scale)
    assert same_bits(found, expected)


def test_a_scale_reaches_its_block_and_no_other() -> None:
    ones = torch.ones(4, 6).to(torch.float8_e4m3fn)
    out = torch.empty(4, 6)
    definition(out, ones, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert out.tolist() == [[1, 1, 2, 2, 3, 3]] * 2 + [[4, 4, 5, 5, 6, 6]] * 2


@pytest.mark.parametrize("function", [definition, on_gpu])
@pytest.mark.parametrize(
    ("out", "quantized", "scale", "said"),
    [
        (torch.empty(4), torch.empty(4), torch.ones(1), "quantized has dtype torch.float32"),
        (torch.empty(4).double(), codes(torch.float8_e5m2, 1, 4)[0], torch.ones(1), "out has dtype"),
        (torch.empty(4), codes(torch.float8_e5m2, 1, 4)[0], torch.ones(1).half(), "scale has dtype"),
        (torch.empty(3), codes(torch.float8_e5m2, 1, 4)[0], torch.ones(1), "out has shape"),
        (torch.empty(4), codes(torch.float8_e5m2, 1, 4)[0], torch.ones(2), "needs a matrix"),
        (torch.empty(2, 9), codes(torch.float8_e5m2, 2, 9), torch.ones(1, 4), "into blocks"),
        (torch.empty(4, 2).t(), codes(torch.float8_e5m2, 2, 4), torch.ones(1), "out is not contiguous"),
    ],
)
def test_what_does_not_go_together_is_refused(
    function: object, out: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor, said: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        function(out, quantized, scale)  # type: ignore[operator]
