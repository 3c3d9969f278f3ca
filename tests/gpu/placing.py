"""numpy arrays as the tensors that the GPU's kernels take, at addresses to choose, and kernels run on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from kernel_inputs import Array, Case

from ggez_kernels.reference.rounding import tensor
from ggez_kernels.sparsify import Stats

PAGE = 64  # bytes: what is placed at a multiple of it can be accessed as widely as can be


def place(array: Array, shift: int = 0) -> tuple[torch.Tensor, Any]:
    """A copy `shift` elements behind a multiple of PAGE, and a question whether its surroundings are untouched."""
    whole = np.full(array.nbytes + 3 * PAGE, 0xA5, np.uint8)
    begin = -whole.ctypes.data % PAGE + PAGE + shift * array.itemsize
    inside = whole[begin : begin + array.nbytes].view(array.dtype)
    inside[:] = array

    def untouched() -> bool:
        return bool((whole[:begin] == 0xA5).all() and (whole[begin + array.nbytes :] == 0xA5).all())

    return tensor(inside), untouched


def poisoned(size: int, dtype: np.dtype[Any], shift: int = 0) -> tuple[torch.Tensor, Any]:
    return place(np.full(size, np.nan, dtype), shift)


def on_gpu(kernel: Any, case: Case, shift: int = 0, **options: Any) -> tuple[Array, Stats]:
    """The output and the statistics, waited for; nothing beside the output has changed."""
    arrays = [array for array in (case.base, *case.models) if array is not None]
    placed = [place(array, shift) for array in arrays]
    inputs = [each for each, _ in placed]
    out, untouched = poisoned(arrays[0].size, case.out_dtype, shift)
    base = None if case.base is None else inputs[0]
    models = inputs[len(inputs) - len(case.models) :]
    stats = kernel(out, base, models, case.weights, sparsify=case.sparsify, start=case.start, **options)
    assert untouched() and all(each() for _, each in placed)
    for array, each in zip(arrays, inputs, strict=True):
        assert each.view(torch.uint8).numpy().tobytes() == array.tobytes()
    return as_array(out, case.out_dtype), waited_for(stats)


def as_array(out: torch.Tensor, dtype: np.dtype[Any]) -> Array:
    array: Array = out.view(torch.uint8).numpy().view(dtype)
    return array


def waited_for(stats: Stats) -> Stats:
    every = (*stats.nonfinite, stats.nonfinite_out, *stats.delta_squares)
    assert all(isinstance(number, torch.Tensor) and number.dim() == 0 for number in every)
    assert {number.dtype for number in stats.delta_squares} == {torch.float64}
    return Stats(
        tuple(int(number) for number in stats.nonfinite),
        int(stats.nonfinite_out),
        tuple(float(number) for number in stats.delta_squares),
    )


def on_cpu(kernel: Any, case: Case, **options: Any) -> tuple[Array, Stats]:
    out = np.empty(case.models[0].size, case.out_dtype)
    with np.errstate(all="ignore"):
        return out, kernel(
            out, case.base, case.models, case.weights, sparsify=case.sparsify, start=case.start, **options
        )


def assert_same(gpu: Any, cpu: Any, case: Case, shift: int = 0, **options: Any) -> None:
    """The same bytes and counts; sums of squares, whose order is not the CPU's, to their accuracy."""
    found, stats = on_gpu(gpu, case, shift, **options)
    expected, wanted = on_cpu(cpu, case, **options)
    assert found.tobytes() == expected.tobytes()
    assert (stats.nonfinite, stats.nonfinite_out) == (wanted.nonfinite, wanted.nonfinite_out)
    assert np.allclose(stats.delta_squares, wanted.delta_squares, rtol=1e-5, atol=0, equal_nan=True)
