"""L1 sums of sparsified deltas on a GPU: the CPU's bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from kernel_inputs import BF16, F16, F32, keys, make

from ggez_kernels.cpu import drop as cpu
from ggez_kernels.gpu import drop as gpu
from ggez_kernels.reference.rounding import tensor
from ggez_kernels.sparsify import CHUNK, Sparsify

DTYPES = (BF16, F16, F32)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that nothing can be right by what was left lying about."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def sparsifiers(threshold: int, start: int, size: int) -> list[Sparsify]:
    seed = 0xFEDCBA9876543210
    return [
        Sparsify(),
        Sparsify(rescale=3.0),
        Sparsify(threshold=threshold, last=start + size // 2),
        Sparsify(threshold=threshold, last=-1, rescale=2.0),
        Sparsify(threshold=0x7FFFFFFF),
        Sparsify(keep=0.3, seed=seed),
        Sparsify(keep=0.0),
        Sparsify(threshold=threshold, keep=0.9, seed=seed, rescale=1.1),
    ]


def assert_same(size: int, dtypes: tuple[Any, Any], flavour: str, start: int) -> None:
    rng = np.random.default_rng(size)
    base = make(rng, size, dtypes[0], flavour)
    model = make(rng, size, dtypes[1], flavour, base)
    threshold = int(np.median(keys(base, model))) if size else 1
    for how in sparsifiers(threshold, start, size):
        found = gpu.l1(tensor(base), tensor(model), how, start=start)
        expected = cpu.l1(base, model, how, start=start)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.dtype == np.float64
            assert np.array_equal(mine, theirs, equal_nan=True), how


@pytest.mark.parametrize("start", [0, (1 << 18) * CHUNK])
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4097])
@pytest.mark.parametrize("dtypes", [*((d, d) for d in DTYPES), (F16, BF16)], ids=str)
def test_bits_are_those_of_the_cpu(dtypes: tuple[Any, Any], size: int, start: int) -> None:
    for flavour in ("plain", "special", "nonfinite"):
        assert_same(size, dtypes, flavour, start)


def test_chunks() -> None:
    assert_same(CHUNK + 4099, (BF16, BF16), "special", 2 * CHUNK)


def test_sums_are_right() -> None:
    rng = np.random.default_rng(8)
    base, model = make(rng, 5003, F32, "plain"), make(rng, 5003, F32, "plain")
    how = Sparsify(threshold=int(np.median(keys(base, model))), keep=0.7, seed=1, rescale=3.0)
    delta = np.abs((model - base).astype(np.float64))
    kept = delta * (keys(base, model) >= how.threshold) * cpu.keep_mask(how, delta.size)
    found = gpu.l1(tensor(base), tensor(model), how, start=0)
    for sums, expected in zip(found, (delta, kept), strict=True):
        assert math.fsum(sums) == pytest.approx(math.fsum(expected), rel=1e-12)


@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("size", [5, 4096, 5003])
def test_what_lies_around_a_tile_is_not_added(offset: int, size: int) -> None:
    whole = np.full(offset + size + 2048, np.nan, BF16)
    whole[offset : offset + size] = 1
    ones = tensor(whole)[offset : offset + size]
    before, after = gpu.l1(torch.zeros_like(ones), ones, Sparsify(threshold=1), start=0)
    assert before.tolist() == after.tolist() == [size]


def test_wrong_arguments_are_refused_by_name() -> None:
    one = torch.ones(4)
    with pytest.raises(ValueError, match=f"multiple of {CHUNK}, found 1"):
        gpu.l1(one, one, Sparsify(), start=1)
    with pytest.raises(TypeError, match=r"base has dtype torch\.float64"):
        gpu.l1(one.double(), one, Sparsify(), start=0)
    with pytest.raises(ValueError, match="model has 3 elements, base has 4"):
        gpu.l1(one, one[:3], Sparsify(), start=0)
