"""Gram sums on a GPU: the CPU's bits, whatever the tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from kernel_inputs import BF16, F16, F32, Array, as_bytes, make

from ggez_kernels.cpu.gram import gram as cpu_gram
from ggez_kernels.gpu.gram import gram
from ggez_kernels.reference.rounding import tensor
from ggez_kernels.sparsify import CHUNK

DTYPES = (BF16, F16, F32)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that nothing can be right by what was left lying about."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def arrays(size: int, count: int, dtypes: list[Any], flavour: str) -> tuple[Array, list[Array]]:
    rng = np.random.default_rng(size + count)
    base = make(rng, size, dtypes[0], flavour)
    return base, [make(rng, size, dtypes[(k + 1) % len(dtypes)], flavour, base) for k in range(count)]


def assert_same(models: list[Array], base: Array | None, start: int = 0) -> None:
    found = gram([tensor(model) for model in models], None if base is None else tensor(base), start=start)
    expected = cpu_gram(models, base, start=start)
    assert found.dtype == np.float64
    assert found.shape == expected.shape
    nan = np.isnan(expected)
    assert (np.isnan(found) == nan).all()
    assert as_bytes(found[~nan]) == as_bytes(expected[~nan])


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4097])
@pytest.mark.parametrize("dtypes", [[BF16], [F16], [F32], [BF16, F16, F32]], ids=str)
def test_bits_are_those_of_the_cpu(dtypes: list[Any], size: int, with_base: bool) -> None:
    for flavour in ("plain", "special", "nonfinite"):
        base, models = arrays(size, 2, dtypes, flavour)
        assert_same(models, base if with_base else None)


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("count", [1, 3, 8, 17])
def test_any_number_of_models(count: int, with_base: bool) -> None:
    base, models = arrays(33, count, [BF16], "special")
    assert_same(models, base if with_base else None)


@pytest.mark.parametrize(("dtype", "size"), [(BF16, CHUNK - 1), (F32, CHUNK), (BF16, CHUNK + 16), (F16, CHUNK + 4099)])
def test_chunks(dtype: Any, size: int) -> None:
    base, (model,) = arrays(size, 1, [dtype], "plain")
    assert_same([model], base, start=3 * CHUNK)


def test_sums_are_right() -> None:
    _, models = arrays(4097, 2, [F32], "plain")
    rows = [model.astype(np.float64) for model in models]
    found = gram([tensor(model) for model in models], start=0)[0]
    for i in range(2):
        for j in range(2):
            right = math.fsum((rows[i] * rows[j]).tolist())
            size = math.sqrt(math.fsum(rows[i] ** 2) * math.fsum(rows[j] ** 2))
            assert abs(found[i, j] - right) <= 1e-12 * size


@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("size", [5, 4096, 5003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_around_a_tile_is_not_added(dtype: Any, offset: int, size: int) -> None:
    whole = np.full(offset + size + 2048, np.nan, dtype)
    whole[offset : offset + size] = 1
    ones = tensor(whole)[offset : offset + size]
    assert gram([ones], start=0).tolist() == [[[size]]]
    assert gram([ones], ones, start=0).tolist() == [[[0]]]


def test_wrong_arguments_are_refused_by_name() -> None:
    one = torch.ones(4)
    with pytest.raises(ValueError, match=f"multiple of {CHUNK}, found 4"):
        gram([one], start=4)
    with pytest.raises(ValueError, match="at least one model"):
        gram([], one, start=0)
    with pytest.raises(TypeError, match=r"inputs\[1\] has dtype torch.float64"):
        gram([one, one.double()], start=0)
    with pytest.raises(ValueError, match=r"base has 3 elements, inputs\[0\] has 4"):
        gram([one], one[:3], start=0)
