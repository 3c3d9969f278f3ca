"""Gram sums: right against float64, the definition's bytes, and the same whatever the tiles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import DTYPES, Array, Case, as_bytes, cases, make, widened, work_dtype

from ggez_kernels.cpu.gram import gram
from ggez_kernels.reference.gram import gram as definition
from ggez_kernels.sparsify import CHUNK

LARGE = (1, 1023, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 4099)


def total(partials: list[Array]) -> list[float]:
    """The entries of the Gram matrix from partial sums."""
    chunks = np.concatenate(partials)
    return [math.fsum(column) for column in chunks.reshape(len(chunks), -1).T]


@settings(max_examples=60, deadline=None)
@given(cases(counts=(1, 2, 3), sizes=(0, *LARGE), thin=False))
def test_compiled_kernel_gives_the_bytes_of_the_definition(case: Case) -> None:
    with np.errstate(all="ignore"):
        found = gram(case.models, case.base, start=0)
        expected = definition(case.models, case.base, start=0)
    assert found.shape == expected.shape == (-(-case.models[0].size // CHUNK), len(case.models), len(case.models))
    nan = np.isnan(expected)
    assert (np.isnan(found) == nan).all()
    assert as_bytes(found[~nan]) == as_bytes(expected[~nan])


@settings(max_examples=25, deadline=None)
@given(cases(counts=(1, 2, 8), sizes=LARGE, flavours=("plain",), thin=False))
def test_sums_are_right(case: Case) -> None:
    work = work_dtype(case)
    rows = [widened(model, work) for model in case.models]
    if case.base is not None:
        rows = [row - widened(case.base, work) for row in rows]
    doubles = [row.astype(np.float64) for row in rows]
    expected = np.array([[math.fsum((a * b).tolist()) for a in doubles] for b in doubles])
    found = np.array(total([gram(case.models, case.base, start=0)])).reshape(expected.shape)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert (np.abs(found - expected) <= 1e-12 * scale).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.sets(st.integers(1, 4), max_size=3), st.sampled_from(DTYPES))
def test_tiles_do_not_matter(seed: int, cuts: set[int], dtype: Any) -> None:
    size = 4 * CHUNK + 12345
    rng = np.random.default_rng(seed)
    base = make(rng, size, dtype, "plain")
    models = [make(rng, size, dtype, "plain", base) for _ in range(2)]
    edges = [0, *(c * CHUNK for c in sorted(cuts)), size]
    parts = [
        gram([model[begin:end] for model in models], base[begin:end], start=begin)
        for begin, end in zip(edges, edges[1:], strict=False)
    ]
    assert total(parts[::-1]) == total([gram(models, base, start=0)])
    assert as_bytes(np.concatenate(parts)) == as_bytes(gram(models, base, start=0))


@pytest.mark.parametrize("kernel", [gram, definition])
def test_a_start_inside_a_chunk_is_refused(kernel: Any) -> None:
    with pytest.raises(ValueError, match="multiple"):
        kernel([np.ones(4, np.float32)], start=4)
