"""Counting magnitudes on a GPU: the integers of the CPU's kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from kernel_inputs import BF16, F16, F32, Array, keys, make

from ggez_kernels.cpu import threshold as cpu
from ggez_kernels.gpu import threshold as gpu
from ggez_kernels.reference.rounding import tensor
from ggez_kernels.sparsify import NAN_KEY

KEYS = 1 << 31
INFINITY_KEY = 0x7F800000
SIZES = (0, 1, 15, 16, 17, 4097)
DTYPES = (BF16, F16, F32)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN and huge integers, so that nothing can be right by what was left lying about."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def near(key: int, width: int) -> tuple[int, int]:
    low = max(0, min(key - width // 2, KEYS - width))
    return low, low + width


@pytest.mark.parametrize("flavour", ["plain", "special", "nonfinite"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("base_dtype", "dtype"), [(d, d) for d in DTYPES] + [(BF16, F32), (F16, BF16)])
def test_counts_are_those_of_the_cpu(base_dtype: Any, dtype: Any, size: int, flavour: str) -> None:
    rng = np.random.default_rng(size)
    base = make(rng, size, base_dtype, flavour)
    model = make(rng, size, dtype, flavour, base)
    key = keys(base, model)
    some = int(key[size // 2]) if size else 0
    for low, high, shift in (
        (0, KEYS, 20),  # the digits of a radix selection
        (*near(some, 1 << 20), 9),
        (*near(some, 1 << 9), 0),
        (0, KEYS, 16),  # more bins than a program has counters
        (some, some + 1, 0),
        (some, KEYS, 21),
        (INFINITY_KEY, NAN_KEY + 1, 12),
    ):
        found = gpu.histogram(tensor(base), tensor(model), low=low, high=high, shift=shift)
        assert found.dtype == np.int64
        assert found.tolist() == cpu.histogram(base, model, low=low, high=high, shift=shift).tolist()
    for threshold in {0, NAN_KEY, INFINITY_KEY, KEYS - 1, some}:
        check_ties(base, model, threshold)


def check_ties(base: Array, model: Array, threshold: int) -> None:
    places = np.flatnonzero(keys(base, model) == threshold)
    assert gpu.ties(tensor(base), tensor(model), threshold) == places.size
    for n in {0, places.size // 3, places.size - 1} - {-1}:
        if n < places.size:
            assert gpu.nth_tie(tensor(base), tensor(model), threshold, n) == places[n]
    for n in (-1, places.size):
        with pytest.raises(IndexError, match=f"no element {n} "):
            gpu.nth_tie(tensor(base), tensor(model), threshold, n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("size", [5, 4096, 5003])
def test_what_lies_around_a_tile_is_not_counted(dtype: Any, offset: int, size: int) -> None:
    """Aligned or not: everywhere around it the delta is 2, within it 1."""
    model = np.full(offset + size + 64, 2, dtype)
    model[offset : offset + size] = 1
    base = np.zeros_like(model)
    b, x = (tensor(array)[offset : offset + size] for array in (base, model))
    one, two = 127 << 23, 128 << 23  # the bits of 1.0 and 2.0
    assert gpu.histogram(b, x, low=one, high=one + 4).tolist() == [size, 0, 0, 0, 0]
    assert gpu.histogram(b, x, low=0, high=one, shift=20).tolist()[-1] == size
    assert gpu.ties(b, x, two) == 0
    assert gpu.ties(b, x, one) == size
    assert gpu.nth_tie(b, x, one, size - 1) == size - 1


def test_every_nan_has_the_same_key() -> None:
    bits = np.array([0x7FC0, 0x7FFF, 0xFFFF, 0x7F81, 0xFF81, 0x7F80, 0xFF80, 0x7F7F], np.uint16)
    model, base = tensor(bits.view(BF16)), torch.zeros(8, dtype=torch.bfloat16)
    assert gpu.ties(base, model, NAN_KEY) == 5
    assert gpu.nth_tie(base, model, NAN_KEY, 4) == 4
    assert gpu.histogram(base, model, low=INFINITY_KEY, high=INFINITY_KEY + 2).tolist() == [2, 0, 5]


def test_a_program_counts_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    size = 4 * gpu.BLOCK + 777
    base = make(rng, size, BF16, "special")
    model = make(rng, size, BF16, "special", base)
    monkeypatch.setattr(gpu, "MOST_PROGRAMS", 3)
    for shift in (16, 20, 23):
        found = gpu.histogram(tensor(base), tensor(model), low=0, high=KEYS, shift=shift)
        assert found.tolist() == cpu.histogram(base, model, low=0, high=KEYS, shift=shift).tolist()


@pytest.mark.parametrize("size", [17, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.2, 0.7, 1.0])
def test_radix_sweeps_select_what_a_sort_does(dtype: Any, size: int, density: float) -> None:
    rng = np.random.default_rng(5)
    base = make(rng, size, dtype, "special")
    model = make(rng, size, dtype, "special", base)
    k = max(1, int(density * size))
    low, high, need = 0, KEYS, k
    while high - low > 1:
        bits = (high - low - 1).bit_length()
        shift = max(0, bits - gpu.COUNTING.digit_bits)
        counts = gpu.histogram(tensor(base), tensor(model), low=low, high=high, shift=shift)[:-1]
        from_top = np.cumsum(counts[::-1])
        place = int(np.searchsorted(from_top, need))
        need -= int(from_top[place] - counts[::-1][place])
        low += (len(counts) - 1 - place) << shift
        high = low + (1 << shift)
    last = gpu.nth_tie(tensor(base), tensor(model), low, need - 1)
    key = keys(base, model).astype(np.int64)
    kept = np.flatnonzero((key > low) | ((key == low) & (np.arange(size) <= last)))
    assert kept.tolist() == np.sort(np.argsort(-key, kind="stable")[:k]).tolist()


@pytest.mark.parametrize(("low", "high", "shift"), [(5, 5, 0), (-1, 4, 0), (0, KEYS + 1, 0), (0, 4, 31), (0, 4, -1)])
def test_keys_that_do_not_exist_are_refused(low: int, high: int, shift: int) -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="31 bits"):
        gpu.histogram(one, one, low=low, high=high, shift=shift)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (torch.ones(4, dtype=torch.float64), TypeError, "model has dtype torch.float64"),
        (torch.ones(4, dtype=torch.int32), TypeError, "model has dtype torch.int32"),
        (torch.ones(5), ValueError, "model has 5 elements, base has 4"),
        (torch.ones(8)[::2], ValueError, "model must be contiguous"),
        (torch.ones(4, device="meta"), ValueError, "model is on meta, base on cpu"),
    ],
)
def test_wrong_tensors_are_refused_by_name(wrong: torch.Tensor, error: type[Exception], words: str) -> None:
    base = torch.ones(4)
    calls: list[Any] = [
        lambda: gpu.histogram(base, wrong, low=0, high=4),
        lambda: gpu.ties(base, wrong, 0),
        lambda: gpu.nth_tie(base, wrong, 0, 0),
    ]
    for call in calls:
        with pytest.raises(error, match=words):
            call()
